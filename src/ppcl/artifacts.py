"""What stages hand on: safetensors beside a small versioned JSON, fingerprinted, written atomically.

A JSON is always the last thing written of an artifact, so its presence says that the rest is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ppcl.errors import UsageError

FORMAT_VERSION = 1
Interval = tuple[int, int]
Intervals = dict[str, list[Interval]]
# By stack: which blocks, by their index in the teacher, lose their `text` stream and their `ffn`.
Width = dict[str, dict[str, list[int]]]


def fingerprint(made_from: Mapping[str, Any]) -> str:
    """A short hash of the JSON form of what an artifact is made from."""
    canonical = json.dumps(made_from, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, flushed to disk and renamed to it when the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block succeeds.

    What a killed process left under such a name goes first.
    """
    for leftover in folder.parent.glob(f".{folder.name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        yield temporary
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The object in `path`; a `UsageError` says what is wrong with a file that holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{what} {path} does not exist.") from None
    except (UnicodeDecodeError, json.JSONDecodeError, IsADirectoryError):
        raise UsageError(f"{what} {path} is not a JSON file.") from None
    if not isinstance(content, dict):
        raise UsageError(f"{what} {path} does not hold a JSON object.")
    return content


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    with atomic_path(path) as temporary:
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, dict(metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    check_safetensors(path)
    with safe_open(path, framework="pt") as handle:
        return {key: handle.get_tensor(key) for key in handle.keys()}, handle.metadata() or {}  # noqa: SIM118


def check_safetensors(path: Path, key: str = "") -> None:
    """Refuse a file that is cut short or no safetensors; reads the header only. `key` starts the sentence."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except FileNotFoundError:
        raise UsageError(f"{key}{path} does not exist.") from None
    except SafetensorError:
        raise UsageError(
            f"{key}{path} is truncated or not a safetensors file; fetch it again, or delete it and run its stage again."
        ) from None


@dataclass
class Header:
    """What every artifact's JSON starts with."""

    format: str
    made_from: dict[str, Any]
    version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        return fingerprint({"format": self.format, "version": self.version, "made_from": self.made_from})

    def to_json(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "version": self.version,
            "fingerprint": self.fingerprint,
            "made_from": self.made_from,
        }


def first_difference(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str:
    """The first key in which two `made_from` differ, with both values."""
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if before != after:
            if isinstance(before, dict) and isinstance(after, dict):
                return first_difference(before, after, f"{prefix}{key}.")
            return f"{prefix}{key}={before!r}, now {after!r}"
    return "nothing"


def is_current(path: Path, header: Header) -> bool:
    """Whether the artifact whose JSON is `path` exists and was made from just this.

    Raises `UsageError` where one exists that was made from something else: it is not ours to replace.
    """
    if not path.exists():
        return False
    found = read_json(path, header.format)
    if found.get("fingerprint") == header.fingerprint:
        return True
    raise UsageError(
        f"{path} was made with {first_difference(found.get('made_from', {}), header.made_from)}: "
        "give this run another name=, or delete that file to make it anew."
    )


@dataclass
class Probes:
    """One linear map per block and stream, x -> x + x W^T + b, with its held-out relative residual.

    `weights[f"{stack}.{index}.{stream}"]` is `[D, D]`, `biases[...]` `[D]`, both float32.
    """

    header: Header
    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    residuals: dict[str, float]

    @staticmethod
    def header_for(made_from: dict[str, Any]) -> Header:
        return Header("ppcl.probes", made_from, version=2)

    def save(self, folder: Path) -> None:
        for key, weight in self.weights.items():
            write_probe(folder, self.header, key, weight, self.biases[key])
        finish_probes(folder, self.header, self.residuals)

    @classmethod
    def load(cls, folder: Path) -> Probes:
        """The probes in `folder`; each is read when it is asked for, as those of a large model are many."""
        content = read_json(folder / "probes.json", "Probes")
        header = Header(content["format"], content["made_from"], content["version"])
        for key in content["residuals"]:
            check_safetensors(folder / f"{key}.safetensors")
            with safe_open(folder / f"{key}.safetensors", framework="pt") as handle:
                if (handle.metadata() or {}).get("fingerprint") != header.fingerprint:
                    raise UsageError(
                        f"{folder} holds probes of two different runs; delete it and run stages=[probe] again."
                    )
        names = list(content["residuals"])
        weights, biases = _StoredProbes(folder, names, "weight"), _StoredProbes(folder, names, "bias")
        return cls(header, weights, biases, content["residuals"])


class _StoredProbes(Mapping[str, Tensor]):
    """One tensor of every probe in a folder."""

    def __init__(self, folder: Path, names: list[str], part: str) -> None:
        self.folder, self.names, self.part = folder, names, part

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.names:
            raise KeyError(key)
        with safe_open(self.folder / f"{key}.safetensors", framework="pt") as handle:
            return handle.get_tensor(self.part)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def write_probe(folder: Path, header: Header, key: str, weight: Tensor, bias: Tensor) -> None:
    """One probe's file; `finish_probes` comes after the last."""
    (folder / "probes.json").unlink(missing_ok=True)
    tensors = {"weight": weight, "bias": bias}
    write_tensors(folder / f"{key}.safetensors", tensors, {"fingerprint": header.fingerprint})


def finish_probes(folder: Path, header: Header, residuals: dict[str, float]) -> None:
    write_json(folder / "probes.json", header.to_json() | {"residuals": residuals})


@dataclass
class PruningPlan:
    """Which runs of adjacent blocks become one student block each, and what that was decided from.

    Plain JSON: a person may write `num_layers` and `intervals` alone and pass the file back in.
    """

    family: str
    num_layers: dict[str, int]
    intervals: Intervals
    made_from: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    scores: dict[str, Any] = field(default_factory=dict)
    width: Width = field(default_factory=dict)

    def header(self) -> Header:
        return Header("ppcl.plan", self.made_from)

    def save(self, path: Path) -> None:
        body = asdict(self)
        del body["made_from"]
        write_json(path, self.header().to_json() | body)

    @classmethod
    def load(cls, path: Path, key: str = "") -> PruningPlan:
        content = read_json(path, f"{key}the pruning plan")
        try:
            intervals = {stack: [(int(u), int(v)) for u, v in pairs] for stack, pairs in content["intervals"].items()}
            width = {
                stack: {kind: [int(index) for index in sets.get(kind, [])] for kind in ("text", "ffn")}
                for stack, sets in content.get("width", {}).items()
            }
            return cls(
                family=str(content["family"]),
                num_layers={stack: int(count) for stack, count in content["num_layers"].items()},
                intervals=intervals,
                made_from=content.get("made_from", {}),
                parameters=content.get("parameters", {}),
                scores=content.get("scores", {}),
                width=width,
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise UsageError(
                f"{key}{path} is not a pruning plan: it needs family, num_layers, intervals {{stack: [[u, v], ...]}}."
            ) from None


def plug_name(stack: str, interval: Interval) -> str:
    """`transformer_blocks.3-5`: how an interval is named in files, logs and calls."""
    return f"{stack}.{interval[0]}-{interval[1]}"


def projector_name(stack: str, index: int, kind: str) -> str:
    """`transformer_blocks.37.text`, `transformer_blocks.2.ffn`."""
    return f"{stack}.{index}.{kind}"


@dataclass
class _Pluggable(ABC):
    """Tensors that stand in for a part of the teacher, and how training them went.

    Tensors that are not finite are refused on saving and on loading: a projector with a NaN in it would
    make every picture of the model grey, far from here.
    """

    header: Header
    stack: str
    state_dict: dict[str, Tensor]
    losses: dict[str, float]

    @property
    @abstractmethod
    def name(self) -> str:
        """How files, logs and calls name it."""

    @abstractmethod
    def place(self) -> dict[str, Any]:
        """Where it is plugged in."""

    def check_finite(self, where: str) -> None:
        for key, value in self.state_dict.items():
            if not value.isfinite().all():
                raise UsageError(f"{where}: {key} holds values that are not finite; train {self.name} again.")

    def save(self, folder: Path) -> None:
        self.check_finite(f"plug {self.name} is not written")
        record = folder / f"{self.name}.json"
        record.unlink(missing_ok=True)
        write_tensors(folder / f"{self.name}.safetensors", self.state_dict, {"fingerprint": self.header.fingerprint})
        write_json(record, self.header.to_json() | {"stack": self.stack} | self.place() | {"losses": self.losses})


def _read_pluggable(record: Path, stage: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The JSON of a plug or projector, and the fields all of them have."""
    content = read_json(record, "The plug")
    header = Header(content["format"], content["made_from"], content["version"])
    tensors, metadata = read_tensors(record.with_suffix(".safetensors"))
    if metadata.get("fingerprint") != header.fingerprint:
        raise UsageError(f"{record} and its safetensors are of two runs; delete both and run stages=[{stage}] again.")
    fields = {"header": header, "stack": content["stack"], "state_dict": tensors, "losses": content["losses"]}
    return content, fields


@dataclass
class Plug(_Pluggable):
    """One trained student block: the state dict of the family's block class."""

    interval: Interval

    @property
    def name(self) -> str:
        return plug_name(self.stack, self.interval)

    def place(self) -> dict[str, Any]:
        return {"interval": list(self.interval)}

    @classmethod
    def load(cls, record: Path) -> Plug:
        content, fields = _read_pluggable(record, "depth")
        u, v = content["interval"]
        plug = cls(**fields, interval=(u, v))
        plug.check_finite(str(record.with_suffix(".safetensors")))
        return plug


@dataclass
class Projector(_Pluggable):
    """The linear projectors that stand for the `text` stream or the `ffn` of one block.

    `base` names the student it was fitted in, None for the teacher's own block; a text projector reads the
    text of block `reference`. In another arrangement of blocks it means nothing.
    """

    index: int
    kind: str
    base: str | None
    reference: int | None

    @property
    def name(self) -> str:
        return projector_name(self.stack, self.index, self.kind)

    def place(self) -> dict[str, Any]:
        return {"index": self.index, "kind": self.kind, "base": self.base, "reference": self.reference}

    @classmethod
    def load(cls, record: Path) -> Projector:
        content, fields = _read_pluggable(record, "width")
        projector = cls(**fields, **{key: content[key] for key in ("index", "kind", "base", "reference")})
        projector.check_finite(str(record.with_suffix(".safetensors")))
        return projector


def load_plugs(folder: Path) -> dict[str, Plug]:
    """Every complete student in `folder`, by name, in the order of the blocks."""
    plugs = [Plug.load(record) for record in folder.glob("*.*-*.json")]
    return {plug.name: plug for plug in sorted(plugs, key=lambda plug: (plug.stack, plug.interval))}


def load_projectors(folder: Path) -> dict[str, Projector]:
    """Every complete projector in `folder`, by name, in the order of the blocks."""
    found = [Projector.load(record) for kind in ("text", "ffn") for record in folder.glob(f"*.*.{kind}.json")]
    return {item.name: item for item in sorted(found, key=lambda item: (item.stack, item.index, item.kind))}
