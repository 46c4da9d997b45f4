"""How a key of the configuration is declared, and what is read off its declaration. Importing this loads no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import asdict, field, fields, is_dataclass
from typing import Any


def option(
    default: Any = NO_DEFAULT,
    *,
    factory: Any = NO_DEFAULT,
    least: float | None = None,
    choices: Collection[str] | None = None,
    before: Any = NO_DEFAULT,
    identity: bool = True,
) -> Any:
    """Declare a key together with all that the rest of ppcl has to know of it.

    `least`: its smallest value. `choices`: its values, or those of its items. Both are checked before anything loads.
    `identity=False`: no artifact depends on it.
    `before`: for a key that came later, the value that does what was done before there was such a key. It never
    changes, even when the default does. With just this value the key stays out of fingerprints, so that artifacts made
    before the key existed are still taken.
    """
    metadata = {"least": least, "choices": choices, "identity": identity, "before": before}
    if factory is not NO_DEFAULT:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


def identity(settings: Any) -> dict[str, Any]:
    """Return the values of a group that artifacts depend on, as they go into fingerprints."""
    found = asdict(settings)
    for item in fields(settings):
        told = item.metadata
        if not told.get("identity", True) or found[item.name] == told.get("before", NO_DEFAULT):
            del found[item.name]
    return found


def declared(settings: Any, prefix: str = "") -> Iterator[tuple[str, Any, float | None, Collection[str] | None]]:
    """Every key of a group and the groups in it: its full name, value, smallest value and choices."""
    for item in fields(settings):
        value = getattr(settings, item.name)
        if is_dataclass(value):
            yield from declared(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value, item.metadata.get("least"), item.metadata.get("choices")
