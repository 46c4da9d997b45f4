"""Evaluate every variant: score its pictures, compare them with the teacher's, and time a denoising step.

Several ranks divide what is compared with the teacher, by picture and by held-out sample, and the scores, by variant.
Rank 0 measures latency and memory, and all others wait while it measures the latency.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch.loggers import Logger
from torch import nn

from ppcl.artifacts.files import read_json
from ppcl.artifacts.headers import first_difference, is_current
from ppcl.artifacts.scores import NOISE_LEVELS, Fidelity, Likeness, NoiseLevel, ScoreRow
from ppcl.context import Run
from ppcl.data.batches import TrainingBatch
from ppcl.efficiency import interleaved_latency_ms, peak_memory_mb
from ppcl.export.quantized import weight_bytes
from ppcl.parallel import barrier, dealt, merged, of_first, together
from ppcl.pictures.drawing import denoising_step
from ppcl.pictures.fidelity import likenesses
from ppcl.pictures.images import image_folder, read_images, teacher_share
from ppcl.pictures.latents import latent_distance
from ppcl.pictures.scores import check_teacher, compare, score_headers, score_record
from ppcl.report.text import show_scores, show_shares
from ppcl.surgery.noise_levels import ByNoiseLevel
from ppcl.tracking.loggers import make_logger
from ppcl.variants.costs import FIRST_BATCH, relative_error, velocities, velocity_errors
from ppcl.variants.switch import Switch
from ppcl.variants.variants import Variant, variants_of

NUM_HELDOUT = 64  # samples that the velocity error is measured on
LOGGED = (
    *("num_layers", "params_ratio", "drop_percent", "latency_ms", "velocity_error", "latent_distance"),
    *("teacher_share", "psnr", "ssim"),
)


def _measure(
    run: Run, variants: list[Variant], switch: Switch, pictures: Mapping[str, list[Likeness]]
) -> dict[str, dict[str, Any]]:
    """Return the measurements of each variant's model, by the variant's name; rank 0 alone has them.

    They are its size, latency (ms), peak memory (MB), held-out velocity error ||v - v_T||^2 / ||v_T||^2, and the
    students, projectors and removals that it consists of. A variant in `pictures`, which holds the likeness of pictures
    to the teacher's, also has its fidelity. With `generate.teacher_above` teacher and pruned model are timed apart, and
    the latency is their mean, weighted by the steps that each of them ran for a picture.
    """
    above, passes = run.config.generate.teacher_above, run.family.num_passes(run.config.model.sampling)
    inputs = denoising_step(run) if run.writes else {}

    def denoise(model: nn.Module | None = None) -> None:
        with torch.inference_mode():
            for _ in range(passes):
                (model or run.teacher.transformer)(**inputs)

    by_name = {"teacher": Variant("teacher")} | {variant.name: variant for variant in variants}
    latency: dict[str, float] = {}
    barrier()  # from here until the end of the context all other ranks are idle
    with together():
        if run.writes:
            latency = interleaved_latency_ms(
                dict.fromkeys(by_name, denoise),
                run.config.benchmark.latency_repeats,
                lambda name: switch(by_name[name]),
                partial(run.track, description="latency, all variants in turns"),
            )
    batches = _heldout(run)
    targets = velocities(switch(Variant("teacher")), run.track(batches, "teacher: velocities"))
    sigmas = merged([batch.sigmas[0].item() for batch in batches])  # the rows of a recorded call have the same
    if sigmas:
        show_shares(run, "evaluate", len(batches), "held-out samples")

    measured = {}
    for variant in variants:
        name, transformer = variant.name, switch(variant)
        num_layers = sum(len(kept) for kept in switch.board.kept.values())
        share, models = None, [transformer]
        if above is not None and name != "teacher":
            transformer = switch(variant, above)
            share, models = teacher_share(run, name), list(cast(ByNoiseLevel, transformer).models)
        errors = []
        if name != "teacher":
            judged = run.track(batches, f"{name}: velocity error")
            errors = merged(velocity_errors(transformer, judged, targets))
        if not run.writes:
            continue
        params = cast(Any, transformer).num_parameters()  # also right for packed 4-bit weights
        resident = weight_bytes(transformer)
        measured[name] = {
            "num_layers": num_layers,
            "params": params,
            "latency_ms": latency[name] if share is None else _mean(latency["teacher"], latency[name], share),
            "peak_memory_mb": max(peak_memory_mb(partial(denoise, each), resident, run.device) for each in models),
            "teacher_share": share,
            "students": variant.students,
            "projectors": variant.projectors,
            "removed": variant.removed,
            "velocity_error": 0.0 if name == "teacher" else relative_error(errors) if errors else None,
            "fidelity": Fidelity(pictures[name], _by_noise_level(sigmas, errors)) if name in pictures else None,
        }
    return measured


def _by_noise_level(sigmas: list[float], errors: list[tuple[float, float]]) -> list[NoiseLevel]:
    """Return the velocity error by noise level, from the noise levels and the errors of batches of one sample."""
    return NoiseLevel.grouped((sigma, *error) for sigma, error in zip(sigmas, errors, strict=True))


def _mean(teacher: float, pruned: float, share: float) -> float:
    """Return the mean over the steps of a picture, of which the teacher runs `share`."""
    return share * teacher + (1 - share) * pruned


def _heldout(run: Run) -> list[TrainingBatch]:
    """Return this rank's share of the held-out samples, none without data.

    They come one by one, so that no setting of a training changes what is measured.
    """
    if run.config.data.name == "none":
        return []
    stream = run.data.stream(run.config.data.calibration_seed, 1)
    return [run.data.to_device(stream(FIRST_BATCH + number)) for number in dealt(range(NUM_HELDOUT))]


def _score(run: Run, name: str) -> dict[str, Any]:
    """Return the scores of a variant's pictures, and the distance of their latents from the teacher's."""
    scores = run.benchmark.score(run.prompts, read_images(run, name))
    distance = latent_distance(image_folder(run, name), image_folder(run, "teacher"), len(run.prompts))
    return {
        "scores": scores,
        "score_interval": None if scores is None else scores.interval,
        "latent_distance": distance,
    }


def _measured_with(run: Run) -> dict[str, Any]:
    """Return what the velocity error is measured with (the data, and how much of it), and if there is a fidelity."""
    data = {} if run.config.data.name == "none" else {"data": run.data.identity, "samples": NUM_HELDOUT}
    return data | ({"noise_levels": NOISE_LEVELS} if run.benchmark.compares else {})


def _was_measured(record: Path, measured_with: dict[str, Any]) -> bool:
    """Return whether a row was measured with the same; False for a row from before this was stored."""
    found = read_json(record, "The scores").get("measured_with")
    return isinstance(found, dict) and first_difference(found, measured_with) == "nothing"


def run(run: Run) -> None:
    """Write the scores and measurements of every variant, print them as a table and log them.

    Pictures are compared with the teacher's by the distance of their latents, and one by one if the benchmark
    `compares`. Existing records with the same settings and held-out data are reused. Raises `UsageError` if pictures
    are missing, or if records have other settings.
    """
    variants, plugs = variants_of(run)
    headers = score_headers(run, variants, plugs)
    check_teacher(headers)
    records = {name: score_record(run, name) for name in headers}
    measured_with = _measured_with(run)
    current = [is_current(records[name], header) for name, header in headers.items()]
    if of_first(all(current) and all(_was_measured(record, measured_with) for record in records.values())):
        run.say("evaluate", f"reused {run.scores_folder}")
    else:
        compared = [name for name in headers if name != "teacher" and run.benchmark.compares]
        pictures = {name: likenesses(run, name) for name in compared}
        switch = Switch(run, plugs)
        measured = _measure(run, variants, switch, pictures)
        switch.restore()
        with together():
            mine = [_score(run, name) for name in dealt(list(headers))]
        for (name, header), scores in zip(headers.items(), merged(mine), strict=True):
            if run.writes:
                row = ScoreRow(name=name, **scores, **measured[name], lower_is_better=run.benchmark.lower_is_better)
                row.save(records[name], header, measured_with)
        show_shares(run, "evaluate", len(mine), "variants scored")
    if not run.writes:
        return
    rows = compare([ScoreRow.load(record) for record in records.values()])
    show_scores(run, rows)
    logger = make_logger(run, "evaluate")
    if isinstance(logger, Logger):
        for row in rows:
            numbers = {key: getattr(row, key) for key in LOGGED} | (row.scores.to_json() if row.scores else {})
            if row.fidelity is not None:
                numbers |= {
                    f"velocity_error_{level.low:.2f}_{level.high:.2f}": level.velocity_error
                    for level in row.fidelity.noise_levels
                }
            logger.log_metrics({f"{row.name}/{k}": v for k, v in numbers.items() if v is not None})
        logger.finalize("success")
