"""What the experiments share: runs made from the same configuration as the command line's, and tables."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from ppcl.quiet import quiet_messages, quiet_progress

quiet_messages()  # before what imports torch and diffusers

from ppcl.cli import conf_dir  # noqa: E402
from ppcl.context import Run  # noqa: E402
from ppcl.pictures.drawing import draw, given_pictures  # noqa: E402
from ppcl.schema import register_schema  # noqa: E402
from ppcl.validation import parse  # noqa: E402

SEEDS = (10, 11, 12)


def make_run(name: str, *overrides: str) -> Run:
    """The run that `ppcl name=<name> <overrides>` would work in, without running a stage."""
    from hydra import compose, initialize_config_dir

    quiet_progress()
    register_schema()
    with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
        config = parse(compose("config", overrides=[f"name={name}", *overrides]))
    folder = Path(config.paths.runs_dir) / name
    folder.mkdir(parents=True, exist_ok=True)
    return Run(config, folder)


def run_stages(run: Run, *stages: str) -> None:
    """Those stages in that order, as the command line runs them."""
    from importlib import import_module

    for stage in stages:
        import_module(f"ppcl.stages.{stage}").run(run)


def score_pipeline(run: Run, per_category: int) -> dict[str, float]:
    """Draw and score the benchmark's prompts with the pipeline as it is arranged now; nothing is kept."""
    sizes = replace(run.config.benchmark, prompts_per_category=per_category)
    prompts = run.benchmark.prompts(run.family, replace(run.config, benchmark=sizes))
    images = []
    size = run.config.generate.batch_size
    for start in range(0, len(prompts), size):
        numbers = range(start, min(start + size, len(prompts)))
        texts = [prompts[number].text for number in numbers]
        given = [given_pictures(run, prompts[number]) for number in numbers]
        images += draw(run, run.teacher.pipeline, texts, numbers, given)
    return run.benchmark.score(prompts, images).to_json()


def read_rows(name: str, variants: Mapping[str, str]) -> list[dict[str, Any]]:
    """The runs of the sweep `name` as a table, a row per variant and seed; `variants` says how each is called."""
    rows = []
    for config in sorted((Path("runs") / name).glob("*/config.yaml")):
        settings = yaml.safe_load(config.read_text())
        scores = {path.stem: json.loads(path.read_text()) for path in (config.parent / "scores").glob("*.json")}
        teacher = scores["teacher"]
        for variant, label in variants.items():
            row = scores[variant]
            drop = 100 * (1 - row["scores"]["overall"] / teacher["scores"]["overall"])
            facts = {"variant": label, "seed": settings["data"]["train_seed"], "num_layers": row["num_layers"]}
            ratios = {"params_ratio": row["params"] / teacher["params"]}
            ratios |= {"latency_ratio": row["latency_ms"] / teacher["latency_ms"]}
            rows.append(facts | ratios | row["scores"] | {"drop_percent": drop})
    return rows


def collect(target: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes the table and prints each variant's mean over the seeds."""
    write_csv(target, rows)
    for variant in dict.fromkeys(row["variant"] for row in rows):
        chosen = [row for row in rows if row["variant"] == variant]
        scores, drops = (mean_and_spread(row[key] for row in chosen) for key in ("overall", "drop_percent"))
        print(
            f"{variant}: {chosen[0]['num_layers']} blocks, {100 * chosen[0]['params_ratio']:.1f}%, score "
            f"{scores[0]:.3f} +- {scores[1]:.3f}, drop {drops[0]:.1f} +- {drops[1]:.1f}% over {len(chosen)} seeds"
        )


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """`rows` with the first one's keys as header; numbers to six digits."""
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        for row in rows:
            writer.writerow({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()})


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def mean_and_spread(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter is 0 of a single value."""
    found = list(values)
    return statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0
