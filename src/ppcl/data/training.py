"""Provides a run's training and held-out batches, and the identity of the data for fingerprints."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from lightning.fabric.utilities import move_data_to_device

from ppcl.artifacts.files import read_json
from ppcl.artifacts.headers import Header
from ppcl.config import Config
from ppcl.data.cached import EMPTY, CachedStream, held_out_share, unit_record
from ppcl.data.encoding import source_header
from ppcl.data.sources import find_units
from ppcl.data.streams import ShapesStream, Stream, encode_world
from ppcl.errors import UsageError
from ppcl.families.base import Conditions
from ppcl.launch import rank
from ppcl.teacher_model import TeacherModel


class TrainingData:
    """Batches for `teacher`, of rendered toy pictures or from a cache of encoded pictures."""

    def __init__(self, config: Config, teacher: TeacherModel) -> None:
        self.config, self.teacher = config, teacher

    @cached_property
    def cache_header(self) -> Header:
        """The header of the data's cache; with `data.cache`, the one in that folder.

        Raises `UsageError` if that cache was encoded by another model's encoders.
        """
        if self.config.data.cache is None:
            return source_header(self.config, find_units(self.config.data), self.teacher.encoder_identity)
        content = read_json(self.cache_folder / "cache.json", "data.cache:")
        header = Header(content["format"], content["made_from"], content["version"])
        there = self.teacher.encoder_identity
        made_by = header.made_from["model"]
        if there["family"] != made_by["family"] or ("encoders" in there and there != made_by):
            raise UsageError(
                f"data.cache={self.config.data.cache} was made by other encoders than model.path has, of a "
                f"{made_by['family']}: make one with this model."
            )
        return header

    @property
    def cache_folder(self) -> Path:
        """The folder of the cache: `data.cache`, or a folder in `paths.cache_dir` named by its fingerprint."""
        if self.config.data.cache is not None:
            return Path(self.config.data.cache)
        return Path(self.config.paths.cache_dir) / "data" / self.cache_header.fingerprint

    @property
    def from_disk(self) -> bool:
        """Whether batches are read from disk, so that it pays to prefetch them."""
        return self.config.data.name != "shapes"

    @property
    def source_identity(self) -> dict[str, Any]:
        """The cache and the held-out share, as headers store them; empty for toy pictures."""
        if self.config.data.name == "shapes":
            return {}
        return {"cache": self.cache_header.fingerprint, "held_out": self.held_out}

    @cached_property
    def held_out(self) -> float:
        """The share of cached samples that is kept from training. Its default depends on their number."""
        data = self.config.data
        if data.held_out is not None:
            return data.held_out
        folder = self._whole_cache()
        records = (read_json(folder / unit_record(unit), "A cache's unit") for unit in self._units)
        return held_out_share(data, sum(record["samples"] for record in records))

    @property
    def _units(self) -> Iterable[str]:
        """The names of the cache's units. Each has a record once it is completely cached."""
        return self.cache_header.made_from["units"]

    def _whole_cache(self) -> Path:
        """Return the folder of the cache; raises `UsageError` if the cache is not complete."""
        folder = self.cache_folder
        missing = [unit for unit in self._units if not (folder / unit_record(unit)).exists()]
        if missing or not (folder / EMPTY).exists():
            raise UsageError(
                f"{folder} lacks {missing[0] if missing else EMPTY}: run 'stages=[cache]' first, to its end."
            )
        return folder

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Everything that training batches depend on, as headers store it."""
        data = self.config.data
        drawn = ("train_seed", "calibration_seed", "eval_seed", "caption_dropout")
        made_of = {"name": data.name} | {key: getattr(data, key) for key in drawn} | self.levels
        if data.name == "shapes" and self.config.model.categories is not None:
            made_of["categories"] = self.config.model.categories
        return made_of | self.source_identity

    @property
    def levels(self) -> dict[str, Any]:
        """The settings of the noise levels, as headers store them; with `data.shift=null` the scheduler's, too."""
        data = self.config.data
        found: dict[str, Any] = {"timesteps": data.timesteps, "shift": data.shift}
        if data.shift is None:
            keys = ["shift", "use_dynamic_shifting", "time_shift_type", "base_shift", "max_shift"]
            keys += ["base_image_seq_len", "max_image_seq_len", "shift_terminal"]
            scheduler = self.teacher.scheduler_config
            found["scheduler"] = {key: scheduler[key] for key in keys if scheduler.get(key) is not None}
        return found

    @cached_property
    def _captions(self) -> Callable[[list[str]], Conditions]:
        """The captions of the toy pictures, encoded by the teacher."""
        return encode_world(self.teacher.family, self.teacher.pipeline)

    def stream(self, seed: int, batch_size: int) -> Stream:
        """Return the batches of `seed`, as a function of the step.

        With `data.calibration_seed` they are made of the samples that are kept from training, with any other seed of
        all others. Raises `UsageError` if the cache is not complete.
        """
        stream = self._stream(seed, batch_size)
        if self.config.data.shift is None:
            stream.scheduler = self.teacher.scheduler_config
        return stream

    def _stream(self, seed: int, batch_size: int) -> Stream:
        data, teacher = self.config.data, self.teacher
        if data.name == "shapes":
            return ShapesStream(teacher.family, teacher.pipeline, data, seed, batch_size, self._captions)
        held_out = seed == data.calibration_seed
        return CachedStream(teacher.family, self._whole_cache(), data, seed, batch_size, held_out=held_out)

    def shared_stream(self, seed: int, batch_size: int) -> Stream:
        """Return the same as `stream`, but with several ranks each batch has only this rank's rows."""
        stream = self.stream(seed, batch_size)
        if self.config.strategy.kind != "single":
            stream.share = rank()
        return stream

    def to_device(self, batch: Any) -> Any:
        """Return a batch with its tensors moved to the teacher's device."""
        return move_data_to_device(batch, self.teacher.device)
