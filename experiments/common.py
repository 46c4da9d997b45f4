"""Functions that the experiments share: make runs as the command line does, score pipelines, write tables."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ppcl
from ppcl.artifacts.scores import ComparedRow
from ppcl.benchmarks.base import Prompt
from ppcl.command import prepare
from ppcl.context import Run
from ppcl.pictures.drawing import draw, given_pictures
from ppcl.quiet import quiet_progress

SEEDS = (10, 11, 12)


def make_run(name: str, *overrides: str) -> Run:
    """Return the run that `ppcl name=<name> <overrides>` would use, without running a stage."""
    quiet_progress()
    run = prepare([f"name={name}", *overrides])
    run.folder.mkdir(parents=True, exist_ok=True)
    return run


def drawing(run: Run) -> dict[str, Any]:
    """Return how a run draws, for the fingerprint of a row: the keys of `model.sampling` that the first rows knew.

    `arguments` came later and counts only where it is set, so that earlier rows are found.
    """
    found = asdict(run.config.model.sampling)
    return found if found["arguments"] else {key: value for key, value in found.items() if key != "arguments"}


def score_pipeline(run: Run, per_category: int) -> dict[str, float]:
    """Draw `per_category` prompts of each category with the run's pipeline as it is now; return the scores by name."""
    return run.benchmark.score(*draw_prompts(run, per_category)).to_json()


def draw_prompts(run: Run, per_category: int) -> tuple[list[Prompt], list[Any]]:
    """Return `per_category` prompts of each category, and the PIL picture that the run's pipeline draws for each.

    The pictures are not kept on disk.
    """
    sizes = replace(run.config.benchmark, prompts_per_category=per_category)
    prompts = run.benchmark.prompts(run.family, replace(run.config, benchmark=sizes))
    images = []
    size = run.config.generate.batch_size
    for start in range(0, len(prompts), size):
        numbers = range(start, min(start + size, len(prompts)))
        texts = [prompts[number].text for number in numbers]
        given = [given_pictures(run, prompts[number]) for number in numbers]
        images += [drawn.picture for drawn in draw(run, run.teacher.pipeline, texts, numbers, given)]
    return prompts, images


def read_rows(name: str, variants: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return a row per variant and seed of the sweep in `runs/<name>`; `variants` maps each variant to its label."""
    rows = []
    for record in sorted((Path("runs") / name).glob("*/config.yaml")):
        results = ppcl.load(record.parent)
        scores = results.scores
        teacher = scores["teacher"]
        for variant, label in variants.items():
            row = ComparedRow.beside(teacher, scores[variant])
            assert row.scores is not None
            facts = {"variant": label, "seed": results.config.data.train_seed, "num_layers": row.num_layers}
            ratios = {"params_ratio": row.params_ratio, "latency_ratio": row.latency_ms / teacher.latency_ms}
            rows.append(facts | ratios | row.scores.to_json() | {"drop_percent": row.drop_percent})
    return rows


def collect(target: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the table and print each variant's mean over the seeds."""
    write_csv(target, rows)
    for variant in dict.fromkeys(row["variant"] for row in rows):
        chosen = [row for row in rows if row["variant"] == variant]
        scores, drops = (mean_and_spread(row[key] for row in chosen) for key in ("overall", "drop_percent"))
        print(
            f"{variant}: {chosen[0]['num_layers']} blocks, {100 * chosen[0]['params_ratio']:.1f}%, score "
            f"{scores[0]:.3f} +- {scores[1]:.3f}, drop {drops[0]:.1f} +- {drops[1]:.1f}% over {len(chosen)} seeds"
        )


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write `rows` as CSV. The keys of the first row are the header; floats are written to six digits."""
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def read_csv(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file. All values are strings."""
    with path.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def mean_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation, which is 0 for a single value."""
    found = list(values)
    return statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0
