"""Endless streams of seeded batches, addressed by step: the base classes, and the stream of the shapes world.

The shapes world, `ppcl.data.worlds`, draws pictures of shapes (or edits of them) for a tiny teacher.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ppcl.config import DataConfig
from ppcl.data.batches import TrainingBatch, own_rows
from ppcl.data.worlds import shapes
from ppcl.errors import UsageError
from ppcl.families.base import Conditions, Family, without_needless_mask
from ppcl.ops import flow_matching

# Steps of two streams share no random numbers as long as a stream is shorter than this.
_STREAM_STRIDE = 1_000_003


class Stream(ABC):
    """Returns training batches by step.

    `share` is (rank, number of ranks). Each rank reads its rows of every batch; random numbers are drawn for the whole
    batch on every rank, so that they do not depend on the number of ranks.

    `remark`: a line that says which samples are left out, if any.
    """

    share = (0, 1)
    remark = ""

    def __init__(self, family: Family, seed: int, batch_size: int) -> None:
        self.family, self.seed, self.batch_size = family, seed, batch_size

    @abstractmethod
    def divided(self, step: int, parts: int) -> list[TrainingBatch]:
        """Return this rank's rows of training batch number `step` as `parts` batches of equal size."""

    @abstractmethod
    def calibration(self, num_samples: int, num_timesteps: int) -> Iterator[TrainingBatch]:
        """Yield `num_samples` samples, each at every one of `num_timesteps` noise levels, captions included."""

    @abstractmethod
    def captions(self, step: int) -> list[str]:
        """Return the captions of batch number `step` as text."""

    @abstractmethod
    def names(self, steps: Iterable[int]) -> set[str]:
        """Return the names of the different samples in batches `steps`."""

    def __call__(self, step: int) -> TrainingBatch:
        """Return training batch number `step`, this rank's rows of it.

        Raises `UsageError` if samples of different shapes make it several batches.
        """
        batches = self.divided(step, 1)
        if len(batches) > 1:
            raise UsageError(
                f"a batch of {self.batch_size} recorded calls has several shapes, which this training cannot take "
                "together: set its batch_size to 1."
            )
        return batches[0]

    def _with_tokens(self, batches: list[TrainingBatch]) -> list[TrainingBatch]:
        """Return the batches of a step with their `tokens`, of the streams that are padded in all of them."""
        masks = [self.family.masks(batch.inputs) for batch in batches]
        counts = [{stream: mask.sum().item() for stream, mask in each.items() if mask is not None} for each in masks]
        padded = [stream for stream in counts[0] if all(stream in count for count in counts)]
        mean = {stream: sum(count[stream] for count in counts) / len(counts) for stream in padded}
        return [
            replace(batch, tokens={stream: count[stream] / mean[stream] for stream in padded})
            for batch, count in zip(batches, counts, strict=True)
        ]


