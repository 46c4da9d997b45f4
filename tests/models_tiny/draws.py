"""Tensors that the calls of several tiny models are made of."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def normals(seed: int = 0) -> Callable[..., Tensor]:
    """Return a function from a shape to standard normal numbers; each call of it goes on drawing from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(shape, generator=generator)


def both(value: float) -> Tensor:
    """Return one number for each of the two samples of a batch, as a pipeline expands its timestep."""
    return torch.tensor(value).expand(2)


def padding(*lengths: int) -> Tensor:
    """Return a tokenizer's mask (sample, token), int64: 1 for the first `length` tokens of each row."""
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()


def grid_ids(height: int, width: int, first: float = 0, start: float = 0) -> Tensor:
    """Return positions (height * width, 3) of image tokens: `first`, then row and column counted from `start`."""
    rows, columns = torch.arange(height) + float(start), torch.arange(width) + float(start)
    return torch.cartesian_prod(torch.tensor([float(first)]), rows, columns)


def line_ids(length: int) -> Tensor:
    """Return positions (length, 3) of text tokens: 0, then the number of the token twice."""
    number = torch.arange(length).float()
    return torch.stack([torch.zeros(length), number, number], dim=-1)
