"""Killed at the worst moments, a run started again ends where one never interrupted ends."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
from commands import (
    BATCH,
    DIE_AT_RENAME,
    INTERVALS,
    NUM_PROMPTS,
    PLUG_NAMES,
    assert_same_tensors,
    digests,
    kill,
    modified,
    plug_tensors,
    ppcl_process,
    start_until,
    succeed,
)
from PIL import Image
from safetensors.torch import load_file

LONG = ["distill.steps=80", "distill.checkpoint_every=2"]


def images(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def assert_same_images(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    assert left.keys() == right.keys()
    assert left
    for name, image in left.items():
        assert np.array_equal(image, right[name]), name


def assert_nothing_partial(folder: Path) -> None:
    """Whatever bears a final name is whole."""
    for path in folder.rglob("*"):
        if path.name.startswith(".") or not path.is_file():
            continue
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".png":
            with Image.open(path) as image:
                image.load()


@pytest.fixture(scope="module")
def uninterrupted(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A long training in one go."""
    runs = tmp_path_factory.mktemp("uninterrupted")
    succeed(*settings, *LONG, INTERVALS, f"paths.runs_dir={runs}", "name=long", "stages=[depth]")
    return runs / "long"


def test_killed_training_resumes_exactly(settings: list[str], uninterrupted: Path, tmp_path: Path) -> None:
    command = [*settings, *LONG, INTERVALS, f"paths.runs_dir={tmp_path}", "name=killed", "stages=[depth]"]
    run = tmp_path / "killed"
    kill(start_until(run, "plugs/checkpoint-*/last.ckpt", command))
    assert not list(run.glob("plugs/*.safetensors"))
    outcome = succeed(*command)
    assert "resuming from" in outcome.out
    assert_same_tensors(plug_tensors(run), plug_tensors(uninterrupted))
    # Its checkpoint is gone; its plugs are what counts, and what a third run finds.
    assert {path.stem for path in (run / "plugs").iterdir()} == set(PLUG_NAMES)
    assert "reused" in succeed(*command).out


def test_interrupt_says_how_to_go_on(settings: list[str], uninterrupted: Path, tmp_path: Path) -> None:
    command = [*settings, *LONG, INTERVALS, f"paths.runs_dir={tmp_path}", "name=stopped", "stages=[depth]"]
    run = tmp_path / "stopped"
    process = start_until(run, "plugs/checkpoint-*/last.ckpt", command)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert err.splitlines()[-1:] == ["ppcl: interrupted; the same command resumes."], err
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "resuming from" in succeed(*command).out
    assert_same_tensors(plug_tensors(run), plug_tensors(uninterrupted))


@pytest.mark.parametrize(
    "pattern", ["*/transformer_blocks.3-4.safetensors", "*/transformer_blocks.1-2.json", "*/last.ckpt"]
)
def test_death_before_a_plug_is_named(settings: list[str], trained: Path, tmp_path: Path, pattern: str) -> None:
    command = [*settings, INTERVALS, f"paths.runs_dir={tmp_path}", "name=cut", "stages=[depth]"]
    command.append("distill.checkpoint_every=4")
    run = tmp_path / "cut"
    died = ppcl_process(pattern, *command, python=DIE_AT_RENAME)
    assert died.returncode == 9, died.stderr
    assert_nothing_partial(run)
    assert not list(run.rglob(pattern[2:]))
    succeed(*command)
    assert_same_tensors(plug_tensors(run), plug_tensors(trained))
    # No checkpoint outlives the plugs that were trained from it.
    assert not list(run.rglob("*.ckpt"))


def test_death_with_packed_states(settings: list[str], tmp_path: Path) -> None:
    """The last two steps go on from the states in a checkpoint. The recipe's are those of Muon and of AdamW."""
    steps = ["distill.steps=10", "distill.checkpoint_every=8", "distill.optimizer_states=8bit"]
    command = [*settings, INTERVALS, f"paths.runs_dir={tmp_path}", "stages=[depth]", *steps]
    succeed(*command, "name=whole")
    pattern = "*/transformer_blocks.1-2.safetensors"
    assert ppcl_process(pattern, *command, "name=cut", python=DIE_AT_RENAME).returncode == 9
    assert "resuming from" in succeed(*command, "name=cut").out
    assert_same_tensors(plug_tensors(tmp_path / "cut"), plug_tensors(tmp_path / "whole"))


def test_death_before_probes_are_named(settings: list[str], chain: Path, tmp_path: Path) -> None:
    command = [*settings, f"paths.runs_dir={tmp_path}", "name=cut", "stages=[probe,detect]"]
    died = ppcl_process("*/probes.json", *command, python=DIE_AT_RENAME)
    assert died.returncode == 9, died.stderr
    (folder,) = (tmp_path / "cache" / "probes").iterdir()
    assert_nothing_partial(tmp_path)
    assert not (folder / "probes.json").exists()
    outcome = succeed(*command)
    assert "probe  wrote" in outcome.out  # without its record, tensor files are not believed
    (whole,) = (chain.parent / "cache" / "probes").iterdir()
    for file in whole.glob("*.safetensors"):
        assert_same_tensors(load_file(folder / file.name), load_file(file))
    plans = [json.loads((run / "plan" / "plan.json").read_text()) for run in (tmp_path / "cut", chain)]
    assert plans[0] == plans[1]


