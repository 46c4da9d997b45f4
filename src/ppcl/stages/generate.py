"""Draw the pictures of every variant, with the same prompts, seeds and settings, through the diffusers pipeline."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ppcl.artifacts.files import atomic_folder, atomic_path, write_json
from ppcl.artifacts.headers import Header
from ppcl.context import Run
from ppcl.pictures.drawing import decoded_latents, draw, equipped
from ppcl.pictures.images import (
    Drawing,
    claim,
    drawings,
    given_to,
    picture_path,
    prompts_of,
    save_image,
    save_prompts,
)
from ppcl.pictures.latents import save_latents
from ppcl.progress import counter
from ppcl.report.plots import image_grid
from ppcl.surgery.plugboard import Plugboard
from ppcl.variants.switch import Switch
from ppcl.variants.variants import variants_of


def _draw_variant(run: Run, drawing: Drawing, board: Plugboard) -> int:
    """Draw the pictures of one variant that do not exist yet, and return their number.

    The folder is claimed as late as possible, so that nothing is written for a LoRA or ControlNet that does not fit.
    """
    with equipped(run, board) as (pipeline, arguments):
        claimed = replace(drawing, folder=claim(run, drawing))
        return _draw_missing(run, claimed, partial(_draw_batch, run, pipeline, arguments))


def _draw_batch(
    run: Run, pipeline: Any, arguments: Mapping[str, Any], numbers: Sequence[int]
) -> tuple[list[Any], list[Tensor]]:
    """Return the pictures of the prompts with these numbers, and the final latents of each as the VAE gets them."""
    texts = [run.prompts[number].text for number in numbers]
    with decoded_latents(pipeline) as latents:
        images = draw(run, pipeline, texts, numbers, [given_to(run, number) for number in numbers], **arguments)
    return images, latents


def _draw_missing(run: Run, drawing: Drawing, draw_batch: Any) -> int:
    """Draw and save the missing pictures of a variant, batch by batch, then its grid and its manifest.

    Returns the number of pictures in the batches that were drawn.
    """
    folder, header, count = drawing.folder, drawing.header, len(run.prompts)
    name, size = drawing.variant.name, run.config.generate.batch_size
    settings = {"variant": name, **header.made_from, "fingerprint": header.fingerprint}
    batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
    missing = [batch for batch in batches if not all(picture_path(folder, number).exists() for number in batch)]
    drawn = sum(map(len, missing))
    with counter(name, count, done=count - drawn, console=run.progress_console) as advance:
        for numbers in missing:
            images, latents = draw_batch(numbers)
            save_latents(folder, numbers, latents)
            for number, image in zip(numbers, images, strict=True):
                text = settings | {"prompt": run.prompts[number].text, "seed": run.config.seed + number}
                path = picture_path(folder, number)
                if not path.exists():
                    save_image(image, path, json.dumps(text))
            advance(len(numbers))
    save_prompts(run, folder)
    image_grid(folder / "grid.png", [Image.open(picture_path(folder, number)) for number in range(count)])
    _complete(folder, header, count)
    return drawn


def _complete(folder: Path, header: Header, count: int) -> None:
    """Record that a folder has all `count` pictures, in place of the record of unfinished ones."""
    write_json(folder / "manifest.json", header.to_json() | {"num_images": count})
    (folder / "unfinished.json").unlink(missing_ok=True)


def _teacher_cache(run: Run, header: Header) -> Path:
    """Return the folder in the cache with the teacher's pictures, which all runs of a sweep share."""
    return Path(run.config.paths.cache_dir) / "images" / header.fingerprint


def _reuse_teacher(run: Run, drawing: Drawing) -> bool:
    """Copy the teacher's pictures from the cache, and return whether that was possible."""
    cached = _teacher_cache(run, drawing.header)
    if drawing.variant.name != "teacher" or not replace(drawing, folder=cached).is_complete:
        return False
    folder = claim(run, drawing)
    _link_all(cached, folder)
    _complete(folder, drawing.header, len(run.prompts))
    run.say("generate", f"reused {cached}, in {folder}")
    return True


def _share_teacher(run: Run, drawing: Drawing, folder: Path) -> None:
    """Copy the teacher's pictures from `folder` to the cache, unless it has them or one says that it is another's."""
    cached = _teacher_cache(run, drawing.header)
    ours = (_made_from(picture_path(folder, number)) for number in range(len(run.prompts)))
    if replace(drawing, folder=cached).is_complete or any(found != drawing.header.fingerprint for found in ours):
        return
    with suppress(OSError), atomic_folder(cached) as temporary:  # another job of the sweep may store them, too
        _link_all(folder, temporary)
        _complete(temporary, drawing.header, len(run.prompts))


def _made_from(path: Path) -> str | None:
    """Return the fingerprint in the text of a picture that `save_image` wrote; None if there is none."""
    with Image.open(path) as image:
        text = image.info.get("ppcl")
    return json.loads(text).get("fingerprint") if text else None


def _link_all(source: Path, target: Path) -> None:
    """Copy a folder of pictures without its records, by hard links where the file system supports them.

    Links are safe because pictures are never changed in place. Files that `target` already has stay.
    """

    def link(path: str, copy: str) -> None:
        try:
            os.link(path, copy)
        except FileExistsError:
            pass
        except OSError:
            with atomic_path(Path(copy)) as temporary:
                shutil.copy2(path, temporary)

    records = shutil.ignore_patterns("manifest.json", "unfinished.json", ".*")
    shutil.copytree(source, target, copy_function=link, ignore=records, dirs_exist_ok=True)


def run(run: Run) -> None:
    """Draw all variants into the folder of this set of pictures. Complete sets are reused, interrupted ones completed.

    Raises `UsageError` if a variant is not available, if a prompt does not suit the model, or if the folder holds
    pictures of other settings.
    """
    variants, plugs = variants_of(run)
    every = drawings(run, variants, plugs)
    run.say("generate", f"{', '.join(variant.name for variant in variants)}: in {run.set_folder}")
    missing = []
    for drawing in every:
        if drawing.is_complete:
            run.say("generate", f"reused {drawing.folder}")
        else:
            missing.append(drawing)
    if not missing:
        return
    missing = [drawing for drawing in missing if not _reuse_teacher(run, drawing)]
    run.family.check_prompts(run.teacher.pipeline, prompts_of(run))
    switch = Switch(run, plugs)
    for drawing in missing:
        switch(drawing.variant)
        drawn = _draw_variant(run, drawing, switch.board)
        name = drawing.variant.name
        folder = run.image_folders[name]
        if name == "teacher":
            _share_teacher(run, drawing, folder)
        run.say("generate", f"{name}: {drawn} of {len(run.prompts)} pictures drawn, in {folder}")
    switch.restore()
