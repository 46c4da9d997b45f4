"""Fine-tuning a pruned model by a LoRA, which is saved as a small file that loads onto the pruned export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl.families.base import Family


def add_lora(family: Family, model: nn.Module, rank: int, *, seed: int) -> None:
    """Add a LoRA of rank `rank` to every linear layer in the blocks of `model`, and freeze all other parameters.

    The LoRA starts at zero: its B is zero, its A is random and drawn with `seed`. The global random state does not
    change.
    """
    from peft import LoraConfig

    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    targets = [name for name in linear if name.startswith(tuple(f"{stack}." for stack in family.stacks))]
    # PEFT matches the ends of names: the target `blocks.0.ff` would also match `encoder.blocks.0.ff`.
    others = [name for name in linear if name not in targets and name.endswith(tuple(f".{end}" for end in targets))]
    adapted: Any = model.requires_grad_(False)
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}  # by default all of them
    with torch.random.fork_rng([*devices]):
        torch.manual_seed(seed)
        adapted.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, exclude_modules=others or None))


def merge_lora(model: Any, pipeline_class: Any, folder: Path) -> None:
    """Save the LoRA of `model` to `folder` in the format of its pipeline's class, and add it to the weights of `model`.

    `pipeline.load_lora_weights(folder)` loads the file. The weights become copies in host memory before.
    """
    from peft.utils import get_peft_model_state_dict

    (name,) = model.peft_config
    layers, metadata = get_peft_model_state_dict(model, adapter_name=name), model.peft_config[name].to_dict()
    pipeline_class.save_lora_weights(folder, layers, transformer_lora_adapter_metadata=metadata)
    model.load_state_dict({key: value.to("cpu", copy=True) for key, value in model.state_dict().items()}, assign=True)
    model.fuse_lora()  # in place, and the weights may have been shared with the teacher
    model.unload_lora()
