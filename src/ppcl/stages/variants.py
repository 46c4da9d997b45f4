"""The variants of a model that are drawn and scored side by side, as arrangements of one plugboard."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ppcl.artifacts import Plug, load_plugs
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
    names = [f"{stack}.{u}-{v}" for stack, pairs in run.intervals.items() for u, v in pairs]
    missing = [name for name in names if name not in plugs]
    if missing:
        raise UsageError(f"{run.folder / 'plugs'} has no student for {', '.join(missing)}; run stages=[depth] first.")
    return {name: plugs[name] for name in names}


def cost(plug: Plug) -> float:
    """Held-out distillation loss per block saved: what plugging this student in costs."""
    u, v = plug.interval
    return plug.losses["heldout_loss"] / (v - u)


def make_board(run: Run) -> tuple[Plugboard, list[Variant], dict[str, Plug]]:
    """The plugboard over the loaded teacher, the configured variants, and the plugs they use."""
    names = run.config.generate.variants
    needs_students = any(name.startswith("ppcl") for name in names)
    plugs = required_plugs(run) if needs_students else {}
    transformer = run.pipeline.transformer
    students: dict[str, Any] = {name: load_student(run.family, transformer, plug) for name, plug in plugs.items()}
    board = Plugboard(run.family, transformer, run.intervals, students)
    cheapest = sorted(plugs, key=lambda name: cost(plugs[name]))
    share = max(1, round(len(cheapest) * run.config.generate.plug_fraction))
    known = {
        "teacher": Variant("teacher"),
        "removed": Variant("removed", removed=board.names),
        "ppcl-depth": Variant("ppcl-depth", students=list(plugs)),
        "ppcl-mixed": Variant("ppcl-mixed", students=sorted(cheapest[:share], key=board.names.index)),
    }
    return board, [known[name] for name in names], plugs
