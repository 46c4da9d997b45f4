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
from ppcl.report.text import counted, show_shares


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
    stream = run.data.stream(run.config.data.calibration_seed, settings.batch_size)
    # The stream's first batches fit the probes, the next ones measure the residuals, and later ones train.
    judged = settings.num_batches + settings.num_heldout_batches
    residuals, trained = _fit(run, stream, header)
    if settings.train_steps:
        found = _train(run, stream, header, trained, judged)
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
    later = range(judged, judged + settings.train_steps)
    judged_on = stream.names(range(settings.num_batches, judged))
    if again := len(judged_on & stream.names([*range(settings.num_batches), *later])):
        run.say(
            "probe",
            f"these residuals are of {counted(len(judged_on), 'different sample')}, and the probes were fitted to "
            f"{again} of them too, because data.held_out leaves too few for probe.num_batches={settings.num_batches} "
            f"of {settings.batch_size}",
        )
    run.say("probe", f"wrote {folder}")


def _batches(run: Run, stream: Stream, steps: Iterable[int]) -> list[TrainingBatch]:
    return [run.data.to_device(batch) for step in steps for batch in stream.divided(step, 1)]


def _fit(run: Run, stream: Stream, header: Header) -> tuple[dict[str, float], dict[str, tuple[Tensor, Tensor]]]:
    """Fit all probes by least squares, on all ranks together. Each rank writes its share of the files.

    Returns the residuals of all probes, and if they are to be trained further, this rank's share of the probes instead
    of writing it.
    """
    settings, (number, ranks) = run.config.probe, share()
    family, transformer = run.family, run.teacher.transformer
    working, judged = min(ranks, settings.num_batches), settings.num_batches + settings.num_heldout_batches
    fitted = range(number, settings.num_batches, working)
    heldout = range(settings.num_batches + number, judged, working)
    batches, add_up = _batches(run, stream, fitted), total
    if not batches:  # the others wait for this rank's part of every sum, so it runs a batch and adds nothing
        batches, heldout, add_up = _batches(run, stream, range(1)), range(0), _add_nothing
    judging = _batches(run, stream, heldout)
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


def _train(
    run: Run, stream: Stream, header: Header, probes: dict[str, tuple[Tensor, Tensor]], judged: int
) -> dict[str, float]:
    """Train this rank's `probes` on the batches from number `judged` on, and write them.

    Returns the residuals of the probes of all ranks.
    """
    settings, family, transformer = run.config.probe, run.family, run.teacher.transformer
    residuals: dict[str, float] = {}
    if probes:
        steps = run.track(range(settings.train_steps), "probe training")
        training = (run.data.to_device(stream(judged + step)) for step in steps)
        trained = train_probes(family, transformer, training, probes, lr=settings.lr)
        heldout = _batches(run, stream, range(settings.num_batches, judged))
        residuals = relative_residuals(family, transformer, heldout, trained)
        for key, (weight, bias) in trained.items():
            check_probe(key, weight, bias, f"lower probe.lr={settings.lr}")
        for key, (weight, bias) in trained.items():
            write_probe(run.probe_folder, header, key, weight, bias)
    return {key: value for part in gathered(residuals) for key, value in part.items()}
