"""Random removal: remove blocks in a seeded order, as a baseline without calibration."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random as Generator
from typing import Any

from ppcl.methods.base import Teacher
from ppcl.methods.removal import Removal, Room
from ppcl.options import option
from ppcl.taps import BlockKey


@dataclass
class Settings:
    """`seed`: decides the order."""

    seed: int = option(0, least=0)


class Random(Removal):
    """Removes blocks in an order that the seed decides, the same on every machine."""

    settings_class = Settings

    def removed(self, teacher: Teacher, room: Room) -> tuple[list[BlockKey], dict[str, Any]]:
        generator = Generator(self.settings.seed)
        # Python promises that random() stays the same in every version, and does not promise it of shuffle().
        drawn = {key: generator.random() for key in room.blocks}
        return room.first_enough(sorted(room.blocks, key=lambda key: drawn[key])), {}
