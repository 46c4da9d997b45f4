"""A tiny model and one call of it for each of diffusers' transformer classes; for some the reason why there is none."""

from __future__ import annotations

from tests.models_tiny import (
    others_l_to_z,
    pictures_a_to_e,
    pictures_f_to_j,
    pictures_k_to_z,
    videos_a_to_c,
    videos_e_to_k,
    videos_l_to_z,
)
from tests.models_tiny.case import Case

CASES: dict[str, Case | str] = {
    **pictures_a_to_e.PICTURES,
    **pictures_f_to_j.PICTURES,
    **videos_a_to_c.VIDEOS,
    **videos_e_to_k.VIDEOS,
    **pictures_k_to_z.PICTURES,
    **videos_l_to_z.VIDEOS,
    **others_l_to_z.OTHERS,
}
