"""PPCL's detection: intervals end at the first inflection (paper Eq. 5, Algorithm 1 lines 4-15)."""

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
    """Eq. 5: the first k - 1 at which delta(u, k) > delta(u, k - 1), else `last`.

    `min_length` L looks for it from k = u + L on; the paper's rule is L = 2.
    """
    for k in range(u + min_length, last + 1):
        if delta(curve, u, k) > delta(curve, u, k - 1):
            return k - 1
    return last


class Lp(Method):
    """Walks over the similarities of linear surrogates. The ablations end intervals otherwise."""

    needs_probes = True

    def end_of(self, curve: Curve, u: int, last: int) -> int:
        """The last block of the interval that begins with u; no block behind `last` may be in one."""
        return first_inflection(curve, u, last, self.config.min_length)

    def finished(self, intervals: Sequence[Interval], last: int) -> list[Interval]:
        """The intervals as they are when all are found."""
        return list(intervals)

    def find_intervals(self, curve: Curve, num_layers: int) -> list[Interval]:
        """Algorithm 1: walk from `start`, end each interval by the rule, go on behind it.

        An interval whose surrogate's cka(u, v) lies below `min_cka` is left out and the walk goes on at
        u + 1: this is where the gaps come from that Eq. 5 alone never leaves.
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
                if len(outputs) == len(batches):  # all that this block gave
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
