"""Compares finished runs: a table of what differs in their settings and what came out, with a plot and a page.

`ppcl compare runs/sizes/*` calls this, and so does a sweep at its end.
"""

from __future__ import annotations

import csv
import html
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from ppcl.artifacts.files import atomic_path, read_json
from ppcl.artifacts.jobs import BEST, JOB, MULTIRUN, read_job
from ppcl.artifacts.scores import ComparedRow
from ppcl.errors import UsageError
from ppcl.options import declared
from ppcl.report import plots
from ppcl.report.text import billions, result_of
from ppcl.results import Stored

PLUS_MINUS = "score ±"  # title of half the width of the score's 95% confidence interval
# Columns of results: the title, the key in `results`, and the digits behind the point.
NUMBERS = (
    ("of the teacher %", "params_percent", 1),
    ("score", "score", 3),
    (PLUS_MINUS, "score_interval", 3),
    ("drop %", "drop_percent", 1),
    ("velocity error", "velocity_error", 4),
    ("latent distance", "latent_distance", 3),
    ("ms a step", "latency_ms", 1),
    ("peak MB", "peak_memory_mb", 1),
    ("training s", "training_seconds", 0),
)
_LONGEST_LABEL = 60  # characters in the plot's legend
_LEFT_OUT = ("name", "run", "stages", "paths.", "hydra.")  # settings that say where a run is, or what is made next


@dataclass(frozen=True)
class Compared:
    """A run in the table: its folder, its settings that are not those of all, its results, and why it has failed.

    `results` has numbers by the keys of `NUMBERS`, the number of parameters as `params`, and the name of the variant
    that they are of as `variant`; what was not measured is missing. It has `lower_is_better` if the score is a
    distance.
    """

    folder: Path
    settings: dict[str, str]
    results: dict[str, Any]
    failed: str | None


def compare(folders: Sequence[str | Path]) -> list[Compared]:
    """Return a row for each of the runs in `folders`; the folder of a sweep stands for its jobs.

        rows = ppcl.compare(["runs/sizes", "runs/demo"])
        errors = [row.results.get("velocity_error") for row in rows if not row.failed]

    Raises `UsageError` for less than two runs, and for a folder that does not exist.
    """
    if isinstance(folders, str | Path):
        raise UsageError(f"ppcl.compare takes a list of folders: write ppcl.compare([{str(folders)!r}]).")
    return compared(_runs_in([Path(folder) for folder in folders]))


def compared(folders: Sequence[Path]) -> list[Compared]:
    """Return a row for each of the folders, in their order.

    Raises `UsageError` for a folder that is not of a run.
    """
    jobs = all((folder / JOB).exists() for folder in folders)
    settings = _differing([_typed(folder) if jobs else _recorded(folder) for folder in folders])
    return [
        Compared(folder, differing, results_of(folder), _failure(folder))
        for folder, differing in zip(folders, settings, strict=True)
    ]


def _failure(folder: Path) -> str | None:
    return read_job(folder).failed if (folder / JOB).exists() else None


def _typed(folder: Path) -> dict[str, str]:
    """Return the settings that were typed for a job of a sweep, and for the job whose students it uses, if it is one.

    Another run whose students it uses is named itself.
    """
    typed = {key: value for key, _, value in (item.lstrip("+").partition("=") for item in read_job(folder).overrides)}
    base = typed.get("paths.base_run", "null").strip("'\"")
    settings = {key: value for key, value in typed.items() if not key.startswith(_LEFT_OUT)}
    if base == "null":
        return settings
    inherited = _typed(Path(base)) if (Path(base) / JOB).exists() else {"paths.base_run": Path(base).name}
    return inherited | settings


def _recorded(folder: Path) -> dict[str, str]:
    """Return all settings of a run; of one that failed before it had any those that were typed."""
    if not (folder / "config.yaml").exists():
        return _typed(folder)
    every = ((item.name, item.value) for item in declared(Stored(folder).config))
    return {key: str(value) for key, value in every if not key.startswith(_LEFT_OUT)}


