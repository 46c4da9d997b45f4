"""The memory plan against the live bytes of real trainings, and what a command does with it."""

from __future__ import annotations

import copy
import json
import os
from functools import reduce
from pathlib import Path

import pytest
import torch
import yaml
from commands import INTERVALS, PLUG_NAMES, REPOSITORY, digests, ppcl, succeed

from ppcl.command import prepare
from ppcl.context import Run
from ppcl.distill.groups import divided
from ppcl.errors import UsageError
from ppcl.memory.checks import in_memory
from ppcl.memory.need import fits
from ppcl.memory.plan import STAGES, Plan
from ppcl.stages import depth

# Near the last block: the teacher's weights behind the last one that is needed are not touched in a step.
SETS = ["intervals.transformer_blocks=[[2,4],[6,8],[17,18]]", "width.source=given"]
SETS += ["width.names=[transformer_blocks.19.text,transformer_blocks.5.ffn]"]
PAPER = ["model=qwen_image", "intervals=qwen_image_paper", "width=qwen_image_paper"]


def planned_and_held(stage: str, command: list[str]) -> tuple[float, float]:
    """Train; return the memory that the plan says, and that of a step, both in MB."""
    succeed(*command, f"stages=[{stage}]")
    run = prepare([*command, f"stages=[{stage}]"])
    need = STAGES[stage](Plan(run))
    need.device.pop("normal equations", None)  # they are gone when steps begin
    return need.total / 1e6, json.loads((run.folder / "training" / f"{stage}.json").read_text())["peak_memory_mb"]


@pytest.mark.parametrize("size", [4, 16])
def test_a_training_holds_as_much_as_is_planned(tmp_path: Path, size: int) -> None:
    command = ["model=tiny_qwen_image", *SETS, f"paths.runs_dir={tmp_path}", "logger=none"]
    command += [f"{group}.steps=4" for group in ("distill", "width", "finetune")]
    command += [f"distill.batch_size={size}", f"finetune.batch_size={size}"]
    found = {stage: planned_and_held(stage, [*command, "name=fit"]) for stage in ("depth", "width", "finetune")}
    changes = {"lora": ["finetune.lora_rank=4"], "streamed": ["finetune.lora_rank=4", "model.streaming=true"]}
    if size == 4:  # where the states are a larger part
        changes["depth"] = ["distill.optimizer_states=8bit"]
        changes["finetune"] = ["finetune.optimizer_states=8bit"]
    for name, change in changes.items():
        base = [f"paths.base_run={tmp_path / 'fit'}"] if name != "depth" else []
        stage = name if name in found else "finetune"
        found[change[-1]] = planned_and_held(stage, [*command, *base, f"name={name}", *change])
        if name == stage:
            saved = [before - now for before, now in zip(found[name], found[change[-1]], strict=True)]
            assert saved[0] == pytest.approx(saved[1], rel=0.15), name
    for what, (planned, held) in found.items():
        assert planned == pytest.approx(held, rel=0.15), what


def test_blocks_that_stay_as_they_are_take_neither_gradients_nor_states(tmp_path: Path) -> None:
    command = ["model=tiny_qwen_image", "intervals.transformer_blocks=[[13,16]]", f"paths.runs_dir={tmp_path}"]
    command += ["recovery=hierarchical", "finetune.steps=4", "finetune.batch_size=4", "logger=none"]
    frozen = planned_and_held("finetune", [*command, "name=frozen"])
    whole = planned_and_held("finetune", [*command, "name=whole", "finetune.trains=all"])
    for planned, held in (frozen, whole):
        assert planned == pytest.approx(held, rel=0.15)
    saved = [before - now for before, now in zip(whole, frozen, strict=True)]
    assert saved[1] > 0.3 * whole[1]
    assert saved[0] == pytest.approx(saved[1], rel=0.15)


def test_students_that_train_in_groups_are_the_same(settings: list[str], trained: Path, tmp_path: Path) -> None:
    command = [*settings, INTERVALS, f"paths.runs_dir={tmp_path}", "name=grouped", "stages=[depth]", "distill.groups=2"]
    outcome = succeed(*command)
    assert "group 2 of 2: transformer_blocks.3-4" in outcome.out
    one, other = (digests(folder / "plugs") for folder in (tmp_path / "grouped", trained))
    assert {name for name in one if name.endswith(".safetensors")} == {f"{name}.safetensors" for name in PLUG_NAMES}
    assert {name: one[name] for name in one if name.endswith("safetensors")} == {
        name: other[name] for name in other if name.endswith("safetensors")
    }
    cost = json.loads((tmp_path / "grouped" / "training" / "depth.json").read_text())
    alone = json.loads((trained / "training" / "depth.json").read_text())
    assert cost["steps"] == 2 * alone["steps"]
    assert cost["peak_memory_mb"] < alone["peak_memory_mb"]
    assert "reused" in succeed(*command).out
    for file in (tmp_path / "grouped" / "plugs").glob("*.3-4.*"):
        file.unlink()
    succeed(*command)  # as after a kill between the groups
    assert json.loads((tmp_path / "grouped" / "training" / "depth.json").read_text())["steps"] == cost["steps"]


