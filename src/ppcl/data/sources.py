"""Reads pictures with captions from webdataset shards, from a folder with a CSV or JSONL table, or from class folders.

The source is divided into units that are cached as a whole: a shard, or up to 1,000 rows of a table or pictures of a
class. A sample that cannot be used is returned as `Skipped`, with the reason. So is a damaged part of a shard.
"""

from __future__ import annotations

import csv
import glob
import io
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from os.path import commonpath, relpath
from pathlib import Path
from typing import Any
from urllib.parse import quote

import webdataset as wds
from PIL import Image
from webdataset.tariterators import group_by_keys

from ppcl.artifacts.files import parse_json
from ppcl.config import DataConfig
from ppcl.data.archives import Damage, read_members
from ppcl.data.captions import NoCaptionError, caption_of, decoded, is_blank, seen
from ppcl.errors import UsageError
from ppcl.pictures.opening import IMAGES, open_picture

ROWS = 1000  # of a table, or pictures of a class, in one unit
LONGEST_CELL = 1 << 24  # characters of a cell in a table
_META = re.compile(r"__[^/]*__($|/)")  # names that webdataset keeps for itself


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
        """Return the pictures as `open_picture` does: first `image`, then `given`."""
        return [open_picture(content) for content in (self.image, *self.given)]


@dataclass
class Skipped:
    """A sample that cannot be used, and why."""

    key: str
    why: str


@dataclass
class Unit(ABC):
    """Samples that are read and cached together.

    `size`, `changed`: size in bytes and modification time in ns of its file, by which a replaced file is detected. Of a
        class folder: its number of pictures, and the modification time of the folder.
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
        skipped: list[Skipped] = []

        def files() -> Iterator[dict[str, Any]]:
            for member in read_members(self.path):
                if isinstance(member, Damage):
                    skipped.append(Skipped(self.path.name, member.why))
                elif not _META.match(member.name):
                    yield {"fname": _utf8(member.name), "data": member.content, "__url__": str(self.path)}

        def note(error: Exception) -> bool:
            name = str(error.args[0]).partition(": duplicate")[0]
            skipped.append(Skipped(name, "its name occurs twice in the shard; the first file is taken"))
            return True

        for member in group_by_keys(files(), handler=note):
            yield _of_shard(member, config)
        yield from skipped

    def count(self) -> int:
        members = read_members(self.path, contents=False)
        suffixes = (Path(member.name).name.partition(".")[2] for member in members if not isinstance(member, Damage))
        return sum(suffix.lower() in IMAGES for suffix in suffixes)


def _of_shard(member: Mapping[str, Any], config: DataConfig) -> Sample | Skipped:
    """Return the sample of the files of one name in a shard, by their suffixes; `__key__` is the name."""
    key = str(member["__key__"])
    found = _picture(member, "")
    if found is None:
        return Skipped(key, f"no picture: {seen([name for name in member if not name.startswith('__')])}")
    given = [picture for name in config.given or () if (picture := _picture(member, f"{name}."))]
    try:
        facts = parse_json(member["json"]) if "json" in member else {}
    except UnicodeDecodeError:
        return Skipped(key, "its .json is not UTF-8: save it with that encoding")
    except ValueError:
        return Skipped(key, "its .json does not read as JSON")
    if not isinstance(facts, Mapping):
        return Skipped(key, "its .json holds no object with named values")
    if "txt" in member and is_blank(facts.get(config.captions[0])):
        try:
            facts = {**facts, config.captions[0]: decoded(member["txt"])}
        except UnicodeDecodeError:
            return Skipped(key, "its .txt is not UTF-8: save it with that encoding")
    return _sample(key, facts, found, given, config)


@dataclass
class Rows(Unit):
    """Up to 1,000 rows of a table, beginning at row number `start`. A row that does not read is `Skipped`."""

    table: Path
    start: int
    rows: Sequence[Mapping[str, Any] | Skipped]

    def read(self, config: DataConfig) -> Iterator[Sample | Skipped]:
        for number, row in enumerate(self.rows, start=self.start):
            if isinstance(row, Skipped):
                yield row
                continue
            name = next((str(row[key]) for key in ("image", "file_name", "path") if row.get(key)), None)
            key = _utf8(name or f"row {number}")
            if name is None:
                yield Skipped(key, f"no image, file_name or path: {seen(row)}")
                continue
            try:
                given = [file for column in config.given or () for file in _files(row.get(column))]
                content, *others = [(self.table.parent / file).read_bytes() for file in (name, *given)]
            except OSError as error:
                yield Skipped(key, f"its file cannot be read: {error.strerror}")
                continue
            except ValueError:  # a zero byte, or what is not UTF-8
                yield Skipped(key, "its file has a name that none has")
                continue
            yield _sample(key, row, content, others, config)

    def count(self) -> int:
        return len(self.rows)


@dataclass
class ClassFolder(Unit):
    """Up to 1,000 pictures of a folder that holds a class. `caption`: that of all of them, at first the folder's name.

    `files`: the names of the pictures; a class without any has none.
    """

    folder: Path
    files: Sequence[str]
    caption: str

    def read(self, config: DataConfig) -> Iterator[Sample | Skipped]:
        for name in self.files:
            key = _utf8(f"{self.folder.name}/{name}")
            try:
                content = (self.folder / name).read_bytes()
            except OSError as error:
                yield Skipped(key, f"its file cannot be read: {error.strerror}")
                continue
            yield Sample(key, self.caption, content)

    def count(self) -> int:
        return len(self.files)


def _utf8(name: str) -> str:
    """Return a name with bytes that are not UTF-8 written out: a key that holds them could not be hashed or written."""
    return name.encode(errors="backslashreplace").decode()


def _picture(member: Mapping[str, Any], prefix: str) -> bytes | None:
    """Return the picture in a shard's member, or with `prefix`, such as `edit_image.`, the given one of that name."""
    return next((member[prefix + name] for name in IMAGES if prefix + name in member), None)


