"""Qwen-Image: 60 dual-stream blocks.

What is special about it:
- A block is called with keyword arguments `hidden_states` (image) and `encoder_hidden_states` (text)
  and returns (text, image). Both streams run through all blocks; only the image becomes the output.
- `timestep` is sigma itself, in [0, 1]; the model multiplies by 1000.
- Padded text tokens are masked as keys, but stay in the text stream. Their values there mean nothing, so every
  statistic and loss must leave them out.
- Latents come from a video VAE: one frame, packed 2x2.
- The guidance scale is `true_cfg_scale`. It works only with a negative prompt, which must be a list as long as the
  list of prompts (the pipeline does not repeat a single string).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.artifacts.plan import Width
from ppcl.families.base import MASK, Conditions, DualStreamFamily, EncodedPrompts
from ppcl.families.pruning import width_roles
from ppcl.families.qwen_image.transformer_qwen_image_pruned import (
    PrunedQwenImageTransformer2DModel,
    PrunedQwenImageTransformerBlock,
    text_qkv_input,
)
from ppcl.families.width import DUAL_STREAM_PROJECTORS, WidthSurgery
from ppcl.layers import Layout
from ppcl.surgery.share import share_pruned


class QwenImageWidth(WidthSurgery):
    transformer_class = PrunedQwenImageTransformer2DModel
    projectors = DUAL_STREAM_PROJECTORS

    def config(self, places: Width, layout: Layout) -> dict[str, Any]:
        return {
            "pruned_text": places["transformer_blocks"]["text"],
            "pruned_ffn": places["transformer_blocks"]["ffn"],
            "text_output": layout.text_output,
            "keep_text_query": layout.keep_text_query,
        }

    def roles(
        self, stack: str, text: list[int], ffn: list[int], num_layers: int, layout: Layout
    ) -> list[dict[str, Any] | None]:
        return list(width_roles(num_layers, text, ffn, layout.text_output, layout.keep_text_query))

    def prune(self, block: nn.Module, role: dict[str, Any], projectors: Mapping[str, Tensor]) -> nn.Module:
        source: Any = block
        with torch.device("meta"):
            pruned = PrunedQwenImageTransformerBlock(
                source.dim,
                source.num_attention_heads,
                source.attention_head_dim,
                zero_cond_t=source.zero_cond_t,
                eps=source.img_norm1.eps,
                **role,
            )
        return share_pruned(pruned, block, projectors)

    def text_qkv_input(self, block: nn.Module, kwargs: dict[str, Any]) -> Tensor:
        temb = kwargs["temb"]
        block_: Any = block
        if block_.zero_cond_t:
            temb = temb.chunk(2, dim=0)[0]
        return text_qkv_input(block_, kwargs["encoder_hidden_states"], temb)[0]


class QwenImage(DualStreamFamily):
    width = QwenImageWidth()

    def forward_inputs(
        self,
        latents: Tensor,
        conditions: Conditions,
        sigmas: Tensor,
        size: tuple[int, int],
    ) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "encoder_hidden_states": conditions["prompt_embeds"],
            "encoder_hidden_states_mask": conditions.get(MASK),
            "timestep": sigmas,
            "img_shapes": [[(1, *size)]] * len(latents),
            "return_dict": False,
        }

    @torch.no_grad()
    def encode_images(self, pipeline: Any, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        vae = pipeline.vae
        frames = images.unsqueeze(2).to(vae.device, vae.dtype)  # [B, 3, 1, H, W]
        latents = vae.encode(frames).latent_dist.mode()[:, :, 0]  # [B, z, h, w]
        mean = latents.new_tensor(vae.config.latents_mean).view(1, -1, 1, 1)
        std = latents.new_tensor(vae.config.latents_std).view(1, -1, 1, 1)
        packed = pipeline._pack_latents((latents - mean) / std, *latents.shape)  # [B, hw/4, 4z]
        return packed, (latents.shape[2] // 2, latents.shape[3] // 2)

    @torch.no_grad()
    def decode_latents(self, pipeline: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        vae, scale = pipeline.vae, pipeline.vae_scale_factor
        frames = pipeline._unpack_latents(latents, 2 * scale * size[0], 2 * scale * size[1], scale)  # [B, z, 1, h, w]
        mean = frames.new_tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
        std = frames.new_tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
        return vae.decode((frames * std + mean).to(vae.device, vae.dtype), return_dict=False)[0][:, :, 0]

    def encode_prompts(self, pipeline: Any, prompts: list[str], references: Sequence[Any] = ()) -> EncodedPrompts:
        embeddings, mask = pipeline.encode_prompt(prompts, max_sequence_length=self.sampling.max_sequence_length)
        if mask is None:
            mask = torch.ones(embeddings.shape[:2])
        return EncodedPrompts(prompts, {"prompt_embeds": embeddings, "prompt_embeds_mask": mask.bool()})

    def masks(self, inputs: dict[str, Any]) -> dict[str, Tensor | None]:
        return {"image": None, "text": inputs["encoder_hidden_states_mask"]}

    def stream_of(self, linear: str) -> str:
        text = ("txt_", "ehs_proj", "attn.add_", "attn.to_add_out")
        return "text" if linear.startswith(text) else "image"

    def sampling_arguments(self, sampling: Any, batch_size: int) -> dict[str, Any]:
        return {
            "height": sampling.height,
            "width": sampling.width,
            "num_inference_steps": sampling.num_inference_steps,
            "true_cfg_scale": sampling.true_cfg_scale,
            "negative_prompt": [sampling.negative_prompt] * batch_size,
            "max_sequence_length": sampling.max_sequence_length,
        }
