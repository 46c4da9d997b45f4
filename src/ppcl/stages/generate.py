"""Draws every variant with the same prompts, seeds and settings through the stock diffusers pipeline."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import Progress

from ppcl.artifacts.files import atomic_folder, atomic_path, write_json
from ppcl.artifacts.headers import Header, is_current
from ppcl.context import Run
from ppcl.pictures.drawing import draw, equipped
from ppcl.pictures.images import given_to, image_folder, prompts_of, save_image, variant_header
from ppcl.report.plots import image_grid
from ppcl.surgery.plugboard import Plugboard
from ppcl.variants.switch import Switch
from ppcl.variants.variants import Variant, variants_of


def _draw_variant(
    run: Run, variant: Variant, prompts: list[str], header: Header, progress: Progress, board: Plugboard
) -> int:
    with equipped(run, board) as (pipeline, arguments):
        return _draw_missing(run, variant, prompts, header, progress, partial(draw, run, pipeline, **arguments))


def _draw_missing(
    run: Run, variant: Variant, prompts: list[str], header: Header, progress: Progress, draw_batch: Any
) -> int:
    folder = image_folder(run, variant.name)
    settings = {"variant": variant.name, **header.made_from, "fingerprint": header.fingerprint}
    size = run.config.generate.batch_size
    # The manifest in progress says whose pictures these are; renamed when all are there.
    unfinished = folder / "unfinished.json"
    if not is_current(unfinished, header):
        for stray in folder.glob("*.png"):  # of settings that nobody vouches for any more
            stray.unlink()
    write_json(unfinished, header.to_json())
    task = progress.add_task(variant.name, total=len(prompts))
    drawn = 0
    for start in range(0, len(prompts), size):
        numbers = range(start, min(start + size, len(prompts)))
        paths = [folder / f"{number:05d}.png" for number in numbers]
        if not all(path.exists() for path in paths):
            batch = [prompts[number] for number in numbers]
            given = [given_to(run, number) for number in numbers]
            for number, image, path in zip(numbers, draw_batch(batch, numbers, given), paths, strict=True):
                text = settings | {"prompt": prompts[number], "seed": run.config.seed + number}
                save_image(image, path, json.dumps(text))
            drawn += len(paths)
        progress.advance(task, len(paths))
    with atomic_path(folder / "prompts.jsonl") as temporary:
        lines = (
            json.dumps({"image": f"{n:05d}.png", "prompt": prompt, "seed": run.config.seed + n})
            for n, prompt in enumerate(prompts)
        )
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    image_grid(folder / "grid.png", [Image.open(folder / f"{n:05d}.png") for n in range(len(prompts))])
    write_json(folder / "manifest.json", header.to_json() | {"num_images": len(prompts)})
    unfinished.unlink()
    return drawn


def _teacher_cache(run: Run, header: Header) -> Path:
    """The teacher's pictures are the same for all runs of a sweep."""
    return Path(run.config.paths.cache_dir) / "images" / header.fingerprint


def _reuse_teacher(run: Run, variant: Variant, folder: Path, header: Header) -> bool:
    """Take the teacher's pictures from the cache, where they are."""
    cached = _teacher_cache(run, header)
    if variant.name != "teacher" or not is_current(cached / "manifest.json", header):
        return False
    _hand_over(cached, folder)
    run.say("generate", f"reused {cached}, in {folder}")
    return True


def _hand_over(source: Path, target: Path) -> None:
    """Links where the file system can, since no picture is ever changed in place; else copies."""

    def link(path: str, copy: str) -> None:
        try:
            os.link(path, copy)
        except OSError:
            shutil.copy2(path, copy)

    with atomic_folder(target) as temporary:
        shutil.copytree(source, temporary, copy_function=link, dirs_exist_ok=True)


def run(run: Run) -> None:
    prompts = prompts_of(run)
    variants, plugs = variants_of(run)
    missing = []
    for variant in variants:
        folder, header = image_folder(run, variant.name), variant_header(run, variant, plugs, prompts)
        if is_current(folder / "manifest.json", header):
            run.say("generate", f"reused {folder}")
        else:
            missing.append((variant, folder, header))
    if not missing:
        return
    missing = [item for item in missing if not _reuse_teacher(run, *item)]
    run.family.check_prompts(run.teacher.pipeline, prompts)
    switch = Switch(run, plugs)
    with Progress(console=run.console, transient=True) as progress:
        for variant, folder, header in missing:
            switch(variant)
            drawn = _draw_variant(run, variant, prompts, header, progress, switch.board)
            if variant.name == "teacher":
                with suppress(OSError):  # another job of the sweep was first
                    _hand_over(folder, _teacher_cache(run, header))
            run.say("generate", f"{variant.name}: {drawn} of {len(prompts)} pictures drawn, in {folder}")
    switch.restore()
