"""Sets of pictures: pictures with the same prompts, seed and settings are stored in one folder.

`images/SET/VARIANT/` holds a variant's pictures, with `manifest.json` once they are complete and `unfinished.json`
before that. Both hold the header of the pictures. No picture is ever deleted or overwritten: other settings make
another set, and another model of the same variant gets another folder within the set.

Several commands may draw into one run at the same time. `unfinished.json` is therefore created exclusively: a command
that finds one of other pictures takes another folder. Until a set has its first one, `images/SET/set.json` does the
same for the set.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, count
from pathlib import Path
from typing import Any

from ppcl.artifacts.files import read_json, temporary_path, write_json
from ppcl.artifacts.headers import Header, fingerprint, first_difference
from ppcl.benchmarks.base import Benchmark, Prompt
from ppcl.config import Config
from ppcl.errors import UsageError
from ppcl.options import identity
from ppcl.pictures.opening import picture_digest
from ppcl.validation.outputs import UNSCORED, has_own_prompts

# Keys of a header that describe the model. All other keys describe the set.
OF_MODEL = ("model", "plugs", "removed", "layout", "finetuned", "quantized")
# Headers do not name this benchmark, since they are older than all other benchmarks.
_UNSAID = {"name": "shapes", "settings": {"images_per_prompt": 1}}
_SLUG_LENGTH = 32
_SET = "set.json"


def set_settings(config: Config, benchmark: Benchmark, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Return the settings that all variants of a set share, as headers store them.

    `prompts`: the prompt of each picture.
    """
    texts = [prompt.text for prompt in prompts]
    given = benchmark.given(prompts, config)
    return {
        "sampling": identity(config.model.sampling),
        "seed": config.seed,
        "batch_size": config.generate.batch_size,
        "prompts": {"count": len(texts), "hash": fingerprint({"prompts": texts} | given)},
        **benchmark_settings(config, benchmark),
        **_put_on(config),
        **({} if config.generate.teacher_above is None else {"teacher_above": config.generate.teacher_above}),
    }


def benchmark_settings(config: Config, benchmark: Benchmark) -> dict[str, Any]:
    """Return what a header says about the benchmark.

    It is empty for the user's own prompts and for `shapes` with its default settings.
    """
    made_from = benchmark.made_from
    return {} if has_own_prompts(config) or made_from == _UNSAID else {"benchmark": made_from}


def _put_on(config: Config) -> dict[str, Any]:
    """Return what a header says about LoRAs and a ControlNet; empty without any."""
    settings, made_from = config.generate, {}
    if settings.loras:
        pairs = [(Path(path).name, _digest(path)) for path in settings.loras]
        by_name = dict(pairs)
        files = by_name if len(by_name) == len(pairs) else pairs  # a dict would lose files of equal names
        made_from["loras"] = {"files": files, "scale": settings.lora_scale, "source": config.lora.source}
        if config.lora.counts is not None:
            made_from["loras"]["counts"] = config.lora.counts
    if settings.controlnet:
        image = picture_digest(str(settings.control_image))
        made_from["controlnet"] = {"path": settings.controlnet, "scale": settings.control_scale, "image": image}
        if settings.control_mode is not None:
            made_from["controlnet"]["mode"] = settings.control_mode
    return made_from


def _digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def set_folder(images: Path, config: Config, settings: Mapping[str, Any]) -> Path:
    """Return the folder in `images` for the set with these `settings`.

    Its name is `generate.name`, or else it begins with the prompt file's name, the prompt's first words, or the
    benchmark's name, and says `generate.teacher_above`. A fingerprint is added, except for a benchmark's first set.
    Raises `UsageError` if the folder `generate.name` holds another set.
    """
    key, name = fingerprint(settings), config.generate.name
    if name is not None:
        other = _other_set(images / name, settings)
        if other is not None:
            raise UsageError(
                f"generate.name={name} names {images / name}, which holds other pictures ({other}): give another "
                "generate.name=, or leave it out."
            )
        return images / name
    above = config.generate.teacher_above
    suffix = "" if above is None else f"-above-{above:g}"
    if has_own_prompts(config):
        return images / f"{_slug(config)}{suffix}-{key[:6]}"
    plain = images / (("captions" if config.benchmark.name in UNSCORED else config.benchmark.name) + suffix)
    own = plain.with_name(f"{plain.name}-{key[:6]}")
    return own if own.exists() or _other_set(plain, settings) is not None else plain


