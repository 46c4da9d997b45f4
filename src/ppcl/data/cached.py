"""Reads cached latents and prompt embeddings and makes batches of them, without loading any encoder.

A cache is a folder of parts. A part is a file `UNIT-NNN.safetensors`, with tensors `NNN.NAME` for each sample, and a
JSON file that lists its samples. Each unit of the source also has a file `UNIT.json`, which is written last and lists
the samples that were left out.

`empty.safetensors` holds the empty prompt. Samples of an edit have their own empty prompt, `NNN.empty.NAME`, since the
text encoder also reads the given pictures.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ppcl.artifacts.files import again, check_safetensors, read_json
from ppcl.artifacts.tensors import TensorFile, read_tensors
from ppcl.config import DataConfig
from ppcl.data.batches import TrainingBatch
from ppcl.data.streams import LatentStream
from ppcl.errors import UsageError
from ppcl.families.base import MASK, Conditions, Family, without_needless_mask

LATENTS = "latents"
SIZES = "image_sizes"  # sizes of the given pictures
EMPTY = "empty.safetensors"
OWN, SHARED = "empty.", "shared"


@dataclass(frozen=True)
class Entry:
    """A cached sample: number `number` in the file `part`.

    `size`, `given`: (height, width) in tokens of its latents, and of each given picture's.
    """

    key: str
    part: Path
    number: int
    size: tuple[int, int]
    given: tuple[tuple[int, int], ...] = ()


def unit_record(name: str) -> str:
    """Return the name of the file that exists once a unit is completely cached."""
    return f"{name}.json"


def part_record(unit: str, number: int) -> str:
    """Return the name of the file that lists the samples of part `number` of a unit."""
    return f"{unit}-{number:03d}.json"


def trimmed(conditions: Conditions) -> Conditions:
    """Return one sample's conditions `[L, ...]` without padding tokens."""
    mask = conditions.get(MASK)
    if mask is None:
        return conditions
    length = int(mask.sum())
    return {name: value[:length] if len(value) == len(mask) else value for name, value in conditions.items()}


def difference(empty: Conditions, prompt: Conditions) -> Conditions:
    """Return a sample's own empty prompt without the first rows that equal those of `prompt`. `emptied` is the inverse.

    The given pictures come first and make up most rows. A causal text encoder encodes them alike whatever text follows,
    so these rows need not be stored twice.
    """
    length = min(map(len, (*empty.values(), *prompt.values())))
    same = [(value[:length] == prompt[name][:length]).reshape(length, -1).all(dim=1) for name, value in empty.items()]
    shared = int(torch.stack(same).all(dim=0).int().cumprod(dim=0).sum())
    return {OWN + SHARED: torch.tensor(shared)} | {OWN + name: value[shared:] for name, value in empty.items()}


def emptied(tensors: Conditions) -> Conditions:
    """Return a sample's conditions with its prompt replaced by its own empty prompt, as `difference` stored it."""
    shared = int(tensors[OWN + SHARED])
    found = {name: value for name, value in tensors.items() if not name.startswith(OWN)}
    return {n: torch.cat([v[:shared], tensors[OWN + n]]) if OWN + n in tensors else v for n, v in found.items()}


def stacked(samples: Sequence[Conditions]) -> Conditions:
    """Return the conditions of several samples as one batch `[B, ...]`, padded with zeros to the longest."""
    batch: Conditions = {}
    for name in samples[0]:
        values = [sample[name] for sample in samples]
        longest = max((len(value) for value in values if value.ndim), default=0)
        padded = [F.pad(v, (0, 0) * (v.ndim - 1) + (0, longest - len(v))) if v.ndim else v for v in values]
        batch[name] = torch.stack(padded)
    return batch