def _files(cell: Any) -> list[str]:
    """Return the files that a table's cell names: none, one, or several as a list (in a CSV as JSON)."""
    if isinstance(cell, str) and cell.startswith("["):
        with suppress(ValueError):  # not JSON, so it is the name of a file
            cell = parse_json(cell)
    return [str(file) for file in cell] if isinstance(cell, list) else [str(cell)] if cell else []


def _sample(
    key: str, facts: Mapping[Any, Any], image: bytes, given: Sequence[bytes], config: DataConfig
) -> Sample | Skipped:
    """Return a sample, or why it cannot be used. `facts`: its keys or columns, among them the caption."""
    if config.given and not given:
        return Skipped(key, f"no given picture: none of {', '.join(config.given)}")
    try:
        caption = caption_of(facts, config.captions)
    except NoCaptionError as error:
        return Skipped(key, str(error))
    accuracy = facts.get("text_accuracy")
    if config.min_text_accuracy is not None and accuracy is not None:
        try:
            number = float(accuracy)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if number < config.min_text_accuracy:
            return Skipped(key, f"text_accuracy={accuracy} is below data.min_text_accuracy={config.min_text_accuracy}")
        if number != number:
            return Skipped(key, f"text_accuracy={accuracy} is not a number")
    return Sample(key, caption, image, given)


def find_units(config: DataConfig) -> list[Unit]:
    """Return all units of `data.path`, in a fixed order; raises `UsageError` if it has none or a table is invalid."""
    return _tables(config) if config.name == "folder" else _shards(config)


def _shards(config: DataConfig) -> list[Unit]:
    pattern = str(config.path)
    names = [f"{glob.escape(pattern)}/*.tar"] if Path(pattern).is_dir() else wds.SimpleShardList(pattern).urls
    paths = sorted({Path(found) for name in names for found in glob.glob(name)})
    if not paths:
        raise UsageError(
            f"data.path={pattern} names no shard; give a folder of .tar files, or shards-{{000..099}}.tar."
        )
    return [
        Shard(name, path.stat().st_size, path.stat().st_mtime_ns, path)
        for name, path in zip(_distinct_names(paths), paths, strict=True)
    ]


