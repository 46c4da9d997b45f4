"""A budget from the command line: what is plugged in is measured, chosen, tuned, drawn and reported."""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from commands import (
    INTERVALS,
    NUM_LAYERS,
    NUM_PROMPTS,
    PLUG_NAMES,
    assert_same_tensors,
    digests,
    kill,
    modified,
    ppcl,
    start_until,
    succeed,
)
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from ppcl.artifacts.costs import Overlap, Unit
from ppcl.artifacts.files import read_json
from ppcl.config import VARIANTS
from ppcl.surgery.plugboard import Plugboard, plug
from ppcl.variants.planner import total_saving

TEXT, FFN = [3, 5], [0, 5]  # block 5 loses both, so that savings have to add up within a block
PROJECTORS = [f"transformer_blocks.{name}" for name in ("0.ffn", "3.text", "5.ffn", "5.text")]
WIDTH = [f"width.transformer_blocks.{kind}={sets}".replace(" ", "") for kind, sets in (("text", TEXT), ("ffn", FFN))]
BUDGET = 0.6
STAGES = "stages=[depth,width,plan,finetune,export,generate,evaluate,report]"
# The stages before, or what reads them, without another training.
PLAN, FINETUNE = "stages=[plan]", "stages=[finetune]"


def load(path: Path) -> dict:
    return read_json(path, "The file")


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "finetuned" / "transformer" / "diffusion_pytorch_model.safetensors")


def savings(costs: dict, names: list[str], measure: str) -> float:
    """What `names` save together by the measurements of `costs.json`."""
    units = [Unit(**unit) for unit in costs["units"]]
    return total_saving(units, [Overlap(**pair) for pair in costs["overlaps"]], names, measure)


@pytest.fixture(scope="module")
def options(settings: list[str]) -> list[str]:
    """What every command here has in common; no stages, no budget, no folder."""
    return [
        *settings,
        "name=budget",
        INTERVALS,
        "width.source=given",
        *WIDTH,
        "width.steps=2",
        "width.num_batches=2",
        "finetune=tiny",
        "finetune.steps=4",
        "finetune.batch_size=4",
        "finetune.warmup_steps=1",
        "finetune.flow_weight=0.1",
        "finetune.ema_decay=0.5",
        f"generate.variants=[{','.join(VARIANTS)}]",
    ]


