"""Stage 1.1: fit one residual linear probe per block and stream (paper Eq. 1-2)."""

from __future__ import annotations

from torch import Tensor

from ppcl.artifacts.headers import is_current
from ppcl.artifacts.probes import Probes, finish_probes, write_probe
from ppcl.context import Run
from ppcl.methods.probes import fit_probes, relative_residuals, train_probes
from ppcl.report.text import counted


def run(run: Run) -> None:
    """Fit the probes l(x) = x + W x + b and write them to the cache, for all runs with the same teacher and data.

    W and b are the ridge regression of a block's residual y - x on its input x, optionally trained further by gradient
    descent. The relative residual ||l(x) - y||^2 / ||y - x||^2 on held-out batches is printed and stored.
    """
    settings, folder = run.config.probe, run.probe_folder
    header = Probes.header_for(run.probe_settings)
    if is_current(folder / "probes.json", header):
        run.say("probe", f"reused {folder}")
        return
    stream = run.data.stream(run.config.data.calibration_seed, settings.batch_size)
    family, transformer = run.family, run.teacher.pipeline.transformer
    # The stream's first batches fit the probes, the next ones measure the residuals, and later ones train.
    judged = settings.num_batches + settings.num_heldout_batches
    batches = [run.data.to_device(stream(step)) for step in range(judged)]
    heldout = batches[settings.num_batches :]
    fits = fit_probes(
        family, transformer, batches[: settings.num_batches], heldout, ridge=settings.ridge, bias=settings.bias
    )
    count = len(family.blocks(transformer)) * len(family.masks(batches[0].inputs))
    residuals: dict[str, float] = {}
    trained: dict[str, tuple[Tensor, Tensor]] = {}  # a training step updates all probes, so all are in memory
    for fit in run.track(fits, "probes", count):
        if settings.train_steps:
            zero = settings.init == "zero"
            trained[fit.key] = (fit.weight * 0, fit.bias * 0) if zero else (fit.weight, fit.bias)
        else:
            write_probe(folder, header, fit.key, fit.weight, fit.bias)
            residuals[fit.key] = fit.residual.value
    if settings.train_steps:
        steps = run.track(range(settings.train_steps), "probe training")
        training = (run.data.to_device(stream(judged + step)) for step in steps)
        trained = train_probes(family, transformer, training, trained, lr=settings.lr)
        residuals = relative_residuals(family, transformer, heldout, trained)
        for key, (weight, bias) in trained.items():
            write_probe(folder, header, key, weight, bias)
    finish_probes(folder, header, residuals)
    for stream_name in sorted({key.rpartition(".")[2] for key in residuals}):
        values = [value for key, value in residuals.items() if key.endswith(stream_name)]
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
