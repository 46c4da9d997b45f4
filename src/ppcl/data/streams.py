"""The shapes world, or edits of it, as batches for a transformer: endless, seeded, addressed by step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ppcl.config import DataConfig
from ppcl.data import shapes
from ppcl.data.batches import TrainingBatch
from ppcl.families.base import Conditions, Family
from ppcl.ops import flow_matching

# Steps of two streams share no random numbers as long as a stream is shorter than this.
_STREAM_STRIDE = 1_000_003


class ShapesStream:
    """Batches of one seed. Captions are encoded once, images when they are asked for.

    An embedded teacher's text encoder is told of given pictures no more than that they are there, so that
    instructions can be encoded beforehand too.
    """

    def __init__(self, family: Family, pipeline: Any, config: DataConfig, seed: int, batch_size: int) -> None:
        self.family, self.pipeline, self.config = family, pipeline, config
        self.seed, self.batch_size = seed, batch_size
        self.prompts = family.encode_prompts(pipeline, [*family.world.all_captions(family.categories), ""])

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * _STREAM_STRIDE + number)

    def _encode(self, start: int, count: int) -> tuple[Tensor, tuple[int, int], list[str], Conditions]:
        """Latents and their size, captions, and what the given pictures condition on."""
        family, numbers = self.family, range(start, start + count)
        scenes = [family.world.make_scene(self.seed, number, categories=family.categories) for number in numbers]
        latents, size = family.encode_images(self.pipeline, shapes.pictures(scenes))
        given = zip(*(scene.references for scene in scenes), strict=True)
        references = family.encode_references(self.pipeline, [shapes.to_tensor(list(images)) for images in given])
        return latents, size, [scene.caption for scene in scenes], references

    def __call__(self, step: int) -> TrainingBatch:
        """Training batch number `step`, with captions dropped for guidance."""
        latents, size, captions, references = self._encode(step * self.batch_size, self.batch_size)
        generator = self._generator(step)
        dropped = torch.rand(self.batch_size, generator=generator) < self.config.caption_dropout
        captions = ["" if drop else caption for drop, caption in zip(dropped.tolist(), captions, strict=True)]
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        sigmas = flow_matching.sample_sigmas(
            self.batch_size, generator, scheme=self.config.timesteps, shift=self.config.shift
        ).to(latents)
        return self.family.training_batch(latents, self.prompts(captions) | references, noise, sigmas, size)

    def calibration(self, num_samples: int, num_timesteps: int) -> Iterator[TrainingBatch]:
        """Every one of `num_samples` samples at every one of `num_timesteps` noise levels.

        The levels are those of a denoising run of that many steps: from 1 down to 1 / num_timesteps.
        """
        grid = torch.linspace(1.0, 1.0 / num_timesteps, num_timesteps)
        grid = self.config.shift * grid / (1 + (self.config.shift - 1) * grid)
        for start in range(0, num_samples, self.batch_size):
            count = min(self.batch_size, num_samples - start)
            latents, size, captions, references = self._encode(start, count)
            conditions = self.prompts(captions) | references
            noise = torch.randn(latents.shape, generator=self._generator(start)).to(latents)
            for sigma in grid.tolist():
                sigmas = latents.new_full((count,), sigma)
                yield self.family.training_batch(latents, conditions, noise, sigmas, size)
