"""Dry runs of detection: of what a method compares, of the simulation of surrogates, and of gates that are trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ppcl.config import MethodConfig
from ppcl.context import Run
from ppcl.distill.gates import LearnGates
from ppcl.efficiency import LiveBytes
from ppcl.memory.dry import (
    blank_batch,
    extrapolated,
    few,
    forward_peak,
    if_it_runs,
    latent_bytes,
    model_of,
    of_batches,
    sample_bytes,
    without_data,
)
from ppcl.methods.base import Teacher
from ppcl.methods.lp import Lp, batches_at_once, run_once
from ppcl.methods.patterns import Group
from ppcl.methods.registry import load_method
from ppcl.methods.similarity import state_cosines, unit_grams
from ppcl.methods.surrogates import SurrogateCurves
from ppcl.methods.tinyfusion import TinyFusion, TinyFusionSettings
from ppcl.taps import BlockCall, observe


@if_it_runs
def detect_peak(run: Run, config: MethodConfig, free: float) -> int:
    """Return the peak bytes that detection adds to the teacher.

    `free`: the bytes of the device beside the teacher, which say how much of the calibration is taken at once.
    """
    samples = min(config.batch_size, config.num_samples)

    method = load_method(config)

    def peak_of(compare: Callable[..., Any]) -> int:
        def measured(layers: Mapping[str, int]) -> int:
            with without_data(run):
                model, batch = model_of(run, layers), blank_batch(run, samples)
                with LiveBytes() as recorded:
                    compare(run.family, model, batch)
            return recorded.peak

        return extrapolated(measured, few(run), run.num_layers)

    peaks = [peak_of(unit_grams)]
    if method.compares_states:
        peaks.append(peak_of(state_cosines))
    if method.num_held:
        held = sample_bytes(run, samples) + 2 * latent_bytes(run, samples)  # velocities of data and teacher
        peaks.append(forward_peak(run, samples) + method.num_held * held)
    if isinstance(method, Lp):
        peaks.append(_simulation_peak(run, config, samples, method.num_batches, free))
    if isinstance(method, TinyFusion):
        peaks.append(_learning_peak(run, method.settings))
    return max(peaks)


def _learning_peak(run: Run, settings: TinyFusionSettings) -> int:
    """Return the peak bytes of a step that trains gates on all blocks, with the weights that are trained beside them.

    A trained weight takes 16 bytes: itself, its gradient and two states of AdamW in float32.
    """

    def measured(layers: Mapping[str, int]) -> int:
        with without_data(run):
            groups = [Group(stack, range(count), count, tuple(range(1, count))) for stack, count in layers.items()]
            module = LearnGates(run.family, model_of(run, layers), groups, settings, run.precision)
            trained = sum(weight.numel() for weight in module.student.parameters() if weight.requires_grad)
            batch = blank_batch(run, settings.batch_size)
            with LiveBytes() as recorded:
                module.learn(batch, 0, torch.Tensor.backward)
        return recorded.peak + 16 * trained

    return extrapolated(measured, few(run), run.num_layers)


def _simulation_peak(run: Run, config: MethodConfig, samples: int, most: int, free: float) -> int:
    """Return the peak bytes of the simulation of surrogates. `samples`: of a batch; `most`: all batches."""
    with without_data(run):
        model, weights = model_of(run, few(run)), dict[str, Tensor]()

        def note(call: BlockCall) -> None:
            for name, stream in call.outputs.items():
                side = stream.shape[-1]
                weights[f"{call.stack}.{call.index}.{name}"] = torch.empty(side, side, dtype=torch.float32)

        observe(run.family, model, blank_batch(run, 1).inputs, note)
        probes: Any = SimpleNamespace(weights=weights)
        curves = SurrogateCurves(probes, few(run), debiased=config.debiased)
        teacher = Teacher(run.family, model, lambda: [], lambda: probes)
        size = min(most, batches_at_once(teacher, curves, blank_batch(run, samples), free))

    def measured(sizes: Mapping[str, int]) -> int:
        with without_data(run), torch.no_grad():
            model = model_of(run, few(run))
            teacher = Teacher(run.family, model, lambda: [], lambda: probes)
            curves = SurrogateCurves(probes, few(run), debiased=config.debiased)
            with LiveBytes() as recorded:
                for _ in run_once(teacher, curves, [blank_batch(run, samples) for _ in range(sizes["batches"])]):
                    pass
        return recorded.peak

    return of_batches(measured, size)
