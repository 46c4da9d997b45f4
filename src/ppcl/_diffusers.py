"""Registers ppcl's model classes with diffusers, and refuses LoRAs of the full model on pruned ones.

The index of an export pruned in width names the class `["transformer_qwen_image_pruned",
"PrunedQwenImageTransformer2DModel"]`, and the export holds that file, which diffusers runs only with
`trust_remote_code=True`. Where ppcl is imported its own module is used and no flag is needed, because diffusers first
looks for the module in `diffusers.pipelines`.
"""

from __future__ import annotations

import sys
from functools import wraps
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import Any

from ppcl.families.registry import component_classes


class _Module:
    """Stands in for a module, and imports it when an attribute is first read."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)


def _register() -> None:
    for module in component_classes().values():
        setattr(sys.modules["diffusers.pipelines"], module.rpartition(".")[2], _Module(module))
    _guard_loras()


def _guard_loras() -> None:
    """Make diffusers refuse a LoRA of the full model on a pruned one, where it would silently hit the wrong blocks."""
    from diffusers.loaders.peft import PeftAdapterMixin

    load: Any = PeftAdapterMixin.load_lora_adapter
    if hasattr(load, "__wrapped__"):
        return

    @wraps(load)
    def load_lora_adapter(self: Any, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any) -> Any:
        from ppcl.surgery.remap import refuse_unmapped

        state = pretrained_model_name_or_path_or_dict
        if isinstance(state, dict):  # as pipelines pass it on
            metadata = {key.removeprefix("transformer."): v for key, v in (kwargs.get("metadata") or {}).items()}
            refuse_unmapped(self, state, metadata)
        return load(self, state, *args, **kwargs)

    PeftAdapterMixin.load_lora_adapter = load_lora_adapter  # type: ignore[method-assign]


class _AfterImport(MetaPathFinder):
    """Registers the classes when `diffusers.pipelines` is imported; importing it here would take seconds."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != "diffusers.pipelines":
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: Any) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def introduce() -> None:
    """Register ppcl's classes with diffusers: now if it is loaded, else once it is."""
    if "diffusers.pipelines" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterImport())