def _distinct_names(paths: Sequence[Path]) -> list[str]:
    """Return a name for each shard that no other has: of its file, or if two are alike, of the folders that differ."""
    names = [path.name for path in paths]
    if len({*names}) == len(names):
        return names
    common = commonpath([path.absolute() for path in paths])
    return [quote(relpath(path, common), safe="", errors="surrogateescape") for path in paths]


def _tables(config: DataConfig) -> list[Unit]:
    path = Path(str(config.path))
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.name in ("metadata.csv", "metadata.jsonl"))
        if not found and not config.given and (classes := _class_folders(path)):
            return classes
        if not found:
            raise UsageError(
                f"data.path={path} holds neither .tar shards nor a table of captions: write metadata.csv with the "
                "columns file_name and text into it, or put the pictures of each class into a folder with its name."
            )
        path = found[0]
    if not path.is_file():
        raise UsageError(f"data.path={path} does not exist; name a folder, a CSV or a JSONL.")
    try:
        # Only rows with what is not UTF-8 are left out: its bytes become surrogates, which no caption may have.
        lines = io.StringIO(decoded(path.read_bytes(), "surrogateescape"), newline=None)
        rows = _rows_of_csv(lines) if path.suffix == ".csv" else _rows_of_json(lines)
    except (UnicodeDecodeError, csv.Error):
        rows = []
    if not any(isinstance(row, Mapping) for row in rows):
        raise UsageError(f"data.path={path} holds no row with named columns that reads as {path.suffix or 'a table'}.")
    stat = path.stat()
    return [
        Rows(f"{path.name}-{start}", stat.st_size, stat.st_mtime_ns, path, start, rows[start : start + ROWS])
        for start in range(0, len(rows), ROWS)
    ]


def _class_folders(path: Path) -> list[Unit]:
    """Return the units of a folder of class folders, sorted by class; none if there is no picture in any of them."""
    units: list[Unit] = []
    for folder in sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith(".")):
        files = sorted(each.name for each in folder.iterdir() if each.suffix[1:].lower() in IMAGES)
        name, changed = _utf8(folder.name), folder.stat().st_mtime_ns
        units += [
            ClassFolder(f"{name}-{start}", len(files), changed, folder, files[start : start + ROWS], name)
            for start in range(0, max(1, len(files)), ROWS)
        ]
    return units if any(unit.count() for unit in units) else []


def _rows_of_csv(lines: io.StringIO) -> list[Mapping[str, Any] | Skipped]:
    """Return the rows of a CSV, whose cells are divided by commas, semicolons or tabs: what its first line has most of.

    Spreadsheets write the latter two in many countries.
    """
    start, blank, first = 0, 0, lines.readline()
    while first.isspace():
        start, blank, first = lines.tell(), blank + 1, lines.readline()
    lines.seek(start)
    delimiter = max(",;\t", key=first.count)
    csv.field_size_limit(LONGEST_CELL)
    reader = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    rows: list[Mapping[str, Any] | Skipped] = []
    while True:
        begin = blank + reader.reader.line_num + 1
        try:
            row = next(reader)
        except StopIteration:
            return rows
        except csv.Error as error:  # a quote that was not closed takes further lines with it
            end = blank + reader.reader.line_num
            places = f"line {begin}" if begin == end else f"lines {begin} to {end}"
            rows.append(Skipped(places, f"{error}: a quote within quotes is written twice, and each needs its end"))
            continue
        further = row.pop(None, ())  # type: ignore[call-overload]
        why = f"has more cells than there are columns: put text with {delimiter!r} into double quotes"
        rows.append(Skipped(f"line {blank + reader.reader.line_num}", why) if any(further) else row)


def _rows_of_json(lines: io.StringIO) -> list[Mapping[str, Any] | Skipped]:
    """Return the rows of a JSON Lines file."""
    rows: list[Mapping[str, Any] | Skipped] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError:
            row = None
        whole = isinstance(row, Mapping)
        rows.append(row if whole else Skipped(f"line {number}", "does not read as a JSON object"))
    return rows
