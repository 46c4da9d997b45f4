"""Compares finished runs: a table of what differs in their settings and what came out, with a plot and a page.

`ppcl compare runs/sizes/*` calls this, and so does a sweep at its end.
"""

from __future__ import annotations

import csv
import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ppcl.api import Results
from ppcl.artifacts.files import atomic_path, read_json
from ppcl.artifacts.jobs import JOB, read_job
from ppcl.artifacts.scores import ComparedRow
from ppcl.errors import UsageError
from ppcl.options import declared
from ppcl.report import plots
from ppcl.report.text import billions, result_of

# Columns of results: the title, the key in `results`, and the digits behind the point.
_NUMBERS = (
    ("of the teacher %", "params_percent", 1),
    ("score", "score", 3),
    ("drop %", "drop_percent", 1),
    ("velocity error", "velocity_error", 4),
    ("latent distance", "latent_distance", 3),
    ("ms a step", "latency_ms", 1),
    ("peak MB", "peak_memory_mb", 1),
    ("training s", "training_seconds", 0),
)
_LEFT_OUT = ("name", "run", "stages", "paths.", "hydra.")  # settings that say where a run is, or what is made next


@dataclass(frozen=True)
class Compared:
    """A run in the table: its folder, its settings that are not those of all, its results, and why it has failed.

    `results` has numbers by the keys of `_NUMBERS`, the number of parameters as `params`, and the name of the variant
    that they are of as `variant`; what was not measured is missing.
    """

    folder: Path
    settings: dict[str, str]
    results: dict[str, Any]
    failed: str | None


def compared(folders: Sequence[Path]) -> list[Compared]:
    """Return a row for each of the folders, in their order.

    Raises `UsageError` for a folder that is not of a run.
    """
    settings = _differing([_settings(folder) for folder in folders])
    return [
        Compared(folder, differing, _results(folder), _failure(folder))
        for folder, differing in zip(folders, settings, strict=True)
    ]


def _failure(folder: Path) -> str | None:
    return read_job(folder).failed if (folder / JOB).exists() else None


def _settings(folder: Path) -> dict[str, str]:
    """Return the settings of a run: those that were typed for a job of a sweep, else all."""
    if (folder / JOB).exists():
        typed = (item.lstrip("+").partition("=") for item in read_job(folder).overrides)
        found = {key: value for key, _, value in typed}
    else:
        found = {item.name: str(item.value) for item in declared(Results(folder).config)}
    return {key: value for key, value in found.items() if not key.startswith(_LEFT_OUT)}


def _differing(every: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return the settings of each run that do not have one value in all of them."""
    keys = dict.fromkeys(key for settings in every for key in settings)
    keys = {key: None for key in keys if len({settings.get(key) for settings in every}) > 1}
    return [{key: settings[key] for key in keys if key in settings} for settings in every]


def _results(folder: Path) -> dict[str, Any]:
    """Return what a run has come to; empty if it has no configuration, because it failed before its first result."""
    if not (folder / "config.yaml").exists():
        return {}
    results, found = Results(folder), dict[str, Any]()
    spent = [read_json(path, "The cost of a training", "report") for path in (folder / "training").glob("*.json")]
    if spent:
        found["training_seconds"] = sum(cost["seconds"] for cost in spent)
    scores = results.scores
    name = result_of(list(scores))
    if name is not None and "teacher" in scores:
        row = ComparedRow.beside(scores["teacher"], scores[name])
        found |= {key: getattr(row, key) for key in ("drop_percent", "velocity_error", "latent_distance")}
        found |= {"variant": name, "params": row.params, "params_percent": 100 * row.params_ratio}
        found |= {"latency_ms": row.latency_ms, "peak_memory_mb": row.peak_memory_mb}
        found["score"] = None if row.scores is None else row.scores.overall
    elif results.finetuned is not None:
        tuned = read_json(results.finetuned / "ppcl.json", "The record", "finetune")
        found |= {"variant": "ppcl-finetuned", "velocity_error": tuned["velocity_error"]["after"]}
    if "params" not in found and results.choice is not None:
        choice = results.choice
        ratio = None if choice.params_ratio is None else 100 * choice.params_ratio
        found |= {"params": choice.params, "params_percent": ratio}
        predicted = choice.predicted_error if choice.budget[2] == "velocity" else None
        found = {"variant": "ppcl-planned", "velocity_error": predicted} | found
    return {key: value for key, value in found.items() if value is not None}


def table(rows: Sequence[Compared]) -> tuple[list[str], list[list[str]]]:
    """Return titles and cells of the table. Columns without any value are left out."""
    keys = list(dict.fromkeys(key for row in rows for key in row.settings))
    columns: dict[str, list[str]] = {"run": [row.folder.name for row in rows]}
    columns |= {key: [row.settings.get(key, "") for row in rows] for key in keys}
    columns["variant"] = [row.results.get("variant", "") for row in rows]
    columns["parameters"] = [billions(row.results["params"]) if "params" in row.results else "" for row in rows]
    for title, key, digits in _NUMBERS:
        columns[title] = [f"{row.results[key]:.{digits}f}" if key in row.results else "" for row in rows]
    columns["failed"] = [row.failed or "" for row in rows]
    columns = {title: cells for title, cells in columns.items() if title in keys or any(cells)}
    return list(columns), [list(cells) for cells in zip(*columns.values(), strict=True)]


def write_comparison(rows: Sequence[Compared], folder: Path) -> Path:
    """Write `comparison.csv`, `comparison.html` and, where sizes are known, `comparison.png`. Return the page."""
    folder.mkdir(parents=True, exist_ok=True)
    titles, cells = table(rows)
    with atomic_path(folder / "comparison.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([titles, *cells])
    points = [(_series(row), row.results) for row in rows if not row.failed]
    drawn = plots.compared_sizes(folder / "comparison.png", points)
    with atomic_path(folder / "comparison.html") as temporary:
        temporary.write_text(_page(rows, titles, cells, folder, drawn), encoding="utf-8")
    return folder / "comparison.html"


def _series(row: Compared) -> str:
    """Return the name of a run's line in the plot: the settings that set it apart, without budgets."""
    named = {key: value for key, value in row.settings.items() if not key.startswith("budget.")}
    return ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in named.items())


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; color: #22303c;
  max-width: 1320px; margin: 0 auto; padding: 2.2rem 1.5rem 4rem; }}
