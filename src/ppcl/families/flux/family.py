"""FLUX.1: dual-stream blocks followed by single-stream blocks; FLUX.1-dev has 19 and 38, FLUX.1 Lite 8 and 38.

What is special about it:
- Blocks of both stacks are called with keyword arguments `hidden_states` (image) and
  `encoder_hidden_states` (text) and return (text, image). Single-stream blocks join the two and split them
  again inside. After the last block only the image is used.
- The prompt goes in twice: T5's tokens are the text stream, CLIP's pooled embedding goes into the
  modulation. T5's padding is not masked: padded tokens attend and are attended to like all
  others, and count in statistics and losses.
- `timestep` is sigma itself, in [0, 1]; the model multiplies by 1000.
- FLUX.1-dev is guidance-distilled: the guidance scale is an input, and one forward per step is enough. There is a
  second one only if `true_cfg_scale` is above 1.
- The image's positions are `img_ids` `[N, 3]`, without a batch dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.artifacts.plan import Width
from ppcl.families.base import Conditions, DualStreamFamily, EncodedPrompts
from ppcl.families.flux.transformer_flux_pruned import (
    PrunedFluxSingleTransformerBlock,
    PrunedFluxTransformer2DModel,
    PrunedFluxTransformerBlock,
)
from ppcl.families.pruning import width_roles
from ppcl.families.width import DUAL_STREAM_PROJECTORS, WidthSurgery
from ppcl.layers import Layout
from ppcl.surgery.share import share_pruned


class FluxWidth(WidthSurgery):
    transformer_class = PrunedFluxTransformer2DModel
    projectors = DUAL_STREAM_PROJECTORS

    def config(self, places: Width, layout: Layout) -> dict[str, Any]:
        return {
            "pruned_text": places["transformer_blocks"]["text"],
            "pruned_ffn": places["transformer_blocks"]["ffn"],
            "pruned_single_ffn": places["single_transformer_blocks"]["ffn"],
            "text_output": layout.text_output,
            "keep_text_query": layout.keep_text_query,
        }

    def roles(
        self, stack: str, text: list[int], ffn: list[int], num_layers: int, layout: Layout
    ) -> list[dict[str, Any] | None]:
        if stack == "single_transformer_blocks":
            return [{"project_ffn": True} if index in ffn else None for index in range(num_layers)]
        return list(width_roles(num_layers, text, ffn, layout.text_output, layout.keep_text_query))

    def prune(self, block: nn.Module, role: dict[str, Any], projectors: Mapping[str, Tensor]) -> nn.Module:
        source: Any = block
        shape = source.attn.inner_dim, source.attn.heads, source.attn.head_dim
        single = hasattr(source, "proj_out")
        with torch.device("meta"):
            pruned = (PrunedFluxSingleTransformerBlock if single else PrunedFluxTransformerBlock)(*shape, **role)
        return share_pruned(pruned, block, projectors)

    def text_qkv_input(self, block: nn.Module, kwargs: dict[str, Any]) -> Tensor:
        source: Any = block
        return source.norm1_context(kwargs["encoder_hidden_states"], emb=kwargs["temb"])[0]


class Flux(DualStreamFamily):
    width = FluxWidth()

    def forward_inputs(
        self,
        latents: Tensor,
        conditions: Conditions,
        sigmas: Tensor,
        size: tuple[int, int],
    ) -> dict[str, Any]:
        rows, columns = (torch.arange(length).to(latents) for length in size)
        grid = torch.cartesian_prod(rows, columns)  # [N, 2]
        text = conditions["prompt_embeds"]
        inputs = {
            "hidden_states": latents,
            "encoder_hidden_states": text,
            "pooled_projections": conditions["pooled_prompt_embeds"],
            "timestep": sigmas,
            "img_ids": torch.cat([torch.zeros_like(grid[:, :1]), grid], dim=1),
            "txt_ids": latents.new_zeros(text.shape[1], 3),
            "return_dict": False,
        }
        if self.arch.get("guidance_embeds"):
            inputs["guidance"] = torch.full_like(sigmas, self.sampling.guidance_scale)
        return inputs

    @torch.no_grad()
    def encode_images(self, pipeline: Any, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        vae = pipeline.vae
        latents = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mode()  # [B, z, h, w]
        latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
        packed = pipeline._pack_latents(latents, *latents.shape)  # [B, hw/4, 4z]
        return packed, (latents.shape[2] // 2, latents.shape[3] // 2)

    @torch.no_grad()
    def decode_latents(self, pipeline: Any, latents: Tensor, size: tuple[int, int]) -> Tensor:
        vae, scale = pipeline.vae, pipeline.vae_scale_factor
        unpacked = pipeline._unpack_latents(latents, 2 * scale * size[0], 2 * scale * size[1], scale)  # [B, z, h, w]
        unpacked = unpacked / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(unpacked.to(vae.device, vae.dtype), return_dict=False)[0]

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: list[str], references: Sequence[Any] = ()) -> EncodedPrompts:
        length = self.sampling.max_sequence_length
        embeddings, pooled, _ = pipeline.encode_prompt(prompts, max_sequence_length=length)
        return EncodedPrompts(prompts, {"prompt_embeds": embeddings, "pooled_prompt_embeds": pooled})

    def masks(self, inputs: dict[str, Any]) -> dict[str, Tensor | None]:
        return {"image": None, "text": None}

    def sampling_arguments(self, sampling: Any, batch_size: int) -> dict[str, Any]:
        arguments = {
            "height": sampling.height,
            "width": sampling.width,
            "num_inference_steps": sampling.num_inference_steps,
            "guidance_scale": sampling.guidance_scale,
            "max_sequence_length": sampling.max_sequence_length,
        }
        if sampling.true_cfg_scale > 1:
            negative = [sampling.negative_prompt] * batch_size
            arguments |= {"true_cfg_scale": sampling.true_cfg_scale, "negative_prompt": negative}
        return arguments
