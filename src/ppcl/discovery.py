"""Finds methods and benchmarks by the names of their files, so that a new one needs no entry in a table.

Importing this loads no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import fields
from importlib import import_module
from inspect import isabstract
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ppcl.errors import UsageError
from ppcl.options import check_options

T = TypeVar("T")


def module_names(package: ModuleType, libraries: Collection[str]) -> tuple[str, ...]:
    """Return the names of the modules in `package` except `libraries`, sorted. It imports none of them."""
    return tuple(sorted({found.name for found in iter_modules(package.__path__)} - {*libraries}))


def declared_class(module_name: str, base: type[T], key: str) -> type[T]:
    """Import a module and return the subclass of `base` that it declares.

    Raises `UsageError` if it declares none or several; `key` starts the sentence.
    """
    module = import_module(module_name)
    own = [item for item in vars(module).values() if isinstance(item, type) and item.__module__ == module.__name__]
    declared = [item for item in own if issubclass(item, base) and not isabstract(item)]
    if len(declared) != 1:
        parts = " and ".join(sorted(getattr(base, "__abstractmethods__", ())))
        raise UsageError(
            f"{key}: {module.__file__} must declare one {base.__name__} with {parts}; it declares {len(declared)}."
        )
    return declared[0]


def parse_settings(settings_class: type[T], settings: Mapping[str, Any], key: str) -> T:
    """Return `settings` as an instance of the dataclass `settings_class`.

    Raises `UsageError` for a key that the class does not have, for a value of another type, and for one that the key's
    `option` does not allow; `key` starts the sentence.
    """
    known = [item.name for item in fields(settings_class)]  # type: ignore[arg-type]
    for name in settings:
        if name not in known:
            raise UsageError(f"{key}.{name} is not a setting here; there are {', '.join(known) or 'none'}.")
    try:
        parsed: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(settings_class), dict(settings)))
    except OmegaConfBaseException as error:
        name = f".{error.full_key}" if getattr(error, "full_key", None) else ""
        raise UsageError(f"{key}{name}: {str(error).splitlines()[0]}.") from None
    check_options(parsed, f"{key}.")
    return parsed
