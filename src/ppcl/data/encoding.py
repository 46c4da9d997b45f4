"""Encodes pictures into latents and captions into prompt embeddings, as a data cache stores them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ppcl.artifacts.headers import Header
from ppcl.config import Config
from ppcl.data.buckets import cut_like, fit, nearest, to_tensor
from ppcl.data.cached import LATENTS, SIZES, difference, trimmed
from ppcl.data.sources import Sample, Unit
from ppcl.families.base import Conditions, Family
from ppcl.validation.values import aspect_ratio


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


def encode_samples(
    encoder: Encoder, samples: list[Sample], advance: Callable[[int], None] = lambda count: None
) -> tuple[tuple[dict[str, Tensor], list], list]:
    """Return `(tensors, records)` of the samples that can be encoded, and a list of those that cannot, with reasons.

    Tensors are named `NNN.NAME`, where NNN is the sample's position in the list of records. `advance` is called after
    each batch, with its number of samples.
    """
    bad: list[dict[str, str]] = []
    tensors: dict[str, Tensor] = {}
    records: list[dict[str, Any]] = []
    usable = _opened(encoder, samples, bad)
    while part := list(islice(usable, encoder.config.encode_batch_size)):
        pictures = encoder.pictures([image for _, image, _ in part])
        if encoder.config.given:
            prompts = [encoder.edit(sample.caption, given) for sample, _, given in part]
        else:
            prompts = encoder.prompts([sample.caption for sample, _, _ in part])
        for (sample, _, _), (latents, size), conditions in zip(part, pictures, prompts, strict=True):
            prefix = f"{len(records):03d}."
            tensors |= {prefix + LATENTS: latents}
            tensors |= {prefix + name: value.contiguous() for name, value in conditions.items()}
            record = {"key": sample.key, "caption": sample.caption, "size": list(size)}
            records.append(record | ({"given": conditions[SIZES].tolist()} if SIZES in conditions else {}))
        advance(len(pictures))
    return (tensors, records), bad


def _opened(
    encoder: Encoder, samples: list[Sample], bad: list[dict[str, str]]
) -> Iterator[tuple[Sample, Tensor, list[Image.Image]]]:
    """Yield each sample with its picture `[3, H, W]` and its given pictures. Adds those that cannot be used to `bad`.

    A picture is opened when it is asked for, since those of a whole file would take gigabytes.
    """
    for sample in samples:
        try:
            picture, *given = sample.open()
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            bad.append({"key": sample.key, "why": f"its picture does not decode: {type(error).__name__}"})
            continue
        if len(given) > encoder.most_given:
            bad.append({"key": sample.key, "why": f"{len(given)} given pictures; the model takes {encoder.most_given}"})
            continue
        yield sample, encoder.fitted(picture, given), given
