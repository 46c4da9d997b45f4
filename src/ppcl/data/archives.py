"""Reads the files in a tar archive, plain or compressed, also in one that is damaged or cut short.

After a damaged header `tarfile` stops without an error, as if the archive ended there. Here the damage is reported, and
reading goes on at the next valid header.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_BLOCK = tarfile.BLOCKSIZE
_MAGIC, _MAGIC_AT = b"ustar", 257  # in the header of every format except that of before 1988
_CHUNK = 1 << 20  # bytes that are searched at once
_OPENERS: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
# What reading a compressed file raises where it is damaged or cut short, and reading any file on a failing disk.
_UNREADABLE = (EOFError, OSError, zlib.error, lzma.LZMAError)
_NO_HEADER = (tarfile.TarError, ValueError, OverflowError)  # the last two are of numbers in it


@dataclass(frozen=True)
class Member:
    """A regular file in an archive. Bytes of its name that are not UTF-8 are surrogates, as in names of files."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Damage:
    """A part of an archive that cannot be read. `why` says where, and what is lost."""

    why: str


def read_members(path: Path, *, contents: bool = True) -> Iterator[Member | Damage]:
    """Yield the regular files in an archive in their order, and what is damaged where the damage is met.

    `contents`: whether to read the files; otherwise each `content` is empty.

    Positions in an archive are bytes; if it is compressed, of what it decompresses to. Nothing can be read behind the
    first damage in a compressed archive.
    """
    try:
        with path.open("rb") as stored:
            start = stored.read(max(map(len, _OPENERS)))
            stored.seek(0)
            opener = next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), None)
            with nullcontext(stored) if opener is None else closing(opener(stored)) as file:
                yield from _members(file, contents)
    except OSError as error:  # of opening it; the archive itself is read in `_members`
        yield Damage(f"it cannot be read: {error.strerror}")


def _members(file: IO[bytes], contents: bool) -> Iterator[Member | Damage]:
    """Yield what `read_members` does of an open, plain archive.

    A file is held back until the next header has been read: if that is no header where one should be, the file may lack
    bytes.
    """
    start: int | None = 0
    held: Member | None = None
    try:
        while start is not None:
            last: tarfile.TarInfo | None = None
            end = start
            file.seek(start)
            with suppress(*_NO_HEADER), tarfile.open(fileobj=file, mode="r:", encoding="utf-8") as archive:
                for info in archive:
                    if held is not None:
                        yield held
                    held = None
                    if archive.offset <= info.offset:  # a size below zero, which `tarfile` would follow in circles
                        break
                    last, end = info, archive.offset
                    held = _read(archive, info, contents)
            block = _at(file, end)
            ended = block == bytes(_BLOCK)  # with another archive behind it, if there are two in a file
            behind = end if ended else start + 1 if last is None else last.offset_data
            following, zeros = _next_header(file, behind, None if ended else end)
            if following is not None and following < end:  # the header of another file is within this one
                held = None
            lost = last is not None and last.isreg() and held is None
            if held is not None:
                yield held
            held = None
            if not (ended and zeros):
                told = "it is empty" if not block else "it is no tar archive"
                if end or following is not None:
                    told = _told(end, following, cut=len(block) < _BLOCK)
                yield Damage(f"{told}; {last.name} is not whole" if last is not None and lost else told)
            start = following
    except _UNREADABLE as error:
        if held is not None:
            yield held
        yield Damage(f"cut short or damaged: {error}")


def _read(archive: tarfile.TarFile, info: tarfile.TarInfo, contents: bool) -> Member | None:
    """Return a regular file of the archive; None for anything else, and if the archive ends before the file does."""
    if not info.isreg():
        return None
    if not contents:
        return Member(info.name, b"")
    opened = archive.extractfile(info)
    assert opened is not None, "it is a regular file"
    try:
        return Member(info.name, opened.read())
    except tarfile.ReadError:
        return None


def _told(end: int, following: int | None, *, cut: bool) -> str:
    """Return what is lost from byte `end` on, where `following` is the next header. `cut`: nothing follows at all."""
    if following is not None:
        return f"damaged at byte {min(end, following):,}: reading went on at byte {following:,}"
    return "cut short: its end is missing" if cut else f"damaged from byte {end:,} on: no file follows that can be read"


def _at(file: IO[bytes], position: int) -> bytes:
    """Return the block at `position`, shorter where the file ends."""
    file.seek(position)
    return file.read(_BLOCK)


def _next_header(file: IO[bytes], position: int, other_than: int | None = None) -> tuple[int | None, bool]:
    """Return the position of the next valid header from `position` on, or None; and whether zeros alone precede it."""
    zeros = True
    while True:
        file.seek(position)
        chunk = file.read(_CHUNK)
        found = chunk.find(_MAGIC)
        while found >= 0:
            header = position + found - _MAGIC_AT
            if found >= _MAGIC_AT and header != other_than and _is_header(_at(file, header)):
                return header, zeros and not chunk[: found - _MAGIC_AT].strip(b"\0")
            found = chunk.find(_MAGIC, found + 1)
        if len(chunk) < _CHUNK:
            return None, zeros and not chunk.strip(b"\0")
        kept = _BLOCK  # of this chunk, since a header may lie on the border
        zeros = zeros and not chunk[:-kept].strip(b"\0")
        position += len(chunk) - kept


def _is_header(block: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except _NO_HEADER:
        return False
    return True
