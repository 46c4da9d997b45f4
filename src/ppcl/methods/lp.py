"""PPCL's detection: an interval ends where its similarity first inflects (paper Eq. 5, Algorithm 1 lines 4-15)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ppcl.artifacts.plan import Interval, Intervals
from ppcl.methods.base import Detection, Method, Teacher
from ppcl.methods.surrogates import Curve, SurrogateCurves, blocks_with, delta, rows_of
from ppcl.taps import Streams, observe_abreast, stack_of


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

    needs_probes = True

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
        batches = list(teacher.calibration())
        masks = [teacher.family.masks(batch.inputs) for batch in batches]
        with torch.no_grad():
            inputs = [batch.inputs for batch in batches]
            calls = observe_abreast(teacher.family, teacher.transformer, inputs, size_keys="method.num_samples")
            outputs: list[Streams] = []
            for _, call in teacher.progress(calls, len(batches) * sum(layers.values())):
                outputs.append(call.outputs)
                if len(outputs) == len(batches):  # this block has run on all batches
                    curves.add(call.stack, call.index, outputs, masks)
                    outputs = []
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
