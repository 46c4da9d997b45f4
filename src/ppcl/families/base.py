"""The base class of a model family.

A family holds everything in which one model differs from another, so that stages need not know which model they work
on. It finds the streams in the calls of its blocks, builds the arguments of a forward pass, draws pictures, and prunes
its blocks in width if they can be (`WidthSurgery`).
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
from ppcl.data.buckets import bucket_size
from ppcl.errors import UsageError
from ppcl.families.facts import FamilyFacts
from ppcl.families.width import WidthSurgery
from ppcl.ops import flow_matching
from ppcl.taps import BlockKey, Streams, stack_of

# Tensors `[B, ...]` that condition a forward pass, besides the timestep. Each family chooses its own names.
Conditions = dict[str, Tensor]
MASK = "prompt_embeds_mask"  # the name of the mask of valid text tokens `[B, tokens]`, in families that have one


def without_needless_mask(conditions: Conditions) -> Conditions:
    """Return conditions without a mask that marks every token as valid.

    Pipelines pass none either, and with a mask the fastest attention kernels do not run.
    """
    if MASK in conditions and bool(conditions[MASK].all()):
        return {name: value for name, value in conditions.items() if name != MASK}
    return conditions


class EncodedPrompts:
    """Distinct prompts that were encoded once, so that a stage can look them up without a text encoder.

    `encoded` maps the name of a condition to its values `[len(prompts), ...]`.
    """

    def __init__(self, prompts: list[str], encoded: Conditions) -> None:
        self.index = {prompt: row for row, prompt in enumerate(prompts)}
        self.encoded = encoded

    def __call__(self, prompts: list[str]) -> Conditions:
        """Return the conditions `[len(prompts), ...]` of `prompts`; `KeyError` for one that was not encoded."""
        rows = torch.tensor([self.index[prompt] for prompt in prompts])
        return {name: value[rows.to(value.device)] for name, value in self.encoded.items()}


class Family(ABC):
    """One model family.

    `facts` is its record in the registry, `arch` the config of its transformer, `sampling` how pictures are drawn.

    A subclass must implement the methods under "Taps" and "Forwards". It needs those under "Drawing" only for stages
    that encode or draw pictures; without them it works on cached data. `width` is None if its blocks cannot be pruned
    in width.
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
        """The path of each block ModuleList, in order of execution, and the config key that holds its length."""
        return self.facts.stacks

    @property
    def transformer_class(self) -> Any:
        """The diffusers class of the family's transformer."""
        import diffusers

        return getattr(diffusers, self.facts.transformer)

    @property
    def channels(self) -> int:
        """The channels D of a token."""
        return int(self.arch["num_attention_heads"] * self.arch["attention_head_dim"])

    def blocks(self, transformer: nn.Module) -> dict[BlockKey, nn.Module]:
        """Return every block by (stack, index), in order of execution."""
        return {
            (stack, index): block for stack in self.stacks for index, block in enumerate(stack_of(transformer, stack))
        }

    # Taps. A stream is a tensor of tokens that runs from block to block, `image` or `text`; a traced model's are named
    # by the arguments that take them. A stack may lack some. The stacks that have a stream have the same tokens in it.

    main_stream = "image"  # the stream that becomes the output

    @abstractmethod
    def streams_in(self, stack: str, kwargs: dict[str, Any], inputs: Mapping[str, Any]) -> Streams:
        """Return the streams `[B, tokens, D]` that a block reads, from the keyword arguments of its call.

        `inputs` are the keyword arguments of the transformer's forward. A family whose blocks take both streams joined
        in one tensor needs them to tell where to split it.
        """

    @abstractmethod
    def streams_out(self, stack: str, output: Any, inputs: Mapping[str, Any]) -> Streams:
        """Return the streams `[B, tokens, D]` in a block's output; a stream that ends in this block is left out."""

    @abstractmethod
    def masks(self, inputs: dict[str, Any]) -> dict[str, Tensor | None]:
        """Return a mask `[B, tokens]` of the valid tokens per stream; None if all are valid.

        `inputs` are the keyword arguments of the transformer's forward.
        """

    def stream_of(self, linear: str) -> str:
        """Return the stream whose tokens a linear layer reads; `linear` is the layer's name within its block."""
        return "image"

    def called_apart(self, transformer: Any) -> list[nn.Module]:
        """Return modules inside blocks that the transformer also calls outside of those blocks' forwards.

        FSDP has to shard each of them as a unit of its own.
        """
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
        """Return the keyword arguments of the transformer's forward.

        `latents` `[B, N, C]` are packed and noisy, `sigmas` `[B]` are their noise levels in [0, 1], and `size` is their
        height and width in packed tokens.
        """

    def training_batch(
        self,
        latents: Tensor,
        conditions: Conditions,
        noise: Tensor,
        sigmas: Tensor,
        size: tuple[int, int],
    ) -> TrainingBatch:
        """Add `noise` to clean `latents`, both `[B, N, C]`, and return the forward's arguments and its target.

        Flow matching: the input is (1 - sigma) * latents + sigma * noise with `sigmas` `[B]` in [0, 1], the target is
        the velocity noise - latents. `size` is the latents' height and width in packed tokens.
        """
        noisy = flow_matching.interpolate(latents, noise, sigmas)
        inputs = self.forward_inputs(noisy, conditions, sigmas, size)
        return TrainingBatch(inputs, flow_matching.velocity(latents, noise), sigmas, as_tensor=self.as_tensor)

    def noise_levels(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the noise levels sigma in [0, 1] of a forward, `[B]`, from its keyword arguments.

        Most models are given sigma itself as their `timestep`.
        """
        return inputs["timestep"]

    def blank(self, count: int, size: tuple[int, int], text_tokens: int) -> tuple[Tensor, Conditions]:
        """Return latents and conditions of `count` samples without content, to count what a forward needs.

        `size`: height and width in image tokens. `text_tokens`: the length of each text.
        """
        conditions = {
            "prompt_embeds": torch.empty(count, text_tokens, self.arch["joint_attention_dim"]),
            "pooled_prompt_embeds": torch.empty(count, self.arch.get("pooled_projection_dim", 1)),
        }
        return torch.empty(count, size[0] * size[1], self.arch["in_channels"]), conditions

    def as_tensor(self, output: Any) -> Tensor:
        """Return the transformer's first output as one tensor in the form of the latents; most return one already."""
        return output

    def initialize(self, transformer: Any) -> None:  # noqa: B027 - most need no change
        """Change the initial weights that diffusers gives to an untrained transformer, before it is pretrained."""

    # Drawing.

    @property
    def draws(self) -> bool:
        """Whether the family can draw pictures: a family that can implements `sampling_arguments`."""
        return type(self).sampling_arguments is not Family.sampling_arguments

    @property
    def world(self) -> ModuleType:
        """The module of `ppcl.data.worlds` that makes synthetic pictures and captions for this family."""
        return import_module(f"ppcl.data.worlds.{self.facts.world}")

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories of its world that this family's prompts can ask for."""
        return self.facts.categories

    @property
    def num_references(self) -> int:
        """The number of reference pictures that a scene of its world has; they are the input of an edit model."""
        return self.facts.num_references

    @property
    def preparation(self) -> str:
        """Lines of Python that a stock pipeline of this model needs before it draws, for model cards."""
        return ""

    prompts_per_call: int | None = None  # the most prompts that one call of the pipeline takes; None: any number

    @property
    def empty_prompt(self) -> str:
        """The prompt of the unconditional pass of guidance, which dropped captions are replaced by."""
        return self.sampling.negative_prompt

    def picture_size(self, pipeline: Any, ratio: float, area: int) -> tuple[int, int]:
        """Return the size (height, width) in pixels at which pictures of the aspect ratio width / height are encoded.

        It has about `area` pixels, and makes whole tokens.
        """
        return bucket_size(ratio, area, 2 * getattr(pipeline, "vae_scale_factor", 8))

    def encode_images(self, pipeline: Any, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return packed, normalised latents `[B, N, C]` of `images` `[B, 3, H, W]` in [-1, 1], and their size.

        The size is height and width in packed tokens. Raises `UsageError` if the family draws no pictures.
        """
        raise self._draws_nothing()

    @property
    def decodes(self) -> bool:
        """Whether the family can turn latents into pictures: a family that can implements `decode_latents`."""
        return type(self).decode_latents is not Family.decode_latents

    def decode_latents(self, pipeline: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the pictures `[B, 3, H, W]` in [-1, 1] of packed latents `[B, N, C]`: the inverse of `encode_images`.

        Of the pipeline only the VAE is used. Raises `UsageError` if the family draws no pictures.
        """
        raise self._draws_nothing()

    def denoise(self, latents: Tensor, prediction: Tensor, sigma: float, following: float) -> Tensor:
        """Return latents at the noise level `following`, from `latents` at `sigma` and the model's `prediction` there.

        Of flow matching, whose prediction is the velocity, it is a step of Euler's method.
        """
        return latents + (following - sigma) * prediction

    def encode_prompts(self, pipeline: Any, prompts: list[str], references: Sequence[Any] = ()) -> EncodedPrompts:
        """Encode distinct `prompts` as the pipeline does, padded to one length.

        `references` are the PIL pictures that an edit model is given with every one of them. Raises `UsageError` if the
        family draws no pictures.
        """
        raise self._draws_nothing()

    def sampling_arguments(self, sampling: Any, batch_size: int) -> dict[str, Any]:
        """Return the pipeline's keyword arguments for a `SamplingConfig` and `batch_size` prompts.

        Raises `UsageError` if the family draws no pictures.
        """
        raise self._draws_nothing()

    def _draws_nothing(self) -> UsageError:
        return UsageError(
            f"model.family={self.name} encodes and draws no pictures: use data.cache=FOLDER, and leave cache, generate "
            "and evaluate out of stages."
        )

    def fit_references(
        self, pipeline: Any, pictures: Sequence[Any], ratios: Sequence[float]
    ) -> tuple[list[Any], list[Tensor]]:
        """Cut reference PIL pictures to aspect ratios, and resize them to what the pipeline encodes of such pictures.

        `ratios`: the aspect ratio, width / height, of each. Returns the PIL pictures for the text encoder, and one
        tensor `[1, 3, H, W]` in [-1, 1] each for the VAE.
        """
        return [], []

    def encode_references(self, pipeline: Any, pictures: Sequence[Tensor]) -> Conditions:
        """Return the conditions that reference pictures make.

        Each of `pictures` is `[B, 3, H, W]` in [-1, 1], already resized for the VAE.
        """
        return {}

    def complete(self, pipeline: Any) -> None:  # noqa: B027 - most have nothing to add
        """Finish a pipeline that was just loaded or built.

        The family reads the settings that it needs from the pipeline, and adds to it what diffusers would not save.
        """

    @property
    def num_classes(self) -> int:
        """The number of classes that the model draws by their number; 0 if it takes texts."""
        return 0

    def num_passes(self, sampling: Any) -> int:
        """Return the number of forward passes per denoising step: two with classifier-free guidance, else one."""
        return 2 if sampling.true_cfg_scale > 1 else 1

    def check_prompts(self, pipeline: Any, prompts: Sequence[str]) -> None:  # noqa: B027 - most take any
        """Raise `UsageError` for a prompt that this model cannot take."""

    def class_captions(self, pipeline: Any, names: Sequence[str]) -> list[str]:
        """Return the caption of each class folder, given the sorted `names` of all of them: by default its name.

        Raises `UsageError` for a class that this model does not have.
        """
        return list(names)

    def prompt_arguments(
        self, pipeline: Any, prompts: Sequence[str], references: Sequence[Sequence[Any]] = ()
    ) -> dict[str, Any]:
        """Return `prompts`, and the reference PIL pictures of each, as keyword arguments of the pipeline."""
        return {"prompt": list(prompts)}


class DualStreamFamily(Family):
    """A family whose blocks take `hidden_states` (image) and `encoder_hidden_states` (text).

    They return (text, image), each `[B, tokens, D]`; text may be None in the last block.
    """

    def streams_in(self, stack: str, kwargs: dict[str, Any], inputs: Mapping[str, Any]) -> Streams:
        return {"image": kwargs["hidden_states"], "text": kwargs["encoder_hidden_states"]}

    def streams_out(self, stack: str, output: tuple[Tensor | None, Tensor], inputs: Mapping[str, Any]) -> Streams:
        text, image = output  # the last block of some models returns None for the text
        return {"image": image} if text is None else {"image": image, "text": text}
