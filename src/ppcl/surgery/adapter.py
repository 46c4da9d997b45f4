"""Fine-tuning a pruned model by a LoRA, which is saved as a small file that loads onto the pruned export."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.artifacts.files import write_json
from ppcl.artifacts.tensors import write_tensors
from ppcl.families.base import Family
from ppcl.layers import BlockMap
from ppcl.streaming import still
from ppcl.surgery.lora_marks import mark_of


def add_lora(family: Family, model: nn.Module, rank: int, *, seed: int, alpha: float | None = None) -> None:
    """Add a LoRA of rank `rank` to every linear layer in the blocks of `model`, and freeze all other parameters.

    The LoRA is multiplied by `alpha` / `rank`, by 1 with None. It starts at zero: its B is zero, its A is random and
    drawn with `seed`. The global random state does not change.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in linear if name.startswith(tuple(f"{stack}." for stack in family.stacks))]
    # PEFT matches the ends of names: the target `blocks.0.ff` would also match `encoder.blocks.0.ff`.
    others = [name for name in linear if name not in targets and name.endswith(tuple(f".{end}" for end in targets))]
    adapted: Any = model.requires_grad_(False)
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}  # by default all of them
    with torch.random.fork_rng([*devices]):
        torch.manual_seed(seed)
        scale: Any = rank if alpha is None else alpha
        config = LoraConfig(r=rank, lora_alpha=scale, target_modules=targets, exclude_modules=others or None)
        if hasattr(adapted, "add_adapter"):
            adapted.add_adapter(config)
        else:  # a class whose pipelines load no LoRAs, such as DiT's
            inject_adapter_in_model(config, adapted)


def save_lora(model: Any, pipeline_class: Any, folder: Path, blocks: BlockMap) -> None:
    """Save the LoRA of `model` to `folder` in the format of its pipeline's class.

    `pipeline.load_lora_weights(folder)` loads the file. `blocks`: which blocks of the full model `model` has. The file
    says that it counts these.
    """
    from peft.utils import get_peft_model_state_dict

    (name,) = model.peft_config
    layers, metadata = get_peft_model_state_dict(model, adapter_name=name), model.peft_config[name].to_dict()
    metadata["base_model_name_or_path"] = mark_of(blocks.kept)
    pipeline_class.save_lora_weights(folder, layers, transformer_lora_adapter_metadata=metadata)


def merge_lora(model: Any) -> None:
    """Add the LoRA of `model` to its weights, which become copies in host memory before."""
    model.load_state_dict({key: value.to("cpu", copy=True) for key, value in model.state_dict().items()}, assign=True)
    model.fuse_lora()  # in place, and the weights may have been shared with the teacher
    model.unload_lora()


def cast_weights(model: nn.Module, dtype_of: Callable[[str], torch.dtype]) -> None:
    """Cast everything in a model's state dict, in place. `dtype_of`: returns the dtype of a weight, given its name."""
    for name, value in model.state_dict(keep_vars=True).items():
        if value.is_floating_point():
            value.data = value.data.to(dtype_of(name))


def save_merged(family: Family, model: Any, folder: Path, dtype_of: Callable[[str], torch.dtype]) -> None:
    """Save `model` with its LoRA added to its weights, as `merge_lora` and `save_pretrained` would.

    `dtype_of`: returns the dtype of a weight, given its name.

    Each block has a file of its own, so that the weights of one block are in memory at a time. Blocks may be streamed.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    def merged(block: nn.Module) -> dict[str, Tensor]:
        with still(block):
            block = copy.deepcopy(block)
        for layer in block.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.merge()
        state = block.state_dict()
        return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}

    blocks = {f"{stack}.{index}.": block for (stack, index), block in family.blocks(model).items()}
    state, files = model.state_dict(), dict[str, str]()
    rest = {name: value for name, value in state.items() if not name.startswith(tuple(blocks))}
    folder.mkdir(parents=True)
    for number, prefix in enumerate([*blocks, ""], start=1):
        values = merged(blocks[prefix]) if prefix else rest
        tensors = {prefix + name: value.to("cpu", dtype_of(prefix + name)) for name, value in values.items()}
        file = f"diffusion_pytorch_model-{number:05d}-of-{len(blocks) + 1:05d}.safetensors"
        write_tensors(folder / file, tensors, {"format": "pt"})
        files |= dict.fromkeys(tensors, file)
    size = sum((folder / file).stat().st_size for file in {*files.values()})
    index = {"metadata": {"total_size": size}, "weight_map": files}
    write_json(folder / "diffusion_pytorch_model.safetensors.index.json", index, checked=False)
    model.save_config(folder)
