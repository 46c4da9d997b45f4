"""Finds the stacks of blocks of a transformer: the block lists whose length one integer of its config sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accelerate import init_empty_weights
from torch import nn

from ppcl.taps import stack_of

MOST_BLOCKS = 512  # integers above this are sizes


@dataclass(frozen=True)
class BlockList:
    """A list of blocks, the config key that sets its length, and which of its blocks are alike.

    `path`: where it is in the transformer. `key`: None if no integer of the config sets its length alone; then `reason`
    says why. `count`: the number of blocks. `share`: of the transformer's parameters. `first`, `last`: how many blocks
    at its beginning and its end are built differently from those in between.
    """

    path: str
    key: str | None
    count: int
    params: int
    share: float
    first: int = 0
    last: int = 0
    reason: str = ""


def block_lists(transformer: nn.Module) -> list[BlockList]:
    """Return the outermost module lists, each with the config key that counts it if there is one.

    Those of a single module are only listed if there is one.

    A key counts a list if the model that is built with that integer one larger has one more block in exactly that list,
    and is otherwise the same. The models are built without weights.
    """
    lists = _outermost(transformer)
    grown: dict[str, list[str]] = {path: [] for path in lists}
    reasons: dict[str, str] = {}
    integers = _integers(transformer)
    lengths = {len(found) for found in lists.values()}
    # A key that counts a list mostly has its length. The others are tried for what is then left: models take seconds.
    for likely in (True, False):
        if not likely and all(grown[path] or path in reasons for path, found in lists.items() if len(found) > 1):
            break
        for key, value in integers.items():
            if (value in lengths) == likely:
                _try(transformer, lists, key, grown, reasons)
    whole = sum(parameter.numel() for parameter in transformer.parameters())
    return [
        _described(transformer, path, grown[path], reasons.get(path, ""), whole)
        for path, found in lists.items()
        if len(found) > 1 or grown[path]
    ]


def _integers(transformer: nn.Module) -> dict[str, int]:
    """Return the integers of a transformer's config that could be a number of blocks."""
    found = plain_config(transformer).items()
    return {key: value for key, value in found if type(value) is int and 1 <= value <= MOST_BLOCKS}


def _try(
    transformer: nn.Module,
    lists: Mapping[str, nn.ModuleList],
    key: str,
    grown: dict[str, list[str]],
    reasons: dict[str, str],
) -> None:
    """Build the model with one more in `key`, and add the key to the list in `grown` that is longer for it.

    Where it does not count a list alone, the reason is put in `reasons`.
    """
    config = plain_config(transformer)
    try:
        larger = without_weights(type(transformer), config | {key: config[key] + 1})
    except Exception:  # of any kind: other integers of a config must divide or equal each other
        return
    longer = {path: len(found) - len(lists[path]) for path, found in _outermost(larger).items() if path in lists}
    changed = [path for path, more in longer.items() if more]
    if len(changed) > 1:
        for path in changed:
            reasons[path] = f"{key} counts {' and '.join(changed)} at once"
    elif changed and longer[changed[0]] != 1:
        reasons[changed[0]] = f"one more in {key} makes {longer[changed[0]]} more blocks"
    elif changed and (other := _other_shape(transformer, larger, changed[0])):
        reasons[changed[0]] = f"{key} also changes the shape of {other}"
    elif changed:
        grown[changed[0]].append(key)


def _described(transformer: nn.Module, path: str, keys: list[str], reason: str, whole: int) -> BlockList:
    blocks = stack_of(transformer, path)
    params = sum(parameter.numel() for parameter in blocks.parameters())
    first, last = alike(blocks)
    if len(keys) == 1 and (first or last):
        first, last = alike(blocks, _with_one_less(transformer, path, keys[0]))
    if len(keys) > 1:
        reason = f"{' and '.join(keys)} each count it"
    elif not keys and not reason:
        reason = "no integer of the config counts it"
    key = keys[0] if len(keys) == 1 else None
    return BlockList(path, key, len(blocks), params, params / max(1, whole), first, last, "" if key else reason)


def _with_one_less(transformer: nn.Module, path: str, key: str) -> nn.ModuleList | None:
    """Return the list that the class makes, without weights, with one less in `key`; None if it makes none."""
    config = plain_config(transformer)
    try:
        return stack_of(without_weights(type(transformer), config | {key: config[key] - 1}), path)
    except Exception:  # of any kind: other entries of a config can ask for so many blocks
        return None


def alike(blocks: nn.ModuleList, fewer: nn.ModuleList | None = None) -> tuple[int, int]:
    """Return how many blocks are before, and how many after, a run of blocks of one class and one shape.

    `fewer`: the list that the class makes with one block less. It is the run that lacks one there; else the largest.
    """
    kinds = [_kind(block) for block in blocks]
    sizes = [sum(parameter.numel() for parameter in block.parameters()) for block in blocks]
    runs, start = list[tuple[int, int]](), 0
    for index in range(1, len(kinds) + 1):
        if index == len(kinds) or kinds[index] != kinds[start]:
            runs.append((start, index))
            start = index
    left = [_kind(block) for block in fewer or ()]
    shorter = [run for run in runs if kinds[: run[0]] + kinds[run[0] + 1 :] == left]
    first, stop = max(shorter or runs, key=lambda run: (run[1] - run[0] > 2, sum(sizes[slice(*run)])))
    return first, len(blocks) - stop


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """Return class and shapes of a block, and those of its modules."""
    modules = tuple((name, type(module)) for name, module in block.named_modules())
    return modules, tuple((name, tuple(value.shape)) for name, value in block.named_parameters())


def plain_config(transformer: Any) -> dict[str, Any]:
    """Return the arguments that a transformer was built with."""
    return {key: value for key, value in transformer.config.items() if not key.startswith("_") and key != "ppcl"}


def without_weights(kind: Any, config: Mapping[str, Any]) -> nn.Module:
    """Return a model with parameters that take no memory, and with real buffers."""
    settings, _, _ = kind.extract_init_dict(dict(config))  # `from_config` would make some classes another one
    with init_empty_weights(include_buffers=False):
        model: nn.Module = kind(**settings)
    return model.eval()


def _outermost(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the module lists that are in no other module list, by path."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return found


def _other_shape(model: nn.Module, larger: nn.Module, path: str) -> str | None:
    """Return a parameter outside of the list at `path` that one of the two models lacks or has in another shape."""
    own, other = (
        {name: tuple(value.shape) for name, value in each.named_parameters() if not name.startswith(f"{path}.")}
        for each in (model, larger)
    )
    return next((name for name in {**own, **other} if own.get(name) != other.get(name)), None)
