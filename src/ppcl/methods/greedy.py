"""Greedy removal: remove blocks one at a time, and measure all that are left anew after each."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heapify, heapreplace
from math import fsum
from typing import Any

from ppcl.artifacts.files import check_finite
from ppcl.config import MethodConfig
from ppcl.data.batches import TrainingBatch
from ppcl.errors import UsageError
from ppcl.families.base import Family
from ppcl.methods.base import Teacher
from ppcl.methods.removal import Removal, Room, without
from ppcl.options import option
from ppcl.parallel import share
from ppcl.surgery.count import on_meta
from ppcl.taps import BlockKey
from ppcl.variants.costs import relative_error, velocities, velocity_errors


@dataclass
class Settings:
    """Settings of the search.

    `batches`: the number of calibration batches that an error is measured on, spread over the noise levels. None: all.
    `min_kept_between`: the fewest kept blocks between two removed ones of a stack. 0: neighbours may both go.
    """

    batches: int | None = option(None, least=1)
    min_kept_between: int = option(0, least=0)


class Greedy(Removal):
    """Removes the block whose removal leaves the least error of the velocity, and repeats that with what is left.

    The error is ||v - v_T||^2 / ||v_T||^2 over the calibration batches, for the velocity v without the removed blocks
    and the teacher's v_T. After each removal it is measured anew for every block that may still go. An error only grows
    from batch to batch, so a block is measured no further once another one has less on all batches. That changes no
    choice (`least_error`).

    `method.settings.min_kept_between` spreads the removals. A block is then passed over if its removal would
    put the size out of reach.

    Cost: Qwen-Image's 60 blocks reach 70% with 19 removals. If every error were measured on all batches, this would
    take 59 + 58 + ... + 41 = 950 measurements, which with the default calibration of 8 batches are 7,600 forwards of 16
    samples. The models get shorter, so these cost as much as 801 x 8 forwards of the teacher. One of these takes 129
    TFLOP a sample at 1328 x 1328 pixels (counted, not timed), which is 0.4 s at 320 TFLOP/s: 11 hours on one H100. On
    the shipped teachers 34% to 50% of such forwards were needed, so expect 4 to 6. `explain=true` says 42, since it
    takes each token through both streams' weights, at 200 TFLOP/s, and all forwards. Several ranks divide the batches.
    """

    settings_class = Settings
    divides = True

    def __init__(self, config: MethodConfig) -> None:
        super().__init__(config)
        if between := self.settings.min_kept_between:
            self.most_what = f"blocks that may be removed with method.settings.min_kept_between={between}"

    @classmethod
    def check(cls, config: MethodConfig) -> None:
        super().check(config)
        method = cls(config)
        asked, there = method.settings.batches, method.num_batches
        if asked is not None and asked > there:
            raise UsageError(
                f"method.settings.batches={asked} exceeds the {there} calibration batches that there are: lower it, or "
                "raise method.num_samples or method.num_timesteps."
            )

    @property
    def num_held(self) -> int:
        """The number of calibration batches that an error is measured on."""
        return self.settings.batches or self.num_batches

    def passes(self, family: Family, layers: Mapping[str, int]) -> float:
        room = Room.of(self.config, family, layers, lambda: on_meta(family, family.arch))
        free, whole = len(room.blocks), sum(layers.values())
        rounds = range(len(room.first_enough(room.blocks)))
        measured = sum((free - gone) * (whole - gone - 1) / whole for gone in rounds)
        return (1 + measured) * self.num_held / self.num_batches

    def most(self, room: Room) -> list[BlockKey]:
        return self._most_beside([], room)

    def _most_beside(self, removed: Sequence[BlockKey], room: Room) -> list[BlockKey]:
        """Return the blocks that may still go beside `removed`, as many parameters of them as possible."""
        between = self.settings.min_kept_between
        found: list[BlockKey] = []
        for stack, blocks in room.by_stack.items():
            gone = [index for other, index in removed if other == stack]
            free = [index for index in blocks if all(abs(index - other) > between for other in gone)]
            best: list[tuple[int, list[int]]] = [(0, [])]  # of the first 0, 1, ... free blocks: their size, and which
            for number, index in enumerate(free):
                size, chosen = best[bisect_left(free, index - between)]  # of those that are far enough before it
                taken = size + room.sizes.get((stack, index), 1), [*chosen, index]
                best.append(max(best[number], taken, key=lambda each: each[0]))
            found += [(stack, index) for index in best[-1][1]]
        return found

    def _candidates(self, removed: Sequence[BlockKey], room: Room) -> list[BlockKey]:
        """Return the blocks that may go next such that the size can still be reached."""
        between = self.settings.min_kept_between
        free = [
            (stack, index)
            for stack, index in room.blocks
            if all(stack != other or abs(index - gone) > between for other, gone in removed)
        ]
        return [key for key in free if room.enough([*removed, key, *self._most_beside([*removed, key], room)])]

    def _batches(self, teacher: Teacher) -> list[TrainingBatch]:
        """Return the calibration batches that errors are measured on, of several ranks those that are this one's."""
        number, ranks = share()
        there, levels, count = self.num_batches, self.config.num_timesteps, self.num_held
        by_level = sorted(range(there), key=lambda n: n % levels)  # the calibration yields the levels in turn
        chosen = {by_level[place * there // count] for place in range(count)}
        return [batch for n, batch in enumerate(teacher.calibration()) if number + n * ranks in chosen]

    def removed(self, teacher: Teacher, room: Room) -> tuple[list[BlockKey], dict[str, Any]]:
        transformer, batches = teacher.transformer, self._batches(teacher)
        targets = velocities(transformer, batches)
        square = sum(teacher.gathered(sum(target.double().square().sum().item() for target in targets)))
        order = [*range(max(teacher.gathered(len(batches))))]
        removed: list[BlockKey] = []
        errors: dict[str, float] = {}
        forwards = plain = 0

        def measure(key: BlockKey, step: int) -> float:
            """Return the squared error without this block, too, on the batches number `step` of all ranks."""
            mine = slice(step, step + 1)  # empty for a rank with fewer batches
            with without(transformer, [*removed, key]):
                found = velocity_errors(transformer, batches[mine], targets[mine])
            error = sum(teacher.gathered(sum(error for error, _ in found)))
            check_finite(error, "no block is chosen", f"the error of the velocity without block {_name(key)}")
            return error

        while not room.enough(removed):
            candidates = self._candidates(removed, room)
            chosen, parts, measured = least_error(candidates, order, measure, partial(_tracked, teacher))
            order.sort(key=lambda step: -parts[step])  # the next search begins with the batch that tells most
            forwards, plain = forwards + measured, plain + len(candidates) * len(order)
            removed.append(chosen)
            errors[_name(chosen)] = found = relative_error([(fsum(parts.values()), square)])
            check_finite(found, "no block is chosen", "the error of the velocity relative to its size")
            teacher.say(f"removed {_name(chosen)}: velocity error {found:.4g}")
        teacher.say(f"{forwards:,} forwards, of {plain:,} that it takes to measure every block on every batch")
        return removed, {"velocity_error": errors}


def _name(key: BlockKey) -> str:
    return f"{key[0]}.{key[1]}"


def _tracked(teacher: Teacher, keys: Sequence[BlockKey]) -> Iterable[BlockKey]:
    return teacher.progress(keys, len(keys) * share()[1])  # every rank measures every block


def least_error(
    candidates: Sequence[BlockKey],
    steps: Sequence[int],
    measure: Callable[[BlockKey, int], float],
    tracked: Callable[[Sequence[BlockKey]], Iterable[BlockKey]] = iter,
) -> tuple[BlockKey, dict[int, float], int]:
    """Return the block with the least sum of errors, its error on each step, and how many errors were measured.

    Every block is measured on the first step, and then always the one with the least sum so far on its next step.
    Errors are not negative. So when that block has been measured on all steps, no other can end below it, although most
    were measured on a few steps only. Of equal blocks it is the first.

    `measure`: returns the error of a block on a step. `tracked`: shows a progress bar while it yields the blocks.
    """
    found = [{steps[0]: measure(key, steps[0])} for key in tracked(candidates)]
    sums = [(parts[steps[0]], place) for place, parts in enumerate(found)]
    heapify(sums)
    while len(least := found[place := sums[0][1]]) < len(steps):
        step = steps[len(least)]
        least[step] = measure(candidates[place], step)
        heapreplace(sums, (fsum(least.values()), place))
    return candidates[place], least, sum(map(len, found))
