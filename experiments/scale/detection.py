"""Time detection against three plain ways to detect intervals, with the same probes and batches.

Ours computes cka(u, k) of the surrogate (Eq. 3) from activations that it keeps. The others find the same intervals:
- `forwards`: for every u < k, replace blocks u + 1 to k by their probes, and run the model up to block k.
- `forwards, walk`: the same, but only for the pairs that Algorithm 1 visits. It gives no complete curves to draw.
- `chain`: run the teacher once. For every u, apply probes u + 1, u + 2, .. in turn to its output at block u.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import ppcl
from experiments.common import make_run
from experiments.scale.measure import in_turns, speedup
from experiments.scale.models import STACK
from ppcl.artifacts.plan import Interval
from ppcl.artifacts.probes import Probes
from ppcl.context import Run
from ppcl.data.batches import TrainingBatch
from ppcl.methods.base import Teacher
from ppcl.methods.registry import load_method
from ppcl.ops.cka import centre, cka
from ppcl.taps import BlockCall, Streams, observe

ROUNDS = 3
TIMESTEPS = 4  # half of the default; the time of every way is proportional to it


class ProbeBlock(nn.Module):
    """Replaces a block by its linear probes, one for each stream."""

    def __init__(self, probes: Probes, index: int) -> None:
        super().__init__()
        for stream in ("image", "text"):
            key = f"{STACK}.{index}.{stream}"
            self.register_buffer(f"{stream}_map", torch.eye(len(probes.weights[key])) + probes.weights[key].T)
            self.register_buffer(f"{stream}_bias", probes.biases[key])

    def forward(self, *, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        return (
            encoder_hidden_states @ self.text_map + self.text_bias,
            hidden_states @ self.image_map + self.image_bias,
        )


class Surrogates:
    """Computes cka(u, k) plainly, by running surrogates. The value is a mean over streams, samples and noise levels."""

    def __init__(self, run: Run, probes: Probes, batches: list[TrainingBatch]) -> None:
        self.family, self.batches = run.family, batches
        self.model: Any = run.teacher.pipeline.transformer
        self.blocks = list(getattr(self.model, STACK))
        self.probes = [ProbeBlock(probes, index) for index in range(len(self.blocks))]

    def similarity(self, batch: TrainingBatch, before: Streams, after: Streams) -> Tensor:
        """Return the CKA `[B]` of two blocks' outputs, a mean over the streams."""
        masks = self.family.masks(batch.inputs)
        pairs = (
            (centre(before[name].double(), mask), centre(after[name].double(), mask)) for name, mask in masks.items()
        )
        return torch.stack([cka(x, y) for x, y in pairs]).mean(dim=0)

    @torch.no_grad()
    def by_forward(self, u: int, k: int) -> float:
        """Return cka(u, k) from a forward pass of the model with blocks u + 1 to k replaced by probes."""
        arranged = [*self.blocks[: u + 1], *self.probes[u + 1 : k + 1], *self.blocks[k + 1 :]]
        found = []
        self.model.transformer_blocks = nn.ModuleList(arranged)
        for batch in self.batches:
            outputs: dict[int, Streams] = {}

            def keep(call: BlockCall, outputs: dict[int, Streams] = outputs) -> None:
                if call.index in (u, k):
                    outputs[call.index] = call.outputs

            observe(self.family, self.model, batch.inputs, keep, last=(STACK, k))
            found.append(self.similarity(batch, outputs[u], outputs[k]))
        self.model.transformer_blocks = nn.ModuleList(self.blocks)
        return torch.cat(found).mean().item()

    @torch.no_grad()
    def by_chain(self) -> dict[Interval, float]:
        """Return cka(u, k) for every pair u < k, from one forward pass of the teacher for each batch."""
        found: dict[Interval, list[Tensor]] = {}
        for batch in self.batches:
            outputs: dict[int, Streams] = {}
            observe(self.family, self.model, batch.inputs, lambda call, o=outputs: o.update({call.index: call.outputs}))
            for u, before in outputs.items():
                text, image = before["text"], before["image"]
                for k in range(u + 1, len(self.blocks)):
                    text, image = self.probes[k](hidden_states=image, encoder_hidden_states=text)
                    found.setdefault((u, k), []).append(self.similarity(batch, before, {"image": image, "text": text}))
        return {pair: torch.cat(values).mean().item() for pair, values in found.items()}


def figures(tiny: bool) -> dict[str, Any]:
    """Return this module's figures by name. With `tiny` they only show that the code runs."""
    settings = ("method.min_cka=0.9945", "trainer=cpu", "trainer.progress=false", "stages=[probe]")
    ppcl.run(["name=bench/detection", *settings])
    run = make_run("bench/detection", *settings)
    config, probes = run.config.method, Probes.load(run.probe_folder)
    samples, timesteps = (2, 2) if tiny else (config.num_samples, TIMESTEPS)
    batches = list(run.data.stream(run.config.data.calibration_seed, config.batch_size).calibration(samples, timesteps))
    surrogates, count = Surrogates(run, probes, batches), len(run.teacher.pipeline.transformer.transformer_blocks)
    intervals: dict[str, list[Interval]] = {}

    def walk(curve: Callable[[int, int], float]) -> list[Interval]:
        method: Any = load_method(config)
        return method.find_intervals(lambda u, k: 1.0 if u == k else curve(u, k), count)

    def ours() -> list[Interval]:
        teacher = Teacher(run.family, run.teacher.pipeline.transformer, lambda: batches, lambda: probes)
        return load_method(config).detect(teacher).intervals[STACK]

    def forwards() -> list[Interval]:
        table = {(u, k): surrogates.by_forward(u, k) for u, k in every_pair(count)}
        return walk(lambda u, k: table[u, k])

    def forwards_of_walk() -> list[Interval]:
        table: dict[Interval, float] = {}

        def curve(u: int, k: int) -> float:
            if (u, k) not in table:
                table[u, k] = surrogates.by_forward(u, k)
            return table[u, k]

        return walk(curve)

    def chain() -> list[Interval]:
        table = surrogates.by_chain()
        return walk(lambda u, k: table[u, k])

    def timed(name: str, way: Callable[[], list[Interval]]) -> list[float]:
        start = time.perf_counter()
        intervals[name] = way()
        return [time.perf_counter() - start]

    ways = {"ours": ours, "forwards": forwards, "forwards, walk": forwards_of_walk, "chain": chain}
    turns = {name: lambda name=name, way=way: timed(name, way) for name, way in ways.items()}
    seconds = in_turns(turns, 1 if tiny else ROUNDS)
    for name, found in intervals.items():
        assert found == intervals["ours"], f"{name} finds {found}, ours {intervals['ours']}"
    unit = "seconds"
    return {
        "detect_speedup": speedup(seconds, "forwards", "ours", unit),
        "detect_speedup_of_walk": speedup(seconds, "forwards, walk", "ours", unit),
        "detect_speedup_of_chain": speedup(seconds, "chain", "ours", unit),
        "detect": {
            "model": "embedded:tiny_qwen_image",
            "blocks": count,
            "batches": len(batches),
            "samples_a_batch": len(batches[0].sigmas),
            "intervals": intervals["ours"],
            "seconds": seconds,
        },
    }


def every_pair(count: int) -> Iterator[Interval]:
    """Return all pairs u < k of `count` blocks."""
    return ((u, k) for u in range(count) for k in range(u + 1, count))
