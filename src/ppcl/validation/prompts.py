"""Reads the prompts that a user gives: a text file, or those of GenEval or DPG-Bench as they are published."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcl.artifacts.files import parse_json
from ppcl.config import Config
from ppcl.data.captions import decoded
from ppcl.errors import UsageError

TILES = 4  # pictures of a prompt that DPG-Bench scores at most


@dataclass(frozen=True)
class OwnPrompt:
    """A prompt of `generate.prompt_file`, and the name and the record that an official scorer knows it by.

    `name`: the name of the prompt's own file in a folder, without `.txt`; else None.
    `record`: the object on the prompt's line of a JSON Lines file; else None.
    """

    text: str
    name: str | None = None
    record: dict[str, Any] | None = None


def read_prompts(path: Path) -> list[OwnPrompt]:
    """Return the prompts in `path`, in their order.

    It is a text file with a prompt a line, a `.jsonl` with an object with a `prompt` a line, or a folder with a `.txt`
    file for each prompt, which are sorted by name. Empty lines and files are left out. Raises `UsageError` if it is
    missing, holds no prompt, or is neither UTF-8 nor UTF-16 with a byte order mark.
    """
    if path.is_dir():
        found = [OwnPrompt(read_text(file).strip(), file.stem) for file in sorted(path.glob("*.txt"))]
        remedy = "put a .txt file into it for each prompt"
    else:
        lines = [line.strip() for line in read_text(path).split("\n")]
        of_line = _from_json if path.suffix == ".jsonl" else lambda _, __, line: OwnPrompt(line)
        found = [of_line(path, number, line) for number, line in enumerate(lines, start=1) if line]
        remedy = "write one a line"
    prompts = [prompt for prompt in found if prompt.text]
    if not prompts:
        raise UsageError(f"generate.prompt_file={path} holds no prompt; {remedy}.")
    return prompts


def read_text(path: Path, key: str = "generate.prompt_file") -> str:
    """Return the text of a file of prompts, with `\\n` at the end of each line. `key`: names the file in an error.

    Raises `UsageError` if it is missing, or is neither UTF-8 nor UTF-16 with a byte order mark.
    """
    try:
        return io.StringIO(decoded(path.read_bytes()), newline=None).read()
    except FileNotFoundError:
        raise UsageError(f"{key}={path} does not exist; name a text file with a prompt a line.") from None
    except UnicodeDecodeError:
        raise UsageError(f"{key}={path} is not UTF-8; save it with that encoding.") from None


def _from_json(path: Path, number: int, line: str) -> OwnPrompt:
    try:
        record = parse_json(line)
        return OwnPrompt(record["prompt"].strip(), record=record)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(
            f'generate.prompt_file={path}: line {number} is no JSON object with a text as "prompt"; write one, or name '
            "a .txt file with a prompt a line."
        ) from None


def check_layout(config: Config) -> None:
    """Check that `generate.layout` has the prompts that its scorer knows; raises `UsageError`."""
    layout, path, sampling = config.generate.layout, config.generate.prompt_file, config.model.sampling
    if layout is None:
        return
    prompts = [] if path is None else read_prompts(Path(path))
    key, given = f"generate.layout={layout}", "" if path is None else f"; it is {path}"
    if layout == "geneval" and not (prompts and all("tag" in (prompt.record or {}) for prompt in prompts)):
        raise UsageError(
            f"{key} needs generate.prompt_file=evaluation_metadata.jsonl, GenEval's own file, whose lines have a "
            f'"prompt" and a "tag"{given}.'
        )
    if layout == "dpg" and not (prompts and all(prompt.name for prompt in prompts)):
        raise UsageError(f"{key} needs generate.prompt_file=FOLDER, the prompts of DPG-Bench, a .txt each{given}.")
    if layout == "dpg" and config.generate.num_images > TILES:
        raise UsageError(
            f"generate.num_images={config.generate.num_images} is more than the {TILES} pictures of a prompt that "
            f"{key} has room for: give {TILES}."
        )
    if layout == "dpg" and sampling.height != sampling.width:
        raise UsageError(
            f"{key} is for square pictures, and model.sampling.height={sampling.height} is not "
            f"model.sampling.width={sampling.width}: give both the same value."
        )
