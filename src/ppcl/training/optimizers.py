"""Optimisers and learning-rate schedule of all trainings."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

from ppcl.config import TrainingConfig
from ppcl.families.base import Family


def split_for_muon(family: Family, model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the trainable parameters of `model` in two lists: those for Muon, and all others (for AdamW).

    Muon gets the matrices of attention and FFNs in blocks. It does not get modulation layers, nor the embeddings that
    feed them (DiT has some in every block). The row of a class label rarely has a gradient, and Muon would scale an
    update of that row to the size of one of the whole matrix.
    """
    stacks = tuple(f"{stack}." for stack in family.stacks)
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        modulation = any(part in name for part in family.facts.modulations)
        matrix = parameter.ndim == 2 and name.startswith(stacks) and not modulation
        (hidden if matrix else rest).append(parameter)
    return hidden, rest


def adamw(parameters: Iterable[nn.Parameter], config: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW with the settings of a training.

    It is the fused version, which allocates no temporary copies of the parameters.
    """
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay, fused=True
    )


def muon(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Muon:
    """Return Muon with updates scaled to the RMS of AdamW's, so that both can use learning rates of one size."""
    return torch.optim.Muon(parameters, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")


def cosine_schedule(optimizer: torch.optim.Optimizer, config: TrainingConfig) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the learning-rate scheduler of a training, which follows `cosine_with_warmup`."""
    factor = partial(cosine_with_warmup, warmup=config.warmup_steps, total=config.steps, floor=config.min_lr_ratio)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def cosine_with_warmup(step: int, *, warmup: int, total: int, floor: float) -> float:
    """Return the learning-rate factor at `step`: linear warm-up to 1, then a cosine decay to `floor`.

    `warmup`, `total`: the number of warm-up steps and of all steps. From `total` on the factor stays at `floor`.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item())