@pytest.mark.parametrize(("asked", "goes_on"), [("auto", True), ("1", False)])
def test_groups_that_a_stopped_training_has_begun(
    settings: list[str], tmp_path: Path, asked: str, goes_on: bool
) -> None:
    command = [*settings, INTERVALS, f"paths.runs_dir={tmp_path}", "name=resumed", "stages=[depth]"]
    run = prepare(command)
    begun = depth._checkpoint_folder(run, divided(run.intervals, 2)[1])
    begun.mkdir(parents=True)
    outcome = succeed(*command, f"distill.groups={asked}")
    assert ("group 2 of 2" in outcome.out) == goes_on
    assert (f"{begun} is not used: distill.groups=2" in outcome.out) != goes_on
    assert not [*(tmp_path / "resumed" / "plugs").glob("checkpoint-*")]


def test_as_many_groups_as_fit(tmp_path: Path) -> None:
    groups = {}
    for memory in (400, 80, 48, 24):
        streamed = [f"model.streaming={str(memory < 80).lower()}"]
        command = [*PAPER, "stages=[depth]", "explain=true", "distill.groups=auto", f"trainer.memory_gb={memory}"]
        plan = Plan(prepare([*command, *streamed]))
        groups[memory] = plan.groups()
        assert plan.depth().total < memory * 1e9
        assert (f"in {groups[memory]} groups" in plan.depth().note) == (groups[memory] > 1)
    assert groups[400] == 1
    assert 1 < groups[80] < groups[24] < 13


def test_only_the_students_that_a_job_trains_count() -> None:
    command = [*PAPER, "stages=[depth]", "explain=true", "distill.groups=1"]
    every, one = (Plan(prepare([*command, f"distill.intervals={names}"])) for names in ("null", "[3-4]"))
    assert len(every.trained["transformer_blocks"]) == 13
    assert one.trained == {"transformer_blocks": [(3, 4)]}
    assert one.depth().device["students"] == every.depth().device["students"] / 13


def test_explain_shows_and_leaves_nothing(tmp_path: Path) -> None:
    stages = "stages=[depth,width,finetune,generate]"
    outcome = succeed(*PAPER, stages, "explain=true", "trainer.memory_gb=85", f"paths.runs_dir={tmp_path}")
    turns = "finetune does not fit: turn finetune.lora_rank=16 or finetune.accumulate", "or strategy=fsdp"
    for word in ("teacher 40.86 GB", "(too much)", "hours", "the device has 85.00 GB", *turns):
        assert word in outcome.out
    assert not [*tmp_path.iterdir()]


def test_what_does_not_fit_is_refused_before_anything_loads(tmp_path: Path) -> None:
    drawing = ["model=qwen_image", "model.path=NAME/NONE", "stages=[generate]", "generate.variants=[teacher]"]
    outcome = ppcl(*drawing, "generate.prompt=x", "trainer.memory_gb=24", f"paths.runs_dir={tmp_path}")
    assert outcome.code == 2
    assert "'stages=[generate]' needs about" in outcome.err
    assert "generate.offload=model" in outcome.err
    training = ["model=qwen_image", "model.path=NAME/NONE", "stages=[cache,depth]", f"data.path={tmp_path}"]
    outcome = ppcl(*training, "intervals=qwen_image_paper", "trainer.memory_gb=48", f"paths.runs_dir={tmp_path}")
    assert outcome.code == 2
    assert "distill.optimizer_states=8bit" in outcome.err
    assert not [*tmp_path.iterdir()]


