"""The prompts of a recording: a text file with one a line, or a .jsonl with arguments of the pipeline's call."""

from __future__ import annotations

import hashlib
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ppcl.artifacts.files import parse_json
from ppcl.artifacts.headers import fingerprint
from ppcl.errors import UsageError
from ppcl.pictures.opening import IMAGES, UnusablePictureError, open_picture
from ppcl.validation.prompts import read_text

TENSORS = ".safetensors"
_PROMPT = re.compile(r"(negative_)?prompt(_\d)?")
# Arguments that the recording itself gives to the pipeline.
_OWN = ("generator", "output_type", "return_dict", "num_images_per_prompt", "num_videos_per_prompt")


@dataclass(frozen=True)
class Row:
    """The arguments of one call of the pipeline, as they are written in line `line` of the file `path`.

    `prompt`: the text of a line of a text file, which the model's family turns into arguments; None in a table.
    """

    path: Path
    line: int
    arguments: Mapping[str, Any]
    prompt: str | None = None

    @property
    def place(self) -> str:
        """The file and line, as an error names them."""
        return f"data.path={self.path}, line {self.line}"

    @property
    def caption(self) -> str:
        """The prompt as text. A row without one has its line's number in its place."""
        found = self.arguments.get("prompt") if self.prompt is None else self.prompt
        return found if isinstance(found, str) and found.strip() else f"line {self.line}"

    @property
    def files(self) -> list[Path]:
        """The files beside the table that its values name."""
        texts = (text for value in self.arguments.values() for text in _listed(value) if isinstance(text, str))
        found = (self.path.parent / text for text in texts if _is_file_name(text))
        return [path for path in found if path.is_file()]

    @property
    def identity(self) -> str:
        """A hash of the arguments and of the files that they name."""
        contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in self.files]
        return fingerprint({"prompt": self.prompt, "arguments": self.arguments, "files": contents})