@contextmanager
def claimed_set(images: Path, config: Config, settings: Mapping[str, Any]) -> Iterator[Path]:
    """Yield `set_folder`, which no other set takes. Within the context a variant has to be claimed in it.

    Raises `UsageError` if the folder `generate.name` holds another set.
    """
    for _ in range(2):
        folder = set_folder(images, config, settings)
        created = _create(folder / _SET, {"settings": dict(settings)})
        if _other_set(folder, settings) is None:
            break
        if created:  # another command has claimed a variant here since the folder was chosen
            (folder / _SET).unlink(missing_ok=True)
    yield folder
    (folder / _SET).unlink(missing_ok=True)  # from now on the variant's record says whose folder it is


def _slug(config: Config) -> str:
    """Return a folder name for the user's prompts: the name of their file, or the first words of the one prompt.

    It is not `shapes`, since sets of that benchmark are known by their folders alone.
    """
    path = config.generate.prompt_file
    text = Path(path).stem if path is not None else str(config.generate.prompt)
    slug = re.sub(r"\W+", "-", text.lower())[:_SLUG_LENGTH].strip("-_") or "prompts"
    return "shapes-prompts" if slug == "shapes" else slug


def _other_set(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """Return how the set in `folder` differs from `settings`, for a message; None if there is no other set.

    Pictures without a record count as another set, unless other pictures in the folder belong to this set.
    """
    unknown = ours = False
    if (folder / _SET).is_file():
        found = read_json(folder / _SET, "The record", "generate").get("settings", {})
        if fingerprint(found) != fingerprint(settings):
            return f"made with {first_difference(found, settings)}"
        ours = True
    for variant in _visible(folder):
        if variant.name == _SET:
            continue
        record = _record(variant)
        if record is None:
            unknown |= not _is_vacant(variant)
            continue
        made_from = record.get("made_from", {})
        found = {key: value for key, value in made_from.items() if key not in OF_MODEL}
        if fingerprint(found) != fingerprint(settings):
            return f"made with {first_difference(found, settings)}"
        ours = True
    return "which no manifest.json describes" if unknown and not ours else None


def variant_folder(folder: Path, header: Header) -> Path:
    """Return the folder of the pictures with this header: `folder`, or one beside it if `folder` holds other pictures.

    A folder that already holds them is preferred, then the first one that is free.
    """
    named = folder.with_name(f"{folder.name}-{header.fingerprint[:6]}")
    further = (named.with_name(f"{named.name}-{number}") for number in count(2))
    for place in (folder, named):
        record = _record(place)
        if record is not None and record.get("fingerprint") == header.fingerprint:
            return place
    for place in chain((folder, named), further):
        record = _record(place)
        if _is_vacant(place) or (record is not None and record.get("fingerprint") == header.fingerprint):
            return place
    raise AssertionError("there is always a further name")


def claim_variant(folder: Path, header: Header) -> Path:
    """Return `variant_folder`, with a record of this header in it, so that no other pictures are drawn there."""
    while True:
        place = variant_folder(folder, header)
        created = _is_vacant(place) and _create(place / "unfinished.json", header.to_json())
        record = _record(place)
        if record is not None and record.get("fingerprint") == header.fingerprint:
            return place
        if created:  # another command has drawn all its pictures here since the folder was found vacant
            (place / "unfinished.json").unlink(missing_ok=True)


def _create(path: Path, content: Mapping[str, Any]) -> bool:
    """Write a JSON file unless it exists, and return whether it was written. Of several processes only one writes."""
    temporary = temporary_path(path)
    write_json(temporary, content)
    try:
        os.link(temporary, path)  # unlike a rename, this fails if the file exists
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(temporary.read_text(encoding="utf-8"))
        except FileExistsError:
            return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _record(folder: Path) -> dict[str, Any] | None:
    """Return the record of the pictures in a folder, complete or not; None if there is none."""
    # The manifest once more: a command that completes the pictures writes it, and then deletes the other file.
    for name in ("manifest.json", "unfinished.json", "manifest.json"):
        if (folder / name).is_file():
            return read_json(folder / name, "The record", "generate")
    return None


def _visible(folder: Path) -> list[Path]:
    """Return the contents of a folder, without temporary files of an interrupted command."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith(".")) if folder.is_dir() else []


def _is_vacant(folder: Path) -> bool:
    return not folder.exists() or (folder.is_dir() and not _visible(folder))
