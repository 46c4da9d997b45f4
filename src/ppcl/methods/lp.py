"""PPCL's detection: an interval ends where its similarity first inflects (paper Eq. 5, Algorithm 1 lines 4-15)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor

from ppcl.artifacts.plan import Interval, Intervals
from ppcl.data.batches import TrainingBatch
from ppcl.methods.base import Detection, Method, Teacher
from ppcl.methods.surrogates import Curve, SurrogateCurves, blocks_with, delta, rows_of
from ppcl.taps import BlockCall, StopForward, Streams, free_bytes, observe, observe_abreast, stack_of

# The most samples in a part of the calibration. Reading a streamed teacher once for so many takes far less time than
# computing on them, so that larger parts would cost memory and save nothing.
_MOST_SAMPLES = 128


def first_inflection(curve: Curve, u: int, last: int, min_length: int = 2) -> int:
    """Return the end of the interval that begins at u (Eq. 5): the first k - 1 with delta(u, k) > delta(u, k - 1).

    Returns `last` if there is no such k up to it. The search begins at k = u + `min_length`; the paper's rule is 2.
    """
    for k in range(u + min_length, last + 1):
        if delta(curve, u, k) > delta(curve, u, k - 1):
            return k - 1
    return last


class Lp(Method):
    """Finds intervals by the similarity of the teacher to its linear surrogates. Subclasses change where they end."""

    reads: ClassVar[tuple[str, ...]] = ("stream", "debiased", "start", "end", "min_length", "min_cka")
    needs_probes = True
    divides = True

    def end_of(self, curve: Curve, u: int, last: int) -> int:
        """Return the last block of the interval that begins at u, at most `last`."""
        return first_inflection(curve, u, last, self.config.min_length)

    def finished(self, intervals: Sequence[Interval], last: int) -> list[Interval]:
        """Return the final intervals, given all that were found; subclasses may change them."""
        return list(intervals)

    def find_intervals(self, curve: Curve, num_layers: int) -> list[Interval]:
        """Return the intervals of a stack of `num_layers` blocks (Algorithm 1).

        The first interval may begin at `method.start`. Each ends by `end_of`, and the next begins after it. An interval
        with cka(u, v) below `method.min_cka` is rejected, and the search goes on at u + 1. These rejections leave gaps
        between intervals, as in the paper's printed sets; Eq. 5 alone leaves none.
        """
        config = self.config
        last = num_layers - 1 if config.end is None else min(config.end, num_layers - 1)
        intervals: list[Interval] = []
        u = config.start
        while u < last:
            v = self.end_of(curve, u, last)
            if v - u + 1 < config.min_length or curve(u, v) < config.min_cka:
                u += 1
                continue
            intervals.append((u, v))
            u = v + 1
        return self.finished(intervals, last)

    def detect(self, teacher: Teacher) -> Detection:
        layers = {stack: len(stack_of(teacher.transformer, stack)) for stack in teacher.family.stacks}
        curves = SurrogateCurves(teacher.probes(), layers, debiased=self.config.debiased)
        for _ in teacher.progress(_simulate(teacher, curves), self.num_batches * sum(layers.values())):
            pass
        curves.add_up(teacher.gathered)
        intervals: Intervals = {}
        scores: dict[str, dict[str, float]] = {}
        facts = teacher.family.facts
        for stack, count in layers.items():
            table = curves.mean(stack, self.config.stream)
            there, stop = blocks_with(table), count - facts.last_blocks
            if self.config.end is not None:
                stop = min(stop, self.config.end + 1)
            settings = replace(
                self.config, start=max(self.config.start, facts.first_block, there.start), end=min(stop, there.stop) - 1
            )

            def curve(u: int, k: int, table: Tensor = table) -> float:
                return table[u, k].item()

            intervals[stack] = type(self)(settings).find_intervals(curve, count)
            scores[stack] = {f"{u}-{v}": curve(u, v) for u, v in intervals[stack]}
        nested = {
            stack: {name: rows_of(curves.mean(stack, name)) for name in [*curves.streams(stack), "mean"]}
            for stack in layers
        }
        return Detection(intervals, {"cka": scores}, nested)


@torch.no_grad()
def _simulate(teacher: Teacher, curves: SurrogateCurves) -> Iterator[None]:
    """Add the calibration to `curves`, in parts that fit into memory, and yield after each call of a block."""
    batches = iter(teacher.calibration())
    part = list(islice(batches, 1))
    if not part:
        return  # there are fewer batches than ranks
    size = batches_at_once(teacher, curves, part[0])
    part += islice(batches, size - 1)
    while part:
        yield from run_once(teacher, curves, part)
        part = []  # frees its batches before the next ones are made
        part += islice(batches, size)


def batches_at_once(teacher: Teacher, curves: SurrogateCurves, batch: TrainingBatch, free: float | None = None) -> int:
    """Return how many batches like `batch` half of the free memory holds; the other half is for what a block computes.

    It does not depend on how many there are. The streams are measured in the first block that has an image. `free`: the
    bytes that are free; None: those of the batch's device.
    """
    streams: Streams = {}

    def measure(call: BlockCall) -> None:
        streams.update(call.outputs)
        if teacher.family.main_stream in call.outputs:
            raise StopForward

    observe(teacher.family, teacher.transformer, batch.inputs, measure)
    features = list(streams.values())
    needed = sum(each.nbytes for each in features) + max(map(curves.held_bytes, features))
    free = free_bytes(features[0].device) if free is None else free
    return max(1, int(min(_MOST_SAMPLES // len(features[0]), free / 2 / needed)))


def run_once(teacher: Teacher, curves: SurrogateCurves, batches: Sequence[TrainingBatch]) -> Iterator[None]:
    """Run the teacher once on `batches`, add the outputs of its blocks to `curves`, and yield after each call."""
    masks = [teacher.family.masks(batch.inputs) for batch in batches]
    inputs = [batch.inputs for batch in batches]
    outputs: list[Streams] = []
    for _, call in observe_abreast(teacher.family, teacher.transformer, inputs, size_keys="method.batch_size"):
        outputs.append(call.outputs)
        if len(outputs) == len(batches):  # this block has run on all of them
            curves.add(call.stack, call.index, outputs, masks)
            outputs = []
        yield
