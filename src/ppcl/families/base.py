"""The base class of a model family: everything odd about it, so that no stage has to ask which one it serves.

A family says how its blocks are tapped, how a forward is made of latents and conditions, how pictures are drawn, and,
where its blocks can be pruned in width, how (`WidthSurgery`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.config import SamplingConfig
from ppcl.data.batches import TrainingBatch
from ppcl.errors import UsageError
from ppcl.families.facts import FamilyFacts
from ppcl.families.width import WidthSurgery
from ppcl.ops import flow_matching
from ppcl.taps import BlockKey, Streams, stack_of

# Conditioning of a forward besides time, `[B, ...]` each, by names of the family's own.
Conditions = dict[str, Tensor]


class EncodedPrompts:
    """Distinct prompts, encoded once; all that a stage needs of a text encoder."""

    def __init__(self, prompts: list[str], encoded: Conditions) -> None:
        self.index = {prompt: row for row, prompt in enumerate(prompts)}
        self.encoded = encoded

    def __call__(self, prompts: list[str]) -> Conditions:
        """Conditions `[len(prompts), ...]` of prompts that are among the encoded ones."""
        rows = torch.tensor([self.index[prompt] for prompt in prompts])
        return {name: value[rows.to(value.device)] for name, value in self.encoded.items()}


class Family(ABC):
    """One model family. `facts` is its record in the registry, `arch` its transformer's config.

    Taps and forwards have to be implemented. Drawing has to be where stages encode or draw pictures; a family without
    it works on cached data. `width` is None where blocks cannot be pruned in width.
    """

    facts: FamilyFacts
    width: WidthSurgery | None = None

    def __init__(
        self,
        facts: FamilyFacts,
        arch: Mapping[str, Any] | None = None,
        sampling: SamplingConfig | None = None,
    ) -> None:
        self.facts = facts
        self.arch = dict(arch or {})
        self.sampling = sampling or SamplingConfig()

    @property
    def name(self) -> str:
        return self.facts.name

    @property
    def stacks(self) -> dict[str, str]:
        """Path of each block ModuleList, in order of execution, to the config key that counts it."""
        return self.facts.stacks

    @property
    def transformer_class(self) -> Any:
        """The diffusers class of its transformer."""
        import diffusers

        return getattr(diffusers, self.facts.transformer)

    def blocks(self, transformer: nn.Module) -> dict[BlockKey, nn.Module]:
        """Every block by (stack, index), in order of execution."""
        return {
            (stack, index): block for stack in self.stacks for index, block in enumerate(stack_of(transformer, stack))
        }

    # Taps: streams are named `image` and `text`. A stack need not have both; one that has a stream has it at the same
    # tokens as the other stacks.

    @abstractmethod
    def streams_in(self, stack: str, kwargs: dict[str, Any], inputs: Mapping[str, Any]) -> Streams:
        """The streams `[B, tokens, D]` among a block's keyword arguments.

        `inputs` are those of the whole forward, for blocks whose streams are joined to one tensor.
        """

    @abstractmethod
    def streams_out(self, stack: str, output: Any, inputs: Mapping[str, Any]) -> Streams:
        """The streams `[B, tokens, D]` in a block's output; a stream that ends there is left out."""

    @abstractmethod
    def masks(self, inputs: dict[str, Any]) -> dict[str, Tensor | None]:
        """Valid tokens `[B, tokens]` per stream of a forward's inputs; None where all are."""

    def stream_of(self, linear: str) -> str:
        """The stream whose tokens a linear layer reads, by its name within a block."""
        return "image"

    def called_apart(self, transformer: Any) -> list[nn.Module]:
        """Modules within blocks that the transformer also calls by itself: where it is sharded, units of their own."""
        return []

    # Forwards.

    @abstractmethod
    def forward_inputs(
        self,
        latents: Tensor,
        conditions: Conditions,
        sigmas: Tensor,
        size: tuple[int, int],
    ) -> dict[str, Any]:
        """Keyword arguments of the transformer's forward for packed noisy `latents` `[B, N, C]`.

        `size` is the latents' height and width in packed tokens.
        """

    def training_batch(
        self,
        latents: Tensor,
        conditions: Conditions,
        noise: Tensor,
        sigmas: Tensor,
        size: tuple[int, int],
    ) -> TrainingBatch:
        """Noise `latents` `[B, N, C]` at levels `sigmas` `[B]`, as a forward call and its target."""
        noisy = flow_matching.interpolate(latents, noise, sigmas)
        inputs = self.forward_inputs(noisy, conditions, sigmas, size)
        return TrainingBatch(inputs, flow_matching.velocity(latents, noise), sigmas, as_tensor=self.as_tensor)

    def as_tensor(self, output: Any) -> Tensor:
        """Turn the transformer's first output into one tensor of the latents' form; for most it is one."""
        return output

    def initialize(self, transformer: Any) -> None:  # noqa: B027 - most train as diffusers draws them
        """Ready an untrained transformer for its training."""

    # Drawing.

    @property
    def draws(self) -> bool:
        """Whether it draws pictures: it then says how its pipeline is called."""
        return type(self).sampling_arguments is not Family.sampling_arguments

    @property
    def world(self) -> ModuleType:
        """The module of `ppcl.data.worlds` that makes scenes for this family."""
        return import_module(f"ppcl.data.worlds.{self.facts.world}")

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories of its world that a prompt can ask for."""
        return self.facts.categories

    @property
    def num_references(self) -> int:
        """How many given pictures a scene of its world has."""
        return self.facts.num_references

    prompts_per_call: int | None = None  # the most that a pipeline takes at once

    def encode_images(self, pipeline: Any, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images in [-1, 1] `[B, 3, H, W]` to packed, normalised latents `[B, N, C]` and their size."""
        raise self._draws_nothing()

    def encode_prompts(self, pipeline: Any, prompts: list[str], references: Sequence[Any] = ()) -> EncodedPrompts:
        """Distinct `prompts` as the pipeline encodes them, padded to one length.

        `references` are the given PIL pictures that all of them speak of.
        """
        raise self._draws_nothing()

    def sampling_arguments(self, sampling: Any, batch_size: int) -> dict[str, Any]:
        """`SamplingConfig` as keyword arguments of the pipeline for `batch_size` prompts."""
        raise self._draws_nothing()

    def _draws_nothing(self) -> UsageError:
        return UsageError(
            f"model.family={self.name} encodes and draws no pictures: use data.cache=FOLDER, and leave cache, generate "
            "and evaluate out of stages."
        )

    def fit_references(self, pipeline: Any, pictures: Sequence[Any]) -> tuple[list[Any], list[Tensor]]:
        """Given PIL pictures as the pipeline shows them to the text encoder, and `[1, 3, H, W]` each for the VAE."""
        return [], []

    def encode_references(self, pipeline: Any, pictures: Sequence[Tensor]) -> Conditions:
        """Conditions of given pictures in [-1, 1], `[B, 3, H, W]` each and as large as the VAE shall see them."""
        return {}

    def complete(self, pipeline: Any) -> None:  # noqa: B027 - most have nothing to add
        """Take from a loaded pipeline what the family goes by, and make it save all that it was loaded with."""

    def num_passes(self, sampling: Any) -> int:
        """Forwards per denoising step: two with classifier-free guidance."""
        return 2 if sampling.true_cfg_scale > 1 else 1

    def check_prompts(self, pipeline: Any, prompts: Sequence[str]) -> None:  # noqa: B027 - most take any
        """Raise `UsageError` for a prompt that this model cannot be given."""

    def prompt_arguments(
        self, pipeline: Any, prompts: Sequence[str], references: Sequence[Sequence[Any]] = ()
    ) -> dict[str, Any]:
        """`prompts`, and the PIL pictures given with each, as keyword arguments of the pipeline."""
        return {"prompt": list(prompts)}


class DualStreamFamily(Family):
    """Blocks called with `hidden_states` (image) and `encoder_hidden_states` (text) that return (text, image)."""

    def streams_in(self, stack: str, kwargs: dict[str, Any], inputs: Mapping[str, Any]) -> Streams:
        return {"image": kwargs["hidden_states"], "text": kwargs["encoder_hidden_states"]}

    def streams_out(self, stack: str, output: tuple[Tensor | None, Tensor], inputs: Mapping[str, Any]) -> Streams:
        text, image = output  # the last block of some models returns no text
        return {"image": image} if text is None else {"image": image, "text": text}
