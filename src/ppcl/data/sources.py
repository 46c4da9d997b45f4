"""Reads pictures with captions from webdataset shards, or from a folder with a CSV or JSONL table.

The source is divided into units that are cached as a whole: a shard, or up to 1,000 rows of a table. A sample that
cannot be used is returned as `Skipped`, with the reason. A shard that is cut short gives the samples before the cut.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import webdataset as wds
from PIL import Image, ImageOps
from webdataset.tariterators import group_by_keys, tar_file_expander

from ppcl.config import DataConfig
from ppcl.errors import UsageError

IMAGES = ("jpg", "jpeg", "png", "webp")
ROWS = 1000  # of a table, in one unit


@dataclass
class Sample:
    """An undecoded picture with its caption. For an edit: its result, its instruction, and the pictures to edit.

    `given`: the pictures to edit. `key`: the sample's name in the shard, its file name, or its row.
    """

    key: str
    caption: str
    image: bytes
    given: Sequence[bytes] = ()

    def open(self) -> list[Image.Image]:
        """Return the decoded RGB pictures, first `image`, then `given`, turned as their EXIF orientation says.

        Raises PIL's errors for a damaged file.
        """
        pictures = [Image.open(io.BytesIO(content)) for content in (self.image, *self.given)]
        return [ImageOps.exif_transpose(picture).convert("RGB") for picture in pictures]


@dataclass
class Skipped:
    """A sample that cannot be used, and why."""

    key: str
    why: str


@dataclass
class Unit(ABC):
    """Samples that are read and cached together.

    `size`, `changed`: size in bytes and modification time in ns of its file, by which a replaced file is detected.
    """

    name: str
    size: int
    changed: int

    @abstractmethod
    def read(self, config: DataConfig) -> Iterator[Sample | Skipped]:
        """Yield all samples in order, including those that cannot be used."""

    @abstractmethod
    def count(self) -> int:
        """Return the number of pictures without decoding any."""


@dataclass
class Shard(Unit):
    """A .tar file of pictures, each with a .json or .txt file of the same name."""

    path: Path

    def read(self, config: DataConfig) -> Iterator[Sample | Skipped]:
        broken: list[Exception] = []

        def note(error: Exception) -> bool:
            broken.append(error)
            return True

        # Given a name in place of an open file, webdataset would run one that begins with `pipe:` in a shell.
        with self.path.open("rb") as stream:
            files = tar_file_expander([{"url": str(self.path), "stream": stream}], handler=note)
            for member in group_by_keys(files, handler=note):
                key = str(member["__key__"])
                found = _picture(member, "")
                given = [picture for name in config.given or () if (picture := _picture(member, f"{name}."))]
                try:
                    facts = json.loads(member["json"]) if "json" in member else {}
                except ValueError:
                    yield Skipped(key, "its .json does not read as JSON")
                    continue
                if "txt" in member:
                    facts = {config.captions[0]: member["txt"].decode("utf-8", "replace")} | facts
                yield _sample(key, facts, found, given, config)
        if broken:
            yield Skipped(self.path.name, f"cut short or damaged: {type(broken[0]).__name__}")

    def count(self) -> int:
        found = 0
        try:
            with tarfile.open(self.path) as archive:
                for member in archive:
                    found += Path(member.name).name.partition(".")[2].lower() in IMAGES
        except tarfile.TarError:
            pass  # reading the shard reports the damage
        return found


@dataclass
class Rows(Unit):
    """Up to 1,000 rows of a table, beginning at row number `start`."""

    table: Path
    start: int
    rows: Sequence[Mapping[str, Any]]

    def read(self, config: DataConfig) -> Iterator[Sample | Skipped]:
        for number, row in enumerate(self.rows, start=self.start):
            name = next((str(row[key]) for key in ("image", "file_name", "path") if row.get(key)), None)
            key = name or f"row {number}"
            if name is None:
                yield Skipped(key, "no image, file_name or path")
                continue
            try:
                given = [file for column in config.given or () for file in _files(row.get(column))]
                content, *others = [(self.table.parent / file).read_bytes() for file in (name, *given)]
            except OSError as error:
                yield Skipped(key, f"its file cannot be read: {error.strerror}")
                continue
            yield _sample(key, row, content, others, config)

    def count(self) -> int:
        return len(self.rows)


def _picture(member: Mapping[str, Any], prefix: str) -> bytes | None:
    """Return the picture in a shard's member, or with `prefix`, such as `edit_image.`, the given one of that name."""
    return next((member[prefix + name] for name in IMAGES if prefix + name in member), None)


