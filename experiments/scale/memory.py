"""Measure the peak memory of probes and of a depth step, above the teacher's weights, by the number of blocks.

`experiments.scale.run --only memory` measures these. The memory of detection with the paper's calibration, 160 samples
at 50 noise levels, has a command of its own, since it takes 20 minutes on an idle core:

    python -m experiments.scale.memory
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from experiments.common import make_run
from experiments.scale.measure import step_memory_mb, weight_bytes
from experiments.scale.models import CHANNELS, STACK, TEXT_WIDTH, Size, make_batch, make_teacher
from experiments.scale.steps import WAYS, make_module
from ppcl.artifacts.files import write_json
from ppcl.artifacts.probes import Probes
from ppcl.config import DataConfig, MethodConfig
from ppcl.data.streams import Stream
from ppcl.efficiency import LiveBytes
from ppcl.families.base import Conditions
from ppcl.families.registry import get_family
from ppcl.methods import lp
from ppcl.methods.base import Teacher
from ppcl.methods.probes import fit_probes
from ppcl.methods.registry import load_method

HERE = Path(__file__).parent
BLOCKS = (20, 40, 60)
DEFAULT, PAPER = (16, 8), (160, 50)  # calibration samples, and noise levels of each


def by_blocks(counts: Sequence[int] = BLOCKS, **size: Any) -> list[dict[str, float]]:
    """Return a row per number of blocks, in MB (1e6 bytes), for the intervals [0, 1], [3, 4], [6, 7], ..

    - `depth` and `published`: activations and temporaries of a step, of ours and of the published loop's.
    - `depth_with_students`: the same for ours, with the students' weights, gradients and optimiser states.
    - `depth_one_interval`: the same for a job that only trains the last interval.
    """
    rows = []
    for count in counts:
        chosen = Size(num_layers=count, **({"heads": 1, "side": 8, "text": 16} | size))
        family, teacher, batch = get_family("qwen_image"), make_teacher(chosen), make_batch(chosen)
        with LiveBytes() as recorder:
            for _ in fit_probes(family, teacher, [batch, batch], ridge=1e-6, bias=True):
                pass  # as the stage does, which writes each to its file
        pairs = [(u, u + 1) for u in range(0, count - 1, 3)]

        def step(pairs: list, way: str, teacher: Any = teacher, batch: Any = batch) -> dict[str, float]:
            return step_memory_mb(make_module(WAYS[way], teacher, pairs), batch)

        every, one = step(pairs, "ours"), step(pairs[-1:], "ours")
        rows.append(
            {
                "blocks": count,
                "teacher": weight_bytes(teacher) / 1e6,
                "probe": recorder.peak / 1e6,
                "published": step(pairs, "published")["activations"],
                "depth": every["activations"],
                "depth_with_students": every["with_students"],
                "depth_one_interval": one["with_students"],
            }
        )
    return rows


def of_paper_set() -> dict[str, Any]:
    """Compare the memory of our step and the published one, for the paper's 60 blocks and 13 intervals, but narrow."""
    run = make_run("bench/memory", "model=qwen_image", "intervals=qwen_image_paper")
    size = Size(num_layers=60, heads=2)
    teacher, batch = make_teacher(size), make_batch(size)
    ways = ("published", "ours")
    modules = {name: make_module(WAYS[name], teacher, run.intervals[STACK]) for name in ways}
    of = {name: step_memory_mb(module, batch)["activations"] for name, module in modules.items()}
    return {"ratio": of["ours"] / of["published"], "of": of, "unit": "MB above the teacher's weights, activations"}


def figures(tiny: bool) -> dict[str, Any]:
    """Return this module's figures by name. With `tiny` they only show that the code runs."""
    rows = by_blocks(BLOCKS[:1] if tiny else BLOCKS)
    for row in rows:
        print("  ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True)
    return {
        "step_memory_ratio_of_paper_set": of_paper_set(),
        "memory_by_blocks": {"unit": "MB above the teacher's weights", "rows": rows},
    }


class RandomStream(Stream):
    """Batches of random samples of a size."""

    def __init__(self, size: Size) -> None:
        super().__init__(get_family("qwen_image"), DataConfig(), seed=1, batch_size=size.batch)
        self.size = size

    def captions(self, step: int) -> list[str]:
        return ["random numbers"] * self.batch_size

    def samples(self, step: int, rows: range, dropped: Sequence[bool]) -> tuple[Tensor, tuple[int, int], Conditions]:
        generator, count = self._generator(step), len(rows)
        conditions = {
            "prompt_embeds": torch.randn(count, self.size.text, TEXT_WIDTH, generator=generator),
            "prompt_embeds_mask": torch.ones(count, self.size.text, dtype=torch.bool),
        }
        latents = torch.randn(count, self.size.side**2, CHANNELS, generator=generator)
        return latents, (self.size.side, self.size.side), conditions


def by_calibration(size: Size, default: tuple[int, int] = DEFAULT, paper: tuple[int, int] = PAPER) -> dict[str, Any]:
    """Return the peak memory of detection above the teacher's weights, with two calibrations: (samples, noise levels).

    The larger one is also taken in one piece. That this finds the same intervals is asserted.
    """
    teacher, stream, config = make_teacher(size), RandomStream(size), MethodConfig(batch_size=size.batch)
    fits = list(fit_probes(stream.family, teacher, [stream(step) for step in range(8)], ridge=1e-6, bias=True))
    weights, biases = {fit.key: fit.weight for fit in fits}, {fit.key: fit.bias for fit in fits}
    probes = Probes(Probes.header_for({}), weights, biases, {})
    rows, tables = {}, {}
    for name, calibration, most in (
        ("default", default, lp._MOST_SAMPLES),
        ("paper", paper, lp._MOST_SAMPLES),
        ("paper, in one piece", paper, paper[0] * paper[1]),
    ):
        source = Teacher(stream.family, teacher, lambda chosen=calibration: stream.calibration(*chosen), lambda: probes)
        start = time.perf_counter()
        with patch.object(lp, "_MOST_SAMPLES", most), LiveBytes() as recorder:
            found = load_method(config).detect(source)
        values = [value for row in found.curves[STACK]["mean"] for value in row if value is not None]
        tables[name] = torch.tensor(values, dtype=torch.float64)
        rows[name] = {
            "samples": calibration[0],
            "noise_levels": calibration[1],
            "peak_mb": recorder.peak / 1e6,
            "seconds": time.perf_counter() - start,
            "intervals": found.intervals[STACK],
        }
        print(json.dumps({name: rows[name]}), flush=True)
    assert rows["paper"]["intervals"] == rows["paper, in one piece"]["intervals"]
    of = {name: rows[name]["peak_mb"] for name in ("paper", "default")}
    return {
        "ratio": of["paper"] / of["default"],
        "of": of,
        "unit": "MB above the teacher's weights",
        "blocks": size.num_layers,
        "channels": size.width,
        "largest_difference_of_similarities": (tables["paper"] - tables["paper, in one piece"]).abs().max().item(),
        "rows": rows,
    }


if __name__ == "__main__":
    result = by_calibration(Size(num_layers=60, heads=1, side=8, text=16, batch=16))
    print(json.dumps(result, indent=2))
    write_json(HERE / "calibration.json", result, checked=False)