def is_table(path: str | Path) -> bool:
    """Return whether a file of prompts is a table of arguments, by its name."""
    return Path(path).suffix.lower() == ".jsonl"


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file of prompts, in their order; blank lines are left out.

    Raises `UsageError` if it cannot be read, or holds no row.
    """
    lines = [(number, line.strip()) for number, line in enumerate(read_text(path, "data.path").split("\n"), start=1)]
    of_line = _of_table if is_table(path) else _of_text
    rows = [of_line(path, number, line) for number, line in lines if line]
    if not rows:
        raise UsageError(f"data.path={path} holds no prompt; write one a line.")
    return rows


def _of_text(path: Path, number: int, line: str) -> Row:
    return Row(path, number, {}, line)


def _of_table(path: Path, number: int, line: str) -> Row:
    try:
        found = parse_json(line)
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found:
        raise UsageError(
            f"data.path={path}, line {number} is no JSON object of the pipeline's arguments; write one, such as "
            '{"prompt": "a red circle"}.'
        )
    return Row(path, number, found)


def check_rows(rows: Sequence[Row], call: Callable[..., Any], *, given: bool) -> None:
    """Check that the pipeline takes the arguments of each row, and that the files that they name can be read.

    `call`: the `__call__` of the pipeline's class; no weights are needed. `given`: whether the model needs a picture
    with each prompt. Raises `UsageError` for the first row that cannot be used.
    """
    parameters = inspect.signature(call).parameters
    for row in rows:
        if row.prompt is not None and given:
            raise UsageError(
                f"{row.place} is a prompt alone, and the model is given pictures: name a .jsonl file as data.path, "
                'with lines such as {"prompt": "make it red", "image": "picture.png"}.'
            )
        for name in row.arguments:
            if name in _OWN:
                raise UsageError(f"{row.place}: {name} is set by the recording itself: leave it out.")
            if name in parameters:
                _check_kind(row, name, parameters[name])
            if name not in parameters or name == "self":
                known = ", ".join(other for other in parameters if other != "self" and other not in _OWN)
                raise UsageError(
                    f"{row.place}: {name} is no argument of the pipeline, which takes {known} (for a table of pictures "
                    "with captions, add data=folder)."
                )
        _check_picture(row, parameters)
        loaded(row, parameters)


def _check_picture(row: Row, parameters: Mapping[str, inspect.Parameter]) -> None:
    """Raise `UsageError` for a row without a picture that the pipeline cannot do without."""
    for name, parameter in parameters.items():
        needed = parameter.default is inspect.Parameter.empty and "Image" in str(parameter.annotation)
        if needed and name not in row.arguments:
            remedy = f'add "{name}": "picture.png"'
            if row.prompt is not None:
                remedy = f'name a .jsonl as data.path, with lines such as {{"prompt": "a", "{name}": "picture.png"}}'
            raise UsageError(f"{row.place} has no {name}, which the pipeline needs: {remedy}.")


def _check_kind(row: Row, name: str, parameter: inspect.Parameter) -> None:
    """Raise `UsageError` for a value of a kind that the pipeline does not take, as far as its signature says so.

    And for several prompts in a row: a row is one sample.
    """
    annotation = str(parameter.annotation)
    if "Callable" in annotation:
        raise UsageError(f"{row.place}: {name} is a function, which a table cannot hold: leave it out.")
    value, kinds = row.arguments[name], set(re.findall(r"\w+", annotation))
    is_prompt = _PROMPT.fullmatch(name) is not None
    alone = name == "prompt" and not any("embeds" in other for other in row.arguments)
    if value is None and (alone if is_prompt else parameter.default is not None):
        raise UsageError(f"{row.place}: {name} is null: give a value, or leave it out.")
    if is_prompt:
        if isinstance(value, list) and len(value) > 1:
            raise UsageError(f"{row.place}: {name} is a list of {len(value)}: write a row for each.")
        if not all(isinstance(text, str | None) for text in _listed(value)):
            raise UsageError(f"{row.place}: {name} is {value!r}: write a text, in quotes.")
    if "Image" in annotation and not all(isinstance(item, str | None) for item in _listed(value)):
        raise UsageError(f"{row.place}: {name} is {value!r}: write the name of a picture, in quotes.")
    if isinstance(value, str) and kinds & {"int", "float"} and "str" not in kinds:
        raise UsageError(f"{row.place}: {name} is the text {value!r}: write a number, without quotes.")
    if isinstance(value, float) and not math.isfinite(value):  # JSON has no such numbers, but Python reads them
        raise UsageError(f"{row.place}: {name} is {value}: write a finite number.")
    if name == "num_inference_steps" and isinstance(value, int) and value < 1:
        raise UsageError(f"{row.place}: {name} is {value}: raise it to 1 or more.")


def loaded(row: Row, parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Return the arguments of a row with the pictures and tensors that they name.

    A text is the name of a picture where the pipeline's parameter takes pictures, and one that ends in `.safetensors`
    that of tensors. Raises `UsageError` for a file that is missing or damaged.
    """
    found = {}
    for name, value in row.arguments.items():
        takes_pictures = "Image" in str(parameters[name].annotation)
        items = [_opened(row, name, item, takes_pictures=takes_pictures) for item in _listed(value)]
        found[name] = items if isinstance(value, list) else items[0]
    return found


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _is_file_name(text: str) -> bool:
    return text.lower().endswith((TENSORS, *(f".{suffix}" for suffix in IMAGES)))


def _opened(row: Row, name: str, value: Any, *, takes_pictures: bool) -> Any:
    """Return a value of the argument `name`, or the picture or the tensor in the file that it names."""
    if not isinstance(value, str):
        return value
    path = row.path.parent / value
    if value.lower().endswith(TENSORS):
        return _tensor(row, name, path)
    if not takes_pictures:
        return value
    try:
        return open_picture(path)
    except OSError:
        raise UsageError(f"{row.place}: {name}={value} cannot be read: name a picture beside that file.") from None
    except UnusablePictureError as error:
        raise UsageError(f"{row.place}: the picture {name}={value} {error}; give another.") from None


def _tensor(row: Row, name: str, path: Path) -> Any:
    """Return the tensor `name` of a safetensors file, or its only one."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            chosen = name if name in names else names[0] if len(names) == 1 else None
            if chosen is not None:
                return file.get_tensor(chosen)
    except FileNotFoundError:
        raise UsageError(f"{row.place}: {name}={path} does not exist: name a file beside that one.") from None
    except (OSError, SafetensorError):
        raise UsageError(f"{row.place}: {name}={path} does not read as safetensors: write it anew.") from None
    raise UsageError(f"{row.place}: {name}={path} has several tensors, none of them {name}: give one that name.")
