"""The files of a recording: a folder with a record, how calls are joined, and two files for each prompt.

`NNNNNN.safetensors` has every different tensor of a prompt's calls once, by its digest. `NNNNNN.json` says how calls
are made of them. It is written last, so that a prompt which has it is complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from ppcl.artifacts.files import again, check_safetensors, read_json, write_json
from ppcl.artifacts.headers import Header
from ppcl.artifacts.tensors import TensorFile, read_tensors, write_tensors
from ppcl.data.recording.nested import Axes, copied, digest, packed, signature, tensors_of, unpacked
from ppcl.errors import UsageError

RECORD = "recording.json"  # the header: what the recording is made from
JOINING = "joining.json"
ARGUMENTS, OUTPUT = "arguments", "output"


@dataclass(frozen=True)
class Call:
    """One call of the transformer, at the denoising step `step` of a prompt.

    `timestep`: what the scheduler was given after it. `sigma`: the noise level, from 0 to 1. `arguments`: by name.
    `output`: what it predicts, as `ppcl.data.batches.every_output` returns it. `used`: how many of the output's entries
    along dimension 1 the scheduler was given; None for all.
    """

    step: int
    timestep: float
    sigma: float
    arguments: Mapping[str, Any]
    output: Any
    used: int | None = None

    @property
    def first_output(self) -> Any:
        """The output that the scheduler of the latents is given: of a video with sound, the video's velocity."""
        return self.output["0"] if isinstance(self.output, dict) else self.output


@dataclass(frozen=True)
class Joining:
    """Rules for joining calls into batches, and for making them anew at another noise level.

    `axes`: those of arguments and output; None if calls cannot be joined, and `why`. `rows`: how many rows of a call
    can be calls of their own: the passes of guidance, where a pipeline makes them together. `renoising`: the fields of
    a `Renoising`; None if calls cannot be made anew, and `as_recorded`, the reason.
    """

    axes: Axes | None
    why: str = ""
    renoising: Mapping[str, Any] | None = None
    as_recorded: str = ""
    rows: int = 1


@dataclass(frozen=True)
class Entry:
    """A stored call: number `number` of the prompt whose record is `record`.

    `alike`: equal for calls to be joined. `own`: digests of the tensors that no other call of its step is given; empty
    if there is no other. `row`: the one row of the call that is taken; None for all. `unguided`: whether it is the pass
    of guidance that all prompts share.
    """

    record: Path
    number: int
    caption: str
    step: int
    sigma: float
    alike: str
    own: frozenset[str] = frozenset()
    row: int | None = None
    unguided: bool = False

    @property
    def prompt(self) -> int:
        """The number of the prompt."""
        return int(self.record.stem)

    @property
    def name(self) -> str:
        return f"{self.record.stem}-{self.number}" + ("" if self.row is None else f".{self.row}")


def record_of(folder: Path, prompt: int) -> Path:
    """Return the file that exists once prompt number `prompt` is completely recorded."""
    return folder / f"{prompt:06d}.json"


def is_whole(folder: Path, prompt: int) -> bool:
    """Return whether a prompt has its record and its tensors."""
    record = record_of(folder, prompt)
    return record.exists() and record.with_suffix(".safetensors").exists()


def missing_files(folder: Path, count: int) -> list[str]:
    """Return what a recording of `count` prompts lacks: names of files."""
    records = [record_of(folder, number) for number in range(count)]
    files = [file for record in records for file in (record, record.with_suffix(".safetensors"))]
    lacking = [file.name for file in files if not file.exists()]
    return lacking if (folder / JOINING).exists() else [*lacking, JOINING]


def read_header(folder: Path) -> Header:
    """Return the header of the recording in `folder`."""
    record = folder / RECORD
    return Header.of(read_json(record, "A recording's record", "cache"), record, "cache")


def write_joining(folder: Path, joining: Joining) -> None:
    write_json(folder / JOINING, asdict(joining))


def read_joining(folder: Path) -> Joining:
    """Return how calls of a recording are joined."""
    found = read_json(folder / JOINING, "A recording's file", "cache")
    try:
        return Joining(**found)
    except TypeError:
        raise UsageError(f"{folder / JOINING} does not say how calls are joined: {again('cache')}.") from None


