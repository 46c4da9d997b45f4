"""Encodes pictures into latents and captions into prompt embeddings, as a data cache stores them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ppcl.artifacts.headers import Header
from ppcl.config import Config
from ppcl.data.buckets import Cut, cut_like, fit, nearest, to_tensor
from ppcl.data.cached import LATENTS, SIZES, difference, trimmed
from ppcl.data.sources import Sample, Unit
from ppcl.errors import UsageError
from ppcl.families.base import Conditions, Family
from ppcl.pictures.opening import UnusablePictureError
from ppcl.validation.values import aspect_ratio

LEAST_LEFT = 1 / 20  # of a picture that is cut to a shape; its caption says little about less
_THREADS = 4  # a photo of 12 megapixels takes one of them 0.2 seconds


def source_header(config: Config, units: list[Unit], model: dict[str, Any]) -> Header:
    """Return the header that identifies a cache: the model with its encoders, the source's units, and all settings.

    `units`: the parts of the source, identified by name, size and time of change. `model`: identity of the model.
    """
    import diffusers
    import transformers

    data, sampling = config.data, config.model.sampling
    return Header(
        "ppcl.cache",
        {
            "model": model,
            "units": {unit.name: [unit.size, unit.changed] for unit in units},
            "captions": data.captions,
            # Before "cut" was stored, given pictures kept their own aspect ratio.
            **({"given": data.given, "cut": "like the last given picture"} if data.given else {}),
            "min_text_accuracy": data.min_text_accuracy,
            "aspects": data.aspects,
            "size": list(sampling.size),
            # Before it was stored, dropped captions were always encoded as "".
            **({"negative_prompt": sampling.negative_prompt} if sampling.negative_prompt else {}),
            "max_sequence_length": sampling.max_sequence_length,
            # The meaning of prompt masks has changed between versions of these libraries.
            "versions": [diffusers.__version__, transformers.__version__],
        },
    )


class Encoder:
    """Encodes pictures by the pipeline's VAE and captions by its text encoder.

    `ratios`, `sizes`: the aspect ratios of `data.aspects`, and the (height, width) that pictures of each are resized
    to. `most_given`: the most given pictures that the model takes.
    """

    def __init__(self, config: Config, family: Family, pipeline: Any) -> None:
        self.config, self.family, self.pipeline = config.data, family, pipeline
        area = math.prod(config.model.sampling.size)
        self.ratios = [aspect_ratio(aspect) for aspect in config.data.aspects]
        self.sizes = [family.picture_size(pipeline, ratio, area) for ratio in self.ratios]
        self.most_given = self.family.facts.max_references

    def prompts(self, captions: list[str], references: Sequence[Any] = ()) -> list[Conditions]:
        """Return the conditions of each caption, without padding. `references`: the given pictures of all of them."""
        unique = list(dict.fromkeys(captions))
        encoded = self.family.encode_prompts(self.pipeline, unique, references)(captions)
        return [trimmed({name: value[row].cpu() for name, value in encoded.items()}) for row in range(len(captions))]

    def refuses(self, caption: str) -> str:
        """Return why the model cannot take a caption; empty if it can."""
        try:
            self.family.check_prompts(self.pipeline, [caption])
        except UsageError as error:
            return str(error)
        return ""

    def empty_prompt(self) -> Conditions:
        """Return the conditions of a dropped caption."""
        return self.prompts([self.family.empty_prompt])[0]

    def fitted(self, picture: Image.Image, given: Sequence[Image.Image]) -> Tensor:
        """Return a picture `[3, H, W]` in [-1, 1], resized to the size of the nearest of `data.aspects`.

        The result of an edit is cut like the last given picture, whose aspect ratio the pipeline draws in.
        """
        if not given:
            return fit(picture, self.sizes[nearest(picture, [width / height for height, width in self.sizes])])
        number = nearest(given[-1], self.ratios)
        return to_tensor(cut_like(picture, given[-1], self.ratios[number]).of(picture, self.sizes[number]))

    def left_of(self, picture: Image.Image) -> float:
        """Return the share of a picture that is left when it is cut to the nearest of `data.aspects`."""
        return Cut.middle(picture, self.ratios[nearest(picture, self.ratios)]).share

    def edit(self, caption: str, given: list[Image.Image]) -> Conditions:
        """Return the conditions of an edit: its instruction, its given pictures, and as `empty.*` the empty prompt.

        The empty prompt, used when a caption is dropped, is encoded for each edit because its embedding depends on the
        given pictures too. Each given picture is cut to the nearest of `data.aspects`, since only edits whose pictures
        all have the same sizes can be batched.
        """
        ratios = [self.ratios[nearest(picture, self.ratios)] for picture in given]
        seen, encoded = self.family.fit_references(self.pipeline, given, ratios)
        prompt, empty = self.prompts([caption, self.family.empty_prompt], seen)
        pictures = self.family.encode_references(self.pipeline, encoded)
        return prompt | {name: value[0].cpu() for name, value in pictures.items()} | difference(empty, prompt)

    def pictures(self, images: list[Tensor]) -> list[tuple[Tensor, tuple[int, int]]]:
        """Return for each picture `[3, H, W]` its latents `[N, C]` and their (height, width) in tokens.

        Pictures of the same size are encoded in one batch.
        """
        found: list[Any] = [None] * len(images)
        by_size: dict[tuple[int, ...], list[int]] = {}
        for number, image in enumerate(images):
            by_size.setdefault(tuple(image.shape), []).append(number)
        for numbers in by_size.values():
            batch = torch.stack([images[number] for number in numbers])
            latents, size = self.family.encode_images(self.pipeline, batch)
            for number, value in zip(numbers, latents.cpu(), strict=True):
                found[number] = (value.contiguous(), size)
        return found


@dataclass
class _Opened:
    """A sample with its picture for the VAE, `[3, H, W]`, and its given pictures; or the reason why it has none."""

    sample: Sample
    picture: Tensor | None = None
    given: Sequence[Image.Image] = ()
    why: str = ""


def _open(encoder: Encoder, sample: Sample) -> _Opened:
    """Decode the pictures of a sample and resize the one that is encoded."""
    try:
        picture, *given = sample.open()
    except UnusablePictureError as error:
        return _Opened(sample, why=f"its picture {error}")
    if len(given) > encoder.most_given:
        return _Opened(sample, why=f"{len(given)} given pictures; the model takes {encoder.most_given}")
    for each in (picture, *given):
        if encoder.left_of(each) < LEAST_LEFT:
            size = f"{each.width}x{each.height} pixels"
            why = f"its picture has {size}: any shape of data.aspects leaves less than {LEAST_LEFT:.0%} of it"
            return _Opened(sample, why=why)
    return _Opened(sample, encoder.fitted(picture, given), given)


def _opened(encoder: Encoder, samples: Iterable[Sample]) -> Iterator[_Opened]:
    """Yield opened samples in order. Threads open the next two batches while the caller encodes one."""
    waiting: deque[Future[_Opened]] = deque()
    with ThreadPoolExecutor(_THREADS) as pool:
        for sample in samples:
            waiting.append(pool.submit(_open, encoder, sample))
            if len(waiting) > 2 * encoder.config.encode_batch_size:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def encode_samples(
    encoder: Encoder, samples: list[Sample], advance: Callable[[int], None] = lambda count: None
) -> tuple[tuple[dict[str, Tensor], list], list]:
    """Return `(tensors, records)` of the samples that can be encoded, and a list of those that cannot, with reasons.

    Tensors are named `NNN.NAME`, where NNN is the sample's position in the list of records. `advance` is called after
    each batch, with its number of samples.
    """
    bad: list[dict[str, str]] = []

    def usable() -> Iterator[_Opened]:
        for opened in _opened(encoder, samples):
            why = opened.why or encoder.refuses(opened.sample.caption)
            if why:
                bad.append({"key": opened.sample.key, "why": why})
            else:
                yield opened

    tensors: dict[str, Tensor] = {}
    records: list[dict[str, Any]] = []
    found = usable()
    while batch := list(islice(found, encoder.config.encode_batch_size)):
        pictures = encoder.pictures([opened.picture for opened in batch if opened.picture is not None])
        if encoder.config.given:
            prompts = [encoder.edit(opened.sample.caption, list(opened.given)) for opened in batch]
        else:
            prompts = encoder.prompts([opened.sample.caption for opened in batch])
        for opened, (latents, size), conditions in zip(batch, pictures, prompts, strict=True):
            prefix, sample = f"{len(records):03d}.", opened.sample
            tensors |= {prefix + LATENTS: latents}
            tensors |= {prefix + name: value.contiguous() for name, value in conditions.items()}
            record = {"key": sample.key, "caption": sample.caption, "size": list(size)}
            records.append(record | ({"given": conditions[SIZES].tolist()} if SIZES in conditions else {}))
        advance(len(pictures))
    return (tensors, records), bad
