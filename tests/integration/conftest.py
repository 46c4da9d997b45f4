"""One random teacher of six blocks and a few finished runs of it, shared by every test that only reads them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
NUM_LAYERS = 6
INTERVALS = "intervals.transformer_blocks=[[1,2],[3,4]]"
PLUG_NAMES = ["transformer_blocks.1-2", "transformer_blocks.3-4"]
CHAIN = "stages=[probe,detect,depth,export,generate,evaluate,report]"
NUM_PROMPTS = 12
BATCH = 6

# Numbers that change with the number of threads would make bit-identity a matter of luck.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


@dataclass
class Outcome:
    """What a command left on the console."""

    code: int
    out: str
    err: str


def ppcl(*arguments: str) -> Outcome:
    """The console script, called in this process; a process of its own would spend its time on imports."""
    from ppcl.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["ppcl", *arguments])
        patch.setenv("HYDRA_FULL_ERROR", "")
        patch.delenv("HYDRA_FULL_ERROR")  # main sets it for its own process; the next call must not see it
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    return Outcome(code, out.getvalue(), err.getvalue())


def succeed(*arguments: str) -> Outcome:
    """`ppcl`, which must end well."""
    outcome = ppcl(*arguments)
    assert outcome.code == 0, outcome.err
    return outcome


def ppcl_process(*arguments: str, python: str = "from ppcl.cli import main; main()") -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own; `python` may prepare that process first."""
    return subprocess.run(
        [sys.executable, "-c", python, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


def digests(folder: Path) -> dict[str, str]:
    """Every file under `folder` by its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def modified(*folders: Path) -> dict[str, int]:
    """Every file under `folders` by the time it was written."""
    return {str(p): p.stat().st_mtime_ns for folder in folders for p in sorted(folder.rglob("*")) if p.is_file()}


def plug_tensors(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's plugs."""
    from ppcl.artifacts import load_plugs

    plugs = load_plugs(run / "plugs")
    return {f"{name}/{key}": value for name, plug in plugs.items() for key, value in plug.state_dict.items()}


def assert_same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert left.keys() == right.keys()
    assert left
    for key, value in left.items():
        assert torch.equal(value, right[key]), key


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder with an untrained transformer: every stage is as real as on a trained one."""
    from ppcl.families.tiny_qwen_image import build_pipeline

    folder = tmp_path_factory.mktemp("teacher") / "pipeline"
    build_pipeline(0, NUM_LAYERS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def settings(teacher: Path) -> list[str]:
    """What every command here has in common: the teacher, and sizes that take a second."""
    return [
        "model=auto",
        f"model.path={teacher}",
        "model.sampling.num_inference_steps=2",
        "probe.num_batches=2",
        "probe.num_heldout_batches=1",
        "probe.batch_size=8",
        "method.min_cka=0",
        "method.num_samples=4",
        "method.num_timesteps=2",
        "method.batch_size=4",
        "distill=tiny",
        "distill.steps=6",
        "distill.batch_size=4",
        "distill.checkpoint_every=100",
        f"generate.batch_size={BATCH}",
        f"benchmark.prompts_per_category={NUM_PROMPTS // 6}",
        "benchmark.latency_repeats=2",
        "trainer=cpu",
        "trainer.num_threads=1",
        "trainer.progress=false",
        "logger=none",
    ]


@pytest.fixture(scope="session")
def chain_command(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Every stage, with intervals from detection."""
    return [*settings, f"paths.runs_dir={tmp_path_factory.mktemp('chain')}", "name=chain", CHAIN]


@pytest.fixture(scope="session")
def chain(chain_command: list[str]) -> Path:
    """The folder of a run that went through every stage. Read it, do not write."""
    succeed(*chain_command)
    runs = next(a for a in chain_command if a.startswith("paths.runs_dir=")).partition("=")[2]
    return Path(runs) / "chain"


@pytest.fixture(scope="session")
def trained(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose two given intervals have plugs. Read it, do not write."""
    runs = tmp_path_factory.mktemp("trained")
    succeed(*settings, f"paths.runs_dir={runs}", "name=trained", INTERVALS, "stages=[depth]")
    return runs / "trained"