def _files(cell: Any) -> list[str]:
    """Return the files that a table's cell names: none, one, or several as a list (in a CSV as JSON)."""
    if isinstance(cell, str) and cell.startswith("["):
        with suppress(ValueError):  # not JSON, so it is the name of a file
            cell = json.loads(cell)
    return [str(file) for file in cell] if isinstance(cell, list) else [str(cell)] if cell else []


def _sample(key: str, facts: Any, image: bytes | None, given: Sequence[bytes], config: DataConfig) -> Sample | Skipped:
    """Return a sample, or why it cannot be used. `facts`: its keys or columns, among them the caption."""
    if image is None:
        return Skipped(key, "no picture")
    if config.given and not given:
        return Skipped(key, f"no given picture: none of {', '.join(config.given)}")
    if not isinstance(facts, Mapping):
        return Skipped(key, "its .json holds no object with named values")
    caption = next((str(facts[name]).strip() for name in config.captions if facts.get(name)), "")
    if not caption:
        return Skipped(key, f"no caption: none of {', '.join(config.captions)}")
    accuracy = facts.get("text_accuracy")
    if config.min_text_accuracy is not None and accuracy is not None:
        try:
            low = float(accuracy) < config.min_text_accuracy
        except (TypeError, ValueError):
            return Skipped(key, f"text_accuracy={accuracy} is not a number")
        if low:
            return Skipped(key, f"text_accuracy={accuracy} is below data.min_text_accuracy={config.min_text_accuracy}")
    return Sample(key, caption, image, given)


def find_units(config: DataConfig) -> list[Unit]:
    """Return all units of `data.path`, in a fixed order; raises `UsageError` if it has none or a table is invalid."""
    return _tables(config) if config.name == "folder" else _shards(config)


def _shards(config: DataConfig) -> list[Unit]:
    pattern = str(config.path)
    names = [f"{pattern}/*.tar"] if Path(pattern).is_dir() else wds.SimpleShardList(pattern).urls
    paths = sorted(Path(found) for name in names for found in glob.glob(name))
    if not paths:
        raise UsageError(
            f"data.path={pattern} names no shard; give a folder of .tar files, or shards-{{000..099}}.tar."
        )
    return [Shard(path.name, path.stat().st_size, path.stat().st_mtime_ns, path) for path in paths]


def _tables(config: DataConfig) -> list[Unit]:
    path = Path(str(config.path))
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.name in ("metadata.csv", "metadata.jsonl"))
        if not found:
            raise UsageError(
                f"data.path={path} holds neither .tar shards nor a table of captions: "
                "write metadata.csv with the columns file_name and text into it."
            )
        path = found[0]
    if not path.is_file():
        raise UsageError(f"data.path={path} does not exist; name a folder, a CSV or a JSONL.")
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            rows: list[Any] = list(csv.DictReader(io.StringIO(text)))
        else:
            rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (UnicodeDecodeError, ValueError, csv.Error):
        raise UsageError(f"data.path={path} does not read as {path.suffix or 'a table'}; correct the file.") from None
    if not rows or not all(isinstance(row, Mapping) for row in rows):
        raise UsageError(f"data.path={path} holds no rows with named columns.")
    stat = path.stat()
    return [
        Rows(f"{path.name}-{start}", stat.st_size, stat.st_mtime_ns, path, start, rows[start : start + ROWS])
        for start in range(0, len(rows), ROWS)
    ]
