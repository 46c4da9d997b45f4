"""Encodes pictures into latents and captions into prompt embeddings, as a data cache stores them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ppcl.artifacts.headers import Header
from ppcl.config import Config
from ppcl.data.buckets import bucket_sizes, fit, nearest
from ppcl.data.cached import LATENTS, SIZES, difference, trimmed
from ppcl.data.sources import Sample, Unit
from ppcl.families.base import Conditions, Family


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
            **({"given": data.given} if data.given else {}),
            "min_text_accuracy": data.min_text_accuracy,
            "aspects": data.aspects,
            "size": [sampling.height, sampling.width],
            "max_sequence_length": sampling.max_sequence_length,
            # The meaning of prompt masks has changed between versions of these libraries.
            "versions": [diffusers.__version__, transformers.__version__],
        },
    )


class Encoder:
    """Encodes pictures by the pipeline's VAE and captions by its text encoder.

    `sizes`: the (height, width) that pictures are resized to, one per `data.aspects`. `most_given`: the most given
    pictures that the model takes.
    """

    def __init__(self, config: Config, family: Family, pipeline: Any) -> None:
        self.config, self.family, self.pipeline = config.data, family, pipeline
        sampling = config.model.sampling
        multiple = 2 * getattr(self.pipeline, "vae_scale_factor", 8)
        self.sizes = bucket_sizes(config.data.aspects, sampling.height, sampling.width, multiple)
        self.most_given = self.family.facts.max_references

    def prompts(self, captions: list[str], references: Sequence[Any] = ()) -> list[Conditions]:
        """Return the conditions of each caption, without padding. `references`: the given pictures of all of them."""
        unique = list(dict.fromkeys(captions))
        encoded = self.family.encode_prompts(self.pipeline, unique, references)(captions)
        return [trimmed({name: value[row].cpu() for name, value in encoded.items()}) for row in range(len(captions))]

    def edit(self, caption: str, given: list[Image.Image]) -> Conditions:
        """Return the conditions of an edit: its instruction, its given pictures, and as `empty.*` the empty prompt.

        The empty prompt, used when a caption is dropped, is encoded for each edit because its embedding depends on the
        given pictures too.
        """
        seen, encoded = self.family.fit_references(self.pipeline, given)
        prompt, empty = self.prompts([caption, ""], seen)
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
    images, kept, bad = [], [], []
    for sample in samples:
        try:
            picture, *given = sample.open()
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            bad.append({"key": sample.key, "why": f"its picture does not decode: {type(error).__name__}"})
            continue
        if len(given) > encoder.most_given:
            bad.append({"key": sample.key, "why": f"{len(given)} given pictures; the model takes {encoder.most_given}"})
            continue
        images.append(fit(picture, nearest(picture, encoder.sizes)))
        kept.append((sample, given))
    tensors: dict[str, Tensor] = {}
    records = []
    step = encoder.config.encode_batch_size
    for start in range(0, len(kept), step):
        part = slice(start, start + step)
        pictures = encoder.pictures(images[part])
        if encoder.config.given:
            prompts = [encoder.edit(sample.caption, given) for sample, given in kept[part]]
        else:
            prompts = encoder.prompts([sample.caption for sample, _ in kept[part]])
        for offset, ((sample, _), (latents, size), conditions) in enumerate(
            zip(kept[part], pictures, prompts, strict=True)
        ):
            prefix = f"{start + offset:03d}."
            tensors |= {prefix + LATENTS: latents}
            tensors |= {prefix + name: value.contiguous() for name, value in conditions.items()}
            record = {"key": sample.key, "caption": sample.caption, "size": list(size)}
            records.append(record | ({"given": conditions[SIZES].tolist()} if SIZES in conditions else {}))
        advance(len(pictures))
    return (tensors, records), bad
