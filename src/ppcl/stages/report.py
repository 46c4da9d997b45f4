"""One page, one JSON and one contact sheet: what was pruned, what it saved and what it cost."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from ppcl import __version__
from ppcl.artifacts.files import atomic_path, read_json, write_json
from ppcl.artifacts.headers import is_current
from ppcl.artifacts.plugs import load_plugs, load_projectors
from ppcl.benchmarks.shapes import fulfils, to_pixels
from ppcl.context import Run
from ppcl.errors import UsageError
from ppcl.pictures.images import image_folder
from ppcl.pictures.scores import compare, score_headers
from ppcl.report import plots
from ppcl.report.text import billions
from ppcl.validation.pruning import budget_of
from ppcl.variants.variants import variants_of

SAMPLES_PER_CATEGORY = 2


def _rows(run: Run) -> list[dict[str, Any]]:
    rows = []
    for name, header in score_headers(run, *variants_of(run)).items():
        record = run.folder / "scores" / f"{name}.json"
        if not is_current(record, header):
            raise UsageError(f"{record} does not exist: run stages=[evaluate] first.")
        rows.append(read_json(record, "The scores"))
    return compare(rows)


def _samples(run: Run, names: list[str], path: Path) -> None:
    per_category = run.config.benchmark.prompts_per_category
    columns = [
        number * per_category + offset
        for number in range(len(run.family.categories))
        for offset in range(min(SAMPLES_PER_CATEGORY, per_category))
    ]
    rows, good = {}, {}
    for name in names:
        folder = image_folder(run, name)
        rows[name] = [Image.open(folder / f"{column:05d}.png").convert("RGB") for column in columns]
        good[name] = [
            fulfils(run.scenes[column], to_pixels(image)) for column, image in zip(columns, rows[name], strict=True)
        ]
    plots.contact_sheet(path, rows, [run.scenes[column].caption for column in columns], good)


def _embedded(path: Path) -> str | None:
    if not path.exists():
        return None
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _facts(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    teacher = next(row for row in rows if row["name"] == "teacher")
    ours = [row for row in rows if row["name"].startswith("ppcl")]
    # What the run is for: the tuned model, or else the smallest.
    student = min(ours, key=lambda row: (row["name"] != "ppcl-finetuned", row["params"]), default=teacher)
    speedup = teacher["latency_ms"] / student["latency_ms"]
    return [
        {"value": f"{teacher['num_layers']} to {student['num_layers']}", "label": "blocks"},
        {"value": f"{100 * student['params_ratio']:.0f}%", "label": "of the parameters"},
        {"value": f"{speedup:.2f}x", "label": "speed of a denoising step"},
        {"value": f"{student['drop_percent']:.1f}%", "label": f"quality lost by {student['name']}"},
    ]


def _pruned(run: Run, intervals: dict[str, list[list[int]]]) -> list[str]:
    """What may be pruned, a line per stack and kind."""
    lines = [f"{stack}: " + " ".join(f"[{u}, {v}]" for u, v in pairs) for stack, pairs in intervals.items()]
    for stack, sets in run.width.items():
        lines += [f"{stack} without {kind}: " + " ".join(map(str, indices)) for kind, indices in sets.items()]
    return lines


def run(run: Run) -> None:
    rows, folder = _rows(run), run.folder / "report"
    folder.mkdir(parents=True, exist_ok=True)
    names = [row["name"] for row in rows]
    _samples(run, names, folder / "samples.png")
    plots.quality_against_size(folder / "quality.png", rows)
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
        "variants": [{key: row[key] for key in keys} for row in rows],
    }
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
            "title": f"Pruning {run.config.model.name}",
            "version": __version__,
            "facts": _facts(rows),
            "categories": run.family.categories,
            "variants": [row | {"size": billions(row["params"])} for row in rows],
            "num_prompts": len(run.scenes),
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
