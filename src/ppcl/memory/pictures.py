"""Estimates the memory that sample pictures need beside a training, and checks whether the device has it."""

from __future__ import annotations

from dataclasses import replace

from ppcl.context import Run
from ppcl.memory import dry
from ppcl.memory.need import Need, capacity, fits
from ppcl.training.samples import draws_pictures

NO_ROOM = "they do not fit on the device beside the training"


def with_pictures(run: Run, need: Need) -> Need:
    """Return the need of a training with that of its sample pictures, or with a note where they do not fit.

    They are drawn and decoded between steps, when the memory of a step's activations is free. A forward needs less of
    it than a step with as many samples does. The need of another stage is returned as it is.
    """
    activations = next((name for name in need.device if name.startswith("activations")), None)
    if need.stage not in ("depth", "width", "finetune") or activations is None or not draws_pictures(run, need.stage):
        return need
    vae, _, decoding = dry.vae_peaks(run, 1)
    largest = max(need.device[activations], decoding)
    parts = need.device | {"VAE of sample pictures": vae, activations: largest}
    if fits(sum(parts.values()), capacity(run)):
        return replace(need, device=parts)
    note = f"{need.stage} draws no sample pictures: {NO_ROOM}"
    return replace(need, note="; ".join(filter(None, [need.note, note])))
