"""A tiny model and one call of it for each of the first half of diffusers' transformer classes."""

from __future__ import annotations

from tests.models_tiny.case import Case
from tests.models_tiny.first_pictures import PICTURES
from tests.models_tiny.first_videos import VIDEOS

CASES: dict[str, Case | str] = {**PICTURES, **VIDEOS}
