"""Batches for a transformer: endless, seeded, addressed by step; of the shapes world, or edits of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ppcl.config import DataConfig
from ppcl.data.batches import TrainingBatch, own_rows
from ppcl.data.worlds import shapes
from ppcl.families.base import Conditions, EncodedPrompts, Family
from ppcl.ops import flow_matching

# Steps of two streams share no random numbers as long as a stream is shorter than this.
_STREAM_STRIDE = 1_000_003


class Stream(ABC):
    """Batches of one seed: a source's latents and conditions, noised.

    Of each batch rank `share[0]` of `share[1]` is given its rows; all numbers are drawn for the whole batch.
    """

    share = (0, 1)
    from_disk = False

    def __init__(self, family: Family, config: DataConfig, seed: int, batch_size: int) -> None:
        self.family, self.config = family, config
        self.seed, self.batch_size = seed, batch_size

    @abstractmethod
    def samples(self, step: int, dropped: Sequence[bool]) -> tuple[Tensor, tuple[int, int], Conditions]:
        """Latents `[B, N, C]`, their size in tokens, and conditions of the first samples of batch `step`.

        As many as `dropped` is long, which says whose captions are left out.
        """

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * _STREAM_STRIDE + number)

    def __call__(self, step: int) -> TrainingBatch:
        """Training batch number `step`, with captions dropped for guidance."""
        generator = self._generator(step)
        dropped = torch.rand(self.batch_size, generator=generator) < self.config.caption_dropout
        latents, size, conditions = self.samples(step, dropped.tolist())
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        sigmas = flow_matching.sample_sigmas(
            self.batch_size, generator, scheme=self.config.timesteps, shift=self.config.shift
        ).to(latents)
        rows = own_rows(self.batch_size, self.share)
        conditions = {name: value[rows] for name, value in conditions.items()}
        batch = self.family.training_batch(latents[rows], conditions, noise[rows], sigmas[rows], size)
        return replace(batch, divided=self.share[1] > 1)

    def calibration(self, num_samples: int, num_timesteps: int) -> Iterator[TrainingBatch]:
        """Every one of `num_samples` samples at every one of `num_timesteps` noise levels.

        The levels are those of a denoising run of that many steps: from 1 down to 1 / num_timesteps.
        """
        grid = torch.linspace(1.0, 1.0 / num_timesteps, num_timesteps)
        grid = self.config.shift * grid / (1 + (self.config.shift - 1) * grid)
        for start in range(0, num_samples, self.batch_size):
            count = min(self.batch_size, num_samples - start)
            latents, size, conditions = self.samples(start // self.batch_size, [False] * count)
            noise = torch.randn(latents.shape, generator=self._generator(start)).to(latents)
            for sigma in grid.tolist():
                sigmas = latents.new_full((count,), sigma)
                yield self.family.training_batch(latents, conditions, noise, sigmas, size)


def encode_world(family: Family, pipeline: Any) -> EncodedPrompts:
    """Every caption of the family's world, and the empty one, as the pipeline encodes them."""
    return family.encode_prompts(pipeline, [*family.world.all_captions(family.categories), ""])


class ShapesStream(Stream):
    """Captions are encoded beforehand, here or once for several streams (`prompts`), images when they are asked for.

    An embedded teacher's text encoder is told of given pictures no more than that they are there, so that
    instructions can be encoded beforehand too.
    """

    def __init__(
        self,
        family: Family,
        pipeline: Any,
        config: DataConfig,
        seed: int,
        batch_size: int,
        prompts: EncodedPrompts | None = None,
    ) -> None:
        super().__init__(family, config, seed, batch_size)
        self.pipeline = pipeline
        self.prompts = prompts or encode_world(family, pipeline)

    def samples(self, step: int, dropped: Sequence[bool]) -> tuple[Tensor, tuple[int, int], Conditions]:
        family, start = self.family, step * self.batch_size
        numbers = range(start, start + len(dropped))
        scenes = [family.world.make_scene(self.seed, number, categories=family.categories) for number in numbers]
        latents, size = family.encode_images(self.pipeline, shapes.pictures(scenes))
        given = zip(*(scene.references for scene in scenes), strict=True)
        references = family.encode_references(self.pipeline, [shapes.to_tensor(list(images)) for images in given])
        captions = ["" if drop else scene.caption for drop, scene in zip(dropped, scenes, strict=True)]
        return latents, size, self.prompts(captions) | references
