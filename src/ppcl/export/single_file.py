"""Writes a pruned transformer as one safetensors file, with the names that ComfyUI and musubi-tuner read.

The file is made from an exported folder, one tensor at a time. The header needs only shapes. Then each tensor is read
from its shard, joined with others if need be, cast, and appended. So memory holds no more than the largest joined
tensor.

Qwen-Image keeps diffusers' names, since ComfyUI uses the same. ComfyUI recognises the model by `txt_norm.weight`,
counts `transformer_blocks.N.` up to the first gap, and accepts keys with or without the prefix
`model.diffusion_model.`. FLUX gets the names of Black Forest Labs' code. That code fuses the QKV projections, and in
single-stream blocks the MLP's input with them. Its last modulation returns shift before scale, diffusers' the reverse.
Both loaders skip unknown keys without an error, so no file is written of a model that is pruned in width.

Importing this loads no torch, since checks ask for layouts before torch is loaded.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppcl.artifacts.files import CHECKSUM, again, atomic_path, check_safetensors, read_json
from ppcl.errors import UsageError
from ppcl.families.facts import SingleFile
from ppcl.families.registry import FAMILIES

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}  # safetensors' name, bytes
_CHECKSUM = f"ppcl.{CHECKSUM}"  # in the metadata: the checksum of everything after the header
MODELSPEC_VERSION = "1.0.0"
# An empty tensor with this name tells ComfyUI that reference pictures are modulated with timestep 0 (2511).
ZERO_CONDITION_MARKER = "__index_timestep_zero__"


@dataclass(frozen=True)
class Part:
    """A tensor of the file: diffusers' `sources` joined along their rows. If `swapped`, its halves are exchanged.

    If `repeated`, each of the `sources` is a copy of the whole tensor.
    """

    key: str
    sources: tuple[str, ...]
    swapped: bool = False
    repeated: bool = False


def layouts() -> dict[str, SingleFile]:
    """Return the layout of every family that ComfyUI knows, by the family's name."""
    return {name: facts.single_file for name, facts in FAMILIES.items() if facts.single_file is not None}


def layout_of(family: str) -> SingleFile:
    """Return the layout of a family that ComfyUI knows; `KeyError` for others."""
    return layouts()[family]


def _parameters(module: str, sources: tuple[str, ...]) -> Iterable[tuple[str, tuple[str, ...]]]:
    if module.endswith(".scale"):
        yield module, sources
    else:
        for parameter in ("weight", "bias"):
            yield f"{module}.{parameter}", tuple(f"{source}.{parameter}" for source in sources)


def parts_of(layout: SingleFile, names: Iterable[str]) -> list[Part]:
    """Return the file's tensors in order, made of diffusers' parameters `names`, each of which is used once.

    Raises `UsageError` for a parameter that the layout has no place for.
    """
    names = set(names)
    if layout.outer is None or layout.blocks is None:
        return [Part(name, (name,)) for name in sorted(names, key=_in_order)]
    tables = [("", "", layout.outer)]
    parts = []
    for stack, (renamed, modules) in layout.blocks.items():
        indices = sorted(
            {int(n.removeprefix(f"{stack}.").partition(".")[0]) for n in names if n.startswith(f"{stack}.")}
        )
        tables += [(f"{renamed}.{index}.", f"{stack}.{index}.", modules) for index in indices]
        for module, source in layout.repeated.items():
            for key, copies in _parameters(module, tuple(f"{stack}.{index}.{source}" for index in indices)):
                if names.issuperset(copies):
                    parts.append(Part(key, copies, repeated=True))
    for prefix, source_prefix, modules in tables:
        for module, sources in modules.items():
            for key, parameters in _parameters(module, sources):
                found = tuple(f"{source_prefix}{parameter}" for parameter in parameters)
                if names.issuperset(found):
                    parts.append(Part(f"{prefix}{key}", found, swapped=module in layout.swapped))
    left = names.difference(*(part.sources for part in parts))
    if left:
        raise UsageError(
            f"export.single_file=true: {min(left)} has no place in a file of {layout.transformer_class}; "
            "set export.single_file=false."
        )
    return parts


def _in_order(name: str) -> list[Any]:
    """Return a sort key that puts block 2 before block 10."""
    return [(0, int(piece), "") if piece.isdigit() else (1, 0, piece) for piece in name.split(".")]


