"""What was damaged, exchanged or deleted afterwards is made again, or refused in a sentence that leads there."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
from commands import DIE_AT_RENAME, INTERVALS, digests, ppcl, ppcl_process, succeed, two_ranks
from safetensors.torch import load_file

from ppcl.artifacts.locks import locked
from ppcl.command import prepare
from ppcl.stages import export
from tests.battery.damage import BAD, make, run_all, sample

NUM_TRIALS, SEED = 6, 3
WIDTH = ["width.source=given", "width.transformer_blocks.ffn=[0]", "width.transformer_blocks.text=[5]"]
DRAWN = ["stages=[generate]", "generate.variants=[teacher,removed]"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    with path.open("rb+") as file:  # in place, as a bad disk does: a copy by a hard link would change, too
        file.write(content)


def refused(outcome, *fragments: str) -> str:
    """Assert that a command was refused in one sentence with these fragments, and return that."""
    assert outcome.code == 2, outcome.err
    (sentence,) = (line for line in outcome.err.splitlines() if line.startswith("ppcl: "))
    for fragment in fragments:
        assert fragment in sentence
    return sentence


def test_a_sample_of_all_damages_ends_well(settings: list[str], tmp_path: Path) -> None:
    """`make battery` tries all."""
    finished = make(settings, tmp_path)
    endings = run_all(finished, sample(finished, NUM_TRIALS, SEED), tmp_path)
    assert len(endings) > NUM_TRIALS // 2  # the others had the same bytes in the other run
    bad = {str(trial): ending for trial, ending in endings.items() if ending.kind in BAD}
    assert not bad


# Trainings


def test_a_checkpoint_is_of_its_own_training_and_whole(settings: list[str], tmp_path: Path) -> None:
    command = [*settings, INTERVALS, f"paths.runs_dir={tmp_path}", "stages=[depth]", "distill.checkpoint_every=3"]
    checkpoints = {}
    for name, seed in (("cut", 7), ("other", 8)):
        again = [*command, f"name={name}", f"data.train_seed={seed}"]
        died = ppcl_process("*.1-2.safetensors", *again, python=DIE_AT_RENAME)
        assert died.returncode == 9, died.stderr
        (checkpoints[name],) = (tmp_path / name).glob("plugs/checkpoint-*/last.ckpt")
    mine = checkpoints["cut"]
    whole, again = mine.read_bytes(), [*command, "name=cut", "data.train_seed=7"]
    shutil.copy(checkpoints["other"], mine)
    said = refused(ppcl(*again), "holds the checkpoint of another training")
    assert f"delete {mine.parent} to train anew" in said
    mine.write_bytes(whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :])
    refused(ppcl(*again), "last.ckpt is damaged or no checkpoint", f"delete {mine.parent} to train anew")
    mine.write_bytes(whole)
    assert "resuming from" in succeed(*again).out


def test_projectors_that_were_trained_when_a_command_died_are_not_trained_again(
    settings: list[str], trained: Path, tmp_path: Path
) -> None:
    results = {}
    for name in ("whole", "killed"):
        shutil.copytree(trained / "plugs", tmp_path / name / "plugs")
        command = [*settings, INTERVALS, *WIDTH, f"paths.runs_dir={tmp_path}", f"name={name}", "stages=[width]"]
        command += ["width.steps=4", "distill.checkpoint_every=2"]
        if name == "killed":
            died = ppcl_process("*.text.safetensors", *command, python=DIE_AT_RENAME)
            assert died.returncode == 9, died.stderr
            assert len(list((tmp_path / name / "plugs").glob("*.ffn.json"))) == 1
            assert len(list((tmp_path / name).rglob("*.tmp"))) == 1
        outcome = succeed(*command)
        assert ("resuming from" in outcome.out) == (name == "killed")
        plugs = tmp_path / name / "plugs"
        results[name] = {path.name: load_file(path) for path in sorted(plugs.glob("*.safetensors"))}
        assert not list(plugs.glob("checkpoint-*"))
        assert not list(plugs.glob(".*"))
    assert results["whole"].keys() == results["killed"].keys()
    for name, tensors in results["whole"].items():
        assert all(torch.equal(value, results["killed"][name][key]) for key, value in tensors.items()), name


# Pictures


def test_a_spoilt_picture_stays_in_its_run(settings: list[str], tmp_path: Path) -> None:
    command = [*settings, INTERVALS, f"paths.runs_dir={tmp_path}", *DRAWN, "benchmark.prompts_per_category=1"]
    succeed(*command, "name=first")
    succeed(*command, "name=second")
    first, second = (tmp_path / name / "images" / "shapes" / "teacher" for name in ("first", "second"))
    (cached,) = (tmp_path / "cache" / "images").iterdir()
    wanted = digests(first)
    flip(first / "00000.png")
    assert digests(second) == wanted
    refused(ppcl(*command, "name=first"), "00000.png has changed since it was written", "run 'stages=[generate]' again")
    (first / "00000.png").unlink()
    succeed(*command, "name=first")
    assert digests(first) == wanted
    # Nor does a spoilt one in the cache reach a run: it is drawn anew, and the cache has it again.
    for damage in (flip, Path.unlink):
        damage(cached / "00001.png")
        damage(cached / "latents" / "00000.safetensors")
        shutil.rmtree(second)
        assert "teacher: 6 of 6 pictures drawn" in succeed(*command, "name=second").out
        assert digests(second) == wanted
        shutil.rmtree(second)
        assert f"reused {cached}" in succeed(*command, "name=second").out


# Exports


def test_exported_tokenizers_are_the_teachers_own(
    settings: list[str], trained: Path, teacher: Path, tmp_path: Path
) -> None:
    """Encoding captions gives a tokenizer a length and a padding, which it would save."""
    shutil.copytree(trained / "plugs", tmp_path / "own" / "plugs")
    run = prepare([*settings, INTERVALS, f"paths.runs_dir={tmp_path}", "name=own", "stages=[export]"])
    run.teacher.enter("export")
    tokenizer = run.teacher.pipeline.tokenizer
    tokenizer(["a red circle", "two"], padding="max_length", max_length=7, truncation=True)
    assert tokenizer.backend_tokenizer.truncation
    export.run(run)
    assert digests(run.folder / "export" / "tokenizer") == digests(teacher / "tokenizer")


def test_an_export_is_looked_at_before_it_is_reused(settings: list[str], trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "plugs", tmp_path / "own" / "plugs")
    command = [*settings, INTERVALS, f"paths.runs_dir={tmp_path}", "name=own", "stages=[export]"]
    command.append("export.single_file=true")
    succeed(*command)
    folder, single = tmp_path / "own" / "export", tmp_path / "own" / "export.safetensors"
    wanted = digests(folder)
    assert "reused" in succeed(*command).out
    flip(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    said = refused(ppcl(*command), "diffusion_pytorch_model.safetensors has changed since it was written")
    assert f"delete {folder} and run 'stages=[export]' again" in said
    shutil.rmtree(folder)
    succeed(*command)
    assert digests(folder) == wanted
    flip(single)
    refused(ppcl(*command), f"{single} has changed since it was written: delete it and run 'stages=[export]' again")
    single.unlink()
    succeed(*command)


# Several commands


def test_a_stage_runs_once_at_a_time_in_a_run(settings: list[str], tmp_path: Path) -> None:
    command = [*settings, INTERVALS, f"paths.runs_dir={tmp_path}", "name=one", "stages=[depth]"]
    with locked(tmp_path / "one" / ".depth.lock", "", ""):
        said = refused(ppcl(*command), "'stages=[depth]' is being run in", f"process {os.getpid()} on")
        assert said.endswith("wait for its end, or give another name=.")
        succeed(*[*command[:-1], "stages=[plan]"])  # another stage may
    assert not list((tmp_path / "one").glob("plugs"))
    succeed(*command)
    assert not list((tmp_path / "one").rglob(".*"))


def test_probes_of_another_job_are_not_taken_away(settings: list[str], tmp_path: Path) -> None:
    """Two jobs fit the same probes: the one that ends later must not delete what the other is reading."""
    command = [*settings, f"paths.runs_dir={tmp_path}", "stages=[probe]"]
    succeed(*command, "name=early")
    (record,) = (tmp_path / "cache" / "probes").glob("*/probes.json")
    (record.parent / "transformer_blocks.3.image.safetensors").unlink()  # makes the second one fit them again
    died = ppcl_process("*.transformer_blocks.2.image.safetensors", *command, "name=late", python=DIE_AT_RENAME)
    assert died.returncode in (0, 9), died.stderr
    assert record.exists()
    succeed(*command, "name=late")
    assert (record.parent / "transformer_blocks.3.image.safetensors").exists()


def test_all_ranks_end_when_one_is_killed(settings: list[str], tmp_path: Path) -> None:
    """Outside of a training a signal ends a rank at once; the other one would wait for it for days."""
    killing = """
import os, signal
import ppcl.watch
import ppcl.methods.probes as probes
ppcl.watch._GRACE = 0.2
fit = probes.fit_probes
def dying(*arguments, **settings):
    if os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return fit(*arguments, **settings)
import ppcl.stages.probe
ppcl.stages.probe.fit_probes = dying
"""
    command = [*settings, f"paths.runs_dir={tmp_path}", "name=ranks", "stages=[probe]", "strategy=ddp"]
    outcome = two_ranks(*command, before=killing)
    assert outcome.returncode == 143, outcome.stderr
    assert "ppcl: rank 1 has died, so all ranks end; the same command resumes." in outcome.stderr
