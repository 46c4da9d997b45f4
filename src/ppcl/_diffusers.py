"""Makes model classes of ours known to diffusers.

An export that holds one names it `["transformer_qwen_image_pruned", "PrunedQwenImageTransformer2DModel"]`
and carries that file, which diffusers runs only with `trust_remote_code=True`. Where ppcl is imported its
own copy serves instead, and no flag is needed: diffusers looks on `diffusers.pipelines` first.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from typing import Any

MODELS = ("autoencoder_pixel_unshuffle", "transformer_flux_pruned", "transformer_qwen_image_pruned")


class _Model:
    """A module of `ppcl.models` that is imported when something is asked of it."""

    def __init__(self, name: str) -> None:
        self._name = f"ppcl.models.{name}"

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)


def _register() -> None:
    for name in MODELS:
        setattr(sys.modules["diffusers.pipelines"], name, _Model(name))


class _AfterImport(MetaPathFinder):
    """Registers as soon as `diffusers.pipelines` is there: importing it for that would take seconds."""

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
    """Register now if diffusers is loaded, else when it is."""
    if "diffusers.pipelines" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterImport())
