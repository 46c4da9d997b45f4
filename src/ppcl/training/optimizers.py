"""Optimisers of all trainings, and their learning-rate schedule."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn

from ppcl.config import TrainingConfig
from ppcl.families.base import Family


def split_for_muon(family: Family, model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters of `model` that Muon takes, and all others.

    Muon is made for the matrices of attention and FFNs. Modulations, and embeddings that feed them (DiT: in every
    block), are of the others: a label's row gets a step only now and then, and Muon would make that step as large as a
    whole matrix's.
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
    """AdamW by the settings of a training; fused, which takes no temporaries the size of a part."""
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay, fused=True
    )


def muon(parameters: Iterable[nn.Parameter], lr: float, weight_decay: float) -> torch.optim.Muon:
    """Muon whose updates are as large as AdamW's."""
    return torch.optim.Muon(parameters, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")


def cosine_schedule(optimizer: torch.optim.Optimizer, config: TrainingConfig) -> torch.optim.lr_scheduler.LambdaLR:
    """The learning-rate schedule of a training, as `cosine_with_warmup` has it."""
    factor = partial(cosine_with_warmup, warmup=config.warmup_steps, total=config.steps, floor=config.min_lr_ratio)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def cosine_with_warmup(step: int, *, warmup: int, total: int, floor: float) -> float:
    """Learning-rate factor: linear to 1 over `warmup` steps, then half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item())
