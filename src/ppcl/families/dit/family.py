"""DiT: class-conditional blocks of one stream; DiT-XL/2 has 28.

What is odd about it:
- A label in the place of a prompt; 1000 is no label, which guidance needs.
- The output head takes its conditioning from the embedding inside block 0: that block stays the teacher's, so no
  interval starts there.
- Every block embeds time and label anew, and in training mode drops labels on its own: models stay in
  evaluation mode, and labels are dropped with the data.
- It predicts what its scheduler says, DiT-XL/2 the noise, of a DDPM at one of 1,000 timesteps, and behind it a variance
  that sampling leaves out.
- Latents are pictures `[B, C, H, W]`, cut into patches inside the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from ppcl.artifacts.plan import Width
from ppcl.data.batches import TrainingBatch
from ppcl.errors import UsageError
from ppcl.families.base import Conditions, EncodedPrompts, Family
from ppcl.families.dit.transformer_dit_pruned import PrunedDiTBlock, PrunedDiTTransformer2DModel
from ppcl.families.width import WidthSurgery
from ppcl.layers import Layout
from ppcl.surgery.share import share_pruned
from ppcl.taps import Streams

NO_LABEL = 1000
NUM_TIMESTEPS = 1000


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
        """The noise that the model knows: DiT-XL/2's, or that of the pipeline which `complete` was given."""
        return DDPMScheduler(num_train_timesteps=NUM_TIMESTEPS)

    def forward_inputs(
        self,
        latents: Tensor,
        conditions: Conditions,
        sigmas: Tensor,
        size: tuple[int, int],
    ) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "timestep": (sigmas * NUM_TIMESTEPS).long().clamp(max=NUM_TIMESTEPS - 1),
            "class_labels": conditions["class_labels"],
            "return_dict": False,
        }

    def called_apart(self, transformer: Any) -> list[nn.Module]:
        return [transformer.transformer_blocks[0].norm1.emb]  # for the last layer's modulation

    def training_batch(
        self,
        latents: Tensor,
        conditions: Conditions,
        noise: Tensor,
        sigmas: Tensor,
        size: tuple[int, int],
    ) -> TrainingBatch:
        """Noise by DDPM's schedule; `sigmas` are shares of its 1,000 timesteps."""
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

    def encode_prompts(self, pipeline: Any, prompts: list[str], references: Sequence[Any] = ()) -> EncodedPrompts:
        labels = torch.tensor(self._labels(pipeline, prompts))
        return EncodedPrompts(prompts, {"class_labels": labels})

    @staticmethod
    def _labels(pipeline: Any, prompts: Sequence[str]) -> list[int]:
        unknown = [prompt for prompt in prompts if prompt and prompt not in pipeline.labels]
        if unknown:
            raise UsageError(f"{unknown[0]!r} is no class of this model; it has {', '.join(pipeline.labels)}.")
        return [pipeline.labels[prompt] if prompt else NO_LABEL for prompt in prompts]

    def complete(self, pipeline: Any) -> None:
        self.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        # diffusers reads the labels from model_index.json and does not write them again.
        pipeline.register_to_config(id2label={str(number): name for name, number in pipeline.labels.items()})

    def initialize(self, transformer: Any) -> None:
        """adaLN-Zero (DiT, section 3.2): every block starts as the identity, which diffusers leaves to who trains."""
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
