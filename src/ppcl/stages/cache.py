"""Encodes pictures and captions once, so that no later stage loads a text encoder or a VAE."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import track
from torch import Tensor

from ppcl.artifacts import Header, is_current, read_json, write_json, write_tensors
from ppcl.config import Config
from ppcl.data.buckets import bucket_sizes, fit, nearest
from ppcl.data.cached import EMPTY, LATENTS, SIZES, difference, trimmed, unit_record
from ppcl.data.sources import Sample, Skipped, Unit, find_units
from ppcl.errors import UsageError
from ppcl.families import FAMILIES
from ppcl.families.base import Conditions
from ppcl.launch import rank
from ppcl.stages.run import Run

MARGIN = 1.05  # of the estimate, that must be free


def source_header(config: Config, units: list[Unit], model: dict[str, Any]) -> Header:
    """What a cache is made from: the encoders by their model, the source by its units."""
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
            # What a mask means has changed between versions.
            "versions": [diffusers.__version__, transformers.__version__],
        },
    )


class Encoder:
    """The pipeline's VAE and text encoder, on pictures of a few sizes."""

    def __init__(self, run: Run) -> None:
        self.run, self.family, self.pipeline = run, run.family, run.pipeline
        sampling = run.config.model.sampling
        multiple = 2 * getattr(self.pipeline, "vae_scale_factor", 8)
        self.sizes = bucket_sizes(run.config.data.aspects, sampling.height, sampling.width, multiple)
        self.most_given = FAMILIES[self.family.name].max_references

    def prompts(self, captions: list[str], references: Sequence[Any] = ()) -> list[Conditions]:
        """A prompt's conditions each, without padding."""
        unique = list(dict.fromkeys(captions))
        encoded = self.family.encode_prompts(self.pipeline, unique, references)(captions)
        return [trimmed({name: value[row].cpu() for name, value in encoded.items()}) for row in range(len(captions))]

    def edit(self, caption: str, given: list[Image.Image]) -> Conditions:
        """An edit's conditions, and as `empty.*` those of the empty prompt, which speaks of its pictures too."""
        seen, encoded = self.family.fit_references(self.pipeline, given)
        prompt, empty = self.prompts([caption, ""], seen)
        pictures = self.family.encode_references(self.pipeline, encoded)
        return prompt | {name: value[0].cpu() for name, value in pictures.items()} | difference(empty, prompt)

    def pictures(self, images: list[Tensor]) -> list[tuple[Tensor, tuple[int, int]]]:
        """Latents `[N, C]` and size in tokens of each picture `[3, H, W]`; those of one size go together."""
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


def run(run: Run) -> None:
    config = run.config.data
    units, folder = find_units(config), run.cache_folder
    header = run.cache_header
    number, count = rank()
    if not is_current(folder / "cache.json", header):
        write_json(folder / "cache.json", header.to_json())  # first: what lies here is of this making
    mine = [unit for unit in units[number::count] if not (folder / unit_record(unit.name)).exists()]
    if not mine and (folder / EMPTY).exists():
        run.say("cache", f"reused {folder}")
        return
    encoder = Encoder(run)
    write_tensors(folder / EMPTY, encoder.prompts([""])[0], {"fingerprint": header.fingerprint})
    _check_space(run, encoder, mine, folder)
    totals = [0, 0]
    for unit in track(mine, "caching", console=run.console, transient=True):
        stored, skipped = _cache_unit(run, encoder, unit, folder)
        totals[0] += stored
        totals[1] += len(skipped)
        for item in skipped[:3]:
            run.say("cache", f"{unit.name}: left out {item['key']}: {item['why']}")
    done = sum((folder / unit_record(unit.name)).exists() for unit in units)
    run.say("cache", f"{totals[0]} samples of {len(mine)} units cached, {totals[1]} left out, in {folder}")
    if done < len(units):
        run.say("cache", f"{len(units) - done} of {len(units)} units are other ranks'")


def _check_space(run: Run, encoder: Encoder, units: list[Unit], folder: Path) -> None:
    """One sample's bytes times how many there are, against what is free."""
    if not units:
        return
    first = next((item for unit in units for item in unit.read(run.config.data) if isinstance(item, Sample)), None)
    if first is None:
        return
    (found, _), _ = _encode(encoder, [first], run)
    if not found:
        return  # it is left out below, with its reason
    each = sum(tensor.nbytes for tensor in found.values())
    samples = sum(unit.count() for unit in units)
    needed, free = each * samples, shutil.disk_usage(folder).free
    run.say("cache", f"about {needed / 1e9:.2f} GB for {samples} samples; {free / 1e9:.1f} GB are free")
    if needed * MARGIN > free:
        raise UsageError(
            f"paths.cache_dir={run.config.paths.cache_dir} has {free / 1e9:.1f} GB free, and {samples} samples take "
            f"about {needed / 1e9:.1f} GB: name another folder, or fewer samples."
        )


def _cache_unit(run: Run, encoder: Encoder, unit: Unit, folder: Path) -> tuple[int, list[dict[str, str]]]:
    """Write a unit's parts, then its record; parts that an earlier try left whole are kept."""
    size, skipped, stored = run.config.data.samples_per_file, [], 0
    stem = unit_record(unit.name).removesuffix(".json")
    for leftover in folder.glob(f".{stem}*.tmp"):  # of a killed try; no other rank has this unit
        leftover.unlink()
    for part, chunk in enumerate(_chunks(unit.read(run.config.data), size)):
        skipped += [{"key": item.key, "why": item.why} for item in chunk if isinstance(item, Skipped)]
        record = folder / f"{stem}-{part:03d}.json"
        if not record.exists():
            found, bad = _encode(encoder, [item for item in chunk if isinstance(item, Sample)], run)
            write_tensors(record.with_suffix(".safetensors"), found[0], {"unit": unit.name})
            write_json(record, {"samples": found[1], "skipped": bad})
        content = read_json(record, "A cache's part")
        skipped += content["skipped"]
        stored += len(content["samples"])
    write_json(folder / unit_record(unit.name), {"unit": unit.name, "samples": stored, "skipped": skipped})
    return stored, skipped


def _chunks(items: Iterable[Sample | Skipped], size: int) -> Iterator[list[Sample | Skipped]]:
    """Lists of `size` items, good or bad: which part a sample lies in does not depend on decoding it."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _encode(encoder: Encoder, samples: list[Sample], run: Run) -> tuple[tuple[dict[str, Tensor], list], list]:
    """Tensors and records of one part, and what would not decode."""
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
    step = run.config.data.encode_batch_size
    for start in range(0, len(kept), step):
        part = slice(start, start + step)
        pictures = encoder.pictures(images[part])
        if run.config.data.given:
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
    return (tensors, records), bad
