"""Scores the pictures of every variant and measures what a denoising step costs."""

from __future__ import annotations

from typing import Any, cast

import torch
from lightning.pytorch.loggers import Logger
from PIL import Image
from rich.table import Table

from ppcl.artifacts import Header, is_current, read_json, write_json
from ppcl.benchmarks.efficiency import interleaved_latency_ms, peak_memory_mb
from ppcl.benchmarks.shapes import score, to_pixels
from ppcl.errors import UsageError
from ppcl.export.quantized import weight_bytes
from ppcl.stages.generate import image_folder, prompts_of, variant_header
from ppcl.stages.plan import billions
from ppcl.stages.run import Run
from ppcl.stages.training import finish_logger, make_logger
from ppcl.stages.variants import Plugs, Switch, Variant, variants_of


def denoising_step(run: Run) -> dict[str, Any]:
    """Inputs of one forward at batch 1 for the configured resolution; of cached data, as one sample has them."""
    if run.config.data.name != "shapes":
        return run.to_device(run.stream(run.config.data.calibration_seed, 1)(0).inputs)
    sampling = run.config.model.sampling
    images = torch.zeros(1, 3, sampling.height, sampling.width)
    latents, size = run.family.encode_images(run.pipeline, images)
    prompt = [run.scenes[-1].caption]
    references = run.family.encode_references(run.pipeline, [images] * run.family.num_references)
    conditions = run.family.encode_prompts(run.pipeline, prompt)(prompt) | references
    sigmas = torch.full((1,), 0.5).to(latents)
    return run.to_device(run.family.forward_inputs(latents, conditions, sigmas, size))


def _measure(run: Run, variants: list[Variant], switch: Switch) -> dict[str, dict[str, Any]]:
    inputs = denoising_step(run)
    passes = run.family.num_passes(run.config.model.sampling)

    def denoise() -> None:
        with torch.inference_mode():
            for _ in range(passes):
                run.pipeline.transformer(**inputs)

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


def score_headers(run: Run, variants: list[Variant], plugs: Plugs) -> dict[str, Header]:
    """What each variant's scores are made from: just the pictures this configuration draws."""
    prompts, headers = prompts_of(run), {}
    for variant in variants:
        images = variant_header(run, variant, plugs, prompts)
        manifest = image_folder(run, variant.name) / "manifest.json"
        if not is_current(manifest, images):
            raise UsageError(f"{manifest} does not exist: run stages=[generate] for variant {variant.name} first.")
        headers[variant.name] = Header("ppcl.scores", {"images": images.fingerprint})
    return headers


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
    show(run, rows)
    logger = make_logger(run, "evaluate")
    if isinstance(logger, Logger):
        for row in rows:
            numbers = {key: row[key] for key in ("num_layers", "params_ratio", "drop_percent", "latency_ms")}
            logger.log_metrics({f"{row['name']}/{k}": v for k, v in (numbers | row["scores"]).items()})
        logger.finalize("success")
        finish_logger(logger)


def compare(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add `params_ratio` and `drop_percent` (R.: relative loss of overall) against the teacher's row."""
    base = next((row for row in rows if row["name"] == "teacher"), None)
    if base is None:
        raise UsageError("a comparison needs the teacher: add it to generate.variants.")
    compared = []
    for row in rows:
        overall = base["scores"]["overall"]
        # A teacher that scores nothing has nothing to lose; JSON has no NaN.
        drop = 100 * (overall - row["scores"]["overall"]) / overall if overall else 0.0
        compared.append(row | {"params_ratio": row["params"] / base["params"], "drop_percent": drop})
    return compared


def show(run: Run, rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("variant", "blocks", "params", "overall", "drop %", "ms/step", "peak MB"):
        table.add_column(title, justify="left" if title == "variant" else "right")
    for row in rows:
        table.add_row(
            row["name"],
            str(row["num_layers"]),
            billions(row["params"]),
            f"{row['scores']['overall']:.3f}",
            f"{row['drop_percent']:.1f}",
            f"{row['latency_ms']:.1f}",
            f"{row['peak_memory_mb']:.1f}",
        )
    run.console.print(table)
