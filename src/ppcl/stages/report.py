"""Write an HTML page, `report.json` and a contact sheet: what was pruned, what that saved and how quality changed.

A run that has no scores yet gets a page of what it has: plans, losses, trainings and pictures.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any

from ppcl import __version__
from ppcl.artifacts.curves import load_curves
from ppcl.artifacts.files import atomic_path, read_json, write_json
from ppcl.artifacts.plugs import load_plugs, load_projectors
from ppcl.artifacts.samples import load_samples
from ppcl.artifacts.scores import ComparedRow
from ppcl.config import STORED_VARIANTS
from ppcl.context import Run
from ppcl.errors import UsageError
from ppcl.pictures.images import benchmark_header
from ppcl.pictures.scores import read_rows, score_headers
from ppcl.report import plots
from ppcl.report.made import begun, commands_of, data_of
from ppcl.report.page import render
from ppcl.report.sheets import Sheet, compared_sheet, current_model, own_sheets
from ppcl.stages import STAGES
from ppcl.training.cost import trainings_of
from ppcl.validation.pruning import budget_of
from ppcl.variants.variants import default_variants, variants_of


def _rows(run: Run) -> list[ComparedRow]:
    """Return the scores of `generate.variants`, or by default of all variants that have scores.

    By default the variants that are drawn by default must have scores too. If some scores are outdated, only these are
    returned. A run that has no scores yet gives none; one that has scores of other pictures is refused.
    """
    if not any((run.folder / "scores").rglob("*.json")):
        return []
    if run.config.generate.variants is not None:
        return read_rows(run)
    usual = default_variants(run)
    names = [name for name in STORED_VARIANTS if name in usual or any(run.scores_folder.glob(f"{name}*.json"))]
    try:
        return read_rows(run, names)
    except UsageError:  # some scores are outdated: their variant has been trained again
        return read_rows(run)


def _compared(run: Run, rows: list[ComparedRow]) -> Sheet | None:
    """Return pictures of the variants in `rows`, or without any of `generate.variants`; None if they are not drawn."""
    try:
        return compared_sheet(run, [row.name for row in rows] or list(score_headers(run, *variants_of(run))))
    except UsageError:
        if rows:
            raise
        return None


def _losses(run: Run) -> dict[str, dict[str, float]]:
    """Return the held-out losses of each student and projector. Imported ones have none and are left out."""
    trained = load_plugs(run.plugs_folder) | load_projectors(run.plugs_folder)
    return {name: plug.losses for name, plug in trained.items() if plug.losses}


def _choice_path(run: Run, rows: list[ComparedRow]) -> Path | None:
    """Return the file of the plan's choice if a budget is set or a variant in `rows` depends on it, else None.

    Without `rows` it is the newest.
    """
    names = {row.name for row in rows}
    planned = not rows or budget_of(run.config) is not None or {"ppcl-planned", "ppcl-finetuned"} & names
    return run.known_choice_path if planned and run.known_choice_path.exists() else None


def _facts(run: Run, rows: list[ComparedRow]) -> dict[str, Any]:
    """Return the content of `report.json`."""
    intervals = run.intervals if run.has_intervals else {}
    keys = ("name", "num_layers", "params", "params_ratio", "scores", "score_interval", "drop_percent",
            "velocity_error", "latent_distance", "fidelity", "teacher_share", "latency_ms", "peak_memory_mb",
            "students", "projectors", "removed")  # fmt: skip
    facts = {
        "name": run.config.name,
        "version": __version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "seed": run.config.seed,
        "model": run.config.model.name,
        "model_path": run.config.model.path,
        "data": data_of(run),
        "method": run.config.method.name,
        "intervals": {stack: [list(pair) for pair in pairs] for stack, pairs in intervals.items()},
        "prompts_per_category": run.config.benchmark.prompts_per_category,
        "variants": [{key: row.to_json()[key] for key in keys} for row in rows],
        "trainings": trainings_of(run),
        "commands": commands_of(run),
    } | benchmark_header(run)
    if (run.config.width.source != "auto" or run.width_path.exists()) and run.width:
        facts["width"] = run.width
    choice = _choice_path(run, rows)
    if choice is not None:
        facts["choice"] = read_json(choice, "The plan's choice")
    return facts


def run(run: Run) -> None:
    """Write `report/report.html`, `report.json` and, where pictures are drawn, `samples.png`.

    Raises `UsageError` if some variants have current scores and others have not.
    """
    rows, folder, plan = _rows(run), run.report_folder, run.plan_path.parent
    folder.mkdir(parents=True, exist_ok=True)
    compared = _compared(run, rows)
    if compared is not None:
        plots.contact_sheet(folder / "samples.png", compared.rows, compared.captions, compared.fails)
    drawn = {f"curves {path.stem}": path for path in sorted(plan.glob("curves_*.png"))}
    drawn["similarity"] = plan / "similarity.png"
    drawn |= {path.stem: path for path in plan.glob("decisions.png")}
    if plots.quality_against_size(folder / "quality.png", rows, run.benchmark.bounds):
        drawn["quality"] = folder / "quality.png"
    lacking = [row.name for row in rows if row.name != "teacher" and row.fidelity is None]
    if run.benchmark.compares and lacking:
        run.say("report", f"{', '.join(lacking)}: not compared picture by picture yet; 'stages=[evaluate]' does")
    if plots.error_by_noise_level(folder / "noise_levels.png", rows):
        drawn["noise levels"] = folder / "noise_levels.png"
    losses = _losses(run)
    if losses:
        plots.distillation_losses(folder / "losses.png", losses)
        drawn["losses"] = folder / "losses.png"
    curves = load_curves(run.base) | load_curves(run.folder)
    curves = {stage: curves[stage] for stage in STAGES if stage in curves}
    if plots.training_curves(folder / "trainings.png", curves):
        drawn["trainings"] = folder / "trainings.png"
    choice = _choice_path(run, rows)
    if choice is not None:
        drawn["frontier"] = choice.with_name("frontier.png")
    facts = _facts(run, rows)
    current, say = cache(partial(current_model, run)), partial(run.say, "report")
    own = own_sheets(run.folder / "images", compared.folder if compared else run.set_folder, current, say)
    missing = _missing(run, rows, compared)
    sampled = load_samples(run.base) | load_samples(run.folder)
    sampled = {stage: sampled[stage] for stage in STAGES if stage in sampled}
    page = render(run, facts, rows, drawn, compared, own, missing, sampled)
    with atomic_path(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    write_json(folder / "report.json", facts)
    if missing:
        run.say("report", missing)
    run.say("report", f"wrote {folder / 'report.html'}, report.json{' and samples.png' if compared else ''}")


def _missing(run: Run, rows: list[ComparedRow], compared: Sheet | None) -> str:
    """Return sentences that say what is not there yet: the end of a training, and scores."""
    said = []
    if stopped := ",".join(begun(run)):
        said.append(f"A training is not finished: 'stages=[{stopped}]' goes on with it from its last checkpoint.")
    if not rows:
        said.append(f"There are no scores yet: {_remedy(compared)} adds them.")
    return " ".join(said)


def _remedy(compared: Sheet | None) -> str:
    """Return the stages that add scores to a report, and pictures if there are none."""
    return f"'stages=[{'generate,' if compared is None else ''}evaluate,report]'"
