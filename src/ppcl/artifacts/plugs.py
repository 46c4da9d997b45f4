"""Trained students and projectors on disk: one safetensors file with a JSON record each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ppcl.artifacts.files import read_json, write_json
from ppcl.artifacts.headers import Header
from ppcl.artifacts.plan import Interval, plug_name, projector_name, read_plug_name, read_projector_name
from ppcl.artifacts.tensors import read_tensors, write_tensors
from ppcl.errors import UsageError


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
        raise UsageError(f"{record} and its safetensors are of two runs; delete both and run 'stages=[{stage}]' again.")
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

    `base` names the student or the removal that it was fitted in, None for the teacher's own block; a text projector
    reads the text of block `reference`. In another arrangement of blocks it means nothing.
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
    plugs = [Plug.load(record) for record in folder.glob("*.*-*.json") if read_plug_name(record.stem)]
    return {plug.name: plug for plug in sorted(plugs, key=lambda plug: (plug.stack, plug.interval))}


def load_projectors(folder: Path) -> dict[str, Projector]:
    """Every complete projector in `folder`, by name, in the order of the blocks."""
    found = [Projector.load(record) for record in folder.glob("*.*.*.json") if read_projector_name(record.stem)]
    return {item.name: item for item in sorted(found, key=lambda item: (item.stack, item.index, item.kind))}