def test_a_lack_of_memory_names_what_to_turn() -> None:
    run = prepare(["model=tiny_qwen_image", "stages=[probe]"])
    with pytest.raises(UsageError, match=r"ran out of memory on cpu: turn probe\.num_batches"), in_memory(run, "probe"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
    with pytest.raises(RuntimeError, match="a bug"), in_memory(run, "probe"):
        raise RuntimeError("a bug")


def test_no_lora_is_named_where_it_would_be_refused() -> None:
    run = prepare(["model=tiny_qwen_image", "stages=[finetune]", "recovery=hierarchical"])
    with pytest.raises(UsageError, match=r"on cpu: turn finetune\.accumulate or"), in_memory(run, "finetune"):
        raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("model", ["qwen_image_edit_2509", "flux_dev", "dit_xl"])
def test_every_model_is_estimated_without_weights(model: str, tmp_path: Path) -> None:
    stages = "stages=[cache,probe,detect,boundaries,depth,width,finetune,export,quantize,generate,evaluate]"
    outcome = succeed(
        f"model={model}", stages, "width=auto", "quantize=int4", "explain=true", f"paths.runs_dir={tmp_path}"
    )
    assert "it is assumed that three of every five blocks become one" in outcome.out
    assert outcome.out.count("teacher ") >= 4
    assert "export also holds in host memory: teacher " in outcome.out


STREAMED = "model.streaming=true"
CARDS = {"24 GB": 25.7e9, "48 GB": 51.0e9, "80 GB": 85.0e9}  # bytes that such a card has
MODELS = {"Qwen-Image": PAPER, "FLUX.1-dev": ["model=flux_dev", "intervals=flux_dev_paper", "width=auto"]}
LORA = "finetune.lora_rank=16"
ROWS = [  # stages with settings, as the README shows them
    ("cache",),
    ("probe",),
    ("probe", STREAMED),
    ("detect",),
    ("detect", STREAMED),
    ("boundaries", STREAMED),
    ("depth", "distill.groups=1"),
    ("depth", "distill.groups=auto"),
    ("depth", "distill.groups=auto", STREAMED),
    ("depth", "distill.groups=auto", STREAMED, "distill.optimizer_states=8bit"),
    ("width",),
    ("width", STREAMED),
    ("plan",),
    ("plan", STREAMED),
    ("finetune",),
    ("finetune", LORA),
    ("finetune", LORA, "finetune.recorded=true", "finetune.accumulate=2"),
    ("finetune", LORA, "finetune.accumulate=2", STREAMED),
    ("quantize", "quantize.rounding=least_squares"),
    ("generate",),
    ("generate", "generate.offload=group"),
    ("evaluate",),
]
SHARDED = {"depth", "width", "finetune"}  # stages that eight cards share


def with_settings(run: Run, settings: list[str]) -> Run:
    """A run with some keys changed, without composing its configuration anew."""
    config = copy.deepcopy(run.config)
    for setting in settings:
        key, _, value = setting.partition("=")
        *groups, name = key.split(".")
        setattr(reduce(getattr, groups, config), name, yaml.safe_load(value))
    return Run(config, run.folder)


def row_of(run: Run, stage: str, *settings: str) -> list[str]:
    """The cells of a row: what the stage needs in GB, whether each card has it, and what each of eight cards needs."""
    plan = Plan(with_settings(run, [f"stages=[{stage}]", "data.name=folder", *settings]))
    cells, sizes = [], set()
    for room in CARDS.values():
        plan.run.config.trainer.memory_gb = room / 1e9
        need = STAGES[stage](plan)
        groups = plan.groups() if stage == "depth" else 1
        sizes.add(round(need.total / 1e9))
        cells.append("no" if not fits(need.total, room) else "yes" if groups == 1 else f"{groups} groups")
    least, most = min(sizes), max(sizes)
    each = ""
    if stage in SHARDED and settings in ((), ("distill.groups=1",)):
        batches = ["distill.batch_size=16", "finetune.batch_size=16", "strategy.kind=fsdp"]
        eight = with_settings(run, [*settings, *batches])
        each = f"{STAGES[stage](Plan(eight, ranks=8)).total / 1e9:.0f} GB"
    return [f"{least} GB" if least == most else f"{least} to {most} GB", *cells, each]


def test_the_readmes_table_of_memory() -> None:
    """`PPCL_WRITE_README=1` writes the table anew."""
    lines = ["| stage | settings | needs | " + " | ".join(CARDS) + " | each of 8, `strategy=fsdp` |"]
    lines += ["| --- " * (4 + len(CARDS)) + "|"]
    for name, model in MODELS.items():
        lines.append(f"| **{name}** |" + " |" * (3 + len(CARDS)))
        run = prepare([*model, "stages=[depth]", "explain=true"])
        for stage, *settings in ROWS:
            told = " ".join(f"`{setting.partition('.')[2]}`" for setting in settings)
            lines.append(f"| `{stage}` | {told} | {' | '.join(row_of(run, stage, *settings))} |")
    readme = REPOSITORY / "README.md"
    text = readme.read_text(encoding="utf-8")
    start, end = "<!-- memory -->\n", "<!-- end of memory -->"
    (before, _, rest), (_, _, after) = text.partition(start), text.partition(end)
    assert rest
    expected = before + start + "\n".join(lines) + "\n" + end + after
    if os.environ.get("PPCL_WRITE_README"):
        readme.write_text(expected, encoding="utf-8")
        text = expected
    assert text == expected


@pytest.mark.parametrize(("changes", "words"), [(["distill.intervals=[9-10]"], "is not one of this run's"),
                                                (["distill.intervals=[]"], "names no interval")])  # fmt: skip
def test_a_wrong_interval_is_said_before_anything_is_estimated(changes: list[str], words: str) -> None:
    outcome = ppcl(*PAPER, "stages=[depth]", "explain=true", *changes)
    assert outcome.code == 2
    assert words in outcome.err


def test_what_is_not_estimated_is_named(tmp_path: Path) -> None:
    for stages in ("pretrain", "plan, report"):
        asked = f"stages=[{stages}]".replace(" ", "")
        outcome = succeed("model=tiny_qwen_image", asked, "explain=true", f"paths.runs_dir={tmp_path}")
        assert f"{stages}: not estimated" in outcome.out
