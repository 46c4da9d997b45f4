"""The report's page says what the reader who decides needs, in that order, with and without a benchmark."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from html import unescape
from pathlib import Path

import pytest
from commands import INTERVALS, VARIANTS, modified, ppcl, ppcl_process, succeed
from omegaconf import OmegaConf
from PIL import Image
from test_stops import ONE, stopped

from ppcl.artifacts.files import read_json, write_json
from ppcl.context import Run
from ppcl.report.made import commands_of, data_of
from ppcl.training.cost import trainings_of
from ppcl.validation import parse

ORDER = ["Pictures", "Variants", "How it was made", "Diagnosis"]


def page_of(run: Path) -> str:
    return unescape((run / "report" / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def copy(chain: Path, chain_command: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A copy of that run, and the command that writes its report again."""
    runs = tmp_path_factory.mktemp("report")
    shutil.copytree(chain, runs / "chain")
    kept = [argument for argument in chain_command if not argument.startswith(("stages=", "paths.runs_dir="))]
    return runs / "chain", [*kept, f"paths.runs_dir={runs}", f"paths.cache_dir={chain.parent / 'cache'}"]


def change_scores(run: Path, **changes: object) -> None:
    for path in (run / "scores").glob("*.json"):
        write_json(path, read_json(path, "The scores") | changes)


def test_the_page_is_in_the_order_of_what_matters(chain: Path, teacher: Path) -> None:
    page = page_of(chain)
    assert "<h1>chain: pipeline pruned</h1>" in page  # the model by its folder's name
    assert re.findall(r"<h2>(.*?)</h2>", page) == ORDER
    (sentence,) = re.findall(r'<p class="lead">(.*?)</p>', page)
    for said in (str(teacher), "6 blocks", "the shapes world: 32x32 toy pictures", "method ppcl", "seed 42"):
        assert said in sentence
    assert page.index("<table>") < page.index("cka and delta curves")


def test_the_page_tells_how_it_was_made(chain: Path) -> None:
    page = page_of(chain)
    cost = read_json(chain / "training" / "depth.json", "The cost")
    assert f"<td>depth</td><td>{cost['steps']}</td>" in page
    report = json.loads((chain / "report" / "report.json").read_text())
    assert report["trainings"]["depth"] == cost
    again = next(iter(report["commands"].values()))
    assert again in page
    first, run, *settings, stages = shlex.split(again)
    assert (first, run) == ("ppcl", f"run={chain}")
    assert not any(setting.startswith("generate.batch_size=") for setting in settings)  # run= takes it from the record
    assert stages == "stages=[probe,detect,depth,export,generate,evaluate,report]"
    assert report["data"]["name"] == "shapes"
    assert settings == [VARIANTS, "trainer.accelerator=cpu"]


def test_every_variant_is_explained_with_its_plugs(chain: Path) -> None:
    page = page_of(chain)
    pairs = json.loads((chain / "plan" / "plan.json").read_text())["intervals"]["transformer_blocks"]
    names = ", ".join(f"{u}-{v}" for u, v in pairs)
    assert f"<div>students in transformer_blocks: {names}</div>" in page
    assert f"<div>cut to their first block in transformer_blocks: {names}</div>" in page


def test_the_users_own_prompts_are_shown(copy: tuple[Path, list[str]]) -> None:
    run, command = copy
    assert "Your prompts" not in page_of(run)
    drawn = ["generate.prompt='a <b>red</b> circle'", "generate.variants=[teacher,ppcl-depth]", "seed=7"]
    succeed(*command, *drawn, "stages=[generate]")
    succeed(*command, "stages=[report]")
    text = (run / "report" / "report.html").read_text(encoding="utf-8")
    mine = text.partition("Your prompts")[2].partition("<h2>")[0]
    assert mine.count("<img") == 2
    assert "a &lt;b&gt;red&lt;/b&gt; circle" in mine
    assert "seed 7" in mine
    (target,) = re.findall('href="(.*?)"', mine)
    assert (run / "report" / target / "teacher" / "manifest.json").exists()


def test_scores_have_their_intervals(copy: tuple[Path, list[str]]) -> None:
    run, command = copy
    change_scores(run, score_interval=0.034, velocity_error=0.25, latent_distance=None)
    succeed(*command, "stages=[report]")
    page = page_of(run)
    assert re.search(r"<td>\d\.\d{3} ± 0\.03</td>", page)
    assert "<td>0.2500</td>" in page
    assert "latent" not in page
    assert json.loads((run / "report" / "report.json").read_text())["variants"][0]["velocity_error"] == 0.25


def test_a_run_without_a_benchmark_has_a_page(copy: tuple[Path, list[str]]) -> None:
    run, command = copy
    change_scores(run, scores=None, score_interval=None, velocity_error=0.25, latent_distance=1.5)
    (run / "report" / "quality.png").unlink()
    succeed(*command, "stages=[report]")
    page = page_of(run)
    assert re.findall(r"<h2>(.*?)</h2>", page) == ORDER
    assert "<th>score</th>" not in page
    assert "<b>0.2500</b>velocity error of ppcl-depth" in page
    assert "<td>1.500</td>" in page
    assert (run / "report" / "quality.png").exists()
    assert all(
        row["drop_percent"] is None for row in json.loads((run / "report" / "report.json").read_text())["variants"]
    )


