"""Walks nested arguments: tensors and other values in tuples, lists and dicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Path = tuple[str | int, ...]


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield each value that is no tuple, list or dict, with its place: the keys and indices that lead to it."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    else:
        yield path, value


def tensors(value: Any) -> dict[Path, Tensor]:
    """Return the tensors in nested arguments, by their place."""
    return {path: item for path, item in leaves(value) if isinstance(item, Tensor)}


def at(value: Any, path: Path) -> Any:
    """Return what is at a place of nested arguments."""
    for key in path:
        value = value[key]
    return value


def same(one: Any, other: Any) -> bool:
    """Return whether two nested arguments are equal. Objects of unknown kinds are if what they hold is."""
    left, right = dict(leaves(one)), dict(leaves(other))
    return left.keys() == right.keys() and all(_equal(item, right[path]) for path, item in left.items())


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
            return False
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, bool | int | float | str | bytes | None):
        return bool(one == other)
    held = [getattr(item, "__dict__", None) for item in (one, other)]
    return type(one) is type(other) and None not in held and same(*held)
