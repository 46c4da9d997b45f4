"""Measure the cost in quality and the savings of every plug (student, removal or projector).

They are measured once, on one model, and stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.artifacts.costs import COSTS, Costs, Frontier, Overlap, Point, TeacherCost, Unit, set_name
from ppcl.artifacts.files import check_finite
from ppcl.artifacts.headers import Header, is_current
from ppcl.artifacts.plan import projector_name
from ppcl.context import Run
from ppcl.data.batches import TrainingBatch, batch_numbers
from ppcl.efficiency import interleaved_latency_ms, peak_memory_mb
from ppcl.errors import UsageError
from ppcl.pictures.drawing import denoising_step
from ppcl.report.text import billions, show_frontier
from ppcl.streaming import MOST_ABREAST, is_streamed, wait_for_reads
from ppcl.surgery.plugboard import Plugboard
from ppcl.surgery.width import width_surgery
from ppcl.taps import BlockCall, BlockKey, Tapped, observe, observe_abreast, stack_of
from ppcl.variants.planner import NUM_POINTS, closure, frontier, greatest_saving, total_saving
from ppcl.variants.plugs import Plugs
from ppcl.variants.switch import Switch
from ppcl.variants.variants import distillation_loss

FIRST_BATCH = 100_000  # first batch of the calibration stream to measure on; nothing is fitted to batches this late


def find_units(plugs: Plugs) -> list[Unit]:
    """Return every plug as a unit of the planner, without costs and savings.

    A projector needs the student or removal that it was fitted in, and all plugs between its block and its reference.
    """
    shorter = [*plugs.students, *plugs.removals]
    units = [Unit(name) for name in shorter]
    starts = {(stack, interval[0]): name for name in shorter for stack, interval in [plugs.interval(name)]}
    for name, item in plugs.projectors.items():
        needs = [item.base] if item.base else []
        if item.reference is not None:
            between = range(item.reference, item.index)
            needs += [starts[item.stack, index] for index in between if (item.stack, index) in starts]
            needs += [
                other.name
                for other in plugs.projectors.values()
                if other.kind == "text" and other.stack == item.stack and other.index in between
            ]
        units.append(Unit(name, needs))
    return units


def velocity_error(
    transformer: nn.Module,
    batches: Sequence[TrainingBatch],
    targets: Sequence[Tensor],
    family: Tapped | None = None,
) -> float:
    """Return ||v - v_T||^2 / ||v_T||^2, summed over all batches, for the model's velocity v and the teacher's v_T.

    `targets`: the teacher's velocity for each batch, as `velocities` returns it. `family`: see there.
    """
    return relative_error(velocity_errors(transformer, batches, targets, family))


def relative_error(errors: Sequence[tuple[float, float]]) -> float:
    """Return the velocity error of all batches from those of each, as `velocity_errors` returns them."""
    square = sum(square for _, square in errors)
    return sum(error for error, _ in errors) / square if square else math.nan


@torch.no_grad()
def velocity_errors(
    transformer: nn.Module,
    batches: Iterable[TrainingBatch],
    targets: Sequence[Tensor],
    family: Tapped | None = None,
) -> list[tuple[float, float]]:
    """Return ||v - v_T||^2 and ||v_T||^2 of each batch, for the model's velocity v and the teacher's v_T."""
    found = []
    for velocity, target in zip(_predicted(transformer, batches, family), targets, strict=True):
        target = target.double()
        found.append(((velocity.double() - target).square().sum().item(), target.square().sum().item()))
    return found


def heldout_batches(run: Run) -> list[TrainingBatch]:
    """Return `budget.num_batches` held-out batches that nothing is fitted to, on the run's device."""
    size, parts = run.config.distill.batch_size, run.config.distill.accumulate
    stream = run.data.stream(run.config.data.calibration_seed, size)
    numbers = batch_numbers(size, FIRST_BATCH, FIRST_BATCH + run.config.budget.num_batches)
    return [run.data.to_device(batch) for number in numbers for batch in stream.divided(number, parts)]


@torch.no_grad()
def velocities(transformer: nn.Module, batches: Iterable[TrainingBatch], family: Tapped | None = None) -> list[Tensor]:
    """Return the velocity that a model predicts for each batch.

    `family`: that of a model whose blocks may be streamed. Up to eight batches then pass each block together, so that
    it is read once for all of them.
    """
    return list(_predicted(transformer, batches, family))


