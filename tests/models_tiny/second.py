"""Tiny configurations of the second half, by name, of the transformer classes of diffusers, each with a call."""

from __future__ import annotations

from tests.models_tiny import second_image, second_other, second_video
from tests.models_tiny.case import Case

CASES: dict[str, Case | str] = second_image.CASES | second_video.CASES | second_other.CASES
