"""Settings of a short run of a tiny pipeline through all stages, and the mark of what runs on demand alone."""

from __future__ import annotations

import os
from typing import Any

import pytest

CHAIN = "stages=[cache,probe,detect,depth,export,generate,evaluate,report]"
VARIANTS = ["teacher", "removed", "ppcl-depth"]
SHORT = [
    "trainer=cpu",
    "trainer.num_threads=1",
    "trainer.progress=false",
    "logger=none",
    "distill.steps=6",
    "distill.batch_size=4",
    "probe.num_batches=2",
    "probe.num_heldout_batches=1",
    "probe.batch_size=4",
    "method.num_samples=4",
    "method.num_timesteps=2",
    "benchmark.latency_repeats=2",
    "model.sampling.num_inference_steps=3",
]


def only_on_demand(name: str) -> Any:
    """Return a parameter of tests that are skipped unless PPCL_TEST_MODELS is set."""
    asked = bool(os.environ.get("PPCL_TEST_MODELS"))
    return pytest.param(name, marks=pytest.mark.skipif(not asked, reason="set PPCL_TEST_MODELS=1"))
