"""Reads and writes linear probes, one file per block and stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ppcl.artifacts.files import read_json, write_json
from ppcl.artifacts.headers import Header, is_current
from ppcl.artifacts.tensors import TensorFile, write_tensors
from ppcl.errors import UsageError


@dataclass
class Probes:
    """One linear map per block and stream, x -> x + x W^T + b (Eq. 1), and its relative residual on held-out samples.

    `weights[f"{stack}.{index}.{stream}"]` is `[D, D]`, `biases[...]` is `[D]`, both float32. The residual is
    ||l(x) - y||^2 / ||y - x||^2 for a block that maps x to y.
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
        """Open the probes in `folder`. Each tensor is read when it is used, since a large model has many."""
        content = read_json(folder / "probes.json", "The record", "probe")
        header = Header.of(content, folder / "probes.json", "probe")
        names = list(content.get("residuals", {}))
        for key in names:
            if TensorFile(folder / f"{key}.safetensors", "probe").metadata.get("fingerprint") != header.fingerprint:
                raise UsageError(
                    f"{folder} holds probes of two different runs; delete it and run 'stages=[probe]' again."
                )
        weights, biases = _StoredProbes(folder, names, "weight"), _StoredProbes(folder, names, "bias")
        return cls(header, weights, biases, content["residuals"])


class _StoredProbes(Mapping[str, Tensor]):
    """A mapping to one tensor (`weight` or `bias`) of every probe in a folder, which reads it on access."""

    def __init__(self, folder: Path, names: list[str], part: str) -> None:
        self.folder, self.names, self.part = folder, names, part

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.names:
            raise KeyError(key)
        return TensorFile(self.folder / f"{key}.safetensors", "probe").get_tensor(self.part)

    def __contains__(self, key: object) -> bool:
        return key in self.names  # Mapping's own `__contains__` would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def check_probe(key: str, weight: Tensor, bias: Tensor, remedy: str) -> None:
    """Raise `UsageError`, which ends with `remedy`, if a probe's tensors are not finite."""
    if not (weight.isfinite().all() and bias.isfinite().all()):
        raise UsageError(f"the probe {key} has values that are not finite and is not written: {remedy}.")


def write_probe(folder: Path, header: Header, key: str, weight: Tensor, bias: Tensor) -> None:
    """Write one probe's file. Call `finish_probes` after the last."""
    tensors = {"weight": weight, "bias": bias}
    write_tensors(folder / f"{key}.safetensors", tensors, {"fingerprint": header.fingerprint})


def has_probes(folder: Path, header: Header) -> bool:
    """Return whether all probes of this header are in `folder`; raises as `is_current` does."""
    record = folder / "probes.json"
    if not is_current(record, header):
        return False
    return all((folder / f"{key}.safetensors").exists() for key in read_json(record, "The record")["residuals"])


def finish_probes(folder: Path, header: Header, residuals: dict[str, float]) -> None:
    """Write the JSON record, which marks the probes in `folder` as complete."""
    write_json(folder / "probes.json", header.to_json() | {"residuals": residuals})
