"""Rectified flow: x_sigma = (1 - sigma) x_0 + sigma n, velocity n - x_0 (Liu et al., 2209.03003)."""

from __future__ import annotations

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


def interpolate(
    clean: Float[Tensor, batch * rest], noise: Float[Tensor, batch * rest], sigmas: Float[Tensor, " batch"]
) -> Float[Tensor, batch * rest]:
    """Return the noisy samples (1 - sigma) x_0 + sigma n, with one noise level per sample."""
    weight = sigmas.view(-1, *[1] * (clean.ndim - 1)).to(clean.dtype)
    return (1 - weight) * clean + weight * noise


def velocity(clean: Float[Tensor, batch * rest], noise: Float[Tensor, batch * rest]) -> Float[Tensor, batch * rest]:
    """Return n - x_0, the target of a flow-matching model, which is the same at every noise level."""
    return noise - clean
