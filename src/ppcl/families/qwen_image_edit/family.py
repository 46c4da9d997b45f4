"""Qwen-Image-Edit (one reference picture), -2509 and -2511 (several): Qwen-Image's blocks.

Reference pictures are the pictures that the user gives to be edited.

What is special about it:
- The latents of the reference pictures follow the noisy latents as further image tokens. In `img_shapes` each picture
  has a frame of its own. The pipeline cuts the model's output for these tokens off.
- The pipelines resize every reference picture to a megapixel for the VAE, whatever the size of the output.
- Without a size they draw a megapixel in the aspect ratio of the last reference picture, so that both have the same
  grid of tokens.
- The first pipeline resizes all reference pictures of a call to the size of the call's first.
- The text encoder sees the reference pictures too (of 2509, at a smaller size). So every prompt is encoded together
  with its pictures, even the empty prompt for guidance.
- 2509's pipeline takes one prompt per call.
- A model with `zero_cond_t` (2511) modulates the tokens of reference pictures with timestep 0, as they have no noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import (
    CONDITION_IMAGE_SIZE,
    VAE_IMAGE_SIZE,
    calculate_dimensions,
)
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ppcl.data.buckets import Cut
from ppcl.data.worlds.shapes import BACKGROUND
from ppcl.families.base import Conditions, EncodedPrompts
from ppcl.families.qwen_image.family import QwenImage

_BLANK = Image.new("RGB", (1024, 1024), (BACKGROUND,) * 3)


class QwenImageEdit(QwenImage):
    seen_area = VAE_IMAGE_SIZE  # pixels of a reference picture as the text encoder sees it

    def forward_inputs(
        self,
        latents: Tensor,
        conditions: Conditions,
        sigmas: Tensor,
        size: tuple[int, int],
    ) -> dict[str, Any]:
        inputs = super().forward_inputs(latents, conditions, sigmas, size)
        inputs["hidden_states"] = torch.cat([latents, conditions["image_latents"].to(latents)], dim=1)
        inputs["img_shapes"] = [
            [(1, *size), *((1, height, width) for height, width in sizes)]
            for sizes in conditions["image_sizes"].tolist()
        ]
        return inputs

    def blank(self, count: int, size: tuple[int, int], text_tokens: int) -> tuple[Tensor, Conditions]:
        latents, conditions = super().blank(count, size, text_tokens)
        given = self.facts.num_references
        conditions["image_latents"] = torch.cat([latents] * given, dim=1)
        sizes: Any = np.array([[size] * given] * count)  # no tensor: its numbers have to be known
        return latents, conditions | {"image_sizes": sizes}

    def picture_size(self, pipeline: Any, ratio: float, area: int) -> tuple[int, int]:
        """Return the size of what the pipeline draws for a reference picture of this aspect ratio."""
        width, height = calculate_dimensions(area, ratio)
        multiple = 2 * pipeline.vae_scale_factor
        return height // multiple * multiple, width // multiple * multiple

    def fit_references(
        self, pipeline: Any, pictures: Sequence[Any], ratios: Sequence[float]
    ) -> tuple[list[Any], list[Tensor]]:
        seen, large = [], []
        for picture, ratio in zip(pictures, ratios, strict=True):
            cut, (width, height) = Cut.middle(picture, ratio), calculate_dimensions(self.seen_area, ratio)
            seen.append(cut.of(picture, (height, width)))
            large.append(cut.of(picture, self.picture_size(pipeline, ratio, VAE_IMAGE_SIZE)))
        return seen, [pipeline.image_processor.preprocess(picture) for picture in large]

    def encode_references(self, pipeline: Any, pictures: Sequence[Tensor]) -> Conditions:
        """Return `image_latents` `[B, tokens, C]` of all pictures, and `image_sizes` `[B, pictures, 2]` in tokens."""
        encoded = [self.encode_images(pipeline, images) for images in pictures]
        latents = torch.cat([latents for latents, _ in encoded], dim=1)
        sizes = torch.tensor([size for _, size in encoded])
        return {"image_latents": latents, "image_sizes": sizes.expand(len(latents), -1, -1)}

    @torch.no_grad()
    def encode_prompts(self, pipeline: Any, prompts: list[str], references: Sequence[Any] = ()) -> EncodedPrompts:
        pictures = list(references) or [_BLANK] * self.num_references
        length = self.sampling.max_sequence_length
        encoded = [
            pipeline.encode_prompt([prompt], image=pictures, max_sequence_length=length)[0] for prompt in prompts
        ]
        longest = max(embedding.shape[1] for embedding in encoded)
        embeddings = torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[1])) for part in encoded])
        lengths = torch.tensor([part.shape[1] for part in encoded], device=embeddings.device)
        mask = torch.arange(longest, device=embeddings.device) < lengths[:, None]
        return EncodedPrompts(prompts, {"prompt_embeds": embeddings, "prompt_embeds_mask": mask})

    def sampling_arguments(self, sampling: Any, batch_size: int) -> dict[str, Any]:
        """Leave out a size that is None, for which the pipeline takes the aspect ratio of the reference picture."""
        arguments = super().sampling_arguments(sampling, batch_size)
        return {name: value for name, value in arguments.items() if value is not None}

    def prompt_arguments(
        self, pipeline: Any, prompts: Sequence[str], references: Sequence[Sequence[Any]] = ()
    ) -> dict[str, Any]:
        return {"prompt": list(prompts), "image": [pictures[0] for pictures in references]}


class QwenImageEditPlus(QwenImageEdit):
    seen_area = CONDITION_IMAGE_SIZE
    prompts_per_call = 1

    def prompt_arguments(
        self, pipeline: Any, prompts: Sequence[str], references: Sequence[Sequence[Any]] = ()
    ) -> dict[str, Any]:
        (pictures,) = references
        return {"prompt": list(prompts), "image": list(pictures)}