@pytest.fixture(scope="module")
def command(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [*options, f"paths.runs_dir={tmp_path_factory.mktemp('runs')}", f"budget.params={BUDGET}", STAGES]


@pytest.fixture(scope="module")
def planned(command: list[str]) -> Path:
    """The folder of a run under a budget. Read it, do not write."""
    succeed(*command)
    return Path(next(a for a in command if a.startswith("paths.runs_dir=")).partition("=")[2]) / "budget"


@pytest.fixture
def again(options: list[str], planned: Path, tmp_path: Path) -> list[str]:
    """The same options on a copy of that run, which may be changed."""
    shutil.copytree(planned, tmp_path / "budget")
    return [*options, f"paths.runs_dir={tmp_path}"]


@pytest.fixture(scope="module")
def board(teacher: Path, planned: Path) -> Plugboard:
    """That run's plugs in the teacher, to arrange and to count."""
    return plug(DiffusionPipeline.from_pretrained(teacher), planned / "plugs")


@pytest.fixture(scope="module")
def rows(planned: Path) -> dict[str, dict]:
    return {row["name"]: row for row in load(planned / "report" / "report.json")["variants"]}


def test_every_stage_leaves_its_artifacts(planned: Path) -> None:
    for path in (
        "plan/width.json",
        "plan/costs.json",
        "plan/choice.json",
        "plan/frontier.png",
        "finetuned/ppcl.json",
        "finetuned/transformer/config.json",
        "finetuned/transformer/diffusion_pytorch_model.safetensors",
        "export/model_index.json",
        "report/report.html",
    ):
        assert (planned / path).stat().st_size > 0, path
    for variant in VARIANTS:
        assert len(list((planned / "images" / "shapes" / variant).glob("[0-9]*.png"))) == NUM_PROMPTS
    assert not [path for path in planned.rglob("*") if path.name.endswith(".tmp")]
    assert not list(planned.rglob("*.ckpt"))


def test_report_tells_the_variants_apart(planned: Path, rows: dict[str, dict]) -> None:
    assert list(rows) == list(VARIANTS)
    choice = load(planned / "plan" / "choice.json")
    assert rows["ppcl-depth"]["projectors"] == rows["teacher"]["projectors"] == []
    assert rows["ppcl-width"]["students"] == PLUG_NAMES
    assert sorted(rows["ppcl-width"]["projectors"]) == PROJECTORS
    for name in ("ppcl-planned", "ppcl-finetuned"):
        assert sorted(rows[name]["students"] + rows[name]["projectors"]) == sorted(choice["plugged"])
    assert rows["ppcl-width"]["params"] < rows["ppcl-depth"]["params"] < rows["teacher"]["params"]
    assert rows["ppcl-finetuned"]["params"] == rows["ppcl-planned"]["params"]
    report = load(planned / "report" / "report.json")
    assert report["width"] == {"transformer_blocks": {"text": TEXT, "ffn": FFN}}
    assert report["choice"] == choice
    page = (planned / "report" / "report.html").read_text(encoding="utf-8")
    assert all(variant in page for variant in VARIANTS)


def test_the_plan_obeys_the_budget(planned: Path, rows: dict[str, dict]) -> None:
    """By the parameters of the model that comes out, not only by the plan's arithmetic."""
    choice = load(planned / "plan" / "choice.json")
    assert choice["budget"] == ["params", BUDGET, "velocity"]
    assert rows["ppcl-planned"]["params_ratio"] <= BUDGET
    assert rows["ppcl-planned"]["params"] == choice["params"]
    assert choice["params_ratio"] == pytest.approx(rows["ppcl-planned"]["params_ratio"])


def test_costs_name_every_plug_and_add_up(planned: Path, rows: dict[str, dict]) -> None:
    costs = load(planned / "plan" / "costs.json")
    units = {unit["name"]: unit for unit in costs["units"]}
    assert sorted(units) == sorted([*PLUG_NAMES, *PROJECTORS])
    assert costs["teacher"]["params"] == rows["teacher"]["params"]
    for unit in units.values():
        assert unit["savings"].keys() == {"params", "memory_gb", "latency_ratio"}
        assert unit["costs"].keys() == {"velocity", "loss"}
        assert unit["savings"]["params"] > 0
        assert unit["costs"]["loss"] > 0
    assert [pair["names"] for pair in costs["overlaps"]] == [["transformer_blocks.5.text", "transformer_blocks.5.ffn"]]
    everything = savings(costs, list(units), "params")
    assert rows["teacher"]["params"] - everything == rows["ppcl-width"]["params"]


@pytest.mark.parametrize("cost", ["velocity", "loss"])
def test_the_frontier_goes_from_nothing_to_everything(planned: Path, rows: dict[str, dict], cost: str) -> None:
    points = load(planned / "plan" / "costs.json")["frontier"][cost]
    params = [point["params"] for point in points]
    assert params == sorted(set(params), reverse=True)
    assert points[0]["plugged"] == []
    assert points[0]["velocity_error"] == 0
    assert points[0]["num_layers"] == NUM_LAYERS
    assert params[0] == rows["teacher"]["params"]
    assert sorted(points[-1]["plugged"]) == sorted([*PLUG_NAMES, *PROJECTORS])
    assert params[-1] == rows["ppcl-width"]["params"]
    assert all(point["velocity_error"] > 0 for point in points[1:])


def test_the_tuned_model_is_the_planned_one_with_other_weights(planned: Path, board: Plugboard) -> None:
    record = load(planned / "finetuned" / "ppcl.json")
    choice = load(planned / "plan" / "choice.json")
    assert sorted(record["plugged"]) == sorted(choice["plugged"])
    assert set(record["made_from"]["plugs"]) == set(choice["plugged"])
    start = board(*choice["plugged"]).standalone().state_dict()
    tuned = weights(planned)
    assert tuned.keys() == start.keys()
    assert all(value.isfinite().all() for value in tuned.values())
    changed = [key for key, value in tuned.items() if not torch.equal(value, start[key])]
    assert len(changed) > 0.9 * len(tuned)


def test_tuning_tells_and_records_what_it_gained(
    planned: Path, options: list[str], board: Plugboard, tmp_path: Path
) -> None:
    """The error before is that of the planned model, measured on the batches that plans are measured on."""
    for folder in ("plan", "plugs"):
        shutil.copytree(planned / folder, tmp_path / "budget" / folder)
    said = succeed(*options, f"paths.runs_dir={tmp_path}", f"budget.params={BUDGET}", FINETUNE).out
    record = load(tmp_path / "budget" / "finetuned" / "ppcl.json")
    errors = record["velocity_error"]
    assert f"held-out velocity error {errors['before']:.4f} -> {errors['after']:.4f}" in said
    assert errors == load(planned / "finetuned" / "ppcl.json")["velocity_error"]
    assert record["fingerprint"] == load(planned / "finetuned" / "ppcl.json")["fingerprint"]
    chosen = set(load(planned / "plan" / "choice.json")["plugged"])
    points = load(planned / "plan" / "costs.json")["frontier"]["velocity"]
    measured = [point["velocity_error"] for point in points if set(point["plugged"]) == chosen]
    assert all(errors["before"] == pytest.approx(value, rel=1e-4) for value in measured)


def test_export_takes_the_tuned_model(planned: Path) -> None:
    exported = load(planned / "export" / "ppcl.json")
    assert exported["variant"] == "ppcl-finetuned"
    assert exported["made_from"]["finetuned"] == load(planned / "finetuned" / "ppcl.json")["fingerprint"]
    found = load_file(planned / "export" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert_same_tensors(found, weights(planned))


def test_second_run_reuses_everything(planned: Path, command: list[str]) -> None:
    folders = [planned / name for name in ("plugs", "finetuned", "export", "images", "scores")]
    measured = [planned / "plan" / name for name in ("costs.json", "width.json")]
    before, times = modified(*folders), [path.stat().st_mtime_ns for path in measured]
    outcome = succeed(*command)
    for stage in ("depth", "width", "plan", "finetune", "export", "generate", "evaluate"):
        assert any(line.split()[:2] == [stage, "reused"] for line in outcome.out.splitlines()), stage
    assert outcome.out.count("generate  reused ") == len(VARIANTS)
    assert modified(*folders) == before
    assert [path.stat().st_mtime_ns for path in measured] == times


@pytest.mark.parametrize("name", ["params", "memory_gb", "latency_ratio"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_another_budget_is_served_from_the_same_measurements(
    again: list[str], board: Plugboard, tmp_path: Path, name: str, share: float
) -> None:
    """Whatever is asked for between the teacher and everything plugged in; nothing is measured again."""
    plan = tmp_path / "budget" / "plan"
    costs = load(plan / "costs.json")
    units = [*PLUG_NAMES, *PROJECTORS]
    whole = costs["teacher"].get(name, 1.0)
    if name == "latency_ratio":  # where noise may make a plug cost time
        most = max(1 - point["latency_ratio"] for point in costs["frontier"]["velocity"])
    else:
        most = savings(costs, units, name)
    target = max(whole - share * most, 1e-3)  # on a busy machine plugs may seem to save more than there is
    outcome = succeed(*again, f"budget.{name}={target / whole if name == 'params' else target}", PLAN)
    assert "plan  reused" in outcome.out
    after = load(plan / "costs.json")
    assert all(after[key] == costs[key] for key in ("teacher", "units", "overlaps", "frontier"))
    assert all(each in after["errors"] for each in costs["errors"])  # only errors of further sets are measured
    choice = load(plan / "choice.json")
    assert choice["budget"][0] == name
    assert choice[name] <= target * (1 + 1e-6)
    if name != "latency_ratio":
        assert len(choice["plugged"]) in {0.0: [0], 0.5: range(1, len(units)), 1.0: [len(units)]}[share]
    chosen = [unit for unit in costs["units"] if unit["name"] in choice["plugged"]]
    assert all(set(unit["needs"]) <= set(choice["plugged"]) for unit in chosen)
    transformer = board(*choice["plugged"]).transformer
    assert sum(parameter.numel() for parameter in transformer.parameters()) == choice["params"]


def test_one_training_serves_every_size(options: list[str], planned: Path, tmp_path: Path) -> None:
    """A sweep over budgets on the plugs of another run, which is only read; the teacher is drawn once."""
    before = modified(planned)
    sweep = [f"paths.runs_dir={tmp_path}", f"paths.base_run={planned}", "budget.params=0.7,0.8", STAGES]
    outcome = succeed("--multirun", *options, *sweep)
    assert modified(planned) == before
    sizes = []
    jobs = ["budget.params=0.7", "budget.params=0.8"]
    for job in jobs:
        run = tmp_path / "budget" / job
        assert not (run / "plugs").exists()
        choice = load(run / "plan" / "choice.json")
        tuned = load(run / "finetuned" / "ppcl.json")
        assert tuned["plugged"] == choice["plugged"]
        rows = {row["name"]: row for row in load(run / "report" / "report.json")["variants"]}
        assert rows["ppcl-finetuned"]["params"] == choice["params"]
        assert '<img alt="error of the planner\'s choices against size" src="data:image/png' in (
            run / "report" / "report.html"
        ).read_text(encoding="utf-8")
        sizes.append(choice["params_ratio"])
    assert sizes[0] <= 0.7 < sizes[1] <= 0.8
    assert outcome.out.count("teacher: 12 of 12 pictures drawn") == 1
    assert outcome.out.count(f"reused {tmp_path / 'cache' / 'images'}") == 1
    pictures = [digests(tmp_path / "budget" / job / "images" / "shapes" / "teacher") for job in jobs]
    assert pictures[0] == pictures[1] == digests(planned / "images" / "shapes" / "teacher")


def test_distillation_losses_may_be_the_cost(again: list[str], tmp_path: Path) -> None:
    succeed(*again, f"budget.params={BUDGET}", "budget.cost=loss", PLAN)
    choice = load(tmp_path / "budget" / "plan" / "choice.json")
    costs = load(tmp_path / "budget" / "plan" / "costs.json")
    losses = sum(unit["costs"]["loss"] for unit in costs["units"] if unit["name"] in choice["plugged"])
    assert choice["budget"] == ["params", BUDGET, "loss"]
    assert choice["predicted_error"] == pytest.approx(losses)


@pytest.mark.parametrize("budget", ["params=1", "params=1e12", "latency_ratio=1", "memory_gb=1000"])
def test_a_budget_larger_than_the_model_plugs_nothing_in(again: list[str], tmp_path: Path, budget: str) -> None:
    outcome = succeed(*again, f"budget.{budget}", PLAN)
    assert load(tmp_path / "budget" / "plan" / "choice.json")["plugged"] == []
    assert "nothing to plug in: the teacher fits the budget" in outcome.out


def test_the_frontier_is_printed_when_it_is_measured(planned: Path, again: list[str], tmp_path: Path) -> None:
    """Later only the choice, with what was reused and what was written."""
    (tmp_path / "budget" / "plan" / "costs.json").unlink()
    first = succeed(*again, f"budget.params={BUDGET}", PLAN).out
    assert "velocity error" in first
    again_said, other = (succeed(*again, f"budget.params={value}", PLAN).out for value in (BUDGET, 0.8))
    assert "plan  wrote" not in again_said
    assert again_said.count("plan  reused") == 2
    assert "choice.json and frontier.png" in again_said
    assert other.count("plan  wrote") == 1
    assert "velocity error" not in again_said + other


def test_measured_costs_of_another_setting_are_kept_or_replaced_as_the_sentence_says(
    again: list[str], tmp_path: Path
) -> None:
    budget, changed = f"budget.params={BUDGET}", "budget.num_batches=2"
    before = digests(tmp_path / "budget" / "plan")
    outcome = ppcl(*again, budget, changed, PLAN)
    assert outcome.code == 2
    assert "num_batches=4, now 2" in outcome.err
    advice = re.search(r"add (name=OTHER paths\.base_run=\S+) to measure beside them, or delete that file", outcome.err)
    assert advice, outcome.err
    succeed(*again, budget, changed, PLAN, *advice[1].split())
    assert (tmp_path / "OTHER" / "plan" / "costs.json").exists()
    assert digests(tmp_path / "budget" / "plan") == before
    (tmp_path / "budget" / "plan" / "costs.json").unlink()
    succeed(*again, budget, changed, PLAN)
    assert load(tmp_path / "budget" / "plan" / "costs.json")["made_from"]["num_batches"] == 2


@pytest.mark.parametrize("budget", ["budget.params=0.05", "budget.params=1000", "budget.memory_gb=1e-6"])
def test_a_budget_out_of_reach_names_the_least(again: list[str], tmp_path: Path, budget: str) -> None:
    before = digests(tmp_path / "budget")
    outcome = ppcl(*again, budget, PLAN)
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1, outcome.err
    name, value = budget.split("=")
    assert f"{name}={float(value):g} is out of reach" in outcome.err
    costs = load(tmp_path / "budget" / "plan" / "costs.json")
    measure = name.removeprefix("budget.")
    whole = costs["teacher"].get(measure, 1.0)
    if measure != "latency_ratio":  # where noise may make a plug cost time
        least = whole - savings(costs, [*PLUG_NAMES, *PROJECTORS], measure)
        written = f"{least / whole:.3f}" if measure == "params" else f"{least:.3g}"
        assert f"with every plug in, {written} " in outcome.err
    assert digests(tmp_path / "budget") == before


def test_another_budget_needs_a_plan_of_its_own(again: list[str], tmp_path: Path) -> None:
    before = digests(tmp_path / "budget")
    outcome = ppcl(*again, "budget.params=0.8", FINETUNE)
    assert outcome.code == 2
    assert "stages=[plan]" in outcome.err
    assert f"budget.params={BUDGET}" in outcome.err
    assert "budget.params=0.8" in outcome.err
    assert digests(tmp_path / "budget") == before


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("finetune.relative_update=0.5", "finetune.relative_update=0.01, now 0.5"),
        ("finetune.ema_decay=0", "finetune.ema_decay=0.5, now 0.0"),
        ("finetune.optimizer=adamw", "finetune.lr=None, now 0.0"),  # the optimiser decides which rates are set
    ],
)
def test_changed_finetune_setting_is_refused(again: list[str], tmp_path: Path, change: str, key: str) -> None:
    before = digests(tmp_path / "budget")
    outcome = ppcl(*again, f"budget.params={BUDGET}", STAGES, change)
    assert outcome.code == 2
    assert key in outcome.err
    assert "name=" in outcome.err
    assert "  plan  " not in outcome.out  # refused before the first stage
    assert digests(tmp_path / "budget") == before


def test_a_tuned_model_of_another_plan_is_not_passed_off(again: list[str], tmp_path: Path) -> None:
    """Tuned under one budget, then planned for another: drawing the old model as the new one would be a lie."""
    run = tmp_path / "budget"
    for name in ("images", "scores", "export", "report"):
        shutil.rmtree(run / name)
    everything = load(run / "plan" / "costs.json")["frontier"]["velocity"][-1]["params_ratio"]
    outcome = ppcl(
        *again, f"budget.params={everything + 1e-6}", "stages=[plan,export]", "export.variant=ppcl-finetuned"
    )
    assert outcome.code == 2, outcome.out
    assert "finetune" in outcome.err
    assert not (run / "export").exists()


def test_what_was_planned_and_tuned_is_drawn_without_saying_the_budget(
    again: list[str], planned: Path, tmp_path: Path
) -> None:
    """Nor the width sets: the choice and the record of the tuned model name the plugs."""
    plain = [option for option in again if not option.startswith("width.")]
    variants = "generate.variants=[teacher,ppcl-planned,ppcl-finetuned]"
    said = succeed(*plain, "stages=[generate,evaluate]", variants).out
    assert said.count("generate  reused ") == 3
    assert "evaluate  reused" in said
    default = succeed(*plain, "generate.variants=null", "stages=[generate]").out
    assert f"teacher, removed, ppcl-finetuned: in {tmp_path / 'budget' / 'images' / 'shapes'}" in default
    assert default.count("generate  reused ") == 3
    shutil.rmtree(tmp_path / "budget" / "finetuned")
    assert "teacher, removed, ppcl-planned: in" in succeed(*plain, "generate.variants=null", "stages=[generate]").out


def test_the_base_runs_choice_is_drawn(options: list[str], planned: Path, tmp_path: Path) -> None:
    based = [*options, f"paths.runs_dir={tmp_path}", f"paths.base_run={planned}", "stages=[generate]"]
    own = ["name=based", "generate.variants=[ppcl-planned]", "benchmark.prompts_per_category=1"]
    succeed(*based, *own)
    succeed(*based, *own, f"budget.params={BUDGET}")
    (manifest,) = (tmp_path / "based" / "images").glob("shapes/ppcl-planned*/manifest.json")
    drawn = load(planned / "images" / "shapes" / "ppcl-planned" / "manifest.json")["made_from"]
    assert load(manifest)["made_from"]["plugs"] == drawn["plugs"]
    refused = ppcl(*based, *own, "budget.params=0.9")
    assert refused.code == 2
    assert "run 'stages=[plan]' again" in refused.err


def test_a_budget_that_the_tuned_model_is_not_of_is_refused_with_two_ways_out(
    again: list[str], planned: Path, tmp_path: Path
) -> None:
    other = [*again, "budget.params=0.8", "generate.variants=[teacher,ppcl-finetuned]"]
    refused = ppcl(*other, "stages=[plan,generate]")
    assert refused.code == 2
    assert "budget.params=0.8" in refused.err
    without = [option for option in other if not option.startswith("budget.")]
    assert succeed(*without, "stages=[generate]").out.count("generate  reused ") == 2
    advice = re.search(
        r"run '(stages=\[\S+\])' under another name=, as in (name=\S+) (paths.base_run=\S+)\.$", refused.err
    )
    assert advice, refused.err
    succeed(*other, *advice.groups())
    assert load(tmp_path / "budget-2" / "finetuned" / "ppcl.json")["plugged"]


def test_killed_finetuning_resumes_exactly(options: list[str], planned: Path, tmp_path: Path) -> None:
    long = [f"budget.params={BUDGET}", "finetune.steps=40", "finetune.checkpoint_every=2", FINETUNE]
    results = {}
    for name in ("whole", "killed"):
        run = tmp_path / name / "budget"
        for folder in ("plan", "plugs"):
            shutil.copytree(planned / folder, run / folder)
        command = [*options, f"paths.runs_dir={tmp_path / name}", *long]
        if name == "killed":
            kill(start_until(run, "finetune-checkpoint/last.ckpt", command))
            assert not (run / "finetuned").exists()
        outcome = succeed(*command)
        assert ("resuming from" in outcome.out) == (name == "killed")
        results[name] = weights(run)
        assert not (run / "finetune-checkpoint").exists()
        assert "finetune  reused" in succeed(*command).out
    assert_same_tensors(results["killed"], results["whole"])


def test_a_loss_that_is_not_a_number_stops_and_loses_nothing(options: list[str], planned: Path, tmp_path: Path) -> None:
    run = tmp_path / "budget"
    for folder in ("plan", "plugs"):
        shutil.copytree(planned / folder, run / folder)
    change = ["finetune.lr=1000", "finetune.optimizer=adamw", "finetune.checkpoint_every=1"]
    outcome = ppcl(*options, f"paths.runs_dir={tmp_path}", f"budget.params={BUDGET}", *change, FINETUNE)
    assert outcome.code == 2
    assert "finetune.lr=1000.0 made the loss" in outcome.err
    assert "last checkpoint is intact" in outcome.err
    assert zipfile.is_zipfile(run / "finetune-checkpoint" / "last.ckpt")
    assert not (run / "finetuned").exists()
    assert digests(run / "plugs") == digests(planned / "plugs")


def test_a_tuned_runs_choice_is_not_replaced_by_a_command_that_is_refused(
    again: list[str], planned: Path, tmp_path: Path
) -> None:
    choice = tmp_path / "budget" / "plan" / "choice.json"
    before = choice.read_bytes()
    refused = ppcl(*again, "budget.params=0.8", "stages=[plan,finetune]")
    assert refused.code == 2
    assert "is tuned for another choice" in refused.err
    assert choice.read_bytes() == before
    advice = re.search(r"as in (name=\S+) (paths.base_run=\S+), or", refused.err)
    assert advice, refused.err
    succeed(*again, "budget.params=0.8", "stages=[plan,finetune]", *advice.groups())


def test_a_budgets_choice_is_needed_from_the_start(again: list[str], tmp_path: Path) -> None:
    (tmp_path / "budget" / "plan" / "choice.json").unlink()
    refused = ppcl(*again, "budget.params=0.8", "stages=[export]")
    assert refused.code == 2
    assert "add plan to stages" in refused.err
