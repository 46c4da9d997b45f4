"""A tiny model and one call of it for each of the first half of diffusers' transformer classes."""

from __future__ import annotations

from tests.models_tiny import first_pictures_a_to_e, first_pictures_f_to_j, first_videos_a_to_c, first_videos_e_to_k
from tests.models_tiny.case import Case

CASES: dict[str, Case | str] = {
    **first_pictures_a_to_e.PICTURES,
    **first_pictures_f_to_j.PICTURES,
    **first_videos_a_to_c.VIDEOS,
    **first_videos_e_to_k.VIDEOS,
}
