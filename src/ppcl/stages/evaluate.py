"""Scores the pictures of every variant and measures what a denoising step costs."""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning.pytorch.loggers import Logger
from PIL import Image

from ppcl.artifacts.files import read_json, write_json
from ppcl.artifacts.headers import is_current
from ppcl.benchmarks.shapes import score, to_pixels
from ppcl.context import Run
from ppcl.efficiency import interleaved_latency_ms, peak_memory_mb
from ppcl.export.quantized import weight_bytes
from ppcl.pictures.drawing import denoising_step
from ppcl.pictures.images import image_folder
from ppcl.pictures.scores import compare, score_headers
from ppcl.report.text import show_scores
from ppcl.training.loggers import finish_logger, make_logger
from ppcl.variants.switch import Switch
from ppcl.variants.variants import Variant, variants_of


def _measure(run: Run, variants: list[Variant], switch: Switch) -> dict[str, dict[str, Any]]:
    inputs = denoising_step(run)
    passes = run.family.num_passes(run.config.model.sampling)

    def denoise() -> None:
        with torch.inference_mode():
            for _ in range(passes):
                run.teacher.pipeline.transformer(**inputs)

    by_name = {variant.name: variant for variant in variants}
    latency = interleaved_latency_ms(
        dict.fromkeys(by_name, denoise), run.config.benchmark.latency_repeats, lambda name: switch(by_name[name])
    )
    measured = {}
    for variant in variants:
        name, transformer = variant.name, switch(variant)
        params = cast(Any, transformer).num_parameters()  # of quantised weights too
        resident = weight_bytes(transformer)
        measured[name] = {
            "num_layers": sum(len(kept) for kept in switch.board.kept.values()),
            "params": params,
            "latency_ms": latency[name],
            "peak_memory_mb": peak_memory_mb(denoise, resident, run.device),
        }
    return measured


def run(run: Run) -> None:
    variants, plugs = variants_of(run)
    headers = score_headers(run, variants, plugs)
    records = {name: run.folder / "scores" / f"{name}.json" for name in headers}
    if all(is_current(records[name], header) for name, header in headers.items()):
        run.say("evaluate", f"reused {run.folder / 'scores'}")
    else:
        switch = Switch(run, plugs)
        measured = _measure(run, variants, switch)
        switch.restore()
        for variant in variants:
            name, header = variant.name, headers[variant.name]
            folder = image_folder(run, name)
            images = [to_pixels(Image.open(folder / f"{number:05d}.png")) for number in range(len(run.scenes))]
            body = measured[name] | {
                "scores": score(run.scenes, images),
                "students": variant.students,
                "projectors": variant.projectors,
                "removed": variant.removed,
            }
            write_json(records[name], header.to_json() | {"name": name} | body)
    rows = compare([read_json(record, "The scores") for record in records.values()])
    show_scores(run, rows)
    logger = make_logger(run, "evaluate")
    if isinstance(logger, Logger):
        for row in rows:
            numbers = {key: row[key] for key in ("num_layers", "params_ratio", "drop_percent", "latency_ms")}
            logger.log_metrics({f"{row['name']}/{k}": v for k, v in (numbers | row["scores"]).items()})
        logger.finalize("success")
        finish_logger(logger)
