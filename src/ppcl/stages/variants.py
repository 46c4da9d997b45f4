"""The variants of a model that are drawn and scored side by side, as arrangements of one plugboard."""

from __future__ import annotations

from dataclasses import dataclass, field

from ppcl.artifacts import Plug, load_plugs, plug_name
from ppcl.errors import UsageError
from ppcl.stages.run import Run
from ppcl.surgery.depth import Plugboard, load_student


@dataclass(frozen=True)
class Variant:
    """Intervals that are students, and intervals that are cut to their first block; the rest is teacher."""

    name: str
    students: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)


def required_plugs(run: Run) -> dict[str, Plug]:
    """The trained student of every interval of this run, by name."""
    plugs = load_plugs(run.folder / "plugs")
    names = [plug_name(stack, pair) for stack, pairs in run.intervals.items() for pair in pairs]
    missing = [name for name in names if name not in plugs]
    if missing:
        raise UsageError(f"{run.folder / 'plugs'} has no student for {', '.join(missing)}; run stages=[depth] first.")
    for name in names:
        if plugs[name].header.made_from["model"] != run.model_identity:
            raise UsageError(
                f"plug {name} in {run.folder / 'plugs'} was distilled from another teacher than "
                f"model.path={run.config.model.path}: give this run another name=."
            )
    return {name: plugs[name] for name in names}


def cost(plug: Plug) -> float:
    """Held-out distillation loss per block saved: what plugging this student in costs."""
    u, v = plug.interval
    return plug.losses["heldout_loss"] / (v - u)


def variants_of(run: Run) -> tuple[list[Variant], dict[str, Plug]]:
    """The configured variants, and the plugs they use; reads no model."""
    names = run.config.generate.variants
    plugs = required_plugs(run) if any(name.startswith("ppcl") for name in names) else {}
    every = [plug_name(stack, pair) for stack, pairs in run.intervals.items() for pair in pairs]
    cheapest = sorted(plugs, key=lambda name: cost(plugs[name]))
    share = max(1, round(len(cheapest) * run.config.generate.plug_fraction))
    known = {
        "teacher": Variant("teacher"),
        "removed": Variant("removed", removed=every),
        "ppcl-depth": Variant("ppcl-depth", students=list(plugs)),
        "ppcl-mixed": Variant("ppcl-mixed", students=sorted(cheapest[:share], key=every.index)),
    }
    return [known[name] for name in names], plugs


def make_board(run: Run, plugs: dict[str, Plug]) -> Plugboard:
    """The plugboard over the loaded teacher, with the students that `plugs` hold."""
    transformer = run.pipeline.transformer
    students = {name: load_student(run.family, transformer, plug) for name, plug in plugs.items()}
    return Plugboard(run.family, transformer, run.intervals, students)
