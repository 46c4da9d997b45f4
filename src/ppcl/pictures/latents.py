"""Final latents of drawn pictures on disk, and the distance between two sets of them.

`latents/NNNNN.safetensors` holds one batch, named after the number of its first picture. Files are read one by one,
since a whole set may not fit into memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ppcl.artifacts.tensors import read_tensors, write_tensors


def save_latents(folder: Path, numbers: Sequence[int], batches: Sequence[Tensor]) -> None:
    """Write the latents of the pictures `numbers`, given in batches `[B, C, ...]`, each under its number.

    Nothing is written if there is not exactly one latent for each picture, as with pipelines that decode in another
    way.
    """
    latents = [one for batch in batches for one in batch]
    if len(latents) == len(numbers):
        tensors = {_key(number): value for number, value in zip(numbers, latents, strict=True)}
        write_tensors(latents_path(folder, numbers[0]), tensors, {})


def latent_distance(folder: Path, teacher: Path, count: int) -> float | None:
    """Return ||z - z_T||^2 / ||z_T - mean(z_T)||^2 over `count` pictures, with z in `folder` and z_T in `teacher`.

    The mean is taken per channel, over all pictures and positions. Returns None if latents are missing or differ in
    shape.
    """
    error = square = total = torch.zeros((), dtype=torch.float64)
    seen, size = 0, 0
    for path in sorted((teacher / "latents").glob("*.safetensors")):
        ours = folder / "latents" / path.name
        if not ours.exists():
            return None
        for found, wanted in _pairs(read_tensors(ours, "generate")[0], read_tensors(path, "generate")[0]):
            if found.shape != wanted.shape:
                return None
            error = error + (found - wanted).square().sum()
            square, total = square + wanted.square().sum(), total + wanted.sum(dim=1)
            seen, size = seen + 1, size + wanted.shape[1]
    spread = float(square - total.square().sum() / size) if size else 0.0
    return float(error) / spread if seen == count and spread > 0 else None


def _pairs(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return the float64 latents `[C, positions]` of the pictures that both files have."""
    return [(ours[key].double().flatten(1), theirs[key].double().flatten(1)) for key in theirs if key in ours]


def latents_path(folder: Path, first: int) -> Path:
    """Return the file with the latents of the batch whose first picture is number `first`."""
    return folder / "latents" / f"{_key(first)}.safetensors"


def _key(number: int) -> str:
    return f"{number:05d}"
