"""Provides the batches of recorded calls, and their identity for fingerprints."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from ppcl.artifacts.headers import Header
from ppcl.config import Config
from ppcl.data.cached import held_out_share
from ppcl.data.recording.files import RECORD, missing_files, read_captions, read_header
from ppcl.data.recording.identity import recording_header
from ppcl.data.recording.stream import RecordedStream, kept_captions
from ppcl.data.streams import Stream
from ppcl.data.training import TrainingData
from ppcl.errors import UsageError
from ppcl.teacher_model import TeacherModel


def data_of(config: Config, teacher: TeacherModel) -> TrainingData:
    """Return the data of a run."""
    return (RecordedData if config.data.name == "prompts" else TrainingData)(config, teacher)


class RecordedData(TrainingData):
    """Batches of the calls that `stages=[cache]` has recorded of the pipeline. Noise levels are those of its steps."""

    record = RECORD

    @cached_property
    def cache_header(self) -> Header:
        """The header of the recording; with `data.cache`, the one in that folder.

        Raises `UsageError` if `data.cache` was recorded of another model.
        """
        if self.config.data.cache is None:
            return recording_header(self.config, self.teacher.identity, self.teacher.encoder_identity)
        header = read_header(Path(self.config.data.cache))
        if header.made_from.get("model") != self.teacher.identity:
            raise UsageError(
                f"data.cache={self.config.data.cache} was recorded of another model than model.path: record this one."
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
        kept = kept_captions(captions, self.held_out)
        return [caption for caption in dict.fromkeys(captions) if caption in kept]

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

    @property
    def levels(self) -> dict[str, Any]:
        """Nothing: noise levels are those that the recording's own header stands for."""
        return {}

    def stream(self, seed: int, batch_size: int) -> Stream:
        """Return the batches of `seed`: with `data.calibration_seed` those of held-out prompts, else of all others."""
        where = self.whole_cache(), self.count
        held_out = seed == self.config.data.calibration_seed
        return RecordedStream(self.teacher.family, *where, self.held_out, seed, batch_size, held_out=held_out)
