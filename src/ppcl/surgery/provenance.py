"""Reads the `ppcl` entry of an exported transformer's config: which blocks of the full model it has kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ppcl.errors import UsageError
from ppcl.layers import BlockMap


def exported_blocks(transformer: nn.Module) -> BlockMap:
    """Return which blocks of the full model an exported `transformer` has.

    Raises `UsageError` for a transformer that ppcl did not export, and for one whose kept blocks are unknown.
    """
    provenance = _entry(transformer)
    if not provenance:
        raise UsageError("this transformer's config has no ppcl key: it is not a model that ppcl exported.")
    if not provenance.get("kept_layers"):
        raise UsageError(
            "this transformer's config does not say which blocks of the full model it has kept: import it with "
            "intervals=."
        )
    counts = {stack: len(_stack(transformer, stack)) for stack in provenance["kept_layers"]}
    return BlockMap.of(provenance, counts)


def pruned_blocks(transformer: nn.Module) -> BlockMap | None:
    """Return which blocks of the full model `transformer` was exported with, or None if ppcl did not prune it.

    A plugboard may have other blocks in place.
    """
    provenance = _entry(transformer)
    kept = provenance.get("kept_layers")
    return BlockMap.of(provenance, {stack: len(found) for stack, found in kept.items()}) if kept else None


def earlier_of(provenance: Mapping[str, Any] | None) -> list[dict[str, list[int]]]:
    """Return the kept blocks of each pruned model that a model was pruned from, oldest first; empty for most."""
    return list((provenance or {}).get("pruned_from", []))


def earlier_models(transformer: nn.Module) -> list[dict[str, list[int]]]:
    """Return what `earlier_of` does, for a transformer."""
    return earlier_of(_entry(transformer))


def _entry(transformer: nn.Module) -> dict[str, Any]:
    config: Any = getattr(transformer, "config", None) or {}
    return dict(config.get("ppcl") or {})


def _stack(transformer: nn.Module, stack: str) -> Any:
    try:
        return transformer.get_submodule(stack)
    except AttributeError:
        raise UsageError(
            f"the config's ppcl.kept_layers names {stack}, which {type(transformer).__name__} does not have: use the "
            "config.json that was exported with these weights."
        ) from None