def _predicted(transformer: nn.Module, batches: Iterable[TrainingBatch], family: Tapped | None) -> Iterator[Tensor]:
    """Yield the velocity that a model predicts for each batch, as `velocities` returns it."""
    streamed = family is not None and any(map(is_streamed, family.blocks(transformer).values()))
    if family is None or not streamed:
        for batch in batches:
            yield batch.prediction(transformer(**batch.inputs))
        return
    rest = iter(batches)
    while group := list(islice(rest, MOST_ABREAST)):
        inputs, outputs = [batch.inputs for batch in group], dict[int, Any]()
        for _ in observe_abreast(family, transformer, inputs, size_keys="distill.accumulate", done=outputs.__setitem__):
            pass
        yield from (batch.prediction(outputs[number]) for number, batch in enumerate(group))


def _losses(plugs: Plugs, name: str) -> dict[str, float]:
    """Return the held-out distillation loss of a plug, or nothing if the plug was not trained by ppcl."""
    trained = plugs.students | plugs.projectors
    known = name in trained and "heldout_loss" in trained[name].losses
    return {"loss": distillation_loss(trained[name])} if known else {}


class ErrorMeter:
    """Measures the held-out velocity error of the model with different sets of plugs.

    `errors`: what was measured before, as in `Costs`. What is measured is added to it.
    """

    def __init__(self, run: Run, board: Plugboard, errors: dict[str, float] | None = None) -> None:
        self.run, self.board = run, board
        self.errors = {} if errors is None else errors
        self.errors[""] = 0.0  # of the teacher
        board()
        self.batches = heldout_batches(run)
        self.targets = velocities(board.transformer, self.batches, run.family)

    def error(self, names: set[str]) -> float:
        """Return the error with the plugs `names`. Errors are remembered."""
        key = set_name(names)
        if key not in self.errors:
            self.board()  # students are built beside the teacher's blocks
            self.board(*names)
            found = velocity_error(self.board.transformer, self.batches, self.targets, self.run.family)
            check_finite(found, "no costs are written", f"the velocity error with {', '.join(sorted(names))}")
            self.errors[key] = found
        return self.errors[key]


class Meter(ErrorMeter):
    """Measures also parameters, memory, and the time of the blocks that plugs change. Methods take sets of names."""

    def __init__(self, run: Run, board: Plugboard) -> None:
        super().__init__(run, board)
        self.teacher_params = self._count()
        self.calls: dict[BlockKey, dict[str, Any]] = {}
        self.step = denoising_step(run)

        def keep(call: BlockCall) -> None:
            self.calls[call.key] = call.kwargs

        with torch.no_grad():
            observe(run.family, board.transformer, self.step, keep)
        self.streamed = run.config.model.streaming
        self._times: dict[nn.Module, float] = {}
        if self.streamed:  # a forward would be timed with its reads
            self.teacher_ms = self._milliseconds(set())
        else:
            self.teacher_ms = interleaved_latency_ms({"teacher": self._forward}, 10)["teacher"]
        resident = sum(p.numel() * p.element_size() for p in board.transformer.parameters())
        self.bytes_per_param = resident / self.teacher_params
        self.memory_gb = peak_memory_mb(self._forward, resident, run.device) / 1e3

    @torch.inference_mode()
    def _forward(self) -> None:
        self.board.transformer(**self.step)

    def _count(self) -> int:
        return sum(parameter.numel() for parameter in self.board.transformer.parameters())

    def params(self, names: set[str]) -> int:
        """Return the number of parameters."""
        self.board(*names)
        return self._count()

    def _modules(self, names: set[str]) -> dict[BlockKey, tuple[nn.Module, dict[str, Any]]]:
        """Return every block of the model with these plugs, and arguments to call it with."""
        self.board(*names)
        found = {}
        for stack, kept in self.board.kept.items():
            text = self.board.width.get(stack, {}).get("text", [])
            for index, module in zip(kept, stack_of(self.board.transformer, stack), strict=True):
                arguments = self.calls[stack, index]
                if index in text:
                    plain = self.run.family.streams_in(stack, arguments, self.step)["text"]
                    arguments = width_surgery(self.run.family).with_text(arguments, plain, plain)
                found[stack, index] = module, arguments
        return found

    def milliseconds_saved(self, before: set[str], after: set[str], changed: set[BlockKey]) -> float:
        """Return the milliseconds by which the `changed` blocks are faster with plugs `after` than `before`."""
        if self.streamed:
            return self._milliseconds(before, changed) - self._milliseconds(after, changed)
        sides = {"before": self._modules(before), "after": self._modules(after)}

        def timed(side: str) -> Any:
            calls = [sides[side][key] for key in changed if key in sides[side]]

            @torch.inference_mode()
            def run_blocks() -> None:
                for module, arguments in calls:
                    module(**arguments)

            return run_blocks

        times = interleaved_latency_ms({side: timed(side) for side in sides}, 10)
        return times["before"] - times["after"]

    def _milliseconds(self, names: set[str], only: set[BlockKey] | None = None) -> float:
        """Return the milliseconds of the model's blocks with these plugs, or of those in `only`.

        Each block is timed by itself and once. A streamed one is read before that, in a call that is not timed.
        """
        total = 0.0
        for key, (module, arguments) in self._modules(names).items():
            if only is not None and key not in only:
                continue
            if module not in self._times:
                step = partial(module, **arguments)
                with torch.inference_mode():
                    step()
                    wait_for_reads(module)
                    self._times[module] = interleaved_latency_ms({"block": step}, 10)["block"]
            total += self._times[module]
        return total


