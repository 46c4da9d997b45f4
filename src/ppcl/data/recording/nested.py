"""Arguments of a call, as nested dicts, lists, tuples, numbers, texts and tensors: stored, compared and joined.

A path names a value within nested ones: `hidden_states`, `x.0`, `attention_kwargs.scale`. The axes of a call say, by
path, how calls are joined into one batch: the dimension of a tensor along which its rows lie, 0 for a list of rows, and
None for a value that all rows share.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ppcl.errors import UsageError

Axes = Mapping[str, int | None]
_PLAIN = (type(None), bool, int, float, str)


class NoAxesError(ValueError):
    """Two calls do not show along which dimension calls can be joined. The message says why."""


def copied(value: Any) -> Any:
    """Return nested values with every tensor copied to host memory, densely; all others are taken as they are."""
    if isinstance(value, Tensor):
        dense = torch.empty(value.shape, dtype=value.dtype)  # `contiguous` keeps the strides of expanded single numbers
        return dense.copy_(value.detach())
    if isinstance(value, Mapping):
        return {key: copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(item) for item in value) if type(value) in (list, tuple) else list(map(copied, value))
    return value


def digest(tensor: Tensor) -> str:
    """Return a hash, 32 hex digits, of the dtype, shape and values of a contiguous tensor in host memory."""
    found = hashlib.blake2b(f"{tensor.dtype} {list(tensor.shape)}".encode(), digest_size=16)
    values: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    found.update(memoryview(values))
    return found.hexdigest()


def packed(value: Any, keep: Callable[[Tensor], str], path: str) -> Any:
    """Return nested values as JSON, in which `keep` names every tensor.

    Raises `UsageError` for a value of another kind, which cannot be stored. `path`: the path of `value`.
    """
    if isinstance(value, Tensor):
        return {"tensor": keep(value)}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: packed(item, keep, f"{path}.{key}") for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [packed(item, keep, f"{path}.{number}") for number, item in enumerate(value)]}
    if isinstance(value, _PLAIN):
        return value
    raise UsageError(
        f"the transformer's argument {path} is a {type(value).__name__}, which data=prompts cannot record: give "
        "pictures with captions as data.path=FOLDER."
    )


def unpacked(stored: Any, tensor: Callable[[str], Tensor]) -> Any:
    """Return the nested values that `packed` has stored. `tensor` returns the tensor of a name."""
    if not isinstance(stored, dict):
        return stored
    ((kind, content),) = stored.items()
    if kind == "tensor":
        return tensor(content)
    if kind == "dict":
        return {key: unpacked(item, tensor) for key, item in content.items()}
    items = [unpacked(item, tensor) for item in content]
    return tuple(items) if kind == "tuple" else items


def tensors_of(stored: Any) -> frozenset[str]:
    """Return the names of all tensors in nested values, as `packed` has stored these."""
    if not isinstance(stored, dict):
        return frozenset()
    ((kind, content),) = stored.items()
    if kind == "tensor":
        return frozenset({content})
    return frozenset().union(*map(tensors_of, content.values() if kind == "dict" else content))


def replaced(value: Any, path: str, wanted: str, new: Any) -> Any:
    """Return nested values with the one at the path `wanted` replaced by `new`. `path`: the path of `value`."""
    if path == wanted:
        return new
    if not wanted.startswith(f"{path}."):
        return value
    if isinstance(value, Mapping):
        return {key: replaced(item, f"{path}.{key}", wanted, new) for key, item in value.items()}
    return type(value)(replaced(item, f"{path}.{number}", wanted, new) for number, item in enumerate(value))


def axes_of(one: Any, two: Any, path: str) -> dict[str, int | None]:
    """Return the axes of a call, from the nested values of a call for one sample and of one for two.

    A dimension that is twice as large for two samples holds the rows. Raises `NoAxesError` if a value changes in
    another way. `path`: the path of these values.
    """
    if isinstance(one, Tensor) and isinstance(two, Tensor) and one.ndim == two.ndim:
        changed = [dim for dim in range(one.ndim) if one.shape[dim] != two.shape[dim]]
        if not changed:
            return {path: None}
        if len(changed) == 1 and two.shape[changed[0]] == 2 * one.shape[changed[0]]:
            return {path: changed[0]}
        raise NoAxesError(f"{path} has the shape {list(one.shape)} for one sample and {list(two.shape)} for two")
    if isinstance(one, Mapping) and isinstance(two, Mapping) and one.keys() == two.keys():
        return _of_items((f"{path}.{key}", one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)) and type(one) is type(two):
        if one and len(two) == 2 * len(one):
            return {path: 0}
        if len(one) == len(two):
            return _of_items((f"{path}.{number}", *pair) for number, pair in enumerate(zip(one, two, strict=True)))
    if isinstance(one, _PLAIN) and one == two and type(one) is type(two):
        return {path: None}
    raise NoAxesError(f"{path} changes otherwise than by more rows where there are two samples in place of one")


def _of_items(items: Any) -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    for path, one, two in items:
        found |= axes_of(one, two, path)
    return found


def signature(stored: Any, axes: Axes | None, shapes: Mapping[str, Any], path: str) -> str:
    """Return a text that is equal for calls which can be joined into one batch.

    `stored`: a call as `packed` returns it, with tensors named by their digests. `shapes`: dtype and shape of each
    tensor by its name. Without `axes` all values must be equal. A tensor of rows may have other values, not another
    shape.
    """
    return json.dumps(_signature(stored, axes or {}, shapes, path, rows=False), sort_keys=True)


def _signature(stored: Any, axes: Axes, shapes: Mapping[str, Any], path: str, *, rows: bool) -> Any:
    if not isinstance(stored, dict):
        return stored
    rows = rows or axes.get(path) is not None
    ((kind, content),) = stored.items()
    if kind == "tensor":
        return shapes[content] if rows else content
    if kind == "dict":
        return {key: _signature(item, axes, shapes, f"{path}.{key}", rows=rows) for key, item in content.items()}
    items = [_signature(item, axes, shapes, f"{path}.{number}", rows=rows) for number, item in enumerate(content)]
    return [kind, items]


def rows_in(value: Any, axes: Axes, path: str) -> int:
    """Return the number of rows of nested values, that of the first one that has them; 1 if none has."""
    axis = axes.get(path)
    if axis is not None:
        return value.shape[axis] if isinstance(value, Tensor) else len(value)
    items = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    )
    return next((found for key, item in items if (found := rows_in(item, axes, f"{path}.{key}")) > 1), 1)


def row_of(value: Any, axes: Axes, path: str, rows: int, row: int) -> Any:
    """Return the nested values of a call with `rows` rows as those of a call with row number `row` alone.

    What has one row for all of them is taken whole. Raises `NoAxesError` if something has another number of rows.
    """
    axis = axes.get(path)
    if axis is not None:
        size, over = divmod(value.shape[axis] if isinstance(value, Tensor) else len(value), rows)
        if over and rows * size + over > 1:
            raise NoAxesError(f"{path} cannot be divided into {rows} rows")
        start, stop = (row * size, (row + 1) * size) if size else (0, 1)
        return value.narrow(axis, start, stop - start) if isinstance(value, Tensor) else value[start:stop]
    if isinstance(value, Mapping):
        return {key: row_of(item, axes, f"{path}.{key}", rows, row) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = enumerate(value)
        return type(value)(row_of(item, axes, f"{path}.{number}", rows, row) for number, item in items)
    return value


def joined(values: Sequence[Any], axes: Axes, path: str) -> Any:
    """Return the nested values of calls with one `signature` as those of one call for all of their rows."""
    first, axis = values[0], axes.get(path)
    if len(values) == 1:
        return first
    if isinstance(first, Tensor):
        return first if axis is None else torch.cat(list(values), dim=axis)
    if axis is not None:
        return type(first)(item for value in values for item in value)
    if isinstance(first, Mapping):
        return {key: joined([value[key] for value in values], axes, f"{path}.{key}") for key in first}
    if isinstance(first, (list, tuple)):
        each = zip(*values, strict=True)
        return type(first)(joined(items, axes, f"{path}.{number}") for number, items in enumerate(each))
    return first
