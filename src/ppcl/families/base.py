"""What a model family is: everything odd about it, so that no stage has to ask which one it serves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ppcl.config import SamplingConfig
from ppcl.data.batches import TrainingBatch
from ppcl.families import FAMILIES
from ppcl.ops import flow_matching
from ppcl.taps import Streams

if TYPE_CHECKING:
    from ppcl.artifacts import Width
    from ppcl.layers import Layout


# What a forward is conditioned on besides time, `[B, ...]` each, by names of the family's own.
Conditions = dict[str, Tensor]


class EncodedPrompts:
    """Distinct prompts, encoded once; all that a stage needs of a text encoder."""

    def __init__(self, prompts: list[str], encoded: Conditions) -> None:
        self.index = {prompt: row for row, prompt in enumerate(prompts)}
        self.encoded = encoded

    def __call__(self, prompts: list[str]) -> Conditions:
        rows = torch.tensor([self.index[prompt] for prompt in prompts])
        return {name: value[rows.to(value.device)] for name, value in self.encoded.items()}


class Family(ABC):
    """One model family; its light facts (block stacks, pipeline classes) stand in `FAMILIES`.

    Streams are named `image` and `text`.
    """

    name: str
    transformer_class: Any  # a diffusers model class

    def __init__(self, arch: Mapping[str, Any] | None = None, sampling: SamplingConfig | None = None) -> None:
        self.arch = dict(arch or {})
        self.sampling = sampling or SamplingConfig()

    @property
    def stacks(self) -> dict[str, str]:
        """Attribute of each block ModuleList, in order of execution, to the config key that counts it."""
        return FAMILIES[self.name].stacks

    @property
    def first_block(self) -> int:
        """Blocks before this one stay the teacher's."""
        return FAMILIES[self.name].first_block

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories of the shapes world that a prompt can ask for."""
        return FAMILIES[self.name].categories

    @property
    def world(self) -> ModuleType:
        """The module of `ppcl.data` that makes scenes for this family."""
        return import_module(f"ppcl.data.{FAMILIES[self.name].world}")

    @property
    def num_references(self) -> int:
        """How many given pictures a scene of its world has."""
        return FAMILIES[self.name].num_references

    @property
    def text_stacks(self) -> tuple[str, ...]:
        """The stacks whose blocks have a text stream of their own to prune."""
        return FAMILIES[self.name].text_stacks

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

    @abstractmethod
    def encode_images(self, pipeline: Any, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images in [-1, 1] `[B, 3, H, W]` to packed, normalised latents `[B, N, C]` and their size."""

    @abstractmethod
    def encode_prompts(self, pipeline: Any, prompts: list[str], references: Sequence[Any] = ()) -> EncodedPrompts:
        """Distinct `prompts` as the pipeline encodes them, padded to one length.

        `references` are the given PIL pictures that all of them speak of.
        """

    def fit_references(self, pipeline: Any, pictures: Sequence[Any]) -> tuple[list[Any], list[Tensor]]:
        """Given PIL pictures as the pipeline shows them to the text encoder, and `[1, 3, H, W]` each for the VAE."""
        return [], []

    def encode_references(self, pipeline: Any, pictures: Sequence[Tensor]) -> Conditions:
        """What given pictures in [-1, 1], `[B, 3, H, W]` each and as large as the VAE shall see them, condition on."""
        return {}

    @abstractmethod
    def streams_in(self, stack: str, kwargs: dict[str, Any]) -> Streams:
        """The streams among a block's keyword arguments."""

    @abstractmethod
    def streams_out(self, stack: str, output: Any) -> Streams:
        """The streams in what a block returns."""

    @abstractmethod
    def masks(self, inputs: dict[str, Any]) -> dict[str, Tensor | None]:
        """Valid tokens `[B, tokens]` per stream of a forward's inputs; None where all are."""

    def stream_of(self, linear: str) -> str:
        """The stream whose tokens a linear layer reads, by its name within a block."""
        return "image"

    @abstractmethod
    def sampling_arguments(self, sampling: Any, batch_size: int) -> dict[str, Any]:
        """`SamplingConfig` as keyword arguments of the pipeline for `batch_size` prompts."""

    def complete(self, pipeline: Any) -> None:  # noqa: B027 - most have nothing to add
        """Take from a loaded pipeline what the family goes by, and make it save all that it was loaded with."""

    def initialize(self, transformer: Any) -> None:  # noqa: B027 - most train as diffusers draws them
        """Ready an untrained transformer for its training."""

    def num_passes(self, sampling: Any) -> int:
        """Forwards per denoising step: two with classifier-free guidance."""
        return 2 if sampling.true_cfg_scale > 1 else 1

    def check_prompts(self, pipeline: Any, prompts: Sequence[str]) -> None:  # noqa: B027 - most take any
        """`UsageError` for a prompt that this model cannot be given."""

    prompts_per_call: int | None = None  # the most that a pipeline takes at once

    def prompt_arguments(
        self, pipeline: Any, prompts: Sequence[str], references: Sequence[Sequence[Any]] = ()
    ) -> dict[str, Any]:
        """`prompts`, and the PIL pictures given with each, as keyword arguments of the pipeline."""
        return {"prompt": list(prompts)}

    # Width pruning.

    pruned_transformer_class: Any  # `transformer_class` with width sets in its config
    # A pruned block's attributes: `text_in` (l_z), `text_out` (l_h), `image_ffn` and `text_ffn` (Eq. 8-9).
    projectors: dict[str, str]

    @abstractmethod
    def pruned_config(self, places: Width, layout: Layout) -> dict[str, Any]:
        """What the config of `pruned_transformer_class` says of blocks pruned at these positions among those kept."""

    @abstractmethod
    def width_roles(
        self, stack: str, text: list[int], ffn: list[int], num_layers: int, layout: Layout
    ) -> list[dict[str, Any] | None]:
        """What each of a stack's `num_layers` blocks becomes if those at `text` and `ffn` are pruned, or None."""

    @abstractmethod
    def prune_block(self, block: nn.Module, role: dict[str, Any], projectors: Mapping[str, Tensor]) -> nn.Module:
        """A block with `role` that shares what it keeps with `block`; absent projectors are the identity."""

    @abstractmethod
    def text_qkv_input(self, block: nn.Module, kwargs: dict[str, Any]) -> Tensor:
        """z `[B, L, D]`: the modulated, normed text that goes into a block's QKV."""

    @abstractmethod
    def with_text(self, kwargs: dict[str, Any], text: Tensor, reference: Tensor) -> dict[str, Any]:
        """A block's arguments with the text `[B, L, D]` and the reference's z `[B, L, D]` a pruned block reads."""

    def blocks(self, transformer: nn.Module) -> dict[tuple[str, int], nn.Module]:
        """Every block by (stack, index), in order of execution."""
        return {
            (stack, index): block for stack in self.stacks for index, block in enumerate(getattr(transformer, stack))
        }

    def called_apart(self, transformer: Any) -> list[nn.Module]:
        """Modules within blocks that the transformer also calls by itself: where it is sharded, units of their own."""
        return []

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
        return TrainingBatch(inputs, flow_matching.velocity(latents, noise), sigmas)


class DualStreamFamily(Family):
    """Blocks called with `hidden_states` (image) and `encoder_hidden_states` (text) that return (text, image)."""

    projectors = {
        "text_in": "txt_proj",
        "text_out": "ehs_proj",
        "image_ffn": "img_ffn_proj",
        "text_ffn": "txt_ffn_proj",
    }

    def streams_in(self, stack: str, kwargs: dict[str, Any]) -> Streams:
        return {"image": kwargs["hidden_states"], "text": kwargs["encoder_hidden_states"]}

    def streams_out(self, stack: str, output: tuple[Tensor, Tensor]) -> Streams:
        return {"image": output[1], "text": output[0]}

    def with_text(self, kwargs: dict[str, Any], text: Tensor, reference: Tensor) -> dict[str, Any]:
        return kwargs | {"encoder_hidden_states": torch.cat([text, reference], dim=-1)}