def modelspec(family: str, config: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, str]:
    """Return the file's metadata: SAI Model Spec 1.0.0, and which of the teacher's blocks were kept.

    `config` is the transformer's config, with the provenance under `ppcl`. `facts` are `title`, `description`,
    `license` and `resolution`, which belong to the specification; all others are written as `ppcl.<name>`.
    """
    layout, provenance = layout_of(family), config["ppcl"]
    key, value, special = layout.special or ("", False, layout.architecture)
    spec = {
        "sai_model_spec": MODELSPEC_VERSION,
        "architecture": special if config.get(key, False) is value else layout.architecture,
        "implementation": layout.implementation,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    ours = {
        "version": provenance["version"],
        "variant": provenance["variant"],
        "kept_layers": json.dumps(provenance["kept_layers"]),
        "removed_intervals": json.dumps(provenance["removed_intervals"]),
    }
    for name, value in facts.items():
        of_spec = name in ("title", "description", "license", "resolution")
        (spec if of_spec else ours)[name] = str(value)
    return {"format": "pt"} | _prefixed("modelspec", spec) | _prefixed("ppcl", ours)


def _prefixed(prefix: str, entries: Mapping[str, str]) -> dict[str, str]:
    return {f"{prefix}.{name}": value for name, value in entries.items()}


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file; `UsageError` if it is missing or damaged."""
    from safetensors import safe_open

    check_safetensors(path, stage="export")
    with safe_open(path, framework="pt") as handle:
        return handle.metadata() or {}


def write_single_file(transformer: Path, target: Path, family: str, dtype: str, metadata: Mapping[str, str]) -> int:
    """Write the safetensors shards of the exported folder `transformer` to the single file `target`.

    Returns the size of the file in bytes. `dtype` is a key of `DTYPES`. Raises `UsageError` for a class that ComfyUI
    cannot load, for a damaged shard, and for values that overflow `dtype`.
    """
    from safetensors import safe_open

    layout = layout_of(family)
    config = read_json(transformer / "config.json", "The transformer's config")
    if config["_class_name"] != layout.transformer_class:
        raise UsageError(
            f"export.single_file=true: {transformer} holds a {config['_class_name']}, and ComfyUI loads only "
            f"{layout.transformer_class}; set export.single_file=false."
        )
    with ExitStack() as stack:
        shards: dict[str, Any] = {}
        for file in sorted(transformer.glob("*.safetensors")):
            check_safetensors(file)
            handle = stack.enter_context(safe_open(file, framework="pt"))
            shards |= dict.fromkeys(handle.keys(), handle)
        parts = parts_of(layout, shards)
        if config.get("zero_cond_t"):
            parts.append(Part(ZERO_CONDITION_MARKER, ()))
        shapes = {part.key: _joined_shape([shards[name].get_slice(name).get_shape() for name in part.sources])
                  for part in parts}  # fmt: skip
        checksum = 0
        with atomic_path(target) as temporary, open(temporary, "wb") as output:
            output.write(_header(shapes, dtype, {**metadata, _CHECKSUM: f"{checksum:08x}"}))
            for part in parts:
                if part.sources:
                    output.write(values := _bytes(_tensor(part, shards, dtype)))
                    checksum = zlib.crc32(values, checksum)
            output.seek(0)  # checksums have one length
            output.write(_header(shapes, dtype, {**metadata, _CHECKSUM: f"{checksum:08x}"}))
    return target.stat().st_size


def check_single_file(path: Path) -> None:
    """Raise `UsageError` if the tensors of a single file have changed since it was written."""
    wanted = read_metadata(path).get(_CHECKSUM)  # files of earlier versions have none
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        checksum = 0
        while chunk := file.read(1 << 24):
            checksum = zlib.crc32(chunk, checksum)
    if wanted is not None and wanted != f"{checksum:08x}":
        raise UsageError(f"{path} has changed since it was written: {again('export')}.")


def _joined_shape(shapes: list[list[int]]) -> list[int]:
    return [sum(shape[0] for shape in shapes), *shapes[0][1:]] if shapes else [0]


def _header(shapes: Mapping[str, list[int]], dtype: str, metadata: Mapping[str, str]) -> bytes:
    """Return the header of a safetensors file (its length, then JSON) for tensors of one dtype in this order."""
    name, size = DTYPES[dtype]
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for key, shape in shapes.items():
        end = start + math.prod(shape) * size
        entries[key] = {"dtype": name, "shape": shape, "data_offsets": [start, end]}
        start = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # pad to 8 bytes, as readers map the tensors that follow in place
    return len(header).to_bytes(8, "little") + header


def _tensor(part: Part, shards: Mapping[str, Any], dtype: str) -> Tensor:
    import torch

    tensor = torch.cat([shards[name].get_tensor(name).to(getattr(torch, dtype)) for name in part.sources])
    if part.swapped:
        tensor = torch.cat(tensor.chunk(2)[::-1])
    if dtype == "float16" and not tensor.isfinite().all():
        raise UsageError(f"export.single_file_dtype=float16: {part.key} overflows it; use bfloat16.")
    return tensor


def _bytes(tensor: Tensor) -> Any:
    import torch

    return tensor.flatten().view(torch.uint8).numpy().data