def _hash(key: str) -> int:
    """Return a hash of a sample's key, from 0 to 2^32 - 1."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16)


def held_out_share(config: DataConfig, count: int) -> float:
    """Return the share of `count` samples that is kept from training.

    It is `data.held_out` or, if that is None, the share that makes 32 samples, but at least 0.02 and at most 0.2.
    """
    return max(0.02, min(0.2, 32 / max(1, count))) if config.held_out is None else config.held_out


def held_out_keys(keys: Sequence[str], share: float) -> set[str]:
    """Return the keys of the samples that are kept from training.

    Each key is chosen by its own hash, so that it does not depend on the others. At least one is chosen: if no hash
    falls into the `share`, it is the key with the smallest. If all fall into it by chance, the key with the largest is
    left for training. A `share` that leaves less than half a sample is taken at its word.
    """
    ordered = sorted(set(keys), key=_hash)
    chosen = [key for key in ordered if _hash(key) < share * 0x1_0000_0000] or ordered[:1]
    if 1 < len(ordered) == len(chosen) and (1 - share) * len(ordered) >= 0.5:
        chosen.pop()
    return set(chosen)


def read_parts(folder: Path) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    """Yield the record of each part of a cache's whole units, in a fixed order, and the records of its samples.

    Raises `UsageError` if a unit has fewer samples than its record says.
    """
    units: dict[str, int] = {}
    parts: dict[str, dict[int, tuple[Path, list[dict[str, Any]]]]] = {}
    for path in folder.glob("*.json"):
        record = read_json(path, "A cache's record", "cache")
        if "unit" in record:
            units[record["unit"]] = record["samples"]
        elif part := re.fullmatch(r"(.+)-(\d{3,})\.json", path.name):
            parts.setdefault(part[1], {})[int(part[2])] = path, read_part(path)["samples"]
    for unit in sorted(units, key=lambda name: f"{name}-"):  # the order of the files, where none has a fourth digit
        found = [part for _, part in sorted(parts.get(unit, {}).items())]
        missing = units[unit] - sum(len(samples) for _, samples in found)
        if missing > 0:
            raise UsageError(
                f"{folder} lacks {missing} samples of {unit}: delete {folder / unit_record(unit)}, and run "
                "'stages=[cache]' again."
            )
        yield from found


def parts_of(folder: Path, unit: str) -> list[Path]:
    """Return the records of the parts of a unit, in order."""
    stem = unit_record(unit).removesuffix(".json")
    found = [path for path in folder.glob(f"{escape(stem)}-*.json") if path.stem[len(stem) + 1 :].isdigit()]
    return sorted(found, key=lambda path: int(path.stem.rpartition("-")[2]))


def is_whole(folder: Path, unit: str) -> bool:
    """Return whether a unit of a cache has its record, and all the parts that the record counts, with their tensors.

    Raises `UsageError` for a record that does not read.
    """
    record = folder / unit_record(unit)
    if not record.exists():
        return False
    parts = parts_of(folder, unit)
    if not all(part.with_suffix(".safetensors").exists() for part in parts):
        return False
    stored = sum(len(read_part(part)["samples"]) for part in parts)
    return stored == read_unit(record)["samples"]


def read_unit(record: Path) -> dict[str, Any]:
    """Return the record of a unit: `samples`, how many it has, and `skipped`."""
    content = read_json(record, "A cache's unit", "cache")
    if not isinstance(content.get("samples"), int):
        raise UsageError(f"A cache's unit {record} does not say how many samples it has: {again('cache')}.")
    return content


def read_part(record: Path) -> dict[str, Any]:
    """Return the record of a part: its `samples`, and those `skipped`."""
    content = read_json(record, "A cache's part", "cache")
    if not isinstance(content.get("samples"), list):
        raise UsageError(f"A cache's part {record} has no list of samples: {again('cache')}.")
    return content


def read_entries(folder: Path) -> list[Entry]:
    """Return all samples of a cache, in a fixed order; raises `UsageError` for a part that is damaged or missing."""
    entries = []
    for record, samples in read_parts(folder):
        part = record.with_suffix(".safetensors")
        check_safetensors(part, stage="cache")
        for number, item in enumerate(samples):
            given = tuple((height, width) for height, width in item.get("given", ()))
            entries.append(Entry(item["key"], part, number, tuple(item["size"]), given))
    return entries


def _fingerprint(folder: Path) -> str:
    """Return the fingerprint of the cache in `folder`, which the metadata of its files name."""
    return read_json(folder / "cache.json", "The record", "cache")["fingerprint"]


@lru_cache(maxsize=64)
def _opened(part: Path) -> tuple[TensorFile, dict[int, list[str]]]:
    """Return an open part, and the tensor names of each of its samples."""
    file = TensorFile(part, "cache", _fingerprint(part.parent))
    names: dict[int, list[str]] = {}
    for key in file.keys():  # noqa: SIM118 - a file, not a mapping
        number, _, name = key.partition(".")
        names.setdefault(int(number), []).append(name)
    return file, names


class CachedStream(LatentStream):
    """Batches of cached samples. All samples of a batch have one size (a bucket), and each epoch is shuffled anew.

    `held_out`: whether to use the samples that are kept from training, or all others.

    An epoch has every sample once, except for the last few of a bucket that do not fill a batch. If no bucket fills a
    single batch, an epoch has every sample `batch_size` times, each time with its own noise and noise level.

    Raises `UsageError` if there are no samples.
    """

    def __init__(
        self, family: Family, folder: Path, config: DataConfig, seed: int, batch_size: int, *, held_out: bool
    ) -> None:
        super().__init__(family, config, seed, batch_size)
        self.empty, _ = read_tensors(folder / EMPTY, "cache", _fingerprint(folder))
        self.buckets: dict[tuple[tuple[int, int], ...], list[Entry]] = {}
        entries = read_entries(folder)
        share = held_out_share(config, len(entries))
        kept = held_out_keys([entry.key for entry in entries], share)
        for entry in entries:
            if (entry.key in kept) == held_out:
                self.buckets.setdefault((entry.size, *entry.given), []).append(entry)
        if not self.buckets:
            raise _empty(config, folder, len(entries), share)
        sizes = [len(bucket) for bucket in self.buckets.values()]
        self.rounds = 1 if max(sizes) >= batch_size else batch_size
        self.steps_per_epoch = sum(size * self.rounds // batch_size for size in sizes)
        self.remark = self._remark(sizes)

    def _remark(self, sizes: list[int]) -> str:
        """Return how many samples the batches of an epoch hold, of buckets of these `sizes`; empty if they hold all."""
        size, count = self.batch_size, sum(sizes)
        used = self.steps_per_epoch * size // self.rounds
        if used == count:
            return ""
        never = sum(bucket for bucket in sizes if bucket < size)
        remark = f"{used:,} of {count:,} samples fill batches of {size} of one size"
        if used + never < count:
            remark += f"; {count - used - never:,} more wait for another epoch"
        if never:
            remark += f"; {never:,} are in no batch, as fewer than {size} have their size (fewer data.aspects help)"
        return remark

    def entries(self, step: int) -> list[Entry]:
        """Return the `batch_size` samples of batch number `step`."""
        epoch, number = divmod(step, self.steps_per_epoch)
        return self._epoch(epoch)[number]

    def captions(self, step: int) -> list[str]:
        found = ((entry, read_part(entry.part.with_suffix(".json"))["samples"]) for entry in self.entries(step))
        return [samples[entry.number].get("caption", entry.key) for entry, samples in found]

    def names(self, steps: Iterable[int]) -> set[str]:
        """Return the names of the different samples in batches `steps`. Every epoch repeats those of the first."""
        return {entry.key for step in steps for entry in self.entries(step)}

    @lru_cache(maxsize=2)  # noqa: B019 - streams live as long as a stage
    def _epoch(self, epoch: int) -> list[list[Entry]]:
        """Return the batches of an epoch, shuffled by `seed` and the epoch's number."""
        rng = np.random.default_rng([self.seed, epoch])
        batches = []
        for size in sorted(self.buckets):
            bucket = self.buckets[size]
            found = [bucket[index] for _ in range(self.rounds) for index in rng.permutation(len(bucket))]
            whole = len(found) // self.batch_size * self.batch_size
            batches += [found[start : start + self.batch_size] for start in range(0, whole, self.batch_size)]
        return [batches[index] for index in rng.permutation(len(batches))]

    def samples(self, step: int, rows: range, dropped: Sequence[bool]) -> tuple[Tensor, tuple[int, int], Conditions]:
        batch = self.entries(step)
        return self._read([batch[row] for row in rows], dropped)

    def example(self, ratio: float) -> TrainingBatch:
        """Return a batch of one sample with its caption, of the size whose aspect ratio is nearest to `ratio`.

        It is the same for every seed, at noise level 0.5 without noise: what is timed, not what is learnt from.
        """
        bucket = min(self.buckets, key=lambda sizes: abs(math.log(sizes[0][1] / sizes[0][0] / ratio)))
        latents, size, conditions = self._read(self.buckets[bucket][:1], [False])
        level = latents.new_full((1,), 0.5)
        conditions = without_needless_mask(conditions)
        return self.family.training_batch(latents, conditions, torch.zeros_like(latents), level, size)

    def _read(self, entries: Sequence[Entry], dropped: Sequence[bool]) -> tuple[Tensor, tuple[int, int], Conditions]:
        """Return latents, size and conditions of samples of one size."""
        latents, conditions = [], []
        for entry, drop in zip(entries, dropped, strict=True):
            (part, names), prefix = _opened(entry.part), f"{entry.number:03d}."
            own_empty = OWN + SHARED in names[entry.number]
            latents.append(part.get_tensor(prefix + LATENTS))
            if drop and not own_empty:
                conditions.append(self.empty)
                continue
            wanted = [name for name in names[entry.number] if name != LATENTS and (drop or not name.startswith(OWN))]
            tensors = {name: part.get_tensor(prefix + name) for name in wanted}
            conditions.append(emptied(tensors) if drop else tensors)
        return torch.stack(latents), entries[0].size, stacked(conditions)


def _empty(config: DataConfig, folder: Path, count: int, share: float) -> UsageError:
    """Return the error for a stream without samples. `count`: how many the cache in `folder` has in all."""
    source = f"data.path={config.path}" if config.cache is None else f"data.cache={config.cache}"
    if not count:
        return UsageError(
            f"{source} has no sample that could be used, neither to train on nor for data.held_out={share:g}: each "
            f"JSON in {folder} says why samples were left out; mend them, delete that folder, and run 'stages=[cache]' "
            "again."
        )
    if count == 1:
        return UsageError(
            f"{source} has a single sample, which data.held_out={share:g} keeps from training: add pictures with "
            "captions, and run 'stages=[cache]' again."
        )
    return UsageError(
        f"data.held_out={share:g} keeps all {count} samples of {source} from training: lower data.held_out, or leave "
        "it out."
    )
