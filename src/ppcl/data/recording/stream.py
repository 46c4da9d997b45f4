"""Batches of recorded calls, made without loading the pipeline that was recorded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from ppcl.data.batches import TrainingBatch, own_rows
from ppcl.data.cached import held_out_keys
from ppcl.data.recording.files import ARGUMENTS, OUTPUT, Entry, read_call, read_entries, read_joining
from ppcl.data.recording.nested import joined
from ppcl.data.streams import Stream
from ppcl.errors import UsageError
from ppcl.families.base import Family


class RecordedStream(Stream):
    """Batches of a pipeline's own calls, as it made them; their target is the teacher's recorded output.

    `count`: the number of prompts. `share`: the share of them that is kept from training. `held_out`: whether to use
    these, or all others.

    A batch of a step has calls of one shape in groups of `group` calls, which is the largest divisor of `batch_size`
    that no shape has fewer calls than. Where calls cannot be joined it is 1. Calls that do not fill a group wait for
    the next epoch, which is shuffled anew.

    Raises `UsageError` if there are no calls.
    """

    def __init__(
        self,
        family: Family,
        folder: Path,
        count: int,
        share: float,
        seed: int,
        batch_size: int,
        *,
        held_out: bool,
    ) -> None:
        super().__init__(family, seed, batch_size)
        self.axes = read_joining(folder).axes
        entries = read_entries(folder, count, self.axes)
        captions = {entry.caption for entry in entries}
        kept = kept_captions(captions, share)
        self.entries = [entry for entry in entries if (entry.caption in kept) == held_out]
        if not self.entries:
            raise UsageError(
                f"data.held_out={share:g} keeps all of {len(captions)} different prompts from training: add prompts to "
                "data.path, and run 'stages=[cache]' again."
            )
        self.buckets: dict[str, list[Entry]] = {}
        for entry in self.entries:
            self.buckets.setdefault(entry.alike, []).append(entry)
        fewest = min(map(len, self.buckets.values())) if self.axes is not None else 1
        self.group = max(size for size in range(1, batch_size + 1) if batch_size % size == 0 and size <= fewest)
        self._groups_per_epoch = sum(len(bucket) // self.group for bucket in self.buckets.values())
        if self.group < batch_size:
            self.remark = f"each batch of {batch_size} has groups of {self.group} recorded calls of one shape"

    @lru_cache(maxsize=2)  # noqa: B019 - streams live as long as a stage
    def _epoch(self, epoch: int) -> list[list[Entry]]:
        """Return the groups of an epoch, shuffled by `seed` and the epoch's number."""
        rng, groups = np.random.default_rng([self.seed, epoch]), []
        for alike in sorted(self.buckets):
            bucket = self.buckets[alike]
            found = [bucket[index] for index in rng.permutation(len(bucket))]
            whole = len(found) // self.group * self.group
            groups += [found[start : start + self.group] for start in range(0, whole, self.group)]
        return [groups[index] for index in rng.permutation(len(groups))]

    def _of_step(self, step: int) -> list[Entry]:
        """Return the `batch_size` calls of a step, group after group."""
        groups = self.batch_size // self.group
        places = (divmod(number, self._groups_per_epoch) for number in range(step * groups, (step + 1) * groups))
        return [entry for epoch, place in places for entry in self._epoch(epoch)[place]]

    def captions(self, step: int) -> list[str]:
        return [entry.caption for entry in self._of_step(step)]

    def names(self, steps: Iterable[int]) -> set[str]:
        """Return the names of the different calls in batches `steps`."""
        return {entry.name for step in steps for entry in self._of_step(step)}

    def divided(self, step: int, parts: int) -> list[TrainingBatch]:
        """Return this rank's calls of a step as batches of equal size: `parts`, or more where not all can be joined."""
        entries, rows = self._of_step(step), own_rows(self.batch_size, self.share)
        size = math.gcd(self.group, len(rows) // parts)
        batches = [self._batch(entries[start : start + size]) for start in range(rows.start, rows.stop, size)]
        return self._with_tokens(batches) if len(batches) > 1 else batches

    def calibration(self, num_samples: int, num_timesteps: int) -> Iterator[TrainingBatch]:
        """Yield `num_samples` * `num_timesteps` recorded calls, or all if they are fewer, from high to low noise.

        They are spread evenly over all calls in the order of their noise levels.
        """
        ordered = sorted(self.entries, key=lambda entry: (-entry.sigma, entry.name))
        total, most = min(len(ordered), num_samples * num_timesteps), 1 if self.axes is None else self.batch_size
        chosen = [ordered[place * len(ordered) // total] for place in range(total)]
        for start in range(0, total, num_samples):
            level: dict[str, list[Entry]] = {}
            for entry in chosen[start : start + num_samples]:
                level.setdefault(entry.alike, []).append(entry)
            for alike in level.values():
                for first in range(0, len(alike), most):
                    yield self._batch(alike[first : first + most])

    def example(self, ratio: float) -> TrainingBatch:
        """Return a batch of the call whose noise level is nearest to 0.5: what is timed, not what is learnt from."""
        return self._batch([min(self.entries, key=lambda entry: (abs(entry.sigma - 0.5), entry.name))])

    def _batch(self, entries: Sequence[Entry]) -> TrainingBatch:
        """Return calls of one shape as one batch."""
        calls, axes = [read_call(entry.record, entry.number) for entry in entries], self.axes or {}
        inputs = joined([dict(call.arguments) for call in calls], axes, ARGUMENTS)
        output = self.family.as_tensor(joined([call.output for call in calls], axes, OUTPUT))
        target = output[:, : calls[0].used]
        rows = len(target) // len(calls)
        sigmas = torch.tensor([call.sigma for call in calls]).repeat_interleave(rows)
        shared = self.share[1] > 1
        return TrainingBatch(inputs, target, sigmas, divided=shared, as_tensor=self.family.as_tensor, teacher=target)


def kept_captions(captions: Iterable[str], share: float) -> set[str]:
    """Return those of the `captions` of all prompts that are kept from training."""
    return held_out_keys(sorted({*captions}), share)
