"""Qwen-Image: 60 dual-stream blocks, text first in what a block returns.

What is odd about it:
- A block is called with keyword arguments `hidden_states` (image) and `encoder_hidden_states` (text)
  and returns (text, image). Both streams run to the end; only the image is projected.
- `timestep` is sigma itself, in [0, 1]; the model multiplies by 1000.
- Padded text tokens are masked as keys but still flow through the text stream: they are garbage
  there and must be left out of every statistic and loss.
- Latents are a video VAE's, one frame, packed 2x2.
- Guidance is `true_cfg_scale`, on only with a negative prompt, which must be a list as long as the
  prompts (a single string is not repeated).
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from ppcl.families.base import Family, PromptEmbeddings
from ppcl.taps import Streams


class QwenImage(Family):
    name = "qwen_image"
    transformer_class = QwenImageTransformer2DModel

    def forward_inputs(
        self,
        latents: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor,
        sigmas: Tensor,
        size: tuple[int, int],
    ) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "encoder_hidden_states": prompt_embeds,
            "encoder_hidden_states_mask": prompt_mask,
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
    def encode_prompts(self, pipeline: Any, prompts: list[str]) -> PromptEmbeddings:
        embeddings, mask = pipeline.encode_prompt(prompts)
        if mask is None:
            mask = torch.ones(embeddings.shape[:2])
        return PromptEmbeddings(prompts, embeddings, mask.bool())

    def streams_in(self, stack: str, kwargs: dict[str, Any]) -> Streams:
        return {"image": kwargs["hidden_states"], "text": kwargs["encoder_hidden_states"]}

    def streams_out(self, stack: str, output: tuple[Tensor, Tensor]) -> Streams:
        return {"image": output[1], "text": output[0]}

    def masks(self, inputs: dict[str, Any]) -> dict[str, Tensor | None]:
        return {"image": None, "text": inputs["encoder_hidden_states_mask"]}

    def sampling_arguments(self, sampling: Any, batch_size: int) -> dict[str, Any]:
        return {
            "height": sampling.height,
            "width": sampling.width,
            "num_inference_steps": sampling.num_inference_steps,
            "true_cfg_scale": sampling.true_cfg_scale,
            "negative_prompt": [sampling.negative_prompt] * batch_size,
        }
