"""Parts of calls that several cases share: seeded noise, position ids and masks as diffusers' pipelines make them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor


def seeded() -> Callable[..., Tensor]:
    """Return `torch.randn` with a generator of its own, so that an `inputs` gives the same values at each call."""
    return partial(torch.randn, generator=torch.Generator().manual_seed(0))


def both(value: float) -> Tensor:
    """Return one number for each of the two samples of a batch, as a pipeline expands its timestep."""
    return torch.tensor(value).expand(2)


def padding(*lengths: int) -> Tensor:
    """Return a tokenizer's mask (sample, token), int64: 1 for the first `length` tokens of each row."""
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def grid_ids(height: int, width: int) -> Tensor:
    """Return the position ids (token, 3) of a picture in FLUX and its kin: 0, row, column."""
    return torch.cartesian_prod(torch.zeros(1), torch.arange(float(height)), torch.arange(float(width)))
