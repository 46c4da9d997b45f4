"""A run draws any number of sets of pictures, of whatever it has made; what lies there stays as it is."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import INTERVALS, PLUG_NAMES, digests, modified, ppcl, succeed
from PIL import Image
from safetensors.torch import load_file

from ppcl.api import run as draw
from ppcl.artifacts.files import read_json, write_json
from ppcl.errors import UsageError
from ppcl.stages import generate

SMALL = ["benchmark.prompts_per_category=1", "benchmark.latency_repeats=1"]
DRAW, SCORE = "stages=[generate]", "stages=[generate,evaluate,report]"


@pytest.fixture
def command(settings: list[str], trained: Path, tmp_path: Path) -> list[str]:
    """A run with two students, which draws little."""
    shutil.copytree(trained / "plugs", tmp_path / "run" / "plugs")
    return [*settings, *SMALL, f"paths.runs_dir={tmp_path}", "name=run", INTERVALS]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def sets(run: Path) -> set[str]:
    return {path.name for path in (run / "images").iterdir()}


def advised(sentence: str, pattern: str) -> list[str]:
    """The overrides that a refusal advises."""
    found = re.search(pattern, sentence)
    assert found, sentence
    return found[1].split()


def choose(run: Path, *plugged: str) -> None:
    (run / "plan").mkdir(exist_ok=True)
    choice = {"budget": ["params", 0.8, "velocity"], "plugged": plugged}
    (run / "plan" / "choice.json").write_text(json.dumps(choice))


def test_other_prompts_seeds_and_settings_are_sets_of_their_own(command: list[str], run: Path, tmp_path: Path) -> None:
    (tmp_path / "My prompts.txt").write_text("a red circle\na blue square\n")
    changes = [
        ["generate.prompt='A red circle!'"],
        ["generate.prompt=a blue square"],
        ["generate.prompt='A red circle!'", "seed=43"],
        ["generate.prompt='A red circle!'", "generate.num_images=2"],
        ["generate.prompt='A red circle!'", "model.sampling.true_cfg_scale=1.5"],
        [f"generate.prompt_file={tmp_path / 'My prompts.txt'}"],
    ]
    names = [r"a-red-circle-\w{6}", r"a-blue-square-\w{6}", *[r"a-red-circle-\w{6}"] * 3, r"my-prompts-\w{6}"]
    earlier: dict[str, str] = {}
    for change, pattern in zip(changes, names, strict=True):
        before = sets(run) if earlier else set()
        said = succeed(*command, DRAW, *change).out
        (name,) = sets(run) - before
        assert re.fullmatch(pattern, name)
        assert f"teacher, removed, ppcl-depth: in {run / 'images' / name}" in said
        assert {path.name for path in (run / "images" / name).iterdir()} == {"teacher", "removed", "ppcl-depth"}
        now = digests(run / "images")
        assert earlier.items() < now.items()
        earlier = now
    times = modified(run / "images")
    assert succeed(*command, DRAW, *changes[0]).out.count("reused") == 3
    assert modified(run / "images") == times


def test_a_set_may_have_a_name(command: list[str], run: Path) -> None:
    named = [*command, DRAW, "generate.variants=[removed]", "generate.name=cats"]
    succeed(*named, "generate.prompt=a red circle")
    assert sets(run) == {"cats"}
    before = digests(run / "images")
    assert "reused" in succeed(*named, "generate.prompt=a red circle").out
    refused = ppcl(*named, "generate.prompt=a blue square")
    assert refused.code == 2
    assert "holds other pictures (made with prompts.hash=" in refused.err
    assert "give another generate.name=" in refused.err
    assert digests(run / "images") == before
    succeed(*named, "generate.prompt=a blue square", "generate.name=dogs")
    assert sets(run) == {"cats", "dogs"}
    assert before.items() < digests(run / "images").items()


def test_a_second_set_of_a_benchmark_has_scores_and_a_report_of_its_own(command: list[str], run: Path) -> None:
    few = [*command, SCORE, "generate.variants=[teacher,removed]"]
    succeed(*few)
    assert sets(run) == {"shapes"}
    first = {kind: digests(run / kind) for kind in ("images", "scores", "report")}
    succeed(*few, "seed=43")
    (second,) = sets(run) - {"shapes"}
    assert re.fullmatch(r"shapes-\w{6}", second)
    for kind, before in first.items():
        assert before.items() < digests(run / kind).items()
    assert {path.name for path in (run / "scores" / second).iterdir()} == {"teacher.json", "removed.json"}
    assert (run / "report" / second / "report.html").exists()
    shutil.rmtree(run / "images" / "shapes")  # which does not make the second one the first
    assert succeed(*few, "seed=43", "stages=[generate,evaluate]").out.count("reused") == 3


def test_another_model_of_a_variant_lies_beside_the_first(command: list[str], run: Path) -> None:
    few = [*command, "stages=[generate,evaluate]", "generate.variants=[teacher,ppcl-planned]"]
    choose(run, PLUG_NAMES[0])
    succeed(*few)
    before = digests(run / "images") | digests(run / "scores")
    del before["teacher.json"]  # latencies are measured in turns, so that of the teacher is measured again
    choose(run, *PLUG_NAMES)
    succeed(*few)
    assert sets(run) == {"shapes"}
    (name,) = {path.name for path in (run / "images" / "shapes").iterdir()} - {"teacher", "ppcl-planned"}
    assert re.fullmatch(r"ppcl-planned-\w{6}", name)
    assert before.items() < (digests(run / "images") | digests(run / "scores")).items()
    rows = [json.loads((run / "scores" / f"{each}.json").read_text()) for each in ("ppcl-planned", name)]
    assert [row["students"] for row in rows] == [PLUG_NAMES[:1], PLUG_NAMES]
    assert rows[0]["velocity_error"] < rows[1]["velocity_error"]
    choose(run, PLUG_NAMES[0])
    assert succeed(*few).out.count("reused") == 3  # two variants' pictures, and the scores


def test_pictures_that_nothing_vouches_for_stay(command: list[str], run: Path) -> None:
    few = [*command, DRAW, "generate.variants=[removed]"]
    folder = run / "images" / "shapes" / "removed"
    folder.mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(folder / "00000.png")
    before = digests(run / "images")
    succeed(*few)
    (new,) = sets(run) - {"shapes"}
    assert digests(run / "images").items() > before.items()
    (run / "images" / new / "removed" / "manifest.json").rename(run / "kept.json")
    succeed(*few, "generate.variants=[teacher,removed]")
    assert len(list((run / "images" / new).glob("removed-??????/0*.png"))) == 6
    assert digests(run / "images").items() > before.items()


def meanwhile(patch: pytest.MonkeyPatch, other: Callable[[], object]) -> None:
    """Do `other` in the midst of the next command, when it knows what to draw and has not begun."""
    equipped, todo = generate.equipped, [other]

    def after_the_other(*arguments: Any) -> Any:
        if todo:
            todo.pop()()
        return equipped(*arguments)

    patch.setattr(generate, "equipped", after_the_other)


def assert_pictures_are_what_manifests_say(images: Path) -> None:
    manifests = list(images.rglob("manifest.json"))
    assert manifests
    for manifest in manifests:
        pictures = list(manifest.parent.glob("0*.png"))
        assert len(pictures) == 6
        said = {json.loads(Image.open(path).text["ppcl"])["fingerprint"] for path in pictures}
        assert said == {json.loads(manifest.read_text())["fingerprint"]}
    assert not list(images.rglob("unfinished.json"))


def test_two_models_that_are_drawn_at_once_are_kept_apart(
    command: list[str], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [*command, DRAW, "generate.variants=[ppcl-planned]"]

    def draw_another() -> None:
        choose(run, *PLUG_NAMES)
        draw(few, quiet=True)

    choose(run, PLUG_NAMES[0])
    meanwhile(monkeypatch, draw_another)
    draw(few, quiet=True)
    assert len(list((run / "images" / "shapes").glob("ppcl-planned*"))) == 2
    assert_pictures_are_what_manifests_say(run / "images")


def test_two_sets_that_are_drawn_at_once_are_kept_apart(
    command: list[str], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [*command, DRAW, "generate.variants=[teacher]", f"paths.cache_dir={run / 'cache'}"]
    meanwhile(monkeypatch, lambda: draw([*few, "seed=43"], quiet=True))
    draw(few, quiet=True)
    assert len(sets(run)) == 2
    named = [*few, "generate.name=cats", "generate.num_images=6"]
    meanwhile(monkeypatch, lambda: draw([*named, "generate.prompt=a red circle"], quiet=True))
    with pytest.raises(UsageError, match=r"holds other pictures \(made with prompts\.hash="):
        draw([*named, "generate.prompt=a blue square"], quiet=True)
    for images in (run / "images", run / "cache" / "images"):
        assert len(list(images.rglob("manifest.json"))) == 3
        assert_pictures_are_what_manifests_say(images)


def test_pictures_that_are_gone_are_drawn_again(command: list[str], run: Path) -> None:
    few = [*command, "generate.variants=[teacher,removed]"]
    succeed(*few, DRAW)
    before = digests(run / "images")
    (run / "images" / "shapes" / "removed" / "00003.png").unlink()
    refused = ppcl(*few, "stages=[evaluate]")
    assert refused.code == 2
    assert "removed lacks pictures: run 'stages=[generate]' for variant removed first" in refused.err
    succeed(*few, DRAW)
    assert digests(run / "images") == before


def test_other_heldout_data_is_measured_again(command: list[str], run: Path) -> None:
    few = [*command, "stages=[generate,evaluate]", "generate.variants=[teacher,removed]"]
    errors = []
    for change in ("data.calibration_seed=8", "data.calibration_seed=9", "data.shift=1.0"):
        succeed(*few, change)
        assert "reused " + str(run / "scores") in succeed(*few, change).out
        errors.append(json.loads((run / "scores" / "removed.json").read_text())["velocity_error"])
    assert len(set(errors)) == 3


def test_distances_to_the_teacher_are_measured_and_latents_kept(command: list[str], run: Path) -> None:
    few = [*command, "stages=[generate,evaluate]", "generate.variants=[teacher,removed,ppcl-depth]"]
    succeed(*few, "generate.batch_size=4")
    folder = run / "images" / "shapes"
    files = [path.name for path in sorted((folder / "teacher" / "latents").iterdir())]
    assert files == ["00000.safetensors", "00004.safetensors"]
    teacher, removed = (load_file(folder / name / "latents" / files[1]) for name in ("teacher", "removed"))
    assert teacher.keys() == removed.keys() == {"00004", "00005"}
    picture = np.asarray(Image.open(folder / "teacher" / "00004.png")) / 127.5 - 1
    mean = teacher["00004"].float().clamp(-1, 1).mean().item()  # the tiny VAE only rearranges pixels
    assert mean == pytest.approx(picture.mean(), abs=0.01)
    rows = {path.stem: json.loads(path.read_text()) for path in (run / "scores").glob("*.json")}
    assert rows["teacher"]["velocity_error"] == rows["teacher"]["latent_distance"] == 0
    for name in ("removed", "ppcl-depth"):
        assert rows[name]["velocity_error"] > 0
        assert rows[name]["latent_distance"] > 0
    assert all(0 < row["score_interval"] < 1 for row in rows.values())
    # Pictures of earlier versions are without them, and their manifest lists no files.
    shutil.rmtree(folder / "removed" / "latents")
    manifest = read_json(folder / "removed" / "manifest.json", "The record")
    write_json(folder / "removed" / "manifest.json", {key: manifest[key] for key in manifest if key != "files"})
    shutil.rmtree(run / "scores")
    succeed(*few, "generate.batch_size=4")
    assert json.loads((run / "scores" / "removed.json").read_text())["latent_distance"] is None


def test_own_prompts_are_compared_and_have_no_score(command: list[str], run: Path) -> None:
    own = ["generate.prompt=a red circle", "generate.num_images=2"]
    succeed(*command, SCORE, *own)
    (name,) = sets(run)
    assert "a red circle" in (run / "report" / name / "report.html").read_text()
    rows = {path.stem: json.loads(path.read_text()) for path in (run / "scores" / name).glob("*.json")}
    assert rows.keys() == {"teacher", "removed", "ppcl-depth"}
    assert all(row["scores"] is row["score_interval"] is None for row in rows.values())
    assert rows["removed"]["latent_distance"] > 0


@pytest.mark.parametrize("stage", ["finetune", "export"])
def test_the_advice_works_where_intervals_were_detected(
    settings: list[str], chain: Path, tmp_path: Path, stage: str
) -> None:
    for part in ("plan", "plugs"):
        shutil.copytree(chain / part, tmp_path / "old" / part)
    tuned = ["finetune=tiny", "finetune.batch_size=4"]
    common = [*settings, *tuned, f"paths.runs_dir={tmp_path}", f"stages=[{stage}]"]
    first, change = {
        "finetune": ("finetune.steps=1", "finetune.steps=2"),
        "export": ("export.max_shard_size=1GB", "export.max_shard_size=2GB"),
    }[stage]
    succeed(*common, "name=old", first)
    before = digests(tmp_path / "old" / "plugs")
    refused = ppcl(*common, "name=old", change)
    assert refused.code == 2
    assert "give this run another name=" in refused.err
    advice = advised(refused.err, r"as in (name=\S+ paths\.base_run=\S+), or delete")
    assert advice == ["name=old-2", f"paths.base_run={tmp_path / 'old'}"]
    succeed(*common, *advice, change)
    assert (tmp_path / "old-2" / {"finetune": "finetuned", "export": "export"}[stage] / "ppcl.json").exists()
    assert digests(tmp_path / "old" / "plugs") == before
    (folder,) = advised(refused.err, r"or delete (\S+) to make it anew")
    shutil.rmtree(folder)
    succeed(*common, "name=old", change)
