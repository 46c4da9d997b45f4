"""Finds the weight files of a saved model as diffusers does, and the tensors in them. Importing this loads no torch.

diffusers reads the first of these that a component's folder has: the shards that its safetensors index names, one
safetensors file, one `.bin` file. It reads no other file of the folder, such as an older backup of the weights. With a
variant, such as `fp16`, it reads files with the variant in their names instead, if the folder has any.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from ppcl.artifacts.files import check_safetensors, parse_json, read_json
from ppcl.errors import UsageError

WEIGHTS = "diffusion_pytorch_model"
PICKLED = (".bin", ".pt")  # suffixes of files of weights that torch.save has written
_INDEX = f"{WEIGHTS}.safetensors.index.json"


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: the file, the offset in bytes, the dtype by its safetensors name ("BF16"), and the shape."""

    path: Path
    dtype: str
    start: int
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of its elements."""
        return prod(self.shape)


def components_of(index: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the components in the content of a `model_index.json`: the library and the class of each, or None twice.

    Other lists in it are settings of the pipeline.
    """
    return {
        name: entry
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and all(part is None or isinstance(part, str) for part in entry)
    }


def _named(name: str, variant: str | None) -> str:
    """Return `name` with the variant before its last suffix, as diffusers names such files."""
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}" if variant else name


def variants_of(folder: Path) -> list[str]:
    """Return the variants whose weight files a component's folder has, such as `fp16`, by what follows the first dot.

    `model.fp16.safetensors` and `model.fp16-00001-of-00002.safetensors` are both of the variant `fp16`.
    """
    found = set()
    for file in folder.glob("*.*.*"):
        kind, _, rest = file.name.partition(".")[2].partition(".")
        if rest in ("safetensors", "bin") and kind not in ("safetensors", "bin"):
            found.add(kind.partition("-")[0])
    return sorted(found)


def _shards(folder: Path, variant: str | None) -> dict[str, str] | None:
    """Return the file of each tensor by the index that diffusers reads in `folder`; None if it has no index."""
    # The second name is an earlier one, which diffusers still reads.
    names = [_named(_INDEX, variant)] + ([_INDEX.replace(".index", f".index.{variant}")] if variant else [])
    index = next((folder / name for name in names if (folder / name).is_file()), None)
    return None if index is None else weight_map(index)


def _resolved(folder: Path, variant: str | None) -> tuple[list[Path], dict[str, str] | None]:
    """Return the files that diffusers loads in the order in which it does, and the file of each tensor by an index."""
    if variant is not None and not any(found.startswith(variant) for found in variants_of(folder)):
        variant = None
    shards = _shards(folder, variant)
    if shards is not None:
        return [folder / name for name in sorted({*shards.values()})], shards
    for suffix in ("safetensors", "bin"):
        path = folder / _named(f"{WEIGHTS}.{suffix}", variant)
        if path.is_file():
            return [path], None
    raise UsageError(f"{folder} holds no {_named(f'{WEIGHTS}.safetensors', variant)}{_remedy(folder)}.")


def weight_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Return the weight files that diffusers loads of the model saved in `folder`, in the order in which it does.

    Reads an index at most. `variant`: see `model.variant`; a folder without files of it is read as without a variant.
    Raises `UsageError` if there are no such files, or if a shard is missing.
    """
    return _resolved(folder, variant)[0]


def component_files(folder: Path, variant: str | None = None) -> list[Path]:
    """Return the files of a pipeline's component that decide what it computes: its config and its weights.

    Of one without weights, such as a tokenizer, these are all files. Raises `UsageError` like `weight_files`.
    """
    config = [path for path in (folder / "config.json",) if path.is_file()]
    if any(folder.glob(f"{WEIGHTS}*")):
        return config + weight_files(folder, variant)
    # transformers takes a single file before the shards of an index.
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        for kind in (variant, None) if variant else (None,):
            single, index = (folder / _named(f"{stem}.{suffix}{end}", kind) for end in ("", ".index.json"))
            if single.is_file():
                return [*config, single]
            if index.is_file():
                return config + [folder / name for name in sorted({*weight_map(index).values()})]
    return sorted(path for path in folder.iterdir() if path.is_file())


def has_weights(folder: Path) -> bool:
    """Whether a component's folder has files of weights, under any name."""
    return any(path.suffix in (".safetensors", ".bin") for path in folder.glob("*"))


