"""Reads text that users bring, and finds the caption of a sample in it."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from typing import Any

# The mark of UTF-32 begins with that of UTF-16.
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_KINDS = {dict: "an object with named values", list: "a list of other things", bool: "true or false"}


class NoCaptionError(ValueError):
    """A sample without a caption that can be used. The message says why."""


def decoded(content: bytes, errors: str = "strict") -> str:
    """Return text that is UTF-8 with or without a byte order mark, or UTF-16 or UTF-32 with one.

    `errors`: as in `bytes.decode`. Raises `UnicodeDecodeError` for other text, such as that of cp1252.
    """
    encoding = next((name for mark, name in _MARKS.items() if content.startswith(mark)), "utf-8")
    return content.decode(encoding, errors)


def caption_of(facts: Mapping[Any, Any], names: Sequence[str]) -> str:
    """Return the caption of a sample: the first of the values `names` of `facts` that is not blank, as text.

    Of a list, it is the first text in it that is not blank. A whole number is taken as text. Raises `NoCaptionError` if
    there is no such value, or if the first one is no valid text.
    """
    for name in names:
        value = facts.get(name)
        if isinstance(value, list) and value:
            value = next((item for item in value if isinstance(item, str) and item.strip()), value)
        if is_blank(value):
            continue
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise NoCaptionError(f"its {name} is {_KINDS.get(type(value), 'a number')}, no text")
        return _checked(name, str(value).strip().lstrip("\ufeff").strip())
    raise NoCaptionError(f"no caption in data.captions=[{', '.join(names)}]; {seen(facts)}")


def is_blank(value: Any) -> bool:
    """Return whether a value says nothing: null, 0, an empty list or object, and text of spaces alone."""
    return not value or (isinstance(value, str) and not value.strip())


def _checked(name: str, text: str) -> str:
    """Return `text`; raises `NoCaptionError` if it has characters that no text has."""
    if "\0" in text:
        raise NoCaptionError(f"its {name} has zero bytes, as UTF-16 without a byte order mark has: save it as UTF-8")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise NoCaptionError(f"its {name} is not UTF-8: save it with that encoding") from None
    return text


def seen(names: Mapping[Any, Any] | Sequence[str], most: int = 8) -> str:
    """Return what a sample has in place of what was looked for: its first keys, columns or files."""
    shown = [str(name) for name in list(names)[:most]]
    more = ", ..." if len(names) > most else ""
    return f"it has {', '.join(shown)}{more}" if shown else "it has none"
