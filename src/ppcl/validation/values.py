"""Checks of single values: bounds, choices and aspect ratios."""

from __future__ import annotations

import math

from ppcl.errors import UsageError


def one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise `UsageError` unless `value` is one of `allowed`; `key` starts the sentence."""
    if value not in allowed:
        raise UsageError(f"{key}={value} is not one of {', '.join(allowed)}.")


def aspect_ratio(aspect: str) -> float:
    """Return width / height of an aspect "w:h"; `UsageError` if it is not one."""
    try:
        across, down = (float(part) for part in aspect.split(":"))
        ratio = across / down
    except (ValueError, ZeroDivisionError):
        ratio = 0.0
    if not 0 < ratio < math.inf:
        raise UsageError(f"data.aspects={aspect} is not an aspect ratio; write width:height, such as 4:3.")
    return ratio
