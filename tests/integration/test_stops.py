"""Trainings that a signal stops: the step that was running is saved, and the same command ends with the same bits."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from commands import (
    INTERVALS,
    REPOSITORY,
    assert_same_tensors,
    plug_tensors,
    ppcl,
    ppcl_process,
    succeed,
    two_ranks,
)
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

STEP = 3  # of 6; no checkpoint but that of the signal is due
TRAINED = [
    "stages=[depth,finetune]",
    "finetune=tiny",
    "finetune.steps=6",
    "finetune.batch_size=4",
    "finetune.ema_decay=0.5",
]

# Sends a signal while batch number `STEP` is made, and goes on when it has arrived. It goes to this process, or to the
# launcher, which passes it on. Of two ranks the second one sends it. Without a name no signal is sent.
SIGNALLED = f"""
import os, signal, sys
from ppcl.cli import main
from ppcl.data.batches import StepLoader

name, receiver = sys.argv.pop(1), sys.argv.pop(1)
iterate = StepLoader._iterate

def signalling(self):
    for batch in iterate(self):
        if name and self.step == {STEP} and os.environ.get("RANK", "1") == "1":
            read, write = os.pipe()
            os.set_blocking(write, False)
            signal.set_wakeup_fd(write)
            os.kill(os.getppid() if receiver == "launcher" else os.getpid(), getattr(signal, name))
            os.read(read, 1)
            signal.set_wakeup_fd(-1)
        yield batch

StepLoader._iterate = signalling
"""
ONE = SIGNALLED + "main()"


def signalled_ranks(signal: str, *arguments: str) -> CompletedProcess[str]:
    return two_ranks(signal, "itself", *arguments, before=SIGNALLED)


@pytest.fixture(scope="module")
def command(settings: list[str]) -> list[str]:
    return [*settings, *TRAINED, INTERVALS]


@pytest.fixture(scope="module")
def whole(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trainings in one go."""
    runs = tmp_path_factory.mktemp("whole")
    succeed(*command, f"paths.runs_dir={runs}", "name=whole")
    return runs / "whole"


def finetuned(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "finetuned" / "transformer" / "diffusion_pytorch_model.safetensors")


def names(run: Path, pattern: str) -> list[str]:
    return [path.name for path in run.glob(pattern)]


def saved(pattern: str, run: Path) -> dict:
    (path,) = run.glob(pattern)
    return torch.load(path, weights_only=True)


def tensor_bytes(content: Any) -> int:
    """The bytes of all tensors but single numbers."""
    return sum(leaf.nbytes for leaf in tree_leaves(content) if isinstance(leaf, torch.Tensor) and leaf.ndim)


def stopped(outcome: CompletedProcess[str], code: int, name: str) -> None:
    assert outcome.returncode == code, outcome.stderr
    assert outcome.stderr.splitlines()[-1] == f"ppcl: stopped by {name}; the same command resumes."
    assert f"saved step {STEP} of 6" in outcome.stdout


