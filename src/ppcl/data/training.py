"""Provides a run's training and held-out batches, and the identity of the data for fingerprints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from lightning.fabric.utilities import move_data_to_device

from ppcl.artifacts.files import again, read_json
from ppcl.artifacts.headers import Header
from ppcl.config import Config
from ppcl.data.cached import (
    EMPTY,
    CachedStream,
    held_out_keys,
    held_out_share,
    is_whole,
    read_entries,
    read_unit,
    unit_record,
)
from ppcl.data.encoding import source_header
from ppcl.data.sources import find_units
from ppcl.data.streams import LatentStream, ShapesStream, Stream, encode_world
from ppcl.errors import UsageError
from ppcl.families.base import Conditions
from ppcl.launch import rank
from ppcl.teacher_model import TeacherModel


class TrainingData:
    """Batches for `teacher`, of rendered toy pictures or from a cache of encoded pictures."""

    record = "cache.json"  # the file in a cache that identifies it

    def __init__(self, config: Config, teacher: TeacherModel) -> None:
        self.config, self.teacher = config, teacher

    @cached_property
    def cache_header(self) -> Header:
        """The header of the data's cache; with `data.cache`, the one in that folder.

        Pictures are encoded with the same number of pixels, whatever the sides of `model.sampling` are, so that a cache
        for other sides is taken where there is one. Raises `UsageError` if `data.cache` was encoded by another model's
        encoders.
        """
        if self.config.data.cache is None:
            header = source_header(self.config, find_units(self.config.data), self.teacher.encoder_identity)
            alike = (found for _, found in self._caches() if _encodings(found) == _encodings(header))
            return header if (self._caches_folder / header.fingerprint).exists() else next(alike, header)
        record = self.cache_folder / "cache.json"
        header = Header.of(read_json(record, "data.cache:", "cache"), record, "cache")
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
        return self._caches_folder / self.cache_header.fingerprint

    @property
    def _caches_folder(self) -> Path:
        return Path(self.config.paths.cache_dir) / "data"

    def _caches(self) -> Iterator[tuple[Path, Header]]:
        """Yield folder and header of each cache in `paths.cache_dir`."""
        for path in sorted(self._caches_folder.glob("*/cache.json")):
            content = read_json(path, "The record", "cache")
            yield path.parent, Header.of(content, path, "cache")

    def refuse_encoding_again(self) -> None:
        """Raise `UsageError` if this data is whole in a cache that was encoded with other versions of libraries.

        Such encodings may differ in what the libraries have changed. Only the user knows whether they matter more than
        the time that encoding takes.
        """
        own = self.cache_header
        for folder, header in self._caches():
            there, now = (each.made_from["versions"] for each in (header, own))
            whole = not list(self._missing(folder))
            if whole and there != now and _encodings(header) | {"versions": now} == _encodings(own):
                raise UsageError(
                    f"{folder} holds this data, encoded with diffusers {there[0]} and transformers {there[1]}, not "
                    f"{now[0]} and {now[1]}: use it by data.cache={folder} data.path=null data.given=null and without "
                    "the stage cache, or delete it to encode the data anew."
                )

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
        folder = self.whole_cache()
        records = (read_unit(folder / unit_record(unit)) for unit in self._units)
        return held_out_share(data, sum(record["samples"] for record in records))

    def counted(self) -> tuple[int, int] | tuple[None, None]:
        """Return the number of samples in the data's cache, and of those kept from training.

        Both are None if the cache or its source is gone.
        """
        try:
            keys = [entry.key for entry in read_entries(self.cache_folder)]
        except UsageError:
            return None, None
        if not keys:
            return None, None
        kept = held_out_keys(keys, held_out_share(self.config.data, len(keys)))
        return len(keys), sum(key in kept for key in keys)

    @property
    def _units(self) -> Iterable[str]:
        """The names of the cache's units. Each has a record once it is completely cached."""
        return self.cache_header.made_from["units"]

    def whole_cache(self) -> Path:
        """Return the folder of the cache; raises `UsageError` if the cache is not complete."""
        folder, record = self.cache_folder, self.cache_folder / self.record
        if (
            record.exists()
            and read_json(record, "The record", "cache").get("fingerprint") != self.cache_header.fingerprint
        ):
            raise UsageError(f"{record} is that of another cache: {again('cache')}.")
        missing = next(self._missing(folder), None)
        if missing is not None:
            if not folder.exists():
                self.refuse_encoding_again()
            raise UsageError(f"{folder} lacks {missing}: run 'stages=[cache]' first, to its end.")
        return folder

    def _missing(self, folder: Path) -> Iterator[str]:
        """Yield what a cache in `folder` lacks: names of units, and of the file with the empty prompt."""
        yield from (unit for unit in self._units if not is_whole(folder, unit))
        if not (folder / EMPTY).exists():
            yield EMPTY

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

    def stream(self, seed: int, batch_size: int, *, held_out: bool | None = None) -> Stream:
        """Return the batches of `seed`, as a function of the step.

        `held_out`: whether they are made of the samples that are kept from training, or of all others. None: of the
        former with `data.calibration_seed`, of the others with any other seed. Toy pictures are new in every batch.
        Raises `UsageError` if the cache is not complete.
        """
        held_out = seed == self.config.data.calibration_seed if held_out is None else held_out
        stream = self._stream(seed, batch_size, held_out)
        if self.config.data.shift is None and isinstance(stream, LatentStream):
            stream.scheduler = self.teacher.scheduler_config
        return stream

    def _stream(self, seed: int, batch_size: int, held_out: bool) -> Stream:
        data, teacher = self.config.data, self.teacher
        if data.name == "shapes":
            return ShapesStream(teacher.family, teacher.pipeline, data, seed, batch_size, self._captions)
        return CachedStream(teacher.family, self.whole_cache(), data, seed, batch_size, held_out=held_out)

    def shared_stream(self, seed: int, batch_size: int) -> Stream:
        """Return the same as `stream`, but with several ranks each batch has only this rank's rows."""
        stream = self.stream(seed, batch_size)
        if self.config.strategy.kind != "single":
            stream.share = rank()
        return stream

    def to_device(self, batch: Any) -> Any:
        """Return a batch with its tensors moved to the teacher's device."""
        return move_data_to_device(batch, self.teacher.device)


def _encodings(header: Header) -> dict[str, Any]:
    """Return what the content of a cache depends on: of the size of pictures, the number of pixels alone."""
    return header.made_from | {"size": prod(header.made_from["size"])}
