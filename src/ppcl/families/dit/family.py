"""DiT: a class-conditional model whose blocks have an image stream only; DiT-XL/2 has 28 of them.

What is special about it:
- It takes a class in place of a prompt, by name or number. Label 1000 stands for "no class", which guidance needs.
- The output head uses the embedding of time and label inside block 0. So block 0 always stays the teacher's, and no
  interval starts there.
- Every block has its own embedding of time and label, which drops labels at random in training mode. So models stay in
  evaluation mode, and the data stream drops labels instead.
- Its scheduler's config says what it predicts: for DiT-XL/2 the noise of a DDPM at one of 1,000 timesteps. Further
  output channels hold a variance, which sampling ignores.
- With a scheduler of flow matching it is a SiT (Ma et al., 2401.08740): it predicts the velocity, and its timestep is
  1,000 * sigma, which need not be a whole number. The stock pipeline asks every scheduler for `scale_model_input`,
  which one of flow matching does not have.
- Latents are not packed: they are pictures `[B, C, H, W]`, and the model cuts them into patches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from ppcl.artifacts.plan import Width
from ppcl.data.batches import TrainingBatch
from ppcl.data.captions import seen
from ppcl.errors import UsageError
from ppcl.families.base import Conditions, EncodedPrompts, Family
from ppcl.families.dit.transformer_dit_pruned import PrunedDiTBlock, PrunedDiTTransformer2DModel
from ppcl.families.width import WidthSurgery
from ppcl.layers import Layout
from ppcl.surgery.share import share_pruned
from ppcl.taps import Streams

NO_LABEL = 1000
NUM_TIMESTEPS = 1000


def _flows(scheduler: Any) -> bool:
    return type(scheduler).__name__.startswith("FlowMatch")


def _unscaled(sample: Tensor, timestep: Any) -> Tensor:
    """Return `sample` as it is: what the stock pipeline asks a scheduler to do before each step."""
    return sample


class DiTWidth(WidthSurgery):
    transformer_class = PrunedDiTTransformer2DModel
    projectors = {"image_ffn": "img_ffn_proj"}

    def config(self, places: Width, layout: Layout) -> dict[str, Any]:
        return {"pruned_ffn": places["transformer_blocks"]["ffn"]}

    def roles(
        self, stack: str, text: list[int], ffn: list[int], num_layers: int, layout: Layout
    ) -> list[dict[str, Any] | None]:
        return [{"project_ffn": True} if index in ffn else None for index in range(num_layers)]

    def prune(self, block: nn.Module, role: dict[str, Any], projectors: Mapping[str, Tensor]) -> nn.Module:
        source: Any = block
        with torch.device("meta"):
            pruned = PrunedDiTBlock(
                source.dim,
                source.num_attention_heads,
                source.attention_head_dim,
                num_embeds_ada_norm=source.num_embeds_ada_norm,
                attention_bias=source.attention_bias,
                upcast_attention=source.attn1.upcast_attention,
                norm_elementwise_affine=source.norm_elementwise_affine,
            )
        return share_pruned(pruned, block, projectors)


class DiT(Family):
    width = DiTWidth()

    @cached_property
    def scheduler(self) -> Any:
        """The noise schedule of the model: that of the pipeline given to `complete`, or DiT-XL/2's by default."""
        return DDPMScheduler(num_train_timesteps=NUM_TIMESTEPS)

    @property
    def flows(self) -> bool:
        """Whether the model was trained by flow matching, which the class of its scheduler says."""
        return _flows(self.scheduler)

    @property
    def preparation(self) -> str:
        return "pipeline.scheduler.scale_model_input = lambda sample, timestep: sample\n" if self.flows else ""

    def forward_inputs(
        self,
        latents: Tensor,
        conditions: Conditions,
        sigmas: Tensor,
        size: tuple[int, int],
    ) -> dict[str, Any]:
        whole = (sigmas * NUM_TIMESTEPS).long().clamp(max=NUM_TIMESTEPS - 1)
        return {
            "hidden_states": latents,
            "timestep": sigmas.float() * NUM_TIMESTEPS if self.flows else whole,
            "class_labels": conditions["class_labels"],
            "return_dict": False,
        }

    def blank(self, count: int, size: tuple[int, int], text_tokens: int) -> tuple[Tensor, Conditions]:
        side = self.arch["sample_size"]
        labels = torch.zeros(count, dtype=torch.long)
        return torch.empty(count, self.arch["in_channels"], side, side), {"class_labels": labels}

    def noise_levels(self, inputs: Mapping[str, Any]) -> Tensor:
        """Return the middle of the noise levels that a timestep stands for; in flow matching it is one level."""
        return (inputs["timestep"] + (0.0 if self.flows else 0.5)) / NUM_TIMESTEPS

    def called_apart(self, transformer: Any) -> list[nn.Module]:
        return [transformer.transformer_blocks[0].norm1.emb]  # the output head calls it

    def training_batch(
        self,
        latents: Tensor,
        conditions: Conditions,
        noise: Tensor,
        sigmas: Tensor,
        size: tuple[int, int],
    ) -> TrainingBatch:
        """Add `noise` to clean `latents` `[B, C, H, W]` by the DDPM schedule, at timestep 1,000 * sigma.

        The target is the noise, the velocity or the clean latents, whichever the scheduler's config says. In flow
        matching both are those of every family.
        """
        if self.flows:
            return super().training_batch(latents, conditions, noise, sigmas, size)
        inputs = self.forward_inputs(latents, conditions, sigmas, size)
        steps = inputs["timestep"]
        inputs["hidden_states"] = self.scheduler.add_noise(latents, noise, steps)
        velocity = self.scheduler.get_velocity(latents, noise, steps)
        targets = {"epsilon": noise, "v_prediction": velocity, "sample": latents}
        return TrainingBatch(inputs, targets[self.scheduler.config.prediction_type], sigmas)

    @torch.no_grad()
    def encode_images(self, pipeline: Any, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        vae = pipeline.vae
        latents = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode() * vae.config.scaling_factor
        return latents, (latents.shape[2], latents.shape[3])

    @torch.no_grad()
    def decode_latents(self, pipeline: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        vae = pipeline.vae
        return vae.decode((latents / vae.config.scaling_factor).to(vae.device, vae.dtype), return_dict=False)[0]

    def denoise(self, latents: Tensor, prediction: Tensor, sigma: float, following: float) -> Tensor:
        """Take a step of DDIM (Song et al., 2010.02502), from one of the schedule's timesteps to another.

        In flow matching it is a step of Euler's method.
        """
        if self.flows:
            return super().denoise(latents, prediction, sigma, following)
        kept, last = self.scheduler.alphas_cumprod, NUM_TIMESTEPS - 1
        here = kept[min(round(sigma * NUM_TIMESTEPS), last)].item()
        there = kept[min(round(following * NUM_TIMESTEPS), last)].item() if following else 1.0  # clean at last
        kind = self.scheduler.config.prediction_type
        if kind == "epsilon":
            clean = (latents - (1 - here) ** 0.5 * prediction) / here**0.5
        elif kind == "v_prediction":
            clean = here**0.5 * latents - (1 - here) ** 0.5 * prediction
        else:
            clean = prediction
        noise = (latents - here**0.5 * clean) / (1 - here) ** 0.5
        return there**0.5 * clean + (1 - there) ** 0.5 * noise

    @property
    def empty_prompt(self) -> str:
        return ""  # no label: there are no negative prompts

    def encode_prompts(self, pipeline: Any, prompts: list[str], references: Sequence[Any] = ()) -> EncodedPrompts:
        labels = torch.tensor(self._labels(pipeline, prompts))
        return EncodedPrompts(prompts, {"class_labels": labels})

    @property
    def num_classes(self) -> int:
        return self.arch["num_embeds_ada_norm"]

    def _count(self, pipeline: Any) -> int:
        """Return how many classes the pipeline names, or if it names none, how many the model has."""
        return max(pipeline.labels.values()) + 1 if pipeline.labels else self.num_classes

    def _labels(self, pipeline: Any, prompts: Sequence[str]) -> list[int]:
        """Return the label of each class, given by its name or its number; "" is no class.

        Raises `UsageError` for one that the model does not have.
        """
        count = self._count(pipeline)
        labels = {str(number): number for number in range(count)} | pipeline.labels | {"": NO_LABEL}
        unknown = next((prompt for prompt in prompts if prompt not in labels), None)
        if unknown is not None:
            names = f"one of its names, {seen(pipeline.labels).removeprefix('it has ')}, or " if pipeline.labels else ""
            raise UsageError(f"{unknown!r} is no class of this model; give {names}a number from 0 to {count - 1}.")
        return [labels[prompt] for prompt in prompts]

    def class_captions(self, pipeline: Any, names: Sequence[str]) -> list[str]:
        """Return the name or number of the class in each folder.

        Folders with names of WordNet, as ImageNet has them, are numbered in their order if there is one for each class.
        """
        if not all(re.fullmatch(r"n\d{8}", name) for name in names):
            self._labels(pipeline, names)
            return list(names)
        count = self._count(pipeline)
        if len(names) != count:
            raise UsageError(
                f"{names[0]} is a name of WordNet, whose class follows from its place among the folders of all {count} "
                f"classes, and there are {len(names)}: add the others, if empty, or rename each to its class's number."
            )
        return [str(number) for number in range(count)]

    def complete(self, pipeline: Any) -> None:
        """Take over the pipeline's scheduler; `UsageError` for one of flow matching whose noise levels rise."""
        scheduler = pipeline.scheduler
        if _flows(scheduler):
            if scheduler.config.get("invert_sigmas"):
                raise UsageError(
                    "invert_sigmas=true in the scheduler_config.json of model.path is not known for a DiT: save the "
                    "pipeline with one whose noise levels fall from 1 to 0, and a model that predicts noise - data."
                )
            self.scheduler = scheduler
            scheduler.scale_model_input = _unscaled
        else:
            self.scheduler = DDPMScheduler.from_config(scheduler.config)
        # diffusers reads the labels from model_index.json, but does not write them when it saves the pipeline.
        pipeline.register_to_config(id2label={str(number): name for name, number in pipeline.labels.items()})

    def initialize(self, transformer: Any) -> None:
        """Zero the modulation of every block, so that it starts as the identity (adaLN-Zero, DiT section 3.2).

        diffusers does not do so itself.
        """
        for block in transformer.transformer_blocks:
            nn.init.zeros_(block.norm1.linear.weight)
            nn.init.zeros_(block.norm1.linear.bias)

    def check_prompts(self, pipeline: Any, prompts: Sequence[str]) -> None:
        self._labels(pipeline, prompts)

    def num_passes(self, sampling: Any) -> int:
        return 2 if sampling.guidance_scale > 1 else 1

    def prompt_arguments(
        self, pipeline: Any, prompts: Sequence[str], references: Sequence[Sequence[Any]] = ()
    ) -> dict[str, Any]:
        return {"class_labels": self._labels(pipeline, prompts)}

    def streams_in(self, stack: str, kwargs: dict[str, Any], inputs: Mapping[str, Any]) -> Streams:
        return {"image": kwargs["hidden_states"]}

    def streams_out(self, stack: str, output: Tensor, inputs: Mapping[str, Any]) -> Streams:
        return {"image": output}

    def masks(self, inputs: dict[str, Any]) -> dict[str, Tensor | None]:
        return {"image": None}

    def sampling_arguments(self, sampling: Any, batch_size: int) -> dict[str, Any]:
        return {"num_inference_steps": sampling.num_inference_steps, "guidance_scale": sampling.guidance_scale}
