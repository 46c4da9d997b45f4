"""Declares keys of the configuration and reads these declarations. Importing this loads no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import asdict, field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any

from ppcl.paths import conf_dir


def option(
    default: Any = NO_DEFAULT,
    *,
    factory: Any = NO_DEFAULT,
    least: float | None = None,
    choices: Collection[str] | None = None,
    before: Any = NO_DEFAULT,
    identity: bool = True,
) -> Any:
    """Declare a key of the configuration: a dataclass field with metadata.

    `default`, `factory`: the default value, or a function that returns it.
    `least`: the smallest allowed value. `choices`: the allowed values, for a list those of its items. Both are checked
        before anything heavy loads.
    `identity`: whether artifacts depend on the key. If False, it stays out of their fingerprints.
    `before`: for a key that was added later, the value that gives the behaviour from before the key existed. With this
        value the key stays out of fingerprints, so artifacts that are older than the key remain valid. It must never
        change, even if the default does.
    """
    metadata = {"least": least, "choices": choices, "identity": identity, "before": before}
    if factory is not NO_DEFAULT:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def identity(settings: Any) -> dict[str, Any]:
    """Return the part of a group of keys that goes into the fingerprints of artifacts."""
    found = asdict(settings)
    for item in fields(settings):
        told = item.metadata
        if not told.get("identity", True) or found[item.name] == told.get("before", NO_DEFAULT):
            del found[item.name]
    return found


def declared(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any, float | None, Collection[str] | None]]:
    """Yield the full name, value, smallest value and choices of every key in a group and in its nested groups."""
    for item in fields(settings):
        value = getattr(settings, item.name)
        if is_dataclass(value):
            yield from declared(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value, item.metadata.get("least"), item.metadata.get("choices")


def unknown_key(key: str, settings: Any) -> str:
    """Return the sentence that refuses `key`, with the name that it resembles, if there is one.

    The names are those of the keys and groups in `settings`, and of the groups of configuration files.
    """
    names = sorted(path.name for path in conf_dir().iterdir() if path.is_dir())
    for name, *_ in declared(settings):
        parts = name.split(".")
        names += [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    similar = get_close_matches(key, dict.fromkeys(names), n=1, cutoff=0.8)
    remedy = f"did you mean {similar[0]}?" if similar else "`ppcl --cfg job` prints all of them."
    return f"{key} is no configuration key; {remedy}"