h1 {{ font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere; }}
p {{ color: #5d6d7a; margin: .4rem 0 1.6rem; }} a {{ color: #0b6e99; }}
img {{ max-width: min(100%, 46rem); height: auto; display: block; margin-bottom: 1.6rem; }}
.scroll {{ overflow-x: auto; }} tr.failed td {{ color: #c0392b; }}
table {{ border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .42rem .6rem; text-align: right; border-bottom: 1px solid #dfe5ea; white-space: nowrap; }}
th {{ font-weight: 600; color: #5d6d7a; vertical-align: bottom; }}
th:first-child, td:first-child {{ text-align: left; position: sticky; left: 0; background: #fff; font-weight: 600; }}
.text {{ text-align: left !important; }} td.text {{ white-space: normal; min-width: 22rem; }}
</style></head><body>
<h1>{title}</h1>
<p>{sentence}</p>
{plot}<div class="scroll"><table><tr>{head}</tr>
{body}
</table></div></body></html>
"""


def _page(
    rows: Sequence[Compared], titles: Sequence[str], cells: Sequence[Sequence[str]], folder: Path, drawn: bool
) -> str:
    failed = sum(row.failed is not None for row in rows)
    sentence = f"{len(rows)} runs, {failed} of them failed." if failed else f"{len(rows)} runs."
    sentence += " A run's name leads to its report. Columns in between are the settings that differ."
    lines = []
    for row, line in zip(rows, cells, strict=True):
        address = Results(row.folder).report if (row.folder / "config.yaml").exists() else None
        target = quote(Path(os.path.relpath(address or row.folder, folder)).as_posix())
        first = f'<td><a href="{target}">{html.escape(line[0])}</a></td>'
        others = (
            f'<td class="text">{html.escape(cell)}</td>' if title == "failed" else f"<td>{html.escape(cell)}</td>"
            for title, cell in zip(titles[1:], line[1:], strict=True)
        )
        lines.append(f"<tr{' class=failed' if row.failed else ''}>{first}{''.join(others)}</tr>")
    return _PAGE.format(
        title=f"{html.escape(folder.resolve().name)}: {len(rows)} runs compared",
        sentence=sentence,
        plot='<img alt="quality against size of every run" src="comparison.png">\n' if drawn else "",
        head="".join(f"<th{' class=text' if title == 'failed' else ''}>{html.escape(title)}</th>" for title in titles),
        body="\n".join(lines),
    )


def compare(arguments: Sequence[str]) -> str:
    """Do what `ppcl compare FOLDER..` says, and return a line that says where the table is.

    It lies in the folder that holds all of them. Raises `UsageError` for less than two folders, and for one that is not
    of a run.
    """
    folders = [Path(argument) for argument in arguments]
    runs = [folder for folder in folders if folder.is_dir()]
    for folder in folders:
        if not folder.exists():
            raise UsageError(f"compare: {folder} does not exist: name folders of runs, such as runs/sizes/*.")
    runs = [folder for folder in runs if (folder / "config.yaml").exists() or (folder / JOB).exists()]
    if len(runs) < 2:
        raise UsageError(
            f"compare: {len(runs)} of the {len(folders)} names given are folders of runs, and it takes two: name them, "
            "such as runs/sizes/*."
        )
    common = Path(os.path.commonpath([folder.resolve().parent for folder in runs]))
    page = write_comparison(compared(runs), common)
    return f"compared {len(runs)} runs: {page}, comparison.csv"
