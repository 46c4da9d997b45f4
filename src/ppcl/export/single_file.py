"""One safetensors file of a pruned transformer, with the names that ComfyUI and musubi-tuner read.

It is made from the exported folder, one tensor at a time: the header needs only shapes, then each tensor is
read from its shard, joined, cast and appended. More than the largest joined tensor is never in memory.

Qwen-Image keeps diffusers' names: ComfyUI's are the same, it recognises the model by `txt_norm.weight`, counts
`transformer_blocks.N.` up to the first gap, and takes a prefix `model.diffusion_model.` off only where there is
one. FLUX has the names of Black Forest Labs' own code, which fuses the QKV projections (and a single-stream
block's MLP input with them), and whose last modulation gives shift before scale, diffusers' after it.
Both loaders skip keys they do not know, so a model that is pruned in width has no such file.

Importing this loads no torch, since checks ask for layouts before anything heavy is loaded.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppcl.artifacts.files import atomic_path, check_safetensors, read_json
from ppcl.errors import UsageError
from ppcl.families.facts import SingleFile
from ppcl.families.registry import FAMILIES

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = {"bfloat16": ("BF16", 2), "float16": ("F16", 2), "float32": ("F32", 4)}  # safetensors' name, bytes
MODELSPEC_VERSION = "1.0.0"
# A buffer without values by which ComfyUI knows that given pictures are modulated as free of noise (2511).
ZERO_CONDITION_MARKER = "__index_timestep_zero__"


@dataclass(frozen=True)
class Part:
    """A tensor of the file: diffusers' `sources` joined along their rows, their two halves then `swapped`."""

    key: str
    sources: tuple[str, ...]
    swapped: bool = False


def layouts() -> dict[str, SingleFile]:
    """The layout of every family that ComfyUI knows, by the family's name."""
    return {name: facts.single_file for name, facts in FAMILIES.items() if facts.single_file is not None}


def layout_of(family: str) -> SingleFile:
    """The layout of a family that ComfyUI knows; `KeyError` for others."""
    return layouts()[family]


def _parameters(module: str, sources: tuple[str, ...]) -> Iterable[tuple[str, tuple[str, ...]]]:
    if module.endswith(".scale"):
        yield module, sources
    else:
        for parameter in ("weight", "bias"):
            yield f"{module}.{parameter}", tuple(f"{source}.{parameter}" for source in sources)


def parts_of(layout: SingleFile, names: Iterable[str]) -> list[Part]:
    """The file's tensors, in order, from diffusers' parameter `names`; every name has its place in just one."""
    names = set(names)
    if layout.outer is None or layout.blocks is None:
        return [Part(name, (name,)) for name in sorted(names, key=_in_order)]
    tables = [("", "", layout.outer)]
    for stack, (renamed, modules) in layout.blocks.items():
        indices = {int(n.removeprefix(f"{stack}.").partition(".")[0]) for n in names if n.startswith(f"{stack}.")}
        tables += [(f"{renamed}.{index}.", f"{stack}.{index}.", modules) for index in sorted(indices)]
    parts = []
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
    """Block 2 before block 10."""
    return [(0, int(piece), "") if piece.isdigit() else (1, 0, piece) for piece in name.split(".")]


def modelspec(family: str, config: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, str]:
    """Metadata by SAI Model Spec 1.0.0, and where each block comes from.

    `config` is the transformer's, whose `ppcl` holds the provenance; `facts` are `title`, `description`,
    `license`, `resolution`, `base_model` and whatever else is to stand there, as `ppcl.<name>`.
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
    """Read the metadata of a single file."""
    from safetensors import safe_open

    check_safetensors(path)
    with safe_open(path, framework="pt") as handle:
        return handle.metadata() or {}


def write_single_file(transformer: Path, target: Path, family: str, dtype: str, metadata: Mapping[str, str]) -> int:
    """Write the safetensors shards of an exported `transformer` folder as the one file `target`; returns its bytes.

    Raises `UsageError` for a class that ComfyUI cannot load, and for values that overflow `dtype`.
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
        with atomic_path(target) as temporary, open(temporary, "wb") as output:
            output.write(_header(shapes, dtype, metadata))
            for part in parts:
                if part.sources:
                    output.write(_bytes(_tensor(part, shards, dtype)))
    return target.stat().st_size


def _joined_shape(shapes: list[list[int]]) -> list[int]:
    return [sum(shape[0] for shape in shapes), *shapes[0][1:]] if shapes else [0]


def _header(shapes: Mapping[str, list[int]], dtype: str, metadata: Mapping[str, str]) -> bytes:
    """The length and JSON that a safetensors file starts with, for tensors of one dtype in that order."""
    name, size = DTYPES[dtype]
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for key, shape in shapes.items():
        end = start + math.prod(shape) * size
        entries[key] = {"dtype": name, "shape": shape, "data_offsets": [start, end]}
        start = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # readers map tensors in place, aligned
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
