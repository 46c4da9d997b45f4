"""Collects what each stage shows in W&B: numbers, tables, pictures and pages, all read from the files of the run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ppcl.artifacts.costs import Costs
from ppcl.artifacts.files import read_json
from ppcl.artifacts.plan import Choice, PruningPlan, plug_name, read_projector_name
from ppcl.artifacts.scores import ComparedRow
from ppcl.context import Run
from ppcl.pictures.scores import read_rows
from ppcl.report.text import plugs_of
from ppcl.training.cost import COSTS, trainings_of

# What the table of scores has beside the benchmark's own scores.
_MEASURED = (
    *("num_layers", "params", "params_ratio", "drop_percent", "velocity_error", "latent_distance"),
    *("psnr", "ssim", "latency_ms", "peak_memory_mb"),
)


@dataclass
class Table:
    """Rows under the names of their columns."""

    columns: Sequence[str]
    rows: list[list[Any]]


@dataclass
class Shown:
    """Holds the numbers, tables and files that a stage shows. `pictures` and `pages` are files.

    All keys get the name of the stage in front.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    tables: dict[str, Table] = field(default_factory=dict)
    pictures: dict[str, Path] = field(default_factory=dict)
    pages: dict[str, Path] = field(default_factory=dict)


def _pictures(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    """Return the pictures in `folder` whose file names match `names`, by their names without an ending."""
    return {path.stem: path for name in names for path in sorted(folder.glob(f"{name}.png"))}


def _cache(run: Run) -> Shown:
    samples, held_out = run.data.counted()
    return Shown() if samples is None or held_out is None else Shown({"samples": samples, "held_out": held_out})


def _probe(run: Run) -> Shown:
    residuals = read_json(run.probe_folder / "probes.json", "The record", "probe")["residuals"]
    rows = [[*key.rsplit(".", 2), value] for key, value in residuals.items()]
    return Shown(
        {"probes": len(rows), "mean_residual": sum(residuals.values()) / max(1, len(rows))},
        {"residuals": Table(("stack", "block", "stream", "residual"), [[s, int(b), t, v] for s, b, t, v in rows])},
    )


def _detect(run: Run) -> Shown:
    folder, plan = run.plan_path.parent, PruningPlan.load(run.plan_path)
    pairs = [(stack, *pair) for stack, found in plan.intervals.items() for pair in found]
    numbers = {"intervals": len(pairs), "blocks_left": sum(plan.num_layers.values()) - sum(v - u for _, u, v in pairs)}
    shown = Shown(numbers | _parameters(plan))
    shown.tables["intervals"] = Table(("stack", "first", "last"), [list(pair) for pair in pairs])
    shown.pictures = _pictures(folder, ("curves_*", "similarity", "decisions"))
    if (folder / "curves.json").exists():
        shown.tables["curves"] = _curves(read_json(folder / "curves.json", "The curves", "detect"))
    return shown


def _parameters(plan: PruningPlan) -> dict[str, float]:
    """Return the numbers of parameters that a plan counts."""
    return {f"parameters_{key}": value for key, value in plan.parameters.items()}


def _curves(content: dict[str, Any]) -> Table:
    """Return the CKA and its fall for every first and last block of an interval, as a table."""
    rows = [
        [stack, stream, first, last, value, content["delta"][stack][stream][first][last]]
        for stack, streams in content["cka"].items()
        for stream, table in streams.items()
        for first, row in enumerate(table)
        for last, value in enumerate(row)
        if value is not None
    ]
    return Table(("stack", "stream", "first", "last", "cka", "delta"), rows)


def _plugs(run: Run, *, projectors: bool) -> Shown:
    """Return the held-out losses of students, or of `projectors`."""
    rows = []
    for path in sorted(run.plugs_folder.glob("*.json")):
        if (read_projector_name(path.stem) is not None) == projectors:
            losses = read_json(path, "The plug").get("losses", {})
            rows.append([path.stem, losses.get("heldout_before"), losses.get("heldout_loss")])
    return Shown({"plugs": len(rows)}, {"heldout_losses": Table(("plug", "before", "after"), rows)})


def _width(run: Run) -> Shown:
    shown = _plugs(run, projectors=True)
    if run.width_path.exists():
        plan = PruningPlan.load(run.width_path, stage="width")
        shown.numbers |= _parameters(plan)
        rows = [
            [stack, kind, int(index), value]
            for stack, found in plan.scores.items()
            if isinstance(found, dict)
            for kind, values in found.items()
            for index, value in values.items()
        ]
        shown.tables["selection"] = Table(("stack", "score", "block", "value"), rows)
    return shown


def _plan(run: Run) -> Shown:
    shown, folder = Shown(), run.choice_path.parent
    costs = next((path for path in run.costs_paths if path.exists()), None)
    if run.choice_path.exists():
        choice = Choice.load(run.choice_path)
        facts = ("params", "params_ratio", "latency_ratio", "memory_gb", "predicted_error", "measured_error")
        shown.numbers = {key: value for key in facts if (value := getattr(choice, key)) is not None}
        shown.numbers["plugs"] = len(choice.plugged)
        shown.pictures = _pictures(folder, ("frontier",))
        if costs is not None:
            found = Costs.load(costs)
            names = sorted({key for unit in found.units for key in unit.costs})
            rows = [
                [unit.name, unit.name in choice.plugged, unit.savings.get("params"), *map(unit.costs.get, names)]
                for unit in found.units
            ]
            shown.tables["costs"] = Table(("plug", "chosen", "parameters saved", *names), rows)
            points = [[cost, *vars(point).values()] for cost, points in found.frontier.items() for point in points]
            titles = next((list(vars(point)) for points in found.frontier.values() for point in points), [])
            shown.tables["sizes"] = Table(("cost minimised", *titles), points)
    elif run.has_intervals:
        rows = [[plug_name(stack, pair)] for stack, pairs in run.intervals.items() for pair in pairs]
        shown.numbers["intervals"] = len(rows)
        shown.tables["intervals"] = Table(("interval",), rows)
    return shown


def _finetune(run: Run) -> Shown:
    record = read_json(run.folder / "finetuned" / "ppcl.json", "The record", "finetune")
    return Shown({f"velocity_error_{when}": value for when, value in record["velocity_error"].items()})


def _size(kind: str) -> Callable[[Run], Shown]:
    def shown(run: Run) -> Shown:
        files = (path for path in (run.folder / kind).rglob("*") if path.is_file())
        return Shown({"gigabytes": sum(path.stat().st_size for path in files) / 1e9})

    return shown


def _generate(run: Run) -> Shown:
    return Shown(pictures={name: path / "grid.png" for name, path in run.image_folders.items()})


def _evaluate(run: Run) -> Shown:
    rows = read_rows(run)
    names = list(dict.fromkeys(name for row in rows if row.scores for name in row.scores.to_json()))
    columns = ("variant", *names, *_MEASURED, "plugs")
    return Shown(tables={"scores": Table(columns, [_row(row, names) for row in rows])})


def _row(row: ComparedRow, scores: Sequence[str]) -> list[Any]:
    found = row.scores.to_json() if row.scores else {}
    values = [found.get(name) for name in scores] + [getattr(row, name) for name in _MEASURED]
    return [row.name, *values, " ".join(plugs_of(row))]


def _report(run: Run) -> Shown:
    folder = run.report_folder
    costs = [[stage, *map(cost.get, COSTS)] for stage, cost in trainings_of(run).items()]
    shown = Shown(pictures=_pictures(folder, ("*",)))
    shown.pages["page"] = folder / "report.html"
    if costs:
        shown.tables["costs"] = Table(("stage", *COSTS), costs)
    return shown


SHOWS: dict[str, Callable[[Run], Shown]] = {
    "pretrain": _size("teacher"),
    "cache": _cache,
    "probe": _probe,
    "detect": _detect,
    "boundaries": lambda run: Shown(),
    "depth": partial(_plugs, projectors=False),
    "import_published": partial(_plugs, projectors=False),
    "width": _width,
    "plan": _plan,
    "finetune": _finetune,
    "export": _size("export"),
    "quantize": _size("quantized"),
    "remap_lora": _size("lora"),
    "generate": _generate,
    "evaluate": _evaluate,
    "report": _report,
}