class LatentStream(Stream):
    """Adds noise to the clean latents of a source's samples. Some captions are dropped (`data.caption_dropout`).

    So the model learns classifier-free guidance.

    `scheduler`: the config of the model's own, for data.shift=null.
    """

    scheduler: Mapping[str, Any] = {}

    def __init__(self, family: Family, config: DataConfig, seed: int, batch_size: int) -> None:
        super().__init__(family, seed, batch_size)
        self.config = config

    @abstractmethod
    def samples(self, step: int, rows: range, dropped: Sequence[bool]) -> tuple[Tensor, tuple[int, int], Conditions]:
        """Return latents `[B, N, C]`, their (height, width) in tokens, and conditions of the `rows` of batch `step`.

        `dropped` says of each row whether its caption is replaced by the empty one.
        """

    def names(self, steps: Iterable[int]) -> set[str]:
        """Return the names of the different samples in batches `steps`. Here no sample is ever repeated."""
        return {f"{step}-{row}" for step in steps for row in range(self.batch_size)}

    def _generator(self, number: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * _STREAM_STRIDE + number)

    def divided(self, step: int, parts: int) -> list[TrainingBatch]:
        generator = self._generator(step)
        dropped = torch.rand(self.batch_size, generator=generator) < self.config.caption_dropout
        rows = own_rows(self.batch_size, self.share)
        own = slice(rows.start, rows.stop)
        latents, size, conditions = self.samples(step, rows, dropped[own].tolist())
        conditions = without_needless_mask(conditions)
        noise = torch.randn((self.batch_size, *latents.shape[1:]), generator=generator)[own].to(latents)
        sigmas = flow_matching.sample_sigmas(
            self.batch_size, generator, scheme=self.config.timesteps or "uniform", shift=self._shift(latents)
        )[own].to(latents)
        batches = []
        for number in range(parts):
            part = own_rows(len(rows), (number, parts))
            some = slice(part.start, part.stop)
            chosen = {name: value[some] for name, value in conditions.items()}
            batch = self.family.training_batch(latents[some], chosen, noise[some], sigmas[some], size)
            batches.append(replace(batch, divided=self.share[1] > 1))
        return batches if parts == 1 else self._with_tokens(batches)

    def _shift(self, latents: Tensor) -> float:
        """Return the shift of the noise levels of pictures with these latents."""
        shift = self.config.shift
        return flow_matching.shift_of(self.scheduler, latents.shape[1]) if shift is None else shift

    def calibration(self, num_samples: int, num_timesteps: int) -> Iterator[TrainingBatch]:
        """Yield `num_samples` samples, each at every one of `num_timesteps` noise levels, captions included.

        The levels are those of a denoising run of `num_timesteps` steps: evenly spaced from 1 down to
        1 / num_timesteps, then shifted by `data.shift`. With `data.shift=null` they are the scheduler's.
        """
        for start in range(0, num_samples, self.batch_size):
            count = min(self.batch_size, num_samples - start)
            latents, size, conditions = self.samples(start // self.batch_size, range(count), [False] * count)
            conditions = without_needless_mask(conditions)
            noise = torch.randn(latents.shape, generator=self._generator(start)).to(latents)
            terminal = self.scheduler.get("shift_terminal") or 0.0 if self.config.shift is None else 0.0
            for sigma in flow_matching.levels_of_drawing(num_timesteps, self._shift(latents), terminal):
                sigmas = latents.new_full((count,), sigma)
                yield self.family.training_batch(latents, conditions, noise, sigmas, size)


class WorldEncoder:
    """Encodes captions of a toy world when they are asked for, for a world with too many of them to encode in advance.

    All batches are padded to the length of the world's longest caption. If the text encoder is being trained, gradients
    reach it.
    """

    def __init__(self, family: Family, pipeline: Any) -> None:
        self.family, self.pipeline = family, pipeline
        self.longest = family.world.longest_caption()

    def __call__(self, captions: list[str]) -> Conditions:
        """Return the conditions `[len(captions), ...]`."""
        distinct = list(dict.fromkeys([*captions, self.longest]))
        return self.family.encode_prompts(self.pipeline, distinct)(captions)


@torch.no_grad()
def encode_world(
    family: Family, pipeline: Any, categories: Sequence[str] | None = None
) -> Callable[[list[str]], Conditions]:
    """Return a function that gives the conditions of captions of `categories`, and of the empty caption.

    All captions are encoded in advance by the pipeline's text encoder, unless they are too many. `categories`: None
    takes the family's.
    """
    categories = categories or family.categories
    if {*categories} & {*family.world.OPEN}:
        return WorldEncoder(family, pipeline)
    return family.encode_prompts(pipeline, [*family.world.all_captions(sorted({*categories})), ""])


class ShapesStream(LatentStream):
    """Stream of the shapes world. Captions are encoded in advance, pictures when their batch is asked for.

    `prompts`: gives the conditions of captions, if several streams share it; None makes it here.
    `categories`: the categories to draw from, a repeated one more often. None: the family's.

    Instructions of edits can be encoded in advance too, since the text encoder of an embedded teacher sees only how
    many pictures are given, not what is in them.
    """

    def __init__(
        self,
        family: Family,
        pipeline: Any,
        config: DataConfig,
        seed: int,
        batch_size: int,
        prompts: Callable[[list[str]], Conditions] | None = None,
        categories: Sequence[str] | None = None,
    ) -> None:
        super().__init__(family, config, seed, batch_size)
        self.pipeline = pipeline
        self.categories = categories or family.categories
        self.prompts = prompts or encode_world(family, pipeline, self.categories)

    def _scenes(self, step: int, rows: Iterable[int]) -> list[Any]:
        start, make_scene = step * self.batch_size, self.family.world.make_scene
        return [make_scene(self.seed, start + row, categories=self.categories) for row in rows]

    def captions(self, step: int) -> list[str]:
        return [scene.caption for scene in self._scenes(step, range(self.batch_size))]

    def samples(self, step: int, rows: range, dropped: Sequence[bool]) -> tuple[Tensor, tuple[int, int], Conditions]:
        family, scenes = self.family, self._scenes(step, rows)
        latents, size = family.encode_images(self.pipeline, shapes.pictures(scenes))
        given = zip(*(scene.references for scene in scenes), strict=True)
        references = family.encode_references(self.pipeline, [shapes.to_tensor(list(images)) for images in given])
        captions = ["" if drop else scene.caption for drop, scene in zip(dropped, scenes, strict=True)]
        return latents, size, self.prompts(captions) | references
