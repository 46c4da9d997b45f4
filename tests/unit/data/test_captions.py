"""What is taken as the caption of a sample, and what is refused because it is none."""

from __future__ import annotations

import codecs
from typing import Any

import pytest

from ppcl.data.captions import NoCaptionError, caption_of, decoded, seen

TEXT = "un café, 猫"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_is_read_by_its_mark(encoding: str) -> None:
    assert decoded(TEXT.encode(encoding)) == TEXT


def test_text_of_the_other_byte_order_is_read_by_its_mark() -> None:
    assert decoded(codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be")) == TEXT


@pytest.mark.parametrize("content", ["café".encode("cp1252"), codecs.BOM_UTF16_LE + b"a"])
def test_other_text_is_an_error(content: bytes) -> None:
    with pytest.raises(UnicodeDecodeError):
        decoded(content)


@pytest.mark.parametrize(
    ("facts", "caption"),
    [
        ({"caption": " a cat \n"}, "a cat"),
        ({"caption": " ", "text": "a dog"}, "a dog"),
        ({"caption": None, "text": "a dog"}, "a dog"),
        ({"caption": [], "text": "a dog"}, "a dog"),
        ({"caption": ["", None, "a cat", "a pet"], "text": "a dog"}, "a cat"),
        ({"caption": 207}, "207"),
        ({"caption": "\ufeff\ufeffa cat"}, "a cat"),
    ],
)
def test_the_first_that_is_not_blank_is_the_caption(facts: dict[str, Any], caption: str) -> None:
    assert caption_of(facts, ["caption", "text"]) == caption


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({}, "no caption in data.captions=[caption, text]; it has none"),
        ({"Caption": "a cat", "id": 1}, "no caption in data.captions=[caption, text]; it has Caption, id"),
        ({"caption": {"en": "a cat"}, "text": "a dog"}, "its caption is an object with named values, no text"),
        ({"caption": [{"en": "a cat"}]}, "its caption is a list of other things, no text"),
        ({"caption": True}, "its caption is true or false, no text"),
        ({"caption": 0.5}, "its caption is a number, no text"),
        ({"caption": "a cat".encode("utf-16-le").decode()}, "its caption has zero bytes"),
        ({"caption": "caf\udce9"}, "its caption is not UTF-8"),
    ],
)
def test_what_is_no_text_is_refused(facts: dict[str, Any], said: str) -> None:
    with pytest.raises(NoCaptionError) as error:
        caption_of(facts, ["caption", "text"])
    assert str(error.value).startswith(said)


def test_a_few_names_are_shown_of_many() -> None:
    assert seen([f"{number}" for number in range(9)]) == "it has 0, 1, 2, 3, 4, 5, 6, 7, ..."