def test_own_data_is_named_and_counted(settings: list[str], tmp_path: Path) -> None:
    source = tmp_path / "pictures"
    source.mkdir()
    lines = [json.dumps({"image": f"{number}.png", "caption": "a red circle"}) for number in range(5)]
    (source / "metadata.jsonl").write_text("\n".join(lines))
    for number in range(4):  # one is not there
        Image.new("RGB", (40, 40)).save(source / f"{number}.png")
    data = ["data=folder", f"data.path={source}", "data.held_out=0.4"]
    succeed(*settings, f"paths.runs_dir={tmp_path}", "name=own", *data, "stages=[cache]")
    config = parse(OmegaConf.load(tmp_path / "own" / "config.yaml"))
    found = data_of(Run(config, tmp_path / "own"))
    assert found["samples"] == 4
    assert found["words"] == f"4 captioned pictures of {source}, 2 of them held out"
    (source / "metadata.jsonl").unlink()
    assert data_of(Run(config, tmp_path / "own"))["words"] == f"captioned pictures of {source}"


def test_its_commands_work(copy: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, command = copy
    succeed(*command, "stages=[report]")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a blue circle\na red cross\n")
    again, draw, show = json.loads((run / "report" / "report.json").read_text())["commands"].values()
    assert succeed(*shlex.split(again)[1:]).out.count("reused") >= 6
    succeed(*shlex.split(draw)[1:])
    succeed(*shlex.split(show)[1:])
    assert "a blue circle</p>" in page_of(run)


@pytest.mark.parametrize("name", ["mine, all", "it's $5", "bäume", "plain-1.2"])
def test_its_commands_name_any_folder(name: str, chain: Path, tmp_path: Path) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    run = Run(parse(OmegaConf.load(chain / "config.yaml")), tmp_path / name)
    for command in commands_of(run).values():
        override = OverridesParser.create().parse_override(shlex.split(command)[1])
        assert (override.key_or_group, override.value()) == ("run", str(tmp_path / name))


def test_a_run_caches_again_only_what_it_has_cached(chain: Path, tmp_path: Path) -> None:
    run = Run(parse(OmegaConf.load(chain / "config.yaml")), tmp_path)
    given = [("none", None, None), ("folder", None, "cached"), ("folder", "pictures", None)]
    stages = []
    for run.config.data.name, run.config.data.path, run.config.data.cache in given:
        stages.append(shlex.split(next(iter(commands_of(run).values())))[-1])
        assert "None" not in data_of(run)["words"]
    assert stages == ["stages=[report]", "stages=[report]", "stages=[cache,report]"]


def test_a_training_that_lacks_a_number_is_left_out(chain: Path, tmp_path: Path) -> None:
    shutil.copytree(chain / "training", tmp_path / "training")
    (tmp_path / "training" / "finetune.json").write_text('{"steps": 6}')
    assert list(trainings_of(Run(parse(OmegaConf.load(chain / "config.yaml")), tmp_path))) == ["depth"]


def test_asked_again_by_default_the_report_keeps_every_variant_with_scores(copy: tuple[Path, list[str]]) -> None:
    run, _ = copy
    succeed(f"run={run}", "stages=[report]", "generate.batch_size=6")
    rows = json.loads((run / "report" / "report.json").read_text())["variants"]
    assert [row["name"] for row in rows] == ["teacher", "removed", "ppcl-depth", "ppcl-mixed"]


# Before there are scores


def test_a_run_without_scores_has_a_page_of_what_it_has(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "trained")
    command = [f"run={run}", "trainer.accelerator=cpu", "generate.batch_size=6"]
    said = succeed(*command, "stages=[report]").out
    assert "There are no scores yet: 'stages=[generate,evaluate,report]' adds them." in said
    page = page_of(run)
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["How it was made", "Diagnosis"]
    assert "'stages=[generate,evaluate,report]' adds them" in page
    assert 'alt="distillation losses"' in page
    assert "[1, 2] [3, 4]" in page
    assert json.loads((run / "report" / "report.json").read_text())["variants"] == []
    assert not (run / "report" / "samples.png").exists()
    said = succeed(*command, "stages=[generate,report]", "generate.variants=[teacher,ppcl-depth]").out
    assert "There are no scores yet: 'stages=[evaluate,report]' adds them." in said
    assert re.findall(r"<h2>(.*?)</h2>", page_of(run)) == ["Pictures", "How it was made", "Diagnosis"]
    assert (run / "report" / "samples.png").exists()


def test_a_training_that_was_stopped_is_said_until_it_has_ended(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "trained")
    command = [f"run={run}", "trainer.accelerator=cpu", "finetune=tiny", "finetune.steps=6", "finetune.batch_size=4"]
    stopped(ppcl_process("SIGTERM", "itself", *command, "stages=[finetune]", python=ONE), 143, "SIGTERM")
    sentence = "A training is not finished: 'stages=[finetune]' goes on with it from its last checkpoint."
    assert sentence in succeed(*command, "stages=[report]").out
    assert sentence in page_of(run)
    assert sentence not in succeed(*command, "stages=[finetune,report]").out
    assert sentence not in page_of(run)


def test_a_plan_alone_has_a_page(settings: list[str], tmp_path: Path) -> None:
    succeed(*settings, INTERVALS, f"paths.runs_dir={tmp_path}", "name=counted", "stages=[plan,report]")
    page = page_of(tmp_path / "counted")
    assert "[1, 2] [3, 4]" in page
    assert "6 blocks, pruned on" in page


def test_scores_of_models_that_a_command_replaces_are_not_shown(copy: tuple[Path, list[str]]) -> None:
    run, _ = copy
    before = modified(run / "report")
    refused = ppcl(f"run={run}", "trainer.accelerator=cpu", "stages=[depth,report]")
    assert refused.code == 2
    assert "are older than what this command trains: add generate and evaluate to stages" in refused.err
    assert modified(run / "report") == before
