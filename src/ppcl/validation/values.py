"""Bounds and choices."""

from __future__ import annotations

from ppcl.errors import UsageError


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{key}={value} is not one of {', '.join(allowed)}.")


def at_least(bounds: dict[str, tuple[float, float]]) -> None:
    for key, (value, least) in bounds.items():
        if value < least:
            raise UsageError(f"{key}={value} must be at least {least:g}.")
