"""Checks that the weights of a saved model are those of its config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import nn

from ppcl.errors import UsageError, root


def without_weights(transformer_class: Any, folder: Path) -> nn.Module:
    """Return the model by the config in `folder`, with parameters that take no memory.

    Raises `UsageError` if the config is not one of this class.
    """
    try:
        with init_empty_weights(include_buffers=False):
            model: nn.Module = transformer_class.from_config(transformer_class.load_config(folder))
    except Exception as error:  # a value of any kind can stand in the file
        name = transformer_class.__name__
        raise UsageError(
            f"{folder / 'config.json'} is no config of a {name} ({root(error)}): fetch it again."
        ) from None
    return model


def check_fit(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], folder: Path, stacks: Mapping[str, str]) -> None:
    """Raise `UsageError` if the weights in `folder` are not those of `model`, which was made by the config there.

    Tensors that are in no block, and that the model has no place for, are allowed. diffusers warns of them.

    `shapes`: the shape of each stored tensor, by name. `stacks`: see `FamilyFacts`.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    remedy = "fetch both from one place"
    for stack, key in stacks.items():
        asked, there = (_count(names, stack) for names in (expected, shapes))
        if asked != there:
            raise UsageError(
                f"{folder / 'config.json'} has {key}={asked}, and the weights beside it have {there} blocks in "
                f"{stack}: {remedy}."
            )
    missing = sorted(expected.keys() - shapes.keys())
    if missing:
        more = f" and {len(missing) - 1} more tensors" if len(missing) > 1 else ""
        raise UsageError(f"{folder} lacks {missing[0]}{more}, which its config.json asks for: {remedy}.")
    wrong = next((name for name in expected if expected[name] != shapes[name]), None)
    if wrong:
        raise UsageError(
            f"{folder} holds {wrong} of shape {list(shapes[wrong])}, where its config.json asks for "
            f"{list(expected[wrong])}: {remedy}."
        )


def _count(names: Iterable[str], stack: str) -> int:
    """Return the number of blocks of a stack by the names of parameters."""
    return len({name.removeprefix(f"{stack}.").partition(".")[0] for name in names if name.startswith(f"{stack}.")})