def _differing(every: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """Return the settings of each run that do not have one value in all of them."""
    keys = dict.fromkeys(key for settings in every for key in settings)
    keys = {key: None for key in keys if len({settings.get(key) for settings in every if settings}) > 1}
    return [{key: settings[key] for key in keys if key in settings} for settings in every]


def results_of(folder: Path) -> dict[str, Any]:
    """Return what a run has come to; empty if it has no configuration, because it failed before its first result."""
    if not (folder / "config.yaml").exists():
        return {}
    results, found = Stored(folder), dict[str, Any]()
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
        found["score_interval"] = row.score_interval
        found["lower_is_better"] = row.lower_is_better or None
    elif results.finetuned is not None:
        tuned = read_json(results.finetuned / "ppcl.json", "The record", "finetune")
        found |= {"variant": "ppcl-finetuned", "velocity_error": tuned["velocity_error"]["after"]}
    if "params" not in found and results.choice is not None:
        choice = results.choice
        ratio = None if choice.params_ratio is None else 100 * choice.params_ratio
        found |= {"params": choice.params, "params_percent": ratio}
        summed = choice.predicted_error if choice.budget[2] == "velocity" else None
        predicted = summed if choice.measured_error is None else choice.measured_error
        found = {"variant": "ppcl-planned", "velocity_error": predicted} | found
    return {key: value for key, value in found.items() if value is not None}


def titled(key: str, value: float) -> str:
    """Return a result in words, such as `velocity error 0.0123`."""
    title, digits = next((title, digits) for title, name, digits in NUMBERS if name == key)
    return f"{title} {value:.{digits}f}"


def table(rows: Sequence[Compared]) -> tuple[list[str], list[list[str]]]:
    """Return titles and cells of the table. Columns without any value are left out."""
    keys = list(dict.fromkeys(key for row in rows for key in row.settings))
    columns: dict[str, list[str]] = {"run": [row.folder.name for row in rows]}
    columns |= {key: [row.settings.get(key, "") for row in rows] for key in keys}
    columns["variant"] = [row.results.get("variant", "") for row in rows]
    columns["parameters"] = [billions(row.results["params"]) if "params" in row.results else "" for row in rows]
    for title, key, digits in NUMBERS:
        columns[title] = [f"{row.results[key]:.{digits}f}" if key in row.results else "" for row in rows]
    columns["failed"] = [row.failed or "" for row in rows]
    columns = {title: cells for title, cells in columns.items() if title in keys or any(cells)}
    return list(columns), [list(cells) for cells in zip(*columns.values(), strict=True)]


def write_comparison(rows: Sequence[Compared], folder: Path) -> Path:
    """Write `comparison.csv`, `comparison.html` and, where sizes are known, `comparison.png`. Return the page.

    The page also has the best trial of a search, if `folder` is of one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    titles, cells = table(rows)
    with atomic_path(folder / "comparison.csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([titles, *cells])
    found = [row for row in rows if not row.failed]
    names = [_series(row) for row in found]
    if max(map(len, names), default=0) > _LONGEST_LABEL:  # runs that have little in common
        names = [row.folder.name for row in found]
    drawn = plots.compared_sizes(
        folder / "comparison.png", [(name, row.results) for name, row in zip(names, found, strict=True)]
    )
    with atomic_path(folder / "comparison.html") as temporary:
        temporary.write_text(_page(rows, titles, cells, folder, drawn), encoding="utf-8")
    return folder / "comparison.html"


def _series(row: Compared) -> str:
    """Return the name of a run's line in the plot: the settings that set it apart, without budgets."""
    named = {key: value for key, value in row.settings.items() if not key.startswith("budget.")}
    return ", ".join(f"{key}={value}" for key, value in named.items())


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 16px/1.55 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; color: #22303c;
  max-width: 1320px; margin: 0 auto; padding: 2.2rem 1.5rem 4rem; }}
