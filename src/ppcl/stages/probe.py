"""Stage 1.1: fit one residual linear probe per block and stream (paper Eq. 1-2)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ppcl.artifacts.files import check_finite
from ppcl.artifacts.headers import Header
from ppcl.artifacts.probes import Probes, check_probe, finish_probes, has_probes, write_probe
from ppcl.context import Run
from ppcl.data.batches import TrainingBatch
from ppcl.data.streams import Stream
from ppcl.methods.probes import Residual, fit_probes, relative_residuals, train_probes
from ppcl.parallel import gathered, of_first, share, total
from ppcl.report.text import show_shares


def run(run: Run) -> None:
    """Fit the probes l(x) = x + W x + b and write them to the cache, for all runs with the same teacher and data.

    W and b are the ridge regression of a block's residual y - x on its input x, optionally trained further by gradient
    descent. The relative residual ||l(x) - y||^2 / ||y - x||^2 on held-out batches is printed and stored.

    Several ranks divide the batches. They add their normal equations up in float64, block by block, so that probes are
    those of a single process but for the order of these sums. Training is divided by probe, as a step needs the last.
    """
    settings, folder = run.config.probe, run.probe_folder
    header = Probes.header_for(run.probe_settings)
    if of_first(has_probes(folder, header)):  # another run may write them just now
        run.say("probe", f"reused {folder}")
        return
    residuals, trained = _fit(run, header)
    if settings.train_steps:
        found = _train(run, header, trained)
        residuals = {key: found[key] for key in residuals}
    check_finite(residuals, "the probes are not recorded, since the held-out residual of one is no number")
    if not run.writes:
        return
    finish_probes(folder, header, residuals)
    for stream_name in sorted({key.rpartition(".")[2] for key in residuals}):
        values = [value for key, value in residuals.items() if key.rpartition(".")[2] == stream_name]
        run.say(
            "probe",
            f"{stream_name}: held-out relative residual {min(values):.3f} to {max(values):.3f} "
            f"over {len(values)} blocks",
        )
    run.say("probe", f"wrote {folder}")


def _stream(run: Run, *, held_out: bool) -> Stream:
    """Return calibration batches of held-out samples, or of those that training sees.

    The first ones fit the probes, the next ones measure their residuals, and later ones train. So they differ for toy
    pictures too, of which no sample is kept.
    """
    return run.data.stream(run.config.data.calibration_seed, run.config.probe.batch_size, held_out=held_out)


def _judging(run: Run, number: int = 0, ranks: int = 1) -> list[TrainingBatch]:
    """Return the held-out batches that residuals are measured on: those of rank `number` of `ranks`."""
    first = run.config.probe.num_batches
    steps = range(first + number, first + run.config.probe.num_heldout_batches, ranks)
    return _batches(run, _stream(run, held_out=True), steps)


def _batches(run: Run, stream: Stream, steps: Iterable[int]) -> list[TrainingBatch]:
    return [run.data.to_device(batch) for step in steps for batch in stream.divided(step, 1)]


def _fit(run: Run, header: Header) -> tuple[dict[str, float], dict[str, tuple[Tensor, Tensor]]]:
    """Fit all probes by least squares, on all ranks together. Each rank writes its share of the files.

    Returns the residuals of all probes, and if they are to be trained further, this rank's share of the probes instead
    of writing it.
    """
    settings, (number, ranks) = run.config.probe, share()
    family, transformer = run.family, run.teacher.transformer
    stream, working = _stream(run, held_out=False), min(ranks, settings.num_batches)
    fitted = range(number, settings.num_batches, working)
    if fitted:
        batches, judging, add_up = _batches(run, stream, fitted), _judging(run, number, working), total
    else:  # the others wait for this rank's part of every sum, so it runs a batch and adds nothing
        batches, judging, add_up = _batches(run, stream, range(1)), [], _add_nothing
    fits = fit_probes(family, transformer, batches, judging, ridge=settings.ridge, bias=settings.bias, total=add_up)
    count = len(family.blocks(transformer)) * len(family.masks(batches[0].inputs))
    mine: dict[str, Residual] = {}
    trained: dict[str, tuple[Tensor, Tensor]] = {}  # a training step updates all of them, so they are in memory
    for place, fit in enumerate(run.track(fits, "probes", count)):
        mine[fit.key] = fit.residual
        if place % ranks != number:
            continue
        if settings.train_steps:
            zero = settings.init == "zero"
            trained[fit.key] = (fit.weight * 0, fit.bias * 0) if zero else (fit.weight, fit.bias)
        else:
            check_probe(fit.key, fit.weight, fit.bias, "raise probe.ridge or probe.num_batches")
            write_probe(run.probe_folder, header, fit.key, fit.weight, fit.bias)
    show_shares(run, "probe", len(fitted), "batches fitted")
    parts = gathered(mine)
    return {key: Residual.together([found[key] for found in parts]).value for key in mine}, trained


def _add_nothing(tensor: Tensor) -> Tensor:
    """Return the sum of other ranks' tensors of this shape."""
    return total(torch.zeros_like(tensor))


def _train(run: Run, header: Header, probes: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Train this rank's `probes` and write them.

    Returns the residuals of the probes of all ranks.
    """
    settings, family, transformer = run.config.probe, run.family, run.teacher.transformer
    residuals: dict[str, float] = {}
    if probes:
        steps = run.track(range(settings.train_steps), "probe training")
        first, stream = settings.num_batches + settings.num_heldout_batches, _stream(run, held_out=False)
        training = (run.data.to_device(stream(first + step)) for step in steps)
        trained = train_probes(family, transformer, training, probes, lr=settings.lr)
        residuals = relative_residuals(family, transformer, _judging(run), trained)
        for key, (weight, bias) in trained.items():
            check_probe(key, weight, bias, f"lower probe.lr={settings.lr}")
        for key, (weight, bias) in trained.items():
            write_probe(run.probe_folder, header, key, weight, bias)
    return {key: value for part in gathered(residuals) for key, value in part.items()}