def test_death_before_an_image_is_named(settings: list[str], chain: Path, tmp_path: Path) -> None:
    command = [*settings, INTERVALS, f"paths.runs_dir={tmp_path}", "name=cut", "stages=[generate]"]
    command.append("generate.variants=[teacher]")
    folder = tmp_path / "cut" / "images" / "shapes" / "teacher"
    died = ppcl_process(f"*/{BATCH + 2:05d}.png", *command, python=DIE_AT_RENAME)
    assert died.returncode == 9, died.stderr
    assert_nothing_partial(tmp_path)
    assert len(list(folder.glob("*.png"))) == BATCH + 2
    assert not (folder / "manifest.json").exists()
    before = modified(folder)
    outcome = succeed(*command)
    assert f"{NUM_PROMPTS - BATCH} of {NUM_PROMPTS} pictures drawn" in outcome.out
    after = modified(folder)
    for number in range(BATCH):
        path = str(folder / f"{number:05d}.png")
        assert after[path] == before[path]
    assert_same_images(images(folder), images(chain / "images" / "shapes" / "teacher"))


def test_death_before_the_export_is_named(settings: list[str], trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "cut"
    (run / "plugs").mkdir(parents=True)
    for path in (trained / "plugs").iterdir():
        (run / "plugs" / path.name).write_bytes(path.read_bytes())
    command = [*settings, INTERVALS, f"paths.runs_dir={tmp_path}", "name=cut", "stages=[export]"]
    died = ppcl_process("*/export", *command, python=DIE_AT_RENAME)
    assert died.returncode == 9, died.stderr
    assert not (run / "export").exists()
    succeed(*command)
    exported = digests(run / "export")
    assert "transformer/diffusion_pytorch_model.safetensors" in exported
    # What the dead process left is cleared away: an export can be 20 GB.
    assert not [path for path in run.iterdir() if path.name.endswith(".tmp")]


def test_missing_pictures_are_drawn_again(settings: list[str], chain: Path, tmp_path: Path) -> None:
    command = [*settings, INTERVALS, f"paths.runs_dir={tmp_path}", "name=gaps", "stages=[generate]"]
    command.append("generate.variants=[teacher,removed]")
    succeed(*command)
    folder = tmp_path / "gaps" / "images" / "shapes" / "removed"
    complete, manifest = images(folder), folder / "manifest.json"
    other = modified(folder.with_name("teacher"))
    # As a run leaves it that died in its second batch: `unfinished.json` says whose pictures these are.
    manifest.rename(folder / "unfinished.json")
    for number in (BATCH, NUM_PROMPTS - 1):
        (folder / f"{number:05d}.png").unlink()
    before = modified(folder)
    outcome = succeed(*command)
    assert f"removed: {BATCH} of {NUM_PROMPTS} pictures drawn" in outcome.out
    assert modified(folder.with_name("teacher")) == other
    assert manifest.exists()
    assert not (folder / "unfinished.json").exists()
    after = modified(folder)
    assert all(after[str(folder / f"{n:05d}.png")] == before[str(folder / f"{n:05d}.png")] for n in range(BATCH))
    assert_same_images(images(folder), complete)


def test_pictures_of_nobody_are_not_adopted(settings: list[str], tmp_path: Path) -> None:
    """Without a manifest nothing says what they are; what is drawn must be what the new manifest claims."""
    command = [*settings, INTERVALS, f"paths.runs_dir={tmp_path}", "stages=[generate]", "generate.variants=[removed]"]
    succeed(*command, "name=fresh", "seed=5")
    succeed(*command, "name=again")
    fresh, again = (tmp_path / name / "images" / "shapes" / "removed" for name in ("fresh", "again"))
    (again / "manifest.json").unlink()
    before = digests(again)
    succeed(*command, "name=again", "seed=5")
    (new,) = again.parents[1].glob("shapes-??????/removed")
    assert_same_images(images(new), images(fresh))
    assert digests(again) == before


def test_checkpoint_of_nobody_is_not_resumed(settings: list[str], uninterrupted: Path, tmp_path: Path) -> None:
    """As above for a checkpoint: without its record, `last.ckpt` belongs to no training."""
    command = [*settings, *LONG, INTERVALS, f"paths.runs_dir={tmp_path}", "name=stale", "stages=[depth]"]
    run = tmp_path / "stale"
    # A training with another rate dies after a checkpoint; its record is deleted as the refusal advises.
    died = ppcl_process(
        "*.safetensors", *command, "distill.steps=4", "distill.relative_update=0.5", python=DIE_AT_RENAME
    )
    assert died.returncode == 9, died.stderr
    (checkpoints,) = run.glob("plugs/checkpoint-*")
    (checkpoints / "checkpoint.json").unlink()
    # The new training dies too, and is resumed: from its own checkpoint, if from any.
    kill(start_until(run, "plugs/checkpoint-*/checkpoint.json", command))
    succeed(*command)
    assert_same_tensors(plug_tensors(run), plug_tensors(uninterrupted))
