"""Rectified flow: x_sigma = (1 - sigma) x_0 + sigma n, velocity n - x_0 (Liu et al., 2209.03003)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def sample_sigmas(
    batch_size: int,
    generator: torch.Generator,
    *,
    scheme: str = "logit_normal",
    shift: float = 1.0,
) -> Float[Tensor, " batch"]:
    """Return random noise levels in (0, 1).

    `scheme`: their distribution, `logit_normal` (Esser et al., 2403.03206) or `uniform`.
    `shift`: s maps sigma to s sigma / (1 + (s - 1) sigma), which is nearer to pure noise for s > 1.

    Raises `ValueError` for another scheme.
    """
    if scheme == "logit_normal":
        sigmas = torch.sigmoid(torch.randn(batch_size, generator=generator))
    elif scheme == "uniform":
        sigmas = torch.rand(batch_size, generator=generator)
    else:
        raise ValueError(f"timesteps={scheme!r} is not one of logit_normal, uniform.")
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def shift_of(scheduler: Mapping[str, Any], tokens: int) -> float:
    """Return the shift that diffusers' pipelines give the noise levels of a picture of so many image tokens.

    `scheduler`: the scheduler's config. With `use_dynamic_shifting` the shift grows with the tokens. A scheduler that
    is not of flow matching has none, which is 1.
    """
    if not scheduler.get("use_dynamic_shifting"):
        return float(scheduler.get("shift", 1.0))
    low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    least, most = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    mu = least + (most - least) * (tokens - low) / (high - low)
    return math.exp(mu) if scheduler.get("time_shift_type", "exponential") == "exponential" else mu


def levels_of_drawing(count: int, shift: float, terminal: float = 0.0) -> list[float]:
    """Return the noise levels at which a picture is drawn in `count` steps, from 1 downwards, as diffusers' pipelines.

    They are evenly spaced from 1 to 1 / count, then shifted as by `sample_sigmas`. `terminal`: if above 0, the value
    that the last level gets, by a linear stretch of 1 - level (`shift_terminal` of diffusers' schedulers).
    """
    grid = torch.linspace(1.0, 1.0 / count, count)
    levels = shift * grid / (1 + (shift - 1) * grid)
    if terminal and count > 1:
        levels = 1 - (1 - levels) * (1 - terminal) / (1 - levels[-1])
    return levels.tolist()


def interpolate(
    clean: Float[Tensor, batch * rest], noise: Float[Tensor, batch * rest], sigmas: Float[Tensor, " batch"]
) -> Float[Tensor, batch * rest]:
    """Return the noisy samples (1 - sigma) x_0 + sigma n, with one noise level per sample."""
    weight = sigmas.view(-1, *[1] * (clean.ndim - 1)).to(clean.dtype)
    return (1 - weight) * clean + weight * noise


def velocity(clean: Float[Tensor, batch * rest], noise: Float[Tensor, batch * rest]) -> Float[Tensor, batch * rest]:
    """Return n - x_0, the target of a flow-matching model, which is the same at every noise level."""
    return noise - clean
