"""Batches of recorded calls, made without loading the pipeline that was recorded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppcl.config import DataConfig
from ppcl.data.batches import TrainingBatch, own_rows
from ppcl.data.cached import held_out_keys
from ppcl.data.recording.files import (
    ARGUMENTS,
    OUTPUT,
    Call,
    Entry,
    read_call,
    read_entries,
    read_joining,
    read_latents,
)
from ppcl.data.recording.nested import Axes, joined
from ppcl.data.recording.passes import row_of_call, with_passes
from ppcl.data.recording.renoise import Renoising
from ppcl.data.streams import Stream
from ppcl.errors import UsageError
from ppcl.families.base import Family
from ppcl.ops import flow_matching

_GROUPS = 8  # of a step, at least, where it has as many calls
_CAPTIONS = 5  # at least, to keep whole captions from training
_CALIBRATION = 1 << 31  # in place of a step, which is smaller, in the seeds of a calibration's noise


class RecordedStream(Stream):
    """Batches of a pipeline's own calls, as it made them; their target is the teacher's recorded output.

    `count`: the number of prompts. `share`: the share of them that is kept from training. `held_out`: whether to use
    these, or all others. `unguided`: the share of calls with the text that all prompts share, for classifier-free
    guidance.

    The batch of a step has groups of `group` calls of one shape. Each shape has its share of the groups of every few
    steps: a step of unguided calls alone, which all have the same text, would undo what those before it have learnt.
    `group` is the largest divisor of `batch_size` that no shape has fewer calls than, and of several shapes one that
    leaves 8 groups. Where calls cannot be joined it is 1. Calls that do not fill a group wait for the next epoch,
    which is shuffled anew.

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
        unguided: float,
    ) -> None:
        super().__init__(family, seed, batch_size)
        self.joining = read_joining(folder)
        self.axes = self._axes_of_batches()
        entries = with_passes(read_entries(folder, count, self.joining.axes), self.joining)
        captions = {entry.prompt: entry.caption for entry in entries}
        kept = kept_prompts([captions[prompt] for prompt in range(count)], share)
        self.entries = [entry for entry in entries if (entry.prompt in kept) == held_out]
        if not self.entries:
            raise UsageError(
                f"data.held_out={share:g} keeps all of {count} prompts from training: add prompts to data.path, and "
                "run 'stages=[cache]' again."
            )
        self.guided = [entry for entry in self.entries if not entry.unguided] or self.entries
        self._kept = _kept_of(self.entries, unguided)
        self.buckets: dict[str, list[Entry]] = {}
        for entry in self.entries:
            if self._kept[entry.unguided]:
                self.buckets.setdefault(entry.alike, []).append(entry)
        fewest = min(map(len, self.buckets.values())) if self.axes is not None else 1
        most = min(fewest, batch_size if len(self.buckets) == 1 else max(1, batch_size // _GROUPS))
        self.group = max(size for size in range(1, most + 1) if batch_size % size == 0)
        self._groups_per_epoch = len(self._epoch(0))
        if self.group < batch_size:
            self.remark = f"each batch of {batch_size} has groups of {self.group} recorded calls of one shape"

    def _axes_of_batches(self) -> Axes | None:
        """Return the axes along which calls are joined; None if they are taken one by one."""
        return self.joining.axes

    @lru_cache(maxsize=2)  # noqa: B019 - streams live as long as a stage
    def _epoch(self, epoch: int) -> list[list[Entry]]:
        """Return the groups of an epoch, shuffled by `seed` and its number, and those of each shape evenly spaced."""
        rng, groups = np.random.default_rng([self.seed, epoch]), list[tuple[float, list[Entry]]]()
        for alike in sorted(self.buckets):
            found = self._drawn(self.buckets[alike], rng)
            count, start = len(found) // self.group, rng.random()
            places = ((number + start) / max(1, count) for number in range(count))
            own = (found[number * self.group : (number + 1) * self.group] for number in range(count))
            groups += zip(places, own, strict=True)
        return [group for _, group in sorted(groups, key=itemgetter(0))]

    def _drawn(self, bucket: Sequence[Entry], rng: np.random.Generator) -> list[Entry]:
        """Return the calls of one shape that an epoch takes, shuffled: of each pass of guidance its part, rounded up.

        They are a group at least.
        """
        room = {which: math.ceil(part * _count(bucket, which)) for which, part in self._kept.items()}
        taken, left = list[Entry](), list[Entry]()
        for index in rng.permutation(len(bucket)):
            entry = bucket[index]
            room[entry.unguided] -= 1
            (left if room[entry.unguided] < 0 else taken).append(entry)
        taken += left[: max(0, self.group - len(taken))]
        return [taken[index] for index in rng.permutation(len(taken))]  # else the rarer pass came first

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
        calls = [self._call(entries[row], step, row) for row in rows]
        batches = [self._batch(calls[start : start + size]) for start in range(0, len(calls), size)]
        return self._with_tokens(batches) if len(batches) > 1 else batches

    def calibration(self, num_samples: int, num_timesteps: int) -> Iterator[TrainingBatch]:
        """Yield `num_samples` * `num_timesteps` guided calls, or all if they are fewer, from high to low noise.

        They are spread evenly over all calls in the order of their noise levels.
        """
        ordered = sorted(self.guided, key=lambda entry: (-entry.sigma, entry.name))
        total = min(len(ordered), num_samples * num_timesteps)
        chosen = [ordered[place * len(ordered) // total] for place in range(total)]
        for start in range(0, total, num_samples):
            yield from self._of_level([(entry, self._call(entry)) for entry in chosen[start : start + num_samples]])

    def _of_level(self, calls: Iterable[tuple[Entry, Call]]) -> Iterator[TrainingBatch]:
        """Yield calls of about one noise level as batches of calls of one shape, each with at most `batch_size`."""
        level: dict[str, list[Call]] = {}
        for entry, call in calls:
            level.setdefault(entry.alike, []).append(call)
        most = 1 if self.axes is None else self.batch_size
        for alike in level.values():
            for first in range(0, len(alike), most):
                yield self._batch(alike[first : first + most])

    def example(self, ratio: float) -> TrainingBatch:
        """Return a batch of the call whose noise level is nearest to 0.5: what is timed, not what is learnt from."""
        nearest = min(self.entries, key=lambda entry: (abs(entry.sigma - 0.5), entry.name))
        return self._batch([read_call(nearest.record, nearest.number)], as_recorded=True)

    def _call(self, entry: Entry, step: int = 0, row: int = 0) -> Call:
        """Return row `row` of batch number `step`, which is the call `entry`."""
        call = read_call(entry.record, entry.number)
        if entry.row is None:
            return call
        assert self.joining.axes is not None
        return row_of_call(call, self.joining.axes, self.joining.rows, entry.row)

    def _batch(self, calls: Sequence[Call], *, as_recorded: bool = True) -> TrainingBatch:
        """Return calls of one shape as one batch. `as_recorded`: whether their output is the teacher's."""
        axes = self.axes or {}
        inputs = joined([dict(call.arguments) for call in calls], axes, ARGUMENTS)
        output = joined([call.output for call in calls], axes, OUTPUT)
        target = self.family.as_tensor(output)[:, : calls[0].used] if as_recorded else output
        sigmas = torch.tensor([call.sigma for call in calls]).repeat_interleave(len(target) // len(calls))
        teacher = target if as_recorded else None
        shared, whole = self.share[1] > 1, isinstance(output, dict)
        return TrainingBatch(inputs, target, sigmas, shared, self.family.as_tensor, teacher=teacher, whole=whole)


class RenoisedStream(RecordedStream):
    """Batches of recorded calls with fresh noise: the final latents of a call's prompt at any noise level.

    `data`: says how often there is which noise level. `scheduler`: the config of the model's own, for data.shift=null.
    The target is the velocity n - x_0. Raises `UsageError` if the recording says that calls cannot be made so.
    """

    def __init__(self, *where: Any, data: DataConfig, scheduler: Mapping[str, Any], **settings: Any) -> None:
        self.data, self.scheduler = data, scheduler
        super().__init__(*where, **settings)

    @cached_property
    def renoising(self) -> Renoising:
        """How calls of this recording are made anew."""
        if self.joining.renoising is None:
            why = self.joining.as_recorded
            raise UsageError(f"data.renoise=true does not go with this model: {why}; leave it out.")
        return Renoising(**self.joining.renoising)

    def _axes_of_batches(self) -> Axes | None:
        axes = super()._axes_of_batches()
        together = axes is None or axes.get(self.renoising.timestep) is not None
        return axes if together else None  # all rows of a call share one timestep

    def _call(self, entry: Entry, step: int = 0, row: int = 0, sigma: float | None = None) -> Call:
        latents = read_latents(entry.record)
        seed = np.random.SeedSequence((self.seed, step, row)).generate_state(1, np.uint32)[0]
        generator = torch.Generator().manual_seed(int(seed))
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        if sigma is None:
            scheme = self.data.timesteps or "uniform"
            sigma = flow_matching.sample_sigmas(1, generator, scheme=scheme, shift=self._shift(latents)).item()
        noisy = flow_matching.interpolate(latents, noise, latents.new_full((len(latents),), sigma))
        call = super()._call(entry)
        velocity = flow_matching.velocity(latents, noise)
        rows = velocity.repeat(len(call.first_output) // len(latents), *[1] * (latents.ndim - 1))
        return Call(call.step, call.timestep, sigma, self.renoising.arguments(call, noisy, sigma), rows)

    def _batch(self, calls: Sequence[Call], *, as_recorded: bool = False) -> TrainingBatch:
        return super()._batch(calls, as_recorded=as_recorded)

    def _shift(self, latents: Tensor) -> float:
        shift = self.data.shift
        return flow_matching.shift_of(self.scheduler, latents.shape[1]) if shift is None else shift

    def calibration(self, num_samples: int, num_timesteps: int) -> Iterator[TrainingBatch]:
        """Yield `num_samples` guided calls, each at all noise levels of a denoising run of `num_timesteps` steps.

        See `LatentStream.calibration`.
        """
        count = min(num_samples, len(self.guided))
        chosen = [self.guided[place * len(self.guided) // count] for place in range(count)]
        terminal = self.scheduler.get("shift_terminal") or 0.0 if self.data.shift is None else 0.0
        for start in range(0, count, self.batch_size):
            some = chosen[start : start + self.batch_size]
            levels = flow_matching.levels_of_drawing(num_timesteps, self._shift(read_latents(some[0].record)), terminal)
            for sigma in levels:
                rows = enumerate(some, start=start)
                calls = ((entry, self._call(entry, _CALIBRATION, row, sigma)) for row, entry in rows)
                yield from self._of_level(calls)


def _count(entries: Iterable[Entry], unguided: bool) -> int:
    return sum(entry.unguided is unguided for entry in entries)


def _kept_of(entries: Sequence[Entry], share: float) -> dict[bool, float]:
    """Return the parts of the guided (False) and of the unguided calls (True) that make `share` of all unguided."""
    counts = {which: _count(entries, which) for which in (False, True)}
    if not all(counts.values()):
        return dict.fromkeys(counts, 1.0)
    wanted = {False: (1 - share) / counts[False], True: share / counts[True]}
    return {which: value / max(wanted.values()) for which, value in wanted.items()}


def kept_prompts(captions: Sequence[str], share: float) -> set[int]:
    """Return the numbers of the prompts that are kept from training. `captions`: those of all prompts.

    Prompts with one caption stay together, unless there are so few captions that one of them is more than a fifth.
    """
    together = len({*captions}) >= min(_CAPTIONS, len(captions))
    keys = [caption if together else f"{number} {caption}" for number, caption in enumerate(captions)]
    kept = held_out_keys(sorted({*keys}), share)
    return {number for number, key in enumerate(keys) if key in kept}
