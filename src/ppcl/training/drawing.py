"""Draws sample pictures during a training: the same prompts and noise by the teacher and by what is being trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch.loggers import Logger, WandbLogger
from PIL import Image
from torch import Tensor, nn

from ppcl.artifacts.headers import Header
from ppcl.artifacts.samples import Samples, forget_samples, load_sample, sample_path, samples_folder, save_sample
from ppcl.context import Run
from ppcl.data.batches import TrainingBatch
from ppcl.data.cached import SIZES
from ppcl.data.streams import LatentStream
from ppcl.families.base import Conditions, Family, without_needless_mask
from ppcl.memory.checks import room_for_pictures
from ppcl.memory.pictures import NO_ROOM
from ppcl.ops import flow_matching
from ppcl.precision import computing
from ppcl.training.samples import draws_pictures, picture_steps, why_no_pictures

_LOOKED_AT = 4  # held-out samples for each prompt that is wanted, as captions may repeat
_GAP = 4  # pixels between the two pictures of a pair


@dataclass(frozen=True)
class Drawn:
    """The models whose pictures are compared during a training.

    `parts`: the names of what is trained. `teacher`: the teacher. `pruned`: provides, within a context, the whole
    pruned model with the present weights of these parts.
    """

    parts: Sequence[str]
    teacher: nn.Module
    pruned: Callable[[], AbstractContextManager[nn.Module]]


@dataclass(frozen=True)
class Subject:
    """Holds a caption with its conditions, and the noise `[1, N, C]` that its pictures start from.

    `size`: height and width in packed tokens. `dtype`: of the latents that the model takes.
    """

    caption: str
    seed: int
    noise: Tensor
    conditions: Conditions
    size: tuple[int, int]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[Any, ...]:
        """Equal for subjects that can be drawn in one batch."""
        given = self.conditions[SIZES].tolist() if SIZES in self.conditions else None
        return self.size, *sorted((name, value.shape) for name, value in self.conditions.items()), str(given)


class SamplePictures:
    """Draws a training's sample pictures, and writes them to `training/samples/` and to the log.

    Prompts are the first different held-out captions of the data, encoded as the training reads them, so that no text
    encoder has to be in memory. Nothing moves the random numbers of the training.

    `abreast`: the most pictures that are drawn at once: as many as a step passes at once, which fit.

    With several ranks, rank 0 draws; the caller lets the others wait.
    """

    def __init__(self, run: Run, stage: str, header: Header, drawn: Drawn | None, abreast: int) -> None:
        self.run, self.stage, self.abreast = run, stage, abreast
        self.folder = samples_folder(run.folder, stage, header)
        self.steps: list[int] = []
        self._drawn = drawn

    def start(self, step: int) -> None:
        """Decide whether and when to draw, for a training that begins or goes on at `step`."""
        run = self.run
        why = why_no_pictures(run, self.stage)
        wanted = self._drawn is not None and draws_pictures(run, self.stage)
        if wanted and not room_for_pictures(run, self.stage):
            why, wanted = NO_ROOM, False
        if why:
            run.say(self.stage, f"sample pictures are off: {why}")
        self.steps = picture_steps(run, self.stage) if wanted else []
        if self.steps and run.writes:
            self._go_on(step)

    def _go_on(self, step: int) -> None:
        """Take over the pictures that this training has drawn up to `step`, if they are of the same prompts."""
        assert self._drawn is not None
        prompts, seeds = [each.caption for each in self._subjects], [each.seed for each in self._subjects]
        num_steps, picture_steps = self.steps[-1], self.run.config.watch.picture_steps
        new = Samples(list(self._drawn.parts), prompts, seeds, num_steps, picture_steps)
        known = Samples.load(self.folder) if step else None
        self._samples = new if known is None or known.until(-1) != new.until(-1) else known.until(step)
        if not self._samples.steps:
            forget_samples(self.folder, self._samples.parts)

    def is_due(self, step: int) -> bool:
        """Return whether `draw` is to be called after `step`. All ranks get the same answer."""
        return step in self.steps

    @torch.no_grad()
    def draw(self, step: int, logger: Logger | None) -> None:
        """Draw the pictures of the pruned model after `step`, and those of the teacher if it has none yet.

        A resumed training may have drawn them before it was stopped; then it does nothing.
        """
        assert self._drawn is not None
        if step in self._samples.steps:
            return
        device = self.run.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            if not self._samples.steps:
                self._save(self._latents(self._drawn.teacher), None)
            with self._drawn.pruned() as model, computing(self.run.precision, device):
                latents = self._latents(model)
            self._save(latents, step)
        self._samples = self._samples.then(step)
        self._samples.save(self.folder)
        if isinstance(logger, WandbLogger):
            numbers = range(len(self._subjects))
            pairs = [beside(*(load_sample(sample_path(self.folder, n, at)) for at in (None, step))) for n in numbers]
            captions = [f"{each.caption} (teacher, {self.stage} after {step} steps)" for each in self._subjects]
            logger.log_image(f"{self.stage}/samples", pairs, step=step, caption=captions)

    @cached_property
    def _subjects(self) -> list[Subject]:
        run, most = self.run, self.run.config.watch.prompts
        stream = run.data.stream(run.config.data.calibration_seed, 1)
        assert isinstance(stream, LatentStream)  # of others `why_no_pictures` says so
        found: dict[str, Subject] = {}
        for number in range(len(stream.names(range(_LOOKED_AT * most)))):  # the data may have fewer
            (caption,) = stream.captions(number)
            if caption in found or len(found) == most:
                continue
            latents, size, conditions = stream.samples(number, range(1), [False])
            seed = run.config.seed + len(found)
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
            found[caption] = Subject(caption, seed, noise, without_needless_mask(conditions), size, latents.dtype)
        return list(found.values())

    @cached_property
    def _decoder(self) -> Any:
        """A pipeline with the VAE. It stays on the device until the training ends."""
        return self.run.teacher.decoder()

    def _latents(self, model: nn.Module) -> list[Tensor]:
        """Return the latents `[1, N, C]` that `model` draws of each subject."""
        assert self._drawn is not None
        run, found = self.run, []
        with evaluating(model):
            for subjects in _batches(self._subjects, self.abreast):
                first = subjects[0]
                noise, conditions = run.data.to_device(
                    (torch.cat([each.noise for each in subjects]), _joined([each.conditions for each in subjects]))
                )
                arguments = conditions, first.size, first.dtype, run.config.watch.picture_steps
                latents = denoised(run.family, run.teacher.scheduler_config, model, noise, *arguments)
                found += latents.split(1)
        return found

    def _save(self, latents: Sequence[Tensor], step: int | None) -> None:
        for number, (each, subject) in enumerate(zip(latents, self._subjects, strict=True)):
            decoded = self.run.family.decode_latents(self._decoder, each, subject.size)
            save_sample(as_picture(decoded[0]), sample_path(self.folder, number, step))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode within the context. Afterwards each of its modules has its own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def denoised(
    family: Family,
    scheduler: Mapping[str, Any],
    model: nn.Module,
    noise: Tensor,
    conditions: Conditions,
    size: tuple[int, int],
    dtype: torch.dtype,
    count: int,
) -> Tensor:
    """Return the latents `[B, N, C]` that a model draws from `noise` in `count` steps, without guidance.

    A loop of its own, since pipelines of different families take encoded prompts in different ways, or not at all.

    `scheduler`: the config of the model's own, by which noise levels are shifted. `size`: height and width in packed
        tokens. `dtype`: of the latents that the model takes.
    """
    shift = flow_matching.shift_of(scheduler, noise.shape[1])
    levels = flow_matching.levels_of_drawing(count, shift, scheduler.get("shift_terminal") or 0.0)
    latents = noise
    for sigma, following in pairwise([*levels, 0.0]):
        given = latents.to(dtype)
        sigmas = given.new_full((len(given),), sigma)
        inputs = family.forward_inputs(given, conditions, sigmas, size)
        batch = TrainingBatch(inputs, given, sigmas, as_tensor=family.as_tensor)
        latents = family.denoise(latents, batch.prediction(model(**inputs)).float(), sigma, following)
    return latents


def _batches(subjects: Iterable[Subject], most: int) -> Iterator[list[Subject]]:
    """Yield runs of at most `most` neighbouring subjects that can be drawn in one batch."""
    batch: list[Subject] = []
    for subject in subjects:
        if batch and (len(batch) == most or subject.shape != batch[0].shape):
            yield batch
            batch = []
        batch.append(subject)
    if batch:
        yield batch


def _joined(conditions: Sequence[Conditions]) -> Conditions:
    return {name: torch.cat([each[name] for each in conditions]) for name in conditions[0]}


def as_picture(pixels: Tensor) -> Image.Image:
    """Return a PIL picture of `pixels` `[3, H, W]` in [-1, 1]; what is not finite becomes grey."""
    scaled = (pixels.float().nan_to_num(0, 0, 0).clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(scaled.round().byte().permute(1, 2, 0).cpu().numpy())


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Return two pictures of one size side by side, on white."""
    both = Image.new("RGB", (2 * left.width + _GAP, left.height), "white")
    both.paste(left, (0, 0))
    both.paste(right, (left.width + _GAP, 0))
    return both
