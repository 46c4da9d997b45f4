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

from ppcl.families.registry import PRUNED_MAKER, component_classes

# Arguments of diffusers' loader that say which file to read.
_OF_FILE = (
    *("weight_name", "subfolder", "revision", "use_safetensors", "cache_dir"),
    *("force_download", "proxies", "local_files_only", "token"),
)


class _Module:
    """Stands in for a module, and imports it when an attribute is first read."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)


def _register() -> None:
    for module in (*component_classes().values(), PRUNED_MAKER):
        setattr(sys.modules["diffusers.pipelines"], module.rpartition(".")[2], _Module(module))
    _guard_loras()


def _guard_loras() -> None:
    """Make diffusers refuse a LoRA of the full model on a pruned one, where it would silently hit the wrong blocks."""
    from diffusers.loaders.lora_base import _fetch_state_dict
    from diffusers.loaders.peft import PeftAdapterMixin

    load: Any = PeftAdapterMixin.load_lora_adapter
    if hasattr(load, "__wrapped__"):
        return
    fixed = {"user_agent": {"file_type": "attn_procs_weights", "framework": "pytorch"}, "allow_pickle": False}

    @wraps(load)
    def load_lora_adapter(self: Any, pretrained_model_name_or_path_or_dict: Any, *args: Any, **kwargs: Any) -> Any:
        from ppcl.surgery.lora_marks import refuse_unmapped
        from ppcl.surgery.provenance import pruned_blocks

        state = pretrained_model_name_or_path_or_dict
        if pruned_blocks(self) is None:
            return load(self, state, *args, **kwargs)
        if not isinstance(state, dict):  # pipelines pass on a dict
            told = {key: kwargs.pop(key, None) for key in _OF_FILE}
            if told["use_safetensors"] is None:  # diffusers reads metadata, with the mark, only if it is told so
                told["use_safetensors"] = not str(told["weight_name"] or state).endswith((".bin", ".pt"))
            state, kwargs["metadata"] = _fetch_state_dict(state, **told, **fixed, metadata=kwargs.get("metadata"))
        refuse_unmapped(self, state, kwargs.get("metadata"))
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