def write_calls(
    folder: Path, prompt: int, fingerprint: str, row: str, caption: str, calls: Sequence[Call], latents: Tensor
) -> int:
    """Write the calls of a prompt and its final latents, and return the bytes of its tensors.

    `row`: the identity of what was drawn.
    """
    tensors: dict[str, Tensor] = {}

    def keep(tensor: Tensor) -> str:
        name = digest(tensor)
        tensors[name] = tensor
        return name

    stored = [
        {
            "step": call.step,
            "timestep": call.timestep,
            "sigma": call.sigma,
            "used": call.used,
            ARGUMENTS: packed(call.arguments, keep, ARGUMENTS),
            OUTPUT: packed(call.output, keep, OUTPUT),
        }
        for call in calls
    ]
    last = keep(copied(latents))
    shapes = {name: [str(tensor.dtype).removeprefix("torch."), *tensor.shape] for name, tensor in tensors.items()}
    record = record_of(folder, prompt)
    write_tensors(record.with_suffix(".safetensors"), tensors, {"fingerprint": fingerprint})
    write_json(record, {"row": row, "caption": caption, "calls": stored, "latents": last, "tensors": shapes})
    return sum(tensor.nbytes for tensor in tensors.values())


def row_in(folder: Path, prompt: int) -> str | None:
    """Return the identity of what was drawn as prompt number `prompt`.

    None if there is no such prompt, if it is damaged, or if an earlier version of ppcl recorded it.
    """
    if not is_whole(folder, prompt):
        return None
    with suppress(UsageError):
        return _read_record(record_of(folder, prompt)).get("row")
    return None


def copy_calls(source: Path, folder: Path, prompt: int, fingerprint: str) -> None:
    """Copy a prompt of the recording in `source` to `folder`; raises `UsageError` if it is damaged."""
    record, copy = record_of(source, prompt), record_of(folder, prompt)
    tensors, _ = read_tensors(record.with_suffix(".safetensors"), "cache", read_header(source).fingerprint)
    write_tensors(copy.with_suffix(".safetensors"), tensors, {"fingerprint": fingerprint})
    write_json(copy, _read_record(record))


def _read_record(record: Path) -> dict[str, Any]:
    content = read_json(record, "A recording's prompt", "cache")
    if not all(isinstance(content.get(key), kind) for key, kind in (("calls", list), ("tensors", dict))):
        raise UsageError(f"A recording's prompt {record} has no list of calls: {again('cache')}.")
    return content


def read_captions(folder: Path, count: int) -> list[str]:
    """Return the captions of a recording of `count` prompts."""
    return [_read_record(record_of(folder, prompt))["caption"] for prompt in range(count)]


def read_entries(folder: Path, count: int, axes: Axes | None) -> list[Entry]:
    """Return all calls of a recording of `count` prompts, in a fixed order.

    Raises `UsageError` for a file that is missing or damaged.
    """
    entries = []
    for prompt in range(count):
        record = record_of(folder, prompt)
        content = _read_record(record)
        check_safetensors(record.with_suffix(".safetensors"), stage="cache")
        given: dict[int, list[frozenset[str]]] = {}
        for call in content["calls"]:
            given.setdefault(call["step"], []).append(tensors_of(call[ARGUMENTS]))
        for number, call in enumerate(content["calls"]):
            alike = [signature(call[key], axes, content["tensors"], key) for key in (ARGUMENTS, OUTPUT)]
            alike.append(str(call["used"]))
            where = record, number, content["caption"]
            own = tensors_of(call[ARGUMENTS]) - frozenset.intersection(*given[call["step"]])
            entries.append(Entry(*where, call["step"], call["sigma"], " ".join(alike), own))
    return entries


@lru_cache(maxsize=64)
def _opened(record: Path) -> tuple[TensorFile, dict[str, Any]]:
    """Return the open file of a prompt's tensors, and its record."""
    fingerprint = read_header(record.parent).fingerprint
    return TensorFile(record.with_suffix(".safetensors"), "cache", fingerprint), _read_record(record)


def read_latents(record: Path) -> Tensor:
    """Return the final latents of a prompt; raises `UsageError` if they have changed."""
    file, content = _opened(record)
    return file.get_tensor(content["latents"])


def read_call(record: Path, number: int) -> Call:
    """Return a stored call; raises `UsageError` if a tensor of it has changed."""
    file, content = _opened(record)
    found = content["calls"][number]
    arguments, output = (unpacked(found[key], file.get_tensor) for key in (ARGUMENTS, OUTPUT))
    return Call(found["step"], found["timestep"], found["sigma"], arguments, output, found["used"])
