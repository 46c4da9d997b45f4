"""Bounds that several keys share."""

from __future__ import annotations

# Larger rates and weights overflow within a few steps.
MOST_SEED = 2**32 - 1  # numpy takes no larger one
MOST_RATE = 1000
MOST_WEIGHT = 1_000_000
