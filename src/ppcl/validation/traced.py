"""Registers a model of no known family as a traced one, from its config."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppcl.config import Config
from ppcl.errors import UsageError

TRACED = "traced"


def introduce(config: Config, folder: Path, index: Mapping[str, Any], arch: Mapping[str, Any]) -> None:
    """Register the model in a folder as a traced one.

    Raises `UsageError` if it seems to have no stack of blocks, or is of a class that diffusers does not have.
    """
    import diffusers

    from ppcl.families.traced.known import transformer_of, unknown_class  # loads torch
    from ppcl.surgery.lora_layers import loads_loras

    component, name = config.model.component, index["_class_name"]
    kind = transformer_of(folder, component, index, arch)
    pipeline_class = getattr(diffusers, name, None)
    if pipeline_class is None:
        raise unknown_class(folder, name)
    _register(config, kind, arch, takes_lora=loads_loras(pipeline_class, component))


def introduce_class(config: Config) -> None:
    """Register a model without a local folder as a traced one, by `model.transformer` and `model.arch`."""
    import diffusers

    name = config.model.transformer
    kind = getattr(diffusers, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        raise UsageError(
            f"model.transformer={name} is no model of diffusers {diffusers.__version__}: name the class of the "
            "transformer, such as WanTransformer3DModel, or give model=auto model.path=FOLDER."
        )
    _register(config, kind, config.model.arch)


def _register(config: Config, kind: Any, arch: Mapping[str, Any], *, takes_lora: bool = True) -> None:
    """Register the facts of a traced model: before it is traced, those that its config tells.

    `takes_lora`: whether its pipeline loads LoRAs.
    """
    from ppcl.families.registry import register
    from ppcl.families.traced.family import facts_of
    from ppcl.families.traced.known import guessed, read_trace, trace_path

    path = trace_path(config.paths.cache_dir, config.model.component, kind.__name__, arch)
    found = read_trace(path) or guessed(kind, arch)
    register(facts_of(found, takes_lora=takes_lora))
