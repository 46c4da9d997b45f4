"""One random teacher of six blocks and a few finished runs of it, shared by every test that only reads them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from commands import BATCH, CHAIN, INTERVALS, NUM_LAYERS, NUM_PROMPTS, VARIANTS, succeed

# On a GPU: PPCL_TEST_SETTINGS="trainer=auto trainer.tf32=false trainer.deterministic=true" make test
DEVICE = os.environ.get("PPCL_TEST_SETTINGS", "trainer=cpu").split()

torch.set_num_threads(1)  # as ../conftest.py has it, also where torch was built without OpenMP


def build_teacher(folder: Path) -> Path:
    """Write a pipeline with an untrained transformer to `folder`: every stage is as real as on a trained one."""
    from ppcl.families.qwen_image.tiny import build_pipeline

    build_pipeline(0, NUM_LAYERS).save_pretrained(folder)
    return folder


def settings_of(teacher: Path) -> list[str]:
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
        *DEVICE,
        "trainer.num_threads=1",
        "trainer.progress=false",
        "logger=none",
    ]


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `build_teacher`."""
    return build_teacher(tmp_path_factory.mktemp("teacher") / "pipeline")


@pytest.fixture(scope="session")
def settings(teacher: Path) -> list[str]:
    """The settings of `settings_of` that teacher."""
    return settings_of(teacher)


@pytest.fixture(scope="session")
def chain_command(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Every stage, with intervals from detection."""
    return [*settings, f"paths.runs_dir={tmp_path_factory.mktemp('chain')}", "name=chain", CHAIN, VARIANTS]


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
