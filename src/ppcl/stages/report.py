"""One page, one JSON and one contact sheet: what was pruned, what it saved and what it cost."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from pathlib import Path

import jinja2

from ppcl import __version__
from ppcl.artifacts.files import atomic_path, read_json, write_json
from ppcl.artifacts.plugs import load_plugs, load_projectors
from ppcl.artifacts.scores import ComparedRow
from ppcl.context import Run
from ppcl.pictures.images import benchmark_header, read_image
from ppcl.pictures.scores import read_rows
from ppcl.report import plots
from ppcl.report.text import MEANINGS, billions
from ppcl.validation.pruning import budget_of

SAMPLES_PER_CATEGORY = 2


def _samples(run: Run, names: list[str], path: Path) -> bool:
    """Draw the first picture of a few prompts of each category; return whether any is judged."""
    by_category: dict[str | None, list[int]] = {}
    for number in range(0, len(run.prompts), run.benchmark.images_per_prompt):
        by_category.setdefault(run.prompts[number].category, []).append(number)
    columns = [number for numbers in by_category.values() for number in numbers[:SAMPLES_PER_CATEGORY]]
    prompts = [run.prompts[column] for column in columns]
    rows = {name: [read_image(run, name, column) for column in columns] for name in names}
    good = {name: list(map(run.benchmark.fulfils, prompts, images)) for name, images in rows.items()}
    plots.contact_sheet(path, rows, [prompt.text for prompt in prompts], good)
    return any(right is not None for judged in good.values() for right in judged)


def _embedded(path: Path) -> str | None:
    if not path.exists():
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _facts(rows: list[ComparedRow]) -> list[dict[str, str]]:
    teacher = next(row for row in rows if row.name == "teacher")
    ours = [row for row in rows if row.name.startswith("ppcl")]
    # What the run is for: the tuned model, or else the smallest.
    student = min(ours, key=lambda row: (row.name != "ppcl-finetuned", row.params), default=teacher)
    speedup = teacher.latency_ms / student.latency_ms
    return [
        {"value": f"{teacher.num_layers} to {student.num_layers}", "label": "blocks"},
        {"value": f"{100 * student.params_ratio:.0f}%", "label": "of the parameters"},
        {"value": f"{speedup:.2f}x", "label": "speed of a denoising step"},
        {"value": f"{student.drop_percent or 0:.1f}%", "label": f"quality lost by {student.name}"},
    ]


def _pruned(run: Run, intervals: dict[str, list[list[int]]]) -> list[str]:
    """List the intervals and width sets, a line per stack and kind."""
    lines = [f"{stack}: " + " ".join(f"[{u}, {v}]" for u, v in pairs) for stack, pairs in intervals.items()]
    for stack, sets in run.width.items():
        lines += [f"{stack} without {kind}: " + " ".join(map(str, indices)) for kind, indices in sets.items()]
    return lines


def run(run: Run) -> None:
    rows, folder = read_rows(run), run.report_folder
    folder.mkdir(parents=True, exist_ok=True)
    judged = _samples(run, [row.name for row in rows], folder / "samples.png")
    plots.quality_against_size(folder / "quality.png", rows, run.benchmark.bounds)
    losses = {name: plug.losses for name, plug in load_plugs(run.plugs_folder).items()}
    losses |= {name: item.losses for name, item in load_projectors(run.plugs_folder).items()}
    losses = {name: found for name, found in losses.items() if found}  # imported plugs have none
    if losses:
        plots.distillation_losses(folder / "losses.png", losses)
    keys = ("name", "num_layers", "params", "params_ratio", "scores", "drop_percent", "latency_ms",
            "peak_memory_mb", "students", "projectors", "removed")  # fmt: skip
    intervals = {stack: [list(pair) for pair in pairs] for stack, pairs in run.intervals.items()}
    facts = {
        "name": run.config.name,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "seed": run.config.seed,
        "model": run.config.model.name,
        "method": run.config.method.name,
        "intervals": intervals,
        "prompts_per_category": run.config.benchmark.prompts_per_category,
        "variants": [{key: row.to_json()[key] for key in keys} for row in rows],
    } | benchmark_header(run)
    if run.width:
        facts["width"] = run.width
    budget = budget_of(run.config)
    if budget is not None and run.choice_path.exists():
        facts["choice"] = read_json(run.choice_path, "The plan's choice")
    plan = run.plan_path.parent
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(
        (Path(plots.__file__).parent / "template.html.j2").read_text(encoding="utf-8")
    )
    page = template.render(
        facts
        | {
            "meanings": MEANINGS,
            "title": f"Pruning {run.config.model.name}",
            "version": __version__,
            "facts": _facts(rows),
            "label": run.benchmark.label,
            "judged": judged,
            "variants": [row.to_json() | {"size": billions(row.params)} for row in rows],
            "num_prompts": len(run.prompts) // run.benchmark.images_per_prompt,
            "images_per_prompt": run.benchmark.images_per_prompt,
            "intervals": "\n".join(_pruned(run, intervals)),
            "images": {
                "samples": _embedded(folder / "samples.png"),
                "quality": _embedded(folder / "quality.png"),
                "losses": _embedded(folder / "losses.png"),
                "similarity": _embedded(plan / "similarity.png"),
                "frontier": _embedded(run.choice_path.with_name("frontier.png")) if budget else None,
                "curves": [_embedded(path) for path in sorted(plan.glob("curves_*.png"))],
            },
            "versions": json.dumps(read_json(run.folder / "versions.json", "The versions"), indent=2),
        }
    )
    with atomic_path(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    write_json(folder / "report.json", facts)
    run.say("report", f"wrote {folder / 'report.html'}, report.json and samples.png")
