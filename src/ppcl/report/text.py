"""Tables and lines that stages print."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from ppcl.artifacts.costs import Point
from ppcl.artifacts.plan import PruningPlan
from ppcl.artifacts.scores import ComparedRow
from ppcl.context import Run

# Names of variants are the same whatever method chose the intervals.
MEANINGS = {
    "teacher": "the whole model",
    "removed": "every interval cut to its first block",
    "ppcl-depth": "every student in, whatever method chose the intervals",
    "ppcl-mixed": "the students in that cost least",
    "ppcl-width": "every student, or removal, and every projector in",
    "ppcl-planned": "the budget's choice of these, or all of them without a budget",
    "ppcl-finetuned": "ppcl-planned, tuned",
    "ppcl-quantized": "an export with few bits a weight",
}


def billions(count: int) -> str:
    """20430401088 -> `20.430B`; 3029488 -> `3.029M`."""
    return f"{count / 1e9:.3f}B" if count >= 1e8 else f"{count / 1e6:.3f}M"


def in_bytes(size: float) -> str:
    """Return a size in bytes in the unit that fits: 812 -> `812 bytes`, 3.2e6 -> `3.20 MB`."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size >= factor:
            return f"{size / factor:.2f} {unit}"
    return f"{size:.0f} bytes"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 unit`, `3 units`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def show_plan(run: Run, plan: PruningPlan) -> None:
    """Print a plan: its intervals, and what is left of blocks and parameters."""
    counts = plan.parameters
    for stack, pairs in plan.intervals.items():
        run.say("plan", f"{stack}: {' '.join(f'[{u},{v}]' for u, v in pairs)}")
    for stack, sets in plan.width.items():
        for kind, indices in sets.items():
            if indices:
                run.say("plan", f"{stack} without {kind}: {' '.join(map(str, indices))}")
    layers = counts["teacher_layers"], counts["student_layers"]
    run.say("plan", f"blocks      {layers[0]} -> {layers[1]} ({layers[1] / layers[0]:.3f})")
    before = counts["teacher"]
    for step in ("depth", "text", "ffn") if "depth" in counts else ("student",):
        after, name = counts[step], "parameters" if step == "student" else step
        run.say("plan", f"{name:<11} {billions(before)} -> {billions(after)} ({after / counts['teacher']:.3f})")
        before = after


def show_scores(run: Run, rows: Sequence[ComparedRow]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("variant", "blocks", "params", "overall", "drop %", "ms/step", "peak MB"):
        table.add_column(title, justify="left" if title == "variant" else "right")
    for row in rows:
        table.add_row(
            row.name,
            str(row.num_layers),
            billions(row.params),
            f"{row.scores.overall:.3f}",
            f"{row.drop_percent:.1f}",
            f"{row.latency_ms:.1f}",
            f"{row.peak_memory_mb:.1f}",
        )
    run.console.print(table)
    run.say("evaluate", f"overall: {run.benchmark.label}")


def show_frontier(run: Run, points: list[Point]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("params", "ratio", "blocks", "plugs", "latency", "GB", "predicted", "velocity error"):
        table.add_column(title, justify="right")
    for point in points:
        table.add_row(
            billions(point.params),
            f"{point.params_ratio:.3f}",
            str(point.num_layers),
            str(len(point.plugged)),
            f"{point.latency_ratio:.3f}",
            f"{point.memory_gb:.3g}",
            f"{point.predicted:.4f}",
            f"{point.velocity_error:.4f}",
        )
    run.console.print(table)
