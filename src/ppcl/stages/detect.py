"""Stage 1.2: runs the configured method and writes its plan, curves and similarity maps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from ppcl.artifacts import Probes, PruningPlan, is_current, write_json
from ppcl.data.batches import TrainingBatch
from ppcl.families.base import Family
from ppcl.methods import get_method
from ppcl.methods.base import Curves, Teacher
from ppcl.ops.cka import centre
from ppcl.report import plots
from ppcl.stages.plan import show
from ppcl.stages.run import Run
from ppcl.surgery.count import count_parameters
from ppcl.taps import BlockCall, observe

MAP_TOKENS = 256


@torch.no_grad()
def similarity_maps(
    family: Family, transformer: torch.nn.Module, batch: TrainingBatch, *, top_channels: int = 0
) -> dict[str, list[list[float]]]:
    """CKA between every two blocks' outputs, per stream (paper Fig. 5), averaged over the batch.

    Of at most `MAP_TOKENS` tokens, evenly spaced: the similarities of every block are held at once.
    `top_channels` leaves out that many channels of most variance per block: a few massive ones can make
    blocks look alike that are not.
    """
    masks = family.masks(batch.inputs)
    grams: dict[str, list[Tensor]] = {}

    def on_block(call: BlockCall) -> None:
        for stream, features in call.outputs.items():
            every = -(-features.shape[1] // MAP_TOKENS)
            mask = masks[stream]
            centred = centre(features[:, ::every].double(), None if mask is None else mask[:, ::every])
            if top_channels:
                variance = centred.square().sum(dim=(0, 1))
                centred = centred[..., variance.argsort()[: len(variance) - top_channels]]
            gram = centred @ centred.mT  # [B, N, N]
            unit = gram / gram.square().sum(dim=(1, 2), keepdim=True).sqrt()
            grams.setdefault(stream, []).append(unit.flatten(1).float())

    observe(family, transformer, batch.inputs, on_block)
    maps = {}
    for stream, units in grams.items():
        stacked = torch.stack(units, dim=1)  # [B, M, N * N]
        maps[stream] = (stacked @ stacked.mT).mean(dim=0).tolist()
    return maps


def _deltas(curves: Curves) -> Curves:
    """delta(u, k) = cka(u, k - 1) - cka(u, k) (Eq. 4) for every curve; None where it is undefined."""
    return {
        stack: {
            stream: [[None, *(None if a is None or b is None else a - b for a, b in pairwise(row))] for row in table]
            for stream, table in streams.items()
        }
        for stack, streams in curves.items()
    }


def run(run: Run) -> None:
    method = run.config.method
    made_from = {"detection": run.probe_settings, "method": asdict(method)}
    plan = PruningPlan(run.config.model.family, run.num_layers, {}, made_from)
    if is_current(run.plan_path, plan.header()):
        run.say("detect", f"reused {run.plan_path}")
        show(run, PruningPlan.load(run.plan_path))
        return
    stream = run.stream(run.config.data.calibration_seed, method.batch_size)

    def calibration() -> Iterator[TrainingBatch]:
        for batch in stream.calibration(method.num_samples, method.num_timesteps):
            yield run.to_device(batch)

    def progress(items: Iterable[Any], total: int) -> Iterable[Any]:
        return track(items, "simulation", total, console=run.console, transient=True)

    teacher = Teacher(
        run.family, run.pipeline.transformer, calibration, lambda: Probes.load(run.probe_folder), progress
    )
    found = get_method(method).detect(teacher)
    middle = list(stream.calibration(min(method.num_samples, method.batch_size), 2))[-1]
    maps = similarity_maps(run.family, run.pipeline.transformer, run.to_device(middle))
    plan.intervals = found.intervals
    plan.scores = found.scores
    plan.parameters = count_parameters(run.family, run.config.model.arch, found.intervals)
    folder = run.plan_path.parent
    curves = {"method": method.name, "cka": found.curves, "delta": _deltas(found.curves), "similarity": maps}
    write_json(folder / "curves.json", curves)
    for stack, streams in found.curves.items():
        plots.interval_curves(folder / f"curves_{stack}.png", streams[method.stream], found.intervals[stack])
    plots.similarity_maps(folder / "similarity.png", {f"{name} stream": table for name, table in maps.items()})
    plan.save(run.plan_path)
    show(run, plan)
    run.say("detect", f"wrote {folder}")
