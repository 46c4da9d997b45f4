"""The layers of a model that a LoRA can go onto, of families that ppcl knows and of all others."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.errors import UsageError
from ppcl.families.facts import FamilyFacts
from ppcl.families.registry import family_of_transformer
from ppcl.families.traced.structure import without_weights
from ppcl.layers import BlockMap
from ppcl.taps import stack_of

# What trainers put before the name of a layer. The layer's own dots may be underscores.
SPELLINGS = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "model.")
_FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")


class Layers:
    """The layers of a transformer that a LoRA can go onto, with the shapes of their weights.

    `stacks`: the paths of its block lists. `loader`: the pipeline class that converts the names of other trainers, or
    None if that is unknown.
    """

    def __init__(self, transformer: nn.Module, stacks: Iterable[str], loader: Any) -> None:
        self.stacks, self.loader, self.model = tuple(stacks), loader, type(transformer).__name__
        self.shapes: dict[str, torch.Size] = {}
        for name, module in transformer.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(weight, Tensor) and weight.ndim > 1 and ".lora_" not in name:
                self.shapes[name.removesuffix(".base_layer")] = weight.shape  # PEFT wraps a layer that has a LoRA

    @classmethod
    def of_full_model(cls, kind: Any, config: Mapping[str, Any], blocks: BlockMap, loader: Any) -> Layers:
        """Return the layers of the model that `config` was pruned from, which has the class `kind` of diffusers."""
        known = inspect.signature(kind.__init__).parameters
        own = {key: value for key, value in config.items() if key in known}
        facts = family_of_transformer(kind.__name__)
        if facts is not None and blocks.counts.keys() <= facts.stacks.keys():
            keys: Mapping[str, str] = facts.stacks
        else:
            keys = _counting(kind, own, blocks)
        counts = {keys[stack]: count for stack, count in blocks.counts.items() if stack in keys}
        return cls(without_weights(kind, own | counts), blocks.counts, loader)

    @cached_property
    def by_flat_name(self) -> dict[str, str]:
        return {name.replace(".", "_"): name for name in self.shapes}

    @property
    def example(self) -> str:
        """The first layer within a block."""
        stacks = tuple(f"{stack}.0." for stack in self.stacks)
        return next((name for name in self.shapes if name.startswith(stacks)), next(iter(self.shapes)))

    def find(self, name: str) -> str | None:
        """Return the layer that a trainer's `name` means, or None."""
        if name in self.shapes:
            return name
        for prefix in SPELLINGS:
            if name.startswith(prefix) and (found := self.find(name.removeprefix(prefix))):
                return found
        flat = (name.removeprefix(prefix) for prefix in _FLAT if name.startswith(prefix))
        return next((self.by_flat_name[rest] for rest in flat if rest in self.by_flat_name), None)

    def refuse(self, name: str) -> UsageError:
        """Return the error for a name of a LoRA that is no layer of the model."""
        counts = dict.fromkeys(self.stacks, 0)
        for layer in self.shapes:
            for stack in counts:
                number = layer.removeprefix(f"{stack}.").partition(".")[0]
                if layer.startswith(f"{stack}.") and number.isdigit():
                    counts[stack] = max(counts[stack], int(number) + 1)
        blocks = " and ".join(f"{count} {stack}" for stack, count in counts.items())
        return UsageError(
            f"this LoRA is of another architecture, or a name in it is misspelt: {name} is no layer of the full model, "
            f"whose layers are named like {self.example}, in {blocks}; give a LoRA that was trained on {self.model}."
        )


def _counting(kind: Any, config: Mapping[str, Any], blocks: BlockMap) -> dict[str, str]:
    """Return the config key that counts each pruned stack of a model of no known family.

    With that key set to the number of blocks that the full model has, the class `kind` makes so many. Raises
    `UsageError` if there is none.
    """
    found: dict[str, str] = {}
    for stack in blocks.renumbered:
        count = blocks.counts[stack]
        for key, value in config.items():
            counts = type(value) is int and value == len(blocks.kept[stack])
            if counts and _makes(kind, {**config, key: count}, stack, count):
                found[stack] = key
                break
        else:
            raise UsageError(
                f"no entry of the config counts {stack} of this {kind.__name__}: use the config.json that was exported "
                "with these weights."
            )
    return found


def _makes(kind: Any, config: Mapping[str, Any], stack: str, count: int) -> bool:
    """Whether a model of this config has `count` blocks in `stack`."""
    try:
        return len(stack_of(without_weights(kind, config), stack)) == count
    except Exception:  # of any kind: other integers of a config must divide or equal each other
        return False


def stock_class(transformer: nn.Module) -> Any:
    """Return the class of diffusers that a transformer has, or that the class of a width-pruned one is made from."""
    import diffusers

    facts = family_of_transformer(type(transformer).__name__)
    if facts is not None and hasattr(diffusers, facts.transformer):
        return getattr(diffusers, facts.transformer)
    stock = (kind for kind in type(transformer).__mro__ if kind.__module__.startswith("diffusers.models.transformers"))
    return next(stock, type(transformer))


def lora_loader(facts: FamilyFacts | None, pipeline_class: Any = None) -> Any:
    """Return the pipeline class that loads LoRAs of a model: the first of its family, else `pipeline_class`.

    `facts`: the model's family; None if it has none, or is not known.

    Raises `UsageError` if pipelines of the model load no LoRAs.
    """
    import diffusers

    if facts is not None and not facts.takes_lora:
        raise UsageError(f"pipelines with a {facts.transformer} load no LoRAs in diffusers.")
    if facts is not None and facts.pipeline_classes:
        return getattr(diffusers, facts.pipeline_classes[0])
    if pipeline_class is not None and not loads_loras(pipeline_class):
        raise UsageError(f"{pipeline_class.__name__} of diffusers loads no LoRAs.")
    return pipeline_class


def loads_loras(pipeline_class: Any, component: str = "transformer") -> bool:
    """Return whether a pipeline class of diffusers loads LoRAs of its transformer, the `component` of this name."""
    return component in getattr(pipeline_class, "_lora_loadable_modules", ())