def _changed_blocks(plugs: Plugs, name: str) -> set[BlockKey]:
    if name not in plugs.projectors:
        stack, (u, v) = plugs.interval(name)
        return {(stack, index) for index in range(u, v + 1)}
    return {(plugs.projectors[name].stack, plugs.projectors[name].index)}


def _measure_savings(meter: Meter, before: set[str], after: set[str], changed: set[BlockKey]) -> dict[str, float]:
    saved = meter.params(before) - meter.params(after)
    return {
        "params": saved,
        "memory_gb": saved * meter.bytes_per_param / 1e9,
        "latency_ratio": meter.milliseconds_saved(before, after, changed) / meter.teacher_ms,
    }


def _measure_units(run: Run, plugs: Plugs, meter: Meter) -> list[Unit]:
    units = find_units(plugs)
    for unit in run.track(units, "costs of plugs"):
        after = closure(units, [unit.name])
        before = after - {unit.name}
        unit.savings = _measure_savings(meter, before, after, _changed_blocks(plugs, unit.name))
        unit.costs = {"velocity": meter.error(after) - meter.error(before)} | _losses(plugs, unit.name)
    return units


def _measure_overlaps(run: Run, plugs: Plugs, units: list[Unit], meter: Meter) -> list[Overlap]:
    """Measure what a block's text and FFN projectors save in common: both remove the text stream's FFN."""
    by_name = {unit.name: unit for unit in units}
    overlaps = []
    for name, item in plugs.projectors.items():
        partner = projector_name(item.stack, item.index, "ffn")
        if item.kind != "text" or partner not in by_name:
            continue
        both = closure(units, [name, partner])
        together = _measure_savings(meter, both - {name, partner}, both, _changed_blocks(plugs, name))
        alone = by_name[name].savings, by_name[partner].savings
        overlaps.append(Overlap((name, partner), {key: sum(s[key] for s in alone) - together[key] for key in together}))
    return overlaps


def _measure_frontier(run: Run, units: list[Unit], overlaps: list[Overlap], meter: Meter) -> Frontier:
    points: Frontier = {}
    for cost in known_costs(units):
        choices = frontier(units, "params", cost, NUM_POINTS, overlaps)
        points[cost] = []
        for names in run.track(choices, f"frontier by {cost}"):
            points[cost].append(_point(units, overlaps, names, cost, meter))
    return points


def known_costs(units: Sequence[Unit]) -> list[str]:
    """Return the kinds of cost that every unit has."""
    return [cost for cost in COSTS if all(cost in unit.costs for unit in units)]