def test_one_process_stops_in_each_training_and_ends_alike(command: list[str], whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "stopped"
    again = [*command, f"paths.runs_dir={tmp_path}", "name=stopped"]
    large = f"import ppcl.training.checkpoints as checkpoints\ncheckpoints.LARGE = 0\n{ONE}"
    for pattern in ("plugs/checkpoint-*/last.ckpt", "finetune-checkpoint/last.ckpt"):
        outcome = ppcl_process("SIGTERM", "itself", *again, python=large)
        stopped(outcome, 143, "SIGTERM")
        checkpoint = saved(pattern, run)
        assert checkpoint["global_step"] == STEP
        # What it takes was known before. A few parameters never have a gradient, nor states.
        size, found = (
            float(re.findall(r"a checkpoint takes (\S+) MB", outcome.stdout)[-1]),
            tensor_bytes(checkpoint) / 1e6,
        )
        assert found <= 1.001 * size
        assert size < 1.05 * found
        assert "the first checkpoint took" in outcome.stdout
    succeed(*again)
    assert_same_tensors(plug_tensors(run), plug_tensors(whole))
    assert_same_tensors(finetuned(run), finetuned(whole))


def test_two_ranks_stop_at_one_step_and_end_alike(command: list[str], tmp_path: Path) -> None:
    run, shared = tmp_path / "stopped", [*command, f"paths.runs_dir={tmp_path}", "strategy=fsdp"]
    program = tmp_path / "program.py"
    program.write_text(ONE, encoding="utf-8")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
    outcome = subprocess.run(
        [*torchrun, "SIGTERM", "launcher", *shared, "name=stopped"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert outcome.returncode == 1
    assert outcome.stderr.count("ppcl: stopped by SIGTERM; the same command resumes.") == 1, outcome.stderr
    assert names(run, "plugs/checkpoint-*/sharded-*") == [f"sharded-{STEP:08d}"]
    stopped(signalled_ranks("SIGTERM", *shared, "name=stopped"), 143, "SIGTERM")
    assert names(run, "finetune-checkpoint/sharded-*") == [f"sharded-{STEP:08d}"]
    for name in ("stopped", "whole"):
        outcome = signalled_ranks("", *shared, f"name={name}")
        assert outcome.returncode == 0, outcome.stderr
    assert_same_tensors(plug_tensors(run), plug_tensors(tmp_path / "whole"))
    assert_same_tensors(finetuned(run), finetuned(tmp_path / "whole"))


def test_slurm_runs_a_warned_job_again(
    command: list[str], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a job of SLURM, Lightning would save `hpc_ckpt` files at SIGUSR1, and load them in the next training."""
    job = {"JOB_ID": "7", "ARRAY_JOB_ID": "5", "ARRAY_TASK_ID": "2", "JOB_NAME": "ppcl", "NTASKS": "1", "PROCID": "0"}
    for name, value in (job | {"LOCALID": "0", "NODEID": "0", "NODELIST": "here"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n', encoding="utf-8")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    run, again = tmp_path / "warned", [*command, f"paths.runs_dir={tmp_path}", "name=warned"]
    outcome = ppcl_process("SIGUSR1", "itself", *again, python=ONE)
    stopped(outcome, 138, "SIGUSR1")
    assert "SLURM has requeued job 5_2" in outcome.stdout
    assert (tmp_path / "asked").read_text() == "requeue 5_2\n"
    assert not list(run.rglob("hpc_ckpt*"))
    assert "resuming from" in succeed(*again).out
    assert_same_tensors(finetuned(run), finetuned(whole))


def test_another_programs_handler_is_called_after_the_checkpoint(command: list[str], tmp_path: Path) -> None:
    """As submitit's, which requeues its job and exits."""
    handled = f"import signal, sys\nsignal.signal(signal.SIGUSR2, lambda number, frame: sys.exit(7))\n{ONE}"
    outcome = ppcl_process("SIGUSR2", "itself", *command, f"paths.runs_dir={tmp_path}", "name=own", python=handled)
    assert outcome.returncode == 7, outcome.stderr
    assert saved("plugs/checkpoint-*/last.ckpt", tmp_path / "own")["global_step"] == STEP


def test_a_checkpoint_after_so_many_minutes(command: list[str], tmp_path: Path) -> None:
    """Of none: after every step."""
    always = [*command, "distill.checkpoint_minutes=0", f"paths.runs_dir={tmp_path}", "name=killed"]
    assert ppcl_process("SIGKILL", "itself", *always, python=ONE).returncode == -9
    assert saved("plugs/checkpoint-*/last.ckpt", tmp_path / "killed")["global_step"] == STEP - 1


def test_a_disk_without_room_for_checkpoints_is_refused(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    refused = ppcl(*command, f"paths.runs_dir={tmp_path}", "name=full")
    assert refused.code == 2
    assert "1.00 KB free, and two checkpoints of this training take about" in refused.err
    assert not (tmp_path / "full").exists()