def _remedy(folder: Path) -> str:
    others = variants_of(folder)
    if others:
        return f", only weights of another variant: add model.variant={others[0]}"
    if any(folder.glob("*.bin.index.json")):
        return ", and diffusers does not read .bin files in shards: save the model as safetensors, by save_pretrained"
    if any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")):
        return ", and diffusers reads no weights of another name: give the folder as save_pretrained wrote it"
    return ": give a folder of the whole pipeline"


def weight_map(index: Path) -> dict[str, str]:
    """Return the file of each tensor by the safetensors index `index`; `UsageError` if it is damaged or incomplete."""
    content = read_json(index, "A model's index")
    found = content.get("weight_map")
    if not isinstance(found, dict) or not found or "metadata" not in content:
        raise UsageError(f"{index} is no index of a model, which has metadata and a weight_map: fetch it again.")
    for name in {str(name) for name in found.values()}:
        if Path(name).name != name or not (index.parent / name).is_file():
            raise UsageError(f"{index} names {name}, which is not in its folder: fetch the model again.")
    return {str(key): str(name) for key, name in found.items()}


def read_header(path: Path) -> dict[str, Stored]:
    """Return the location of every tensor in a safetensors file, by name; `UsageError` if the file is damaged."""
    check_safetensors(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entries = parse_json(file.read(length))
    entries.pop("__metadata__", None)
    return {
        name: Stored(path, entry["dtype"], 8 + length + entry["data_offsets"][0], tuple(entry["shape"]))
        for name, entry in entries.items()
    }


def stored_tensors(folder: Path, variant: str | None = None) -> dict[str, Stored]:
    """Return the location of every tensor of the model saved in `folder`, by name, as diffusers would load it.

    Reads the headers of its safetensors files. Raises `UsageError` if one is missing or damaged, or if the weights are
    in a `.bin` file.
    """
    files, named = _resolved(folder, variant)
    check_streamable(files[0])
    found: dict[str, Stored] = {}
    for path in files:  # of a tensor that two shards hold diffusers takes the last
        found |= {name: stored for name, stored in read_header(path).items() if named is None or name in named}
    return found


def check_streamable(path: Path) -> None:
    """Raise `UsageError` if the weights in `path` cannot be read one by one."""
    if path.suffix == ".bin":
        raise UsageError(
            f"{path} is no safetensors file, and model.streaming=true reads no other: leave it out, or save the model "
            "as safetensors, by save_pretrained."
        )


def pickled_tensors(path: Path) -> dict[str, Any]:
    """Return the tensors of a `.bin` or `.pt` file by name, mapped from the file; loads torch.

    Of a training checkpoint (`.pt`) these are the mean of its weights, `ema`, or else `model`. Only tensors are read,
    and no code in the file is run. Raises `UsageError` if the file is damaged or holds more.
    """
    import torch

    try:
        with torch.serialization.safe_globals([Namespace] if path.suffix == ".pt" else []):  # arguments of a training
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds for a damaged file
        reason = str(error).split("\n")[0].split(". ")[0]
        raise UsageError(f"{path} is damaged or no file of weights ({reason}): fetch it again.") from None
    if path.suffix == ".pt" and isinstance(content, dict):
        content = content.get("ema", content.get("model", content))
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UsageError(f"{path} holds more than the weights of a model: save it as safetensors, by save_pretrained.")
    return content


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"
