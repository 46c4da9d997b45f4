"""Declares keys of the configuration and reads these declarations. Importing this loads no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any

from ppcl.errors import UsageError
from ppcl.paths import conf_dir

# The largest whole number of keys that declare no bound of their own. More is a slip of the hand, and overflows.
MOST = 10**9


@dataclass(frozen=True)
class Bounds:
    """The numbers that a key may have: at least `least`, at most `most`, more than `above`, less than `below`.

    None is no bound. NaN and infinity are never allowed, and whole numbers are at most `MOST` if nothing else is said.
    """

    least: float | None = None
    most: float | None = None
    above: float | None = None
    below: float | None = None

    def check(self, key: str, value: float) -> None:
        """Raise `UsageError` unless the number `value` is allowed; `key` starts the sentence."""
        most = MOST if isinstance(value, int) and self.most is None and self.below is None else self.most
        fits = (
            (self.least is None or value >= self.least)
            and (most is None or value <= most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )
        if fits and math.isfinite(value):
            return
        if value < MOST:
            most = self.most  # the general bound goes without saying
        sides = (("at least", self.least), ("above", self.above), ("at most", most), ("below", self.below))
        words = [f"{word} {_written(bound)}" for word, bound in sides if bound is not None]
        if not math.isfinite(value):
            words = ["a finite number", *words]
        raise UsageError(f"{key}={_written(value)} must be {' and '.join(words)}.")


def _written(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def option(
    default: Any = NO_DEFAULT,
    *,
    factory: Any = NO_DEFAULT,
    least: float | None = None,
    most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Collection[str] | None = None,
    before: Any = NO_DEFAULT,
    identity: bool = True,
) -> Any:
    """Declare a key of the configuration: a dataclass field with metadata.

    `default`, `factory`: the default value, or a function that returns it.
    `least`, `most`, `above`, `below`: the bounds of a number, see `Bounds`. `choices`: the allowed values. For a list
        or a mapping they hold for each item. They are checked before anything heavy loads.
    `identity`: whether artifacts depend on the key. If False, it stays out of their fingerprints.
    `before`: for a key that was added later, the value that gives the behaviour from before the key existed. With this
        value the key stays out of fingerprints, so artifacts that are older than the key remain valid. It must never
        change, even if the default does.
    """
    bounds = Bounds(least, most, above, below)
    metadata = {"bounds": bounds, "choices": choices, "identity": identity, "before": before}
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


@dataclass(frozen=True)
class Key:
    """A key of the configuration: its full name, its value, and what it may be.

    `numeric`: whether it is a number, or a list or mapping of numbers, by its annotation.
    """

    name: str
    value: Any
    bounds: Bounds
    choices: Collection[str] | None
    numeric: bool


def declared(settings: Any, prefix: str = "") -> Iterator[Key]:
    """Yield every key in a group and in its nested groups."""
    for item in fields(settings):
        name, value = f"{prefix}{item.name}", getattr(settings, item.name)
        if is_dataclass(value):
            yield from declared(value, f"{name}.")
        else:
            numeric = re.search(r"\b(int|float)\b", str(item.type)) is not None
            yield Key(name, value, item.metadata.get("bounds", Bounds()), item.metadata.get("choices"), numeric)


def check_options(settings: Any, prefix: str = "") -> None:
    """Check the bounds and choices that the keys of a group declare; raises `UsageError`. None is always allowed.

    `prefix`: comes before the name of each key in the message.
    """
    for item in declared(settings, prefix):
        for key, value in _single(item.name, item.value):
            if item.choices is not None and value not in item.choices:
                raise UsageError(f"{key}={value} is not one of {', '.join(item.choices)}.")
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                item.bounds.check(key, value)


def _single(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the single values in a value of the configuration, each with its name. None is left out."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _single(f"{key}.{name}", inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _single(key, inner)
    elif value is not None:
        yield key, value


def unknown_key(key: str, settings: Any) -> str:
    """Return the sentence that refuses `key`, with the name that it resembles, if there is one.

    The names are those of the keys and groups in `settings`, and of the groups of configuration files.
    """
    names = sorted(path.name for path in conf_dir().iterdir() if path.is_dir())
    for item in declared(settings):
        parts = item.name.split(".")
        names += [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    similar = get_close_matches(key, dict.fromkeys(names), n=1, cutoff=0.8)
    remedy = f"did you mean {similar[0]}?" if similar else "`ppcl --cfg job` prints all of them."
    return f"{key} is no configuration key; {remedy}"
