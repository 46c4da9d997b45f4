"""Finds methods by the names of their files. Importing this loads no torch; `load_method` does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ppcl.methods
from ppcl.config import MethodConfig
from ppcl.discovery import declared_class, module_names

if TYPE_CHECKING:
    from ppcl.methods.base import Method

_LIBRARIES = ("base", "patterns", "probes", "registry", "removal", "similarity", "surrogates", "width", "windows")


def method_names() -> tuple[str, ...]:
    """Return the names of all methods, which are the names of their files. No method is imported."""
    return module_names(ppcl.methods, _LIBRARIES)


def load_method(config: MethodConfig) -> Method:
    """Return the method that `method.rule` names, with its settings.

    Raises `UsageError` if there is no such method, or if the configuration is not valid for it.
    """
    from ppcl.methods.base import Method

    kind: type[Any] = declared_class(f"ppcl.methods.{config.rule}", Method, f"method.rule={config.rule}")
    kind.check(config)
    return kind(config)
