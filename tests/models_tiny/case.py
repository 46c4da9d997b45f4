"""A tiny model of a diffusers transformer class, and one call of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Case:
    """`config`: arguments of the class. `inputs`: returns the keyword arguments of one forward, always the same."""

    config: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
