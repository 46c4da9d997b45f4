"""Makes a transformer folder of other files: of one file in ComfyUI's or its authors' layout, or of a LoRA.

The folder lies in the cache. From then on it is a teacher like any other: it can be streamed, sharded and checked.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ppcl.artifacts.files import atomic_folder, write_json
from ppcl.artifacts.model_files import PICKLED, Stored, pickled_tensors, read_header
from ppcl.components import DEFAULT, loading_into
from ppcl.errors import UsageError
from ppcl.export.single_file import parts_of
from ppcl.families.facts import FamilyFacts, SingleFile
from ppcl.model_fit import without_weights
from ppcl.surgery.lora_files import read_file, read_lora
from ppcl.surgery.lora_layers import Layers, lora_loader

PREFIX = "model.diffusion_model."  # of the transformer's tensors in files that may hold other models, too
DONE = "made.json"  # written last


def from_single_file(
    transformer_class: Any, layout: SingleFile, path: Path, config: Path, dtype: torch.dtype
) -> nn.Module:
    """Return the transformer in the file `path`, by the config in the folder `config`.

    The file has the names of `layout`, in which diffusers' modules may be joined. That undoes `write_single_file`.
    diffusers reads such files as well, but takes FLUX to be as wide as the published one.

    Raises `UsageError` if the file does not hold all weights of that config, or holds more.
    """
    model = without_weights(transformer_class, config)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    loaded = pickled_tensors(path) if path.suffix in PICKLED else None
    stored = read_header(path) if loaded is None else _described(loaded, path)
    prefix = PREFIX if any(name.startswith(PREFIX) for name in stored) else ""
    stored = {name.removeprefix(prefix): each for name, each in stored.items() if name.startswith(prefix)}
    stored = {name: each for name, each in stored.items() if each.numel}  # without markers
    if any(name.endswith((".scale_weight", ".weight_scale", "scaled_fp8")) for name in stored):
        raise UsageError(
            f"model.path={path} is quantised to scaled 8-bit numbers, which can be neither trained nor pruned: give "
            "the file in bfloat16."
        )
    whole = next((name for name, each in stored.items() if not each.dtype.startswith(("F", "BF"))), None)
    if whole is not None:
        raise UsageError(f"model.path={path} holds {stored[whole].dtype} in {whole}: give the file in bfloat16.")
    parts = {part.key: part for part in parts_of(layout, shapes)}
    remedy = "set model.base to the pipeline of the model that the file is of"
    buffers = dict(model.named_buffers())
    for name in layout.computed.keys() & stored.keys():
        asked, found = tuple(buffers[layout.computed[name]].shape), stored.pop(name).shape
        if found != asked:
            raise _misfit(path, name, found, asked, config, remedy)
    for names, what in ((parts.keys() - stored.keys(), "lacks"), (stored.keys() - parts.keys(), "also has")):
        if names:
            more = f" and {len(names) - 1} more tensors" if len(names) > 1 else ""
            raise UsageError(f"model.path={path} {what} {min(names)}{more}, by {config / 'config.json'}: {remedy}.")
    state: dict[str, Tensor] = {}
    file: Any
    with safe_open(path, framework="pt") if loaded is None else nullcontext() as file:
        for key, part in parts.items():
            rows = [shapes[name][0] for name in part.sources]
            asked = (rows[0] if part.repeated else sum(rows), *shapes[part.sources[0]][1:])
            if stored[key].shape != asked:
                raise _misfit(path, key, stored[key].shape, asked, config, remedy)
            tensor = (file.get_tensor(prefix + key) if loaded is None else loaded[prefix + key]).to(dtype)
            if part.swapped:
                tensor = torch.cat(tensor.chunk(2)[::-1])
            pieces = [tensor] * len(rows) if part.repeated else tensor.split(rows)
            state |= {name: each.clone() for name, each in zip(part.sources, pieces, strict=True)}
    model.load_state_dict(state, assign=True)
    return model.eval()


def _described(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Stored]:
    """Return loaded tensors as `read_header` describes those of a safetensors file."""
    return {
        name: Stored(path, "F" if value.is_floating_point() else str(value.dtype), 0, tuple(value.shape))
        for name, value in tensors.items()
    }


def _misfit(
    path: Path, name: str, found: tuple[int, ...], asked: tuple[int, ...], config: Path, remedy: str
) -> UsageError:
    return UsageError(
        f"model.path={path} holds {name} of shape {list(found)}, where {config / 'config.json'} asks for "
        f"{list(asked)}: {remedy}."
    )


def merge_lora(
    pipeline_class: Any, components: Iterable[str], transformer: nn.Module, name: str, path: Path, facts: FamilyFacts
) -> None:
    """Add the LoRA in the file `path` to the weights of `transformer`, as `load_lora_weights` and `fuse_lora` do.

    `pipeline_class`: the diffusers class of the pipeline. `components`: the names of its components, of which `name` is
    the transformer. `facts`: the model's family.

    Raises `UsageError` if parts of the file fit no layer, or belong to a text encoder.
    """
    of_text = next((name for name in read_header(path) if name.startswith(("text_encoder", "lora_te"))), None)
    if of_text is not None:
        raise UsageError(
            f"model.lora={path} has {of_text} for a text encoder, and only LoRAs of the transformer are merged: give "
            "one of it alone."
        )
    raw, metadata = read_file(path)
    try:
        lora = read_lora(raw, metadata, Layers(transformer, facts.stacks, lora_loader(facts, pipeline_class)))
    except UsageError as error:
        raise UsageError(f"model.lora={path}: {error}") from None
    if lora.left_out:
        raise UsageError(f"model.lora={path} has parts that diffusers would leave out, as {lora.left_out[0]}.")
    own = any(name.startswith("base_model.") for name in raw)  # PEFT's names, which diffusers does not read
    # For another component, too, diffusers looks at the first one's config.
    pipeline = pipeline_class(**dict.fromkeys(components) | {DEFAULT: transformer, name: transformer})
    told, logger = _LeftOut(), logging.getLogger("diffusers")
    logger.addHandler(told)
    try:
        pipeline.load_lora_weights(dict(lora.state) if own else str(path), **loading_into(name))
    finally:
        logger.removeHandler(told)
    fits = any("lora_" in name for name, _ in transformer.named_parameters())
    if told.messages or not fits:
        reason = " ".join(told.messages[0].split())[:200] if told.messages else "none of its tensors fits a layer"
        raise UsageError(f"model.lora={path} does not fit this model ({reason}): give a LoRA of it.")
    pipeline.fuse_lora(components=[name])
    pipeline.unload_lora_weights()


class _LeftOut(logging.Handler):
    """Collects the warnings of diffusers that parts of a LoRA were left out, or that layers got none."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if re.search(r"unexpected keys|missing keys|No LoRA keys associated to (?!NoneType)", message):
            self.messages.append(message)


def save(transformer: Any, folder: Path) -> None:
    """Save the transformer as `folder/transformer`, completely or not at all."""
    with atomic_folder(folder) as temporary:
        transformer.save_pretrained(temporary / "transformer")
        write_json(temporary / DONE, {})
