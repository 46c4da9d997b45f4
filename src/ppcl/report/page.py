"""Renders the report as an HTML page."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from ppcl.artifacts.files import read_json
from ppcl.artifacts.plan import Width
from ppcl.artifacts.samples import Samples
from ppcl.artifacts.scores import ComparedRow
from ppcl.context import Run
from ppcl.export.folder import BaseModel
from ppcl.report.fidelity import fidelity_section
from ppcl.report.made import link, links_of, made_by, trainings_in_words
from ppcl.report.sheets import Sheet
from ppcl.report.text import MEANINGS, billions, notes_of, plugs_in_words, plugs_of, result_of, score_columns
from ppcl.report.training import training_sections

SMALL, LARGE = 256, 512  # pixels per side of pictures in the comparison, and of the user's own prompts


def render(
    run: Run,
    facts: Mapping[str, Any],
    rows: Sequence[ComparedRow],
    plots: Mapping[str, Path],
    compared: Sheet | None,
    own: Sequence[Sheet],
    missing: str,
    sampled: Mapping[str, Sequence[tuple[Path, Samples]]],
) -> str:
    """Return the report as HTML. All pictures are embedded, and links to the run's folders are relative.

    `facts`: the content of `report.json`. `rows`: the scores of all variants. `plots`: the files of plots by name.
        `compared`: the pictures of the prompts that variants are compared on, if they are drawn. `own`: pictures of
        the user's own prompts. `missing`: a sentence that says what is not there yet, and how it is added.
        `sampled`: folders and records of pictures that were drawn during trainings, by stage.
    """
    template = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).from_string((Path(__file__).parent / "template.html.j2").read_text(encoding="utf-8"))
    return template.render(
        title=f"{run.config.name}: {BaseModel.of(run).name} pruned",
        sentence=_sentence(run, facts, rows),
        headlines=headlines(rows),
        plots={name: _embedded_plot(path) for name, path in plots.items() if path.exists()},
        missing=missing,
        compared=_section(run, compared, SMALL) if compared is not None else None,
        fidelity=fidelity_section(run, rows, LARGE),
        own=[_section(run, sheet, LARGE) for sheet in own],
        columns=score_columns(rows, details=True),
        result=result_of([row.name for row in rows]),
        notes=[*notes_of(rows, run.benchmark.label), *_how_measured(run)] if rows else [],
        intervals_known=any(row.score_interval is not None for row in rows),
        variants=[
            {"name": row.name, "meaning": MEANINGS.get(row.name, ""), "plugs": plugs_in_words(plugs_of(row))}
            for row in rows
        ],
        choice=_choice(facts.get("choice")),
        sampled=training_sections(run, sampled, SMALL),
        trainings=trainings_in_words(facts["trainings"]),
        commands=facts["commands"],
        links=links_of(run),
        intervals="\n".join(_pruned(facts["intervals"], facts.get("width", {}))),
        versions=_versions(run),
    )


def _versions(run: Run) -> dict[str, Any]:
    """Return the versions of Python and of the libraries, which are recorded anew if the run has lost its record."""
    path = run.folder / "versions.json"
    if not path.exists():
        run.record_versions()
    return read_json(path, "The record", "report")


def _sentence(run: Run, facts: Mapping[str, Any], rows: Sequence[ComparedRow]) -> str:
    """Return one sentence that says what was pruned, on which data, and how the intervals were found."""
    teacher = next((row for row in rows if row.name == "teacher"), None)
    size = f"{sum(run.num_layers.values())} blocks" + (f" and {billions(teacher.params)} parameters" if teacher else "")
    name, path = BaseModel.of(run).name, run.config.model.path
    place = "" if path in (None, name) else f" ({path})"
    data = "without data" if run.config.data.name == "none" else f"on {facts['data']['words']}"
    made = f"{made_by(run)}; {facts['date']}, seed {facts['seed']}, ppcl {facts['version']}"
    return f"{name}{place}, {size}, pruned {data}; {made}."


def headlines(rows: Sequence[ComparedRow]) -> list[dict[str, str]]:
    """Return the most important numbers of the run's main result, compared with the teacher: `value` and `label`."""
    name = result_of([row.name for row in rows])
    if name is None:
        return []
    teacher, result = (next(row for row in rows if row.name == each) for each in ("teacher", name))
    shown = [
        {"value": f"{teacher.num_layers} to {result.num_layers}", "label": "blocks"},
        {"value": f"{100 * result.params_ratio:.0f}%", "label": "of the parameters"},
        {"value": f"{teacher.latency_ms / result.latency_ms:.2f}x", "label": "speed of a denoising step"},
    ]
    if result.teacher_share is not None:
        shown.append({"value": f"{100 * result.teacher_share:.0f}%", "label": "of the steps run by the teacher"})
    if result.drop_percent is not None and result.lower_is_better:
        shown.append({"value": f"{result.drop_percent:+.1f}%", "label": f"score of {name}, lower is better"})
    elif result.drop_percent is not None:
        shown.append({"value": f"{result.drop_percent:.1f}%", "label": f"of the score lost by {name}"})
    elif result.velocity_error is not None:
        shown.append({"value": f"{result.velocity_error:.4f}", "label": f"velocity error of {name}, held-out"})
    elif result.latent_distance is not None:
        shown.append({"value": f"{result.latent_distance:.2f}", "label": f"latent distance of {name} to the teacher"})
    if result.ssim is not None:
        shown.append({"value": f"{result.ssim:.2f}", "label": "SSIM of its pictures to the teacher's"})
    return shown


def _how_measured(run: Run) -> list[str]:
    """Return notes on how pictures were scored and steps were timed."""
    each = run.benchmark.images_per_prompt
    pictures = f" with {each} pictures each" if each > 1 else ""
    return [
        f"measured over {len(run.prompts) // each} prompts{pictures}, with equal seeds and settings",
        "step: one denoising step with guidance at batch 1, variants take turns while timed",
    ]


def _choice(choice: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Return the budget as an override, and the plugs that its plan has chosen in words."""
    if choice is None:
        return None
    key, value, _ = choice["budget"]
    return {"budget": f"budget.{key}={value:g}", "plugs": plugs_in_words(choice["plugged"])}


def _section(run: Run, sheet: Sheet, largest: int) -> dict[str, Any]:
    """Return a sheet's pictures and texts as the template expects them. `largest`: the largest side in pixels."""
    return {
        "name": sheet.folder.name,
        "href": link(run, sheet.folder),
        "remark": sheet.remark,
        "captions": sheet.captions,
        "rows": sheet.cells(largest),
        "judged": sheet.judged,
    }


def _embedded_plot(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _pruned(intervals: Mapping[str, list[list[int]]], width: Width) -> list[str]:
    """Return the intervals and width sets as lines, one for each stack and kind."""
    lines = [f"{stack}: " + " ".join(f"[{u}, {v}]" for u, v in pairs) for stack, pairs in intervals.items()]
    for stack, sets in width.items():
        lines += [f"{stack} without {kind}: " + " ".join(map(str, indices)) for kind, indices in sets.items()]
    return lines
