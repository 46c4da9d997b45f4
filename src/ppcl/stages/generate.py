"""Draw the pictures of every variant, with the same prompts, seeds and settings, through the diffusers pipeline."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from ppcl.artifacts.files import atomic_folder, write_json
from ppcl.artifacts.headers import Header, is_current
from ppcl.context import Run
from ppcl.pictures.drawing import decoded_latents, draw, equipped
from ppcl.pictures.images import Drawing, drawings, given_to, prompts_of, save_image, save_prompts
from ppcl.pictures.latents import save_latents
from ppcl.progress import counter
from ppcl.report.plots import image_grid
from ppcl.surgery.plugboard import Plugboard
from ppcl.variants.switch import Switch
from ppcl.variants.variants import variants_of


def _draw_variant(run: Run, drawing: Drawing, board: Plugboard) -> int:
    """Draw the pictures of one variant that do not exist yet, and return their number."""
    with equipped(run, board) as (pipeline, arguments):
        draw_batch = partial(_draw_batch, run, pipeline, arguments)
        with counter(drawing.variant.name, len(run.prompts), console=run.progress_console) as advance:
            return _draw_missing(run, drawing, draw_batch, advance)


def _draw_batch(
    run: Run, pipeline: Any, arguments: Mapping[str, Any], numbers: Sequence[int]
) -> tuple[list[Any], list[Tensor]]:
    """Return the pictures of the prompts with these numbers, and the final latents of each as the VAE gets them."""
    texts = [run.prompts[number].text for number in numbers]
    with decoded_latents(pipeline) as latents:
        images = draw(run, pipeline, texts, numbers, [given_to(run, number) for number in numbers], **arguments)
    return images, latents


def _draw_missing(run: Run, drawing: Drawing, draw_batch: Any, advance: Callable[[int], None]) -> int:
    """Draw and save the missing pictures of a variant, batch by batch, then its grid and its manifest.

    Returns the number of pictures in the batches that were drawn. `advance` is called with the size of each batch.
    """
    folder, header, count = drawing.folder, drawing.header, len(run.prompts)
    name, size = drawing.variant.name, run.config.generate.batch_size
    settings = {"variant": name, **header.made_from, "fingerprint": header.fingerprint}
    # Identifies the pictures of an interrupted run. It is deleted when all pictures exist.
    unfinished = folder / "unfinished.json"
    write_json(unfinished, header.to_json())
    drawn = 0
    for start in range(0, count, size):
        numbers = range(start, min(start + size, count))
        paths = [folder / f"{number:05d}.png" for number in numbers]
        if not all(path.exists() for path in paths):
            images, latents = draw_batch(numbers)
            save_latents(folder, numbers, latents)
            for number, image, path in zip(numbers, images, paths, strict=True):
                text = settings | {"prompt": run.prompts[number].text, "seed": run.config.seed + number}
                if not path.exists():
                    save_image(image, path, json.dumps(text))
            drawn += len(paths)
        advance(len(paths))
    save_prompts(run, folder)
    image_grid(folder / "grid.png", [Image.open(folder / f"{number:05d}.png") for number in range(count)])
    write_json(folder / "manifest.json", header.to_json() | {"num_images": count})
    unfinished.unlink()
    return drawn


def _teacher_cache(run: Run, header: Header) -> Path:
    """Return the folder in the cache with the teacher's pictures, which all runs of a sweep share."""
    return Path(run.config.paths.cache_dir) / "images" / header.fingerprint


def _reuse_teacher(run: Run, drawing: Drawing) -> bool:
    """Copy the teacher's pictures from the cache, and return whether that was possible."""
    cached = _teacher_cache(run, drawing.header)
    if drawing.variant.name != "teacher" or not is_current(cached / "manifest.json", drawing.header):
        return False
    _hand_over(cached, drawing.folder)
    run.say("generate", f"reused {cached}, in {drawing.folder}")
    return True


def _hand_over(source: Path, target: Path) -> None:
    """Copy a folder of pictures, by hard links where the file system supports them.

    Links are safe because pictures are never changed in place.
    """

    def link(path: str, copy: str) -> None:
        try:
            os.link(path, copy)
        except OSError:
            shutil.copy2(path, copy)

    with atomic_folder(target) as temporary:
        shutil.copytree(source, temporary, copy_function=link, dirs_exist_ok=True)


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
        name, folder = drawing.variant.name, drawing.folder
        if name == "teacher":
            with suppress(OSError):  # another job of the sweep has already stored them
                _hand_over(folder, _teacher_cache(run, drawing.header))
        run.say("generate", f"{name}: {drawn} of {len(run.prompts)} pictures drawn, in {folder}")
    switch.restore()
