"""Provides the batches of recorded calls, and their identity for fingerprints."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from ppcl.artifacts.headers import Header, first_difference
from ppcl.config import Config
from ppcl.data.cached import held_out_share
from ppcl.data.recording.files import RECORD, missing_files, read_captions, read_header, read_joining
from ppcl.data.recording.identity import recording_header
from ppcl.data.recording.stream import RecordedStream, RenoisedStream, kept_prompts
from ppcl.data.streams import Stream
from ppcl.data.training import TrainingData
from ppcl.errors import UsageError
from ppcl.teacher_model import TeacherModel


def data_of(config: Config, teacher: TeacherModel) -> TrainingData:
    """Return the data of a run."""
    return (RecordedData if config.data.name == "prompts" else TrainingData)(config, teacher)


class RecordedData(TrainingData):
    """Batches of the calls that `stages=[cache]` has recorded of the pipeline, as they were or with fresh noise."""

    record = RECORD

    @cached_property
    def cache_header(self) -> Header:
        """The header of the recording; with `data.cache`, the one in that folder.

        Raises `UsageError` if `data.cache` was recorded of another model.
        """
        if self.config.data.cache is None:
            return recording_header(self.config, self.teacher.identity, self.teacher.encoder_identity)
        header = read_header(Path(self.config.data.cache))
        difference = first_difference(header.made_from.get("model", {}), self.teacher.identity, "model.")
        if difference != "nothing":
            raise UsageError(
                f"data.cache={self.config.data.cache} was recorded with {difference}: set that key as it was, or "
                "record this model by data.path."
            )
        return header

    @property
    def _caches_folder(self) -> Path:
        return Path(self.config.paths.cache_dir) / "recordings"

    @property
    def count(self) -> int:
        """The number of prompts."""
        return int(self.cache_header.made_from["prompts"]["count"])

    @cached_property
    def held_out(self) -> float:
        """The share of prompts that is kept from training."""
        return held_out_share(self.config.data, self.count)

    def held_out_prompts(self) -> list[str]:
        """Return the different prompts that are kept from training, in their order."""
        captions = read_captions(self.whole_cache(), self.count)
        return list(dict.fromkeys(captions[number] for number in sorted(kept_prompts(captions, self.held_out))))

    def counted(self) -> tuple[int, int] | tuple[None, None]:
        """Return the number of prompts, and of different ones kept from training; None if the recording is gone."""
        try:
            return self.count, len(self.held_out_prompts())
        except UsageError:
            return None, None

    def refuse_encoding_again(self) -> None:
        """Do nothing: prompts that were recorded with other versions of libraries are recorded anew."""

    def _missing(self, folder: Path) -> Iterator[str]:
        yield from missing_files(folder, self.count)

    @cached_property
    def renoised(self) -> bool:
        """Whether calls get fresh noise: as `data.renoise` says, or else where the recording shows that they can."""
        wanted = self.config.data.renoise
        return read_joining(self.whole_cache()).renoising is not None if wanted is None else wanted

    @property
    def levels(self) -> dict[str, Any]:
        """The share of unguided calls, and the settings of fresh noise. Recorded calls have the recording's levels."""
        unguided = {"unguided": self.config.data.caption_dropout}
        return unguided | {"renoise": True} | super().levels if self.renoised else unguided

    def _stream(self, seed: int, batch_size: int, held_out: bool) -> Stream:
        data, where = self.config.data, (self.teacher.family, self.whole_cache(), self.count, self.held_out)
        settings: dict[str, Any] = {"held_out": held_out, "unguided": data.caption_dropout}
        if not self.renoised:
            return RecordedStream(*where, seed, batch_size, **settings)
        scheduler = self.teacher.scheduler_config
        return RenoisedStream(*where, seed, batch_size, **settings, data=data, scheduler=scheduler)
