"""Reads and writes trained students and projectors: one safetensors file and one JSON record each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ppcl.artifacts.files import again, check_finite, read_json, write_json
from ppcl.artifacts.headers import Header, is_current
from ppcl.artifacts.plan import Interval, plug_name, projector_name, read_plug_name, read_projector_name
from ppcl.artifacts.tensors import read_tensors, write_tensors
from ppcl.errors import UsageError


@dataclass
class _Pluggable(ABC):
    """Tensors that replace a part of the teacher, and the losses of their training.

    Saving raises `UsageError` for tensors and losses that are not finite, and so does loading for tensors. Otherwise a
    NaN in a projector would show only much later, as grey pictures.
    """

    header: Header
    stack: str
    state_dict: dict[str, Tensor]
    losses: dict[str, float]

    @property
    @abstractmethod
    def name(self) -> str:
        """The name of the plug in files, logs and calls."""

    @abstractmethod
    def place(self) -> dict[str, Any]:
        """Return the record's entries that say where in the teacher it is plugged in."""

    def check_finite(self, where: str) -> None:
        for key, value in self.state_dict.items():
            if not value.isfinite().all():
                raise UsageError(f"{where}: {key} holds values that are not finite; train {self.name} again.")

    def save(self, folder: Path) -> None:
        self.check_finite(f"plug {self.name} is not written")
        check_losses(self.name, self.losses)
        record = folder / f"{self.name}.json"
        write_tensors(folder / f"{self.name}.safetensors", self.state_dict, {"fingerprint": self.header.fingerprint})
        write_json(record, self.header.to_json() | {"stack": self.stack} | self.place() | {"losses": self.losses})


def check_losses(name: str, losses: Mapping[str, float]) -> None:
    """Raise `UsageError` if one of the `losses` of the plug `name` is not finite."""
    check_finite(losses, f"plug {name} is not written")


def has_risen(losses: Mapping[str, float]) -> bool:
    """Return whether a plug's held-out loss is higher after its training than before, by more than 1%."""
    return losses["heldout_loss"] > 1.01 * losses["heldout_before"]


def _read_pluggable(record: Path, stage: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the JSON record of a plug or projector, and the fields that both kinds have; `stage` makes them."""
    content = read_json(record, "The plug", stage)
    header = Header.of(content, record, stage)
    tensors, metadata = read_tensors(record.with_suffix(".safetensors"), stage)
    if metadata.get("fingerprint") != header.fingerprint:
        raise UsageError(f"{record} and its safetensors are of two runs; delete both and run 'stages=[{stage}]' again.")
    try:
        fields = {"header": header, "stack": content["stack"], "state_dict": tensors, "losses": content["losses"]}
    except KeyError:
        raise UsageError(f"{record} is not the record of a plug: {again(stage)}.") from None
    return content, fields


def is_stored(record: Path, header: Header, advice: str) -> bool:
    """Return whether the plug of this record and header is there, with its tensors; raises as `is_current` does."""
    return is_current(record, header, advice, [record.with_suffix(".safetensors")])


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
    """The linear projectors that replace the `text` stream or the `ffn` of one block (Eq. 8-9).

    `index` is the block's index in the teacher, `kind` is `text` or `ffn`. `base` names the student or removal that was
    plugged in at this block when the projector was fitted; None is the teacher's block. A text projector reads the text
    of block `reference`. A projector is valid only with the `base` and the `reference` it was fitted with.
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
    """Return every complete student in `folder`, by name, in the order of the blocks."""
    plugs = [Plug.load(record) for record in folder.glob("*.*-*.json") if read_plug_name(record.stem)]
    return {plug.name: plug for plug in sorted(plugs, key=lambda plug: (plug.stack, plug.interval))}


def load_projectors(folder: Path) -> dict[str, Projector]:
    """Return every complete projector in `folder`, by name, in the order of the blocks."""
    found = [Projector.load(record) for record in folder.glob("*.*.*.json") if read_projector_name(record.stem)]
    return {item.name: item for item in sorted(found, key=lambda item: (item.stack, item.index, item.kind))}