h1 {{ font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere; }}
p {{ color: #5d6d7a; margin: .4rem 0 1.6rem; }} a {{ color: #0b6e99; }}
img {{ max-width: min(100%, 46rem); height: auto; display: block; margin-bottom: 1.6rem; }}
.scroll {{ overflow-x: auto; }} tr.failed td {{ color: #c0392b; }} tr.best td {{ background: #e8f4ec !important; }}
.note {{ color: #7a8894; font-weight: 400; font-size: .82em; margin-left: .5em; }}
pre {{ background: #f4f6f8; padding: .8rem 1rem; white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }}
table {{ border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .42rem .6rem; text-align: right; border-bottom: 1px solid #dfe5ea; white-space: nowrap; }}
th {{ font-weight: 600; color: #5d6d7a; vertical-align: bottom; }}
th:first-child, td:first-child {{ text-align: left; position: sticky; left: 0; background: #fff; font-weight: 600; }}
.text {{ text-align: left !important; }} td.text {{ white-space: normal; min-width: 22rem; }}
</style></head><body>
<h1>{title}</h1>
<p>{sentence}</p>
{best}{plot}<div class="scroll"><table><tr>{head}</tr>
{body}
</table></div></body></html>
"""


def _page(
    rows: Sequence[Compared], titles: Sequence[str], cells: Sequence[Sequence[str]], folder: Path, drawn: bool
) -> str:
    failed = sum(row.failed is not None for row in rows)
    sentence = f"{len(rows)} runs, {failed} of them without a result." if failed else f"{len(rows)} runs."
    sentence += " Settings that differ come first. A name that is a link leads to the run's report."
    best = read_json(folder / BEST, "The best trial") if (folder / BEST).exists() else {}
    settled = 1 + len({key for row in rows for key in row.settings})  # columns before those of results
    titles = [title for title in titles if title != "failed"]
    shown = [title for title in titles if title != PLUS_MINUS]
    lines = []
    for row, line in zip(rows, cells, strict=True):
        kind = "failed" if row.failed else "best" if best and row.folder == folder / best["job"] else None
        columns = dict(zip(titles, line, strict=False))  # the reason of a failure takes the place of results
        if interval := columns.pop(PLUS_MINUS, ""):
            columns["score"] += f" ± {interval}"
        told = [html.escape(cell) for cell in [*columns.values()][1 : settled if row.failed else None]]
        row_cells = [f"<td>{_named(row, folder, kind)}</td>", *(f"<td>{cell}</td>" for cell in told)]
        if row.failed:
            span = max(1, len(shown) - settled)
            row_cells.append(f'<td class="text" colspan="{span}">{html.escape(row.failed)}</td>')
        lines.append(f"<tr{f' class={kind}' if kind else ''}>{''.join(row_cells)}</tr>")
    return _PAGE.format(
        title=f"{html.escape(folder.resolve().name)}: {len(rows)} runs compared",
        sentence=sentence,
        best=""
        if not best
        else f"<p>The {html.escape(best['told'])}, by</p>\n<pre>{html.escape(best['command'])}</pre>\n",
        plot='<img alt="quality against size of every run" src="comparison.png">\n' if drawn else "",
        head="".join(f"<th>{html.escape(title)}</th>" for title in shown),
        body="\n".join(lines),
    )


def _named(row: Compared, folder: Path, kind: str | None) -> str:
    """Return a run's name on the page: with a link to its report, or else the remark that there is none."""
    name = html.escape(row.folder.name)
    report = Stored(row.folder).report if (row.folder / "config.yaml").exists() else None
    if report is not None:
        name = f'<a href="{quote(Path(os.path.relpath(report, folder)).as_posix())}">{name}</a>'
    notes = [*([kind] if kind else []), *(["no report"] if report is None and not row.failed else [])]
    return name + "".join(f'<span class="note">{note}</span>' for note in notes)


def compare_command(arguments: Sequence[str]) -> str:
    """Do what `ppcl compare FOLDER..` says, and return a line that says where the table is.

    A folder of a sweep stands for its jobs. The table lies in the folder that holds all runs, or in `to=FOLDER`. Raises
    `UsageError` for less than two runs, for a folder that does not exist, and for some of the jobs of a sweep without
    `to=`, since that would replace the table of all of them.
    """
    told = [argument.removeprefix("to=") for argument in arguments if argument.startswith("to=")]
    for name in told:
        if not name or (Path(name).exists() and not Path(name).is_dir()):
            raise UsageError(f"compare: to={name} is no folder: name one, such as to=runs/compared.")
    runs = _runs_in([Path(argument) for argument in arguments if not argument.startswith("to=")])
    target = Path(told[-1]) if told else Path(os.path.commonpath([folder.resolve().parent for folder in runs]))
    missing = {job.resolve() for job in jobs_of(target)} - {run.resolve() for run in runs}
    if missing and not told:
        raise UsageError(
            f"compare: {target} has the table of a sweep with {len(missing)} more jobs: name all of them as {target}, "
            "or say with to=FOLDER where this table goes."
        )
    page = write_comparison(compared(runs), target)
    others = [name for name in ("comparison.csv", "comparison.png") if (target / name).exists()]
    return f"compared {len(runs)} runs: {', '.join([str(page), *others])}"


def _runs_in(folders: Sequence[Path]) -> list[Path]:
    """Return the runs that `folders` name, at least two; raises `UsageError` as `compare` does."""
    every = [job for folder in folders for job in (jobs_of(folder) or [folder])]
    folders = list({folder.resolve(): folder for folder in every}.values())
    for folder in folders:
        if not folder.exists():
            raise UsageError(f"compare: {folder} does not exist: name folders of runs, such as runs/sizes/*.")
    runs = [folder for folder in folders if (folder / "config.yaml").exists() or (folder / JOB).exists()]
    if len(runs) < 2:
        raise UsageError(
            f"compare: {len(runs)} of the {len(folders)} names given are folders of runs, and it takes two: name them, "
            "such as runs/sizes/*."
        )
    if len({run.parent for run in runs}) == 1 and all((run / JOB).exists() for run in runs):
        runs.sort(key=_place)  # a shell has sorted them by their names
    return runs


def jobs_of(folder: Path) -> list[Path]:
    """Return the folders of the jobs of a sweep in the order in which they ran; none if `folder` is not of a sweep."""
    found = [path.parent for path in folder.glob(f"*/{JOB}")] if (folder / MULTIRUN).exists() else []
    return sorted(found, key=_place)


def _place(job: Path) -> tuple[float, str]:
    number = read_job(job).number
    if number is None:  # of an earlier version, which named folders by the job's number
        number = int(job.name) if job.name.isdecimal() else None
    return (math.inf if number is None else number), job.name