def _point(units: list[Unit], overlaps: list[Overlap], names: list[str], cost: str, meter: Meter) -> Point:
    chosen = [unit for unit in units if unit.name in names]
    params = meter.params(set(names))
    return Point(
        plugged=names,
        num_layers=sum(len(kept) for kept in meter.board.kept.values()),
        params=params,
        params_ratio=params / meter.teacher_params,
        latency_ratio=1 - total_saving(units, overlaps, names, "latency_ratio"),
        memory_gb=meter.memory_gb - total_saving(units, overlaps, names, "memory_gb"),
        predicted=sum(unit.costs[cost] for unit in chosen),
        velocity_error=meter.error(set(names)),
    )


def measure(run: Run, plugs: Plugs) -> Costs:
    """Return the costs and savings of every plug, and the frontier (cheapest choices by size) for each kind of cost.

    They are measured once and then read from disk, also from the run in `paths.base_run`. Raises `UsageError` if the
    file on disk was measured with other plugs or settings.
    """
    path, of_base = run.costs_paths
    made_from = {
        "model": run.teacher.identity,
        "plugs": plugs.fingerprints(plugs.names),
        **({"removed": list(plugs.removals)} if plugs.removals else {}),
        "layout": asdict(run.layout),
        "num_batches": run.config.budget.num_batches,
        "size": list(run.config.model.sampling.size),
        "data": run.data.identity,
    }
    header = Header("ppcl.costs", made_from)
    advice = f"add name=OTHER paths.base_run={run.base} to measure beside them, or delete that file to measure anew"
    if of_base != path and of_base.exists() and Costs.load(of_base).header.fingerprint == header.fingerprint:
        run.say("plan", f"reused {of_base}")
        return Costs.load(of_base)
    if is_current(path, header, advice):
        run.say("plan", f"reused {path}")
        return Costs.load(path)
    switch = Switch(run, plugs)
    meter = Meter(run, switch.board)
    units = _measure_units(run, plugs, meter)
    overlaps = _measure_overlaps(run, plugs, units, meter)
    teacher = TeacherCost(meter.teacher_params, meter.memory_gb, meter.teacher_ms)
    points = _measure_frontier(run, units, overlaps, meter)
    costs = Costs(header, teacher, units, overlaps, points, meter.errors)
    switch.restore()
    costs.save(path)
    _show(run, costs)
    run.say("plan", f"wrote {path}")
    return costs


def _show(run: Run, costs: Costs) -> None:
    """Print the frontier for `budget.cost`."""
    show_frontier(run, costs.frontier.get(run.config.budget.cost, costs.frontier["velocity"]))


def compare_costs(points: Frontier) -> float:
    """Return the velocity error of plans made with the cost `velocity`, relative to plans made with `loss`.

    It is the geometric mean over pairs of plans of similar size. Below 1 the cost `velocity` makes better plans.
    """
    ratios = []
    for ours in points["velocity"]:
        theirs = min(points["loss"], key=lambda other: abs(other.params - ours.params))
        if ours.velocity_error > 0 and theirs.velocity_error > 0:
            ratios.append(math.log(ours.velocity_error / theirs.velocity_error))
    return math.exp(sum(ratios) / len(ratios)) if ratios else 1.0


def target_of(
    name: str, value: float, teacher: TeacherCost, units: Sequence[Unit], overlaps: Sequence[Overlap] = ()
) -> float:
    """Return the saving that `budget.<name>=<value>` requires, in the units of `Unit.savings`.

    It is 0 or less if the teacher already meets the budget. Raises `UsageError`, which names the smallest possible
    budget, if all plugs together save too little.
    """
    whole = {"params": teacher.params, "memory_gb": teacher.memory_gb, "latency_ratio": 1.0}[name]
    allowed = value * whole if name == "params" and value <= 1 else value
    saving = whole - allowed
    most = greatest_saving(units, name, overlaps)

    def written(amount: float) -> str:
        if name == "params":
            return f"{amount / whole:.3f} ({billions(round(amount))})"
        return f"{amount:.3g}"

    if saving > most * (1 + 1e-9):
        raise UsageError(
            f"budget.{name}={value:g} is out of reach: with every plug in, {written(whole - most)} is left of the "
            f"teacher's {written(whole)}; raise the budget, or train more plugs: more intervals, or projectors "
            "(width=auto 'stages=[width,plan]')."
        )
    return saving
