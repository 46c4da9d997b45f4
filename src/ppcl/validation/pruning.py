"""Checks that intervals, width sets, plans and budgets fit the model and each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ppcl.artifacts.plan import (
    Interval,
    Intervals,
    PruningPlan,
    Width,
    plug_name,
    read_plug_name,
    read_projector_name,
)
from ppcl.config import Config
from ppcl.errors import UsageError
from ppcl.families.registry import FAMILIES, get_family
from ppcl.layers import check_counts, check_width_sets, kept_layers
from ppcl.methods.registry import load_method
from ppcl.validation.model import num_layers

_FEWEST = 1000  # parameters of a pruned model
_KEYS = ("transformer_blocks", "single_transformer_blocks")  # stacks with their own keys in `intervals` and `width`


def check_intervals(
    intervals: Intervals, layers: dict[str, int], where: str, first: int = 0, last: int = 0, *, named: bool = False
) -> None:
    """Raise `UsageError` unless every interval [u, v] has u < v, lies in its stack, and follows the one before it.

    `layers`: the number of blocks by stack. `where`: the key or file that gives the intervals, for the message.
        `first`,
    `last`: the family does not allow students before block `first`, nor intervals with one of a stack's `last` blocks.
    `named`: whether the intervals are given by name, for the message.
    """

    def place(stack: str, u: int, v: int) -> str:
        return f"{where}={plug_name(stack, (u, v))}" if named else f"{where}.{stack}: [{u}, {v}]"

    for stack, pairs in intervals.items():
        if stack not in layers:
            raise UsageError(f"{where}: the model has no block stack {stack} (it has {', '.join(layers)}).")
        previous: Interval = (-1, -1)
        for pair in pairs:
            if len(pair) != 2:
                raise UsageError(f"{where}.{stack}: {list(pair)} is not a pair [u, v].")
            u, v = pair
            here = place(stack, u, v)
            if u >= v:
                raise UsageError(f"{here} is reversed or empty; an interval needs u < v.")
            if u < 0 or v >= layers[stack]:
                raise UsageError(f"{here} is out of range; the model's blocks are 0 to {layers[stack] - 1}.")
            if u < first:
                raise UsageError(
                    f"{here} has a student in the place of block {u}, but blocks before {first} must stay the "
                    "teacher's in this family."
                )
            if v >= layers[stack] - last:
                raise UsageError(
                    f"{here} takes in block {v}, but from block {layers[stack] - last} on they must stay the teacher's "
                    "in this family."
                )
            if u <= previous[1]:
                raise UsageError(f"{here} overlaps or precedes {list(previous)}; intervals are disjoint and ordered.")
            previous = (u, v)


def check_plan(plan: PruningPlan, config: Config, path: Path) -> None:
    """Raise `UsageError` if the plan at `path` is for another family or depth, or if its intervals are invalid."""
    layers = num_layers(config)
    if plan.family != config.model.family or plan.num_layers != layers:
        raise UsageError(
            f"{path} was made for {plan.family} with {plan.num_layers}; model={config.model.name} is "
            f"{config.model.family} with {layers}."
        )
    facts = FAMILIES[config.model.family]
    check_intervals(plan.intervals, layers, str(path), facts.first_block, facts.last_blocks)


def _read_names(
    config: Config, key: str, names: Sequence[str], read: Callable[[str], Any], form: str, ending: str
) -> list[Any]:
    """Return what `read` makes of each name, in the order of stacks and blocks.

    `key`: the key that gives the `names`. `form`, `ending`: how a name is written, for the message. Raises `UsageError`
        for a malformed name, or for a stack that the model does not have.
    """
    stacks = FAMILIES[config.model.family].stacks
    found = []
    for name in names:
        parts = read(name)
        if parts is None:
            raise UsageError(f"{key}={name} is no name: write {form}, such as {next(iter(stacks))}.{ending}.")
        if parts[0] not in stacks:
            raise UsageError(f"{key}={name}: the model has no block stack {parts[0]} (it has {', '.join(stacks)}).")
        found.append(parts)
    return sorted(found, key=lambda parts: ([*stacks].index(parts[0]), *parts[1:]))


def _given_intervals(config: Config) -> tuple[Intervals, str | None]:
    """Return the intervals in the configuration, and the key that gives them (None if there are none)."""
    given: Intervals = {
        stack: [tuple(pair) for pair in pairs]  # type: ignore[misc]
        for stack in _KEYS
        if (pairs := getattr(config.intervals, stack)) is not None
    }
    names = config.intervals.names
    if names is None:
        return given, next((f"intervals.{stack}" for stack in given), None)
    if given:
        raise UsageError(f"intervals.names and intervals.{next(iter(given))} exclude each other: give all in one way.")
    for stack, pair in _read_names(config, "intervals.names", names, read_plug_name, "STACK.U-V", "3-4"):
        given.setdefault(stack, []).append(pair)
    return given, "intervals.names"


def resolve_intervals(config: Config) -> Intervals | None:
    """Return the intervals that the configuration gives, directly or in a plan; None if they are to be detected.

    Raises `UsageError` if they are invalid, of another family, or given in two ways.
    """
    given, key = _given_intervals(config)
    if config.intervals.source == "plan":
        if key is not None:
            raise UsageError(f"{key} and intervals=from_plan exclude each other: give one.")
        if config.intervals.path is None:
            raise UsageError("intervals=from_plan needs intervals.path, the JSON file of a pruning plan.")
        path = Path(config.intervals.path)
        plan = PruningPlan.load(path, "intervals.path: ")
        check_plan(plan, config, path)
        return plan.intervals
    if config.intervals.path is not None:
        raise UsageError(f"intervals.path={config.intervals.path} is read only with intervals=from_plan.")
    if key is None:
        return None
    if config.intervals.family not in (None, config.model.family):
        raise UsageError(
            f"these intervals are for family {config.intervals.family}, and model={config.model.name} is of family "
            f"{config.model.family}: give intervals for that model."
        )
    facts, named = FAMILIES[config.model.family], config.intervals.names is not None
    where = "intervals.names" if named else "intervals"
    layers = num_layers(config)
    check_intervals(given, layers, where, facts.first_block, facts.last_blocks, named=named)
    check_counts(facts.stacks, {stack: len(kept_layers(n, given.get(stack, []))) for stack, n in layers.items()})
    return given


def _given_width(config: Config) -> tuple[Width, str | None]:
    """Return the width sets in the configuration, and the key that gives them (None if there are none)."""
    given: Width = {
        stack: {"text": sorted(sets.text), "ffn": sorted(sets.ffn)}
        for stack in _KEYS
        if (sets := getattr(config.width, stack)).text or sets.ffn
    }
    names = config.width.names
    if names is None:
        return given, next((f"width.{stack}" for stack in given), None)
    if given:
        raise UsageError(f"width.names and width.{next(iter(given))} exclude each other: give all sets in one way.")
    form = "STACK.N.text or STACK.N.ffn"
    for stack, index, kind in _read_names(config, "width.names", names, read_projector_name, form, "3.ffn"):
        given.setdefault(stack, {"text": [], "ffn": []})[kind].append(index)
    return given, "width.names"


def resolve_width(config: Config) -> Width | None:
    """Return the width sets that the configuration gives, directly or in a plan; None if the stage is to select them.

    They are empty for `width=none`. Raises `UsageError` if they contradict `width.source` or are of another family.
    """
    settings = config.width
    given, key = _given_width(config)
    if key is not None and settings.source != "given":
        raise UsageError(f"{key} is read only with width.source=given; it is {settings.source}.")
    if settings.path is not None and settings.source != "plan":
        raise UsageError(f"width.path={settings.path} is read only with width=from_plan.")
    if settings.source == "auto":
        return None
    if settings.source == "plan":
        if settings.path is None:
            raise UsageError("width=from_plan needs width.path, the JSON file of a pruning plan.")
        path = Path(settings.path)
        plan = PruningPlan.load(path, "width.path: ")
        check_plan(plan, config, path)
        return plan.width
    if settings.source == "given":
        if not given:
            raise UsageError(
                "width.source=given needs sets: width.names=[...], or width.transformer_blocks.text=[...] and .ffn."
            )
        if settings.family not in (None, config.model.family):
            raise UsageError(
                f"these width sets are for family {settings.family}, and model={config.model.name} is of family "
                f"{config.model.family}: give sets for that model, or width=auto."
            )
    return given


def check_width(config: Config, width: Width, intervals: Intervals, where: str = "width") -> None:
    """Raise `UsageError` unless every block that `width` names is kept by `intervals` and can be pruned in width."""
    layers, known = num_layers(config), FAMILIES[config.model.family]
    for stack, sets in width.items():
        if stack not in layers:
            raise UsageError(f"{where}: the model has no block stack {stack} (it has {', '.join(layers)}).")
        if sets["text"] and stack not in known.text_stacks:
            raise UsageError(f"{where}.{stack}.text={sets['text']}: these blocks have no text stream of their own.")
        kept = kept_layers(layers[stack], intervals.get(stack, []))
        check_width_sets(stack, kept, sets["text"], sets["ffn"], where)


def check_method(config: Config) -> None:
    """Raise `UsageError` if the settings of `method` do not fit the model, which may have too few blocks."""
    method, facts = config.method, FAMILIES[config.model.family]
    if "detect" not in config.stages:
        return
    layers = num_layers(config)
    if method.end is not None and method.end <= method.start:
        raise UsageError(
            f"method.end={method.end} must be above method.start={method.start}: an interval has two blocks."
        )
    most = max(layers.values()) - 1 - facts.last_blocks
    if method.start >= most:
        raise UsageError(f"method.start={method.start} leaves no interval, which may contain blocks up to {most}.")
    if method.rule != "lp":  # which checks nothing, and loading it takes long
        found = load_method(method)
        found.check_model(get_family(config.model.family, config.model.arch), layers)
        unfit = "model.streaming=true" if config.model.streaming else "strategy=fsdp"
        if found.trains and (config.model.streaming or config.strategy.kind == "fsdp"):
            raise UsageError(
                f"method.rule={method.rule} trains with a whole teacher on each device, which {unfit} does not hold: "
                "detect in a command of its own, without it."
            )


def check_width_group(config: Config, intervals: Intervals | None) -> None:
    """Check the width sets against `intervals` and the stages; raises `UsageError`."""
    width = resolve_width(config)
    if width is not None:
        check_width(config, width, intervals or {})  # those that are to be detected only keep fewer blocks
    if config.width.source == "auto" and config.width.num_text == config.width.num_ffn == 0:
        raise UsageError("width.num_text=0 and width.num_ffn=0 leave nothing to prune: use width=none.")
    if config.width.source == "none" and "width" in config.stages:
        raise UsageError(
            "'stages=[width]' needs width sets: give width=auto, width=from_plan or width.source=given, or leave width "
            "out of stages."
        )
    drawn = config.generate.variants or [] if {"generate", "evaluate", "report"} & set(config.stages) else []
    if config.width.source == "none" and "ppcl-width" in [*drawn, config.export.variant]:
        raise UsageError("variant ppcl-width needs width sets: width=auto, width=from_plan or width.source=given.")


def budget_of(config: Config) -> tuple[str, float] | None:
    """Return name and value of the budget, such as (`params`, 0.6), or None; raises `UsageError` if two are set."""
    budget = config.budget
    found = {
        name: value for name in ("params", "memory_gb", "latency_ratio") if (value := getattr(budget, name)) is not None
    }
    if len(found) > 1:
        raise UsageError(
            f"budget.{' and budget.'.join(found)} are both set, and a plan serves one budget: add "
            f"budget.{next(iter(found))}=null, or the like for the other."
        )
    return next(iter(found.items()), None)


def check_budget(config: Config) -> None:
    """Raise `UsageError` if the budget is no size of a model, or if there are no weights to measure costs with."""
    budget = budget_of(config)
    if budget is not None and budget[0] == "params" and 1 < budget[1] < _FEWEST:
        raise UsageError(
            f"budget.params={budget[1]:g} is more than the whole model as a share, and too few as a number of "
            "parameters: write a share such as 0.6, or a number such as 6e9."
        )
    if budget is not None and config.model.path is None and not config.explain:
        raise UsageError(f"budget.{budget[0]} needs measurements: set model.path to a pipeline folder.")
