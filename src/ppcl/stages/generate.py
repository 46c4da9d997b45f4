"""Draw the pictures of every variant, with the same prompts, seeds and settings, through the diffusers pipeline.

Of a video the picture is a sheet of its frames, with an mp4 beside it, and of a sound a spectrogram, with a wav.

Several ranks divide the batches, which are those of a single process, so that their pictures are the same bit for bit.
Each rank writes its own. Rank 0 says which are missing, and in which folder they belong, and does everything else.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ppcl.artifacts.files import atomic_folder, atomic_path, write_json
from ppcl.artifacts.folders import list_files
from ppcl.artifacts.headers import Header
from ppcl.context import Run
from ppcl.data.recording.table import Row
from ppcl.errors import UsageError
from ppcl.parallel import dealt, gathered, of_first, together
from ppcl.pictures.drawing import decoded_latents, draw, draw_row, equipped
from ppcl.pictures.images import (
    FRAMES,
    TEACHER_SHARE,
    Drawing,
    claim,
    drawings,
    given_to,
    picture_path,
    prompts_of,
    read_picture,
    save_drawn,
    save_prompts,
    told_by,
)
from ppcl.pictures.latents import save_latents
from ppcl.pictures.layouts import write_layout
from ppcl.pictures.loras import TeacherLora, read_loras
from ppcl.pictures.outputs import Drawn
from ppcl.pictures.videos import lacks_encoder
from ppcl.progress import Part, counter
from ppcl.report.plots import image_grid
from ppcl.report.text import by_ranks
from ppcl.surgery.noise_levels import ByNoiseLevel
from ppcl.surgery.plugboard import Plugboard
from ppcl.variants.plugs import Plugs
from ppcl.variants.switch import Switch
from ppcl.variants.variants import variants_of

IN_GRID = 400  # pictures of the overview `grid.png`


def _draw_variant(run: Run, drawing: Drawing, board: Plugboard, loras: list[TeacherLora]) -> list[int]:
    """Draw the pictures of one variant that do not exist yet, and return how many each rank has drawn.

    The folder is claimed as late as possible, so that nothing is written for a ControlNet that does not fit.
    """
    with equipped(run, board, loras) as (pipeline, arguments):
        with together():
            if run.writes:
                claim(run, drawing)
        run.image_folders |= of_first(run.image_folders)
        claimed = replace(drawing, folder=run.image_folders[drawing.variant.name])
        return _draw_missing(run, claimed, partial(_draw_batch, run, pipeline, arguments))


def _draw_batch(
    run: Run, pipeline: Any, arguments: Mapping[str, Any], numbers: Sequence[int]
) -> tuple[list[Drawn], list[Tensor]]:
    """Return what is drawn for the prompts with these numbers, and the final latents of each as the VAE gets them."""
    prompts = [run.prompts[number] for number in numbers]
    rows = [prompt.fact for prompt in prompts if isinstance(prompt.fact, Row)]
    with decoded_latents(pipeline) as latents:
        if rows:
            drawn = [draw_row(run, pipeline, *pair, **arguments) for pair in zip(rows, numbers, strict=True)]
        else:
            texts, given = [prompt.text for prompt in prompts], [given_to(run, number) for number in numbers]
            drawn = draw(run, pipeline, texts, numbers, given, **arguments)
    return drawn, latents


def _draw_missing(run: Run, drawing: Drawing, draw_batch: Any) -> list[int]:
    """Draw and save the missing pictures of a variant, batch by batch, then its grid and its manifest.

    Returns the number of pictures in the batches that each rank has drawn.
    """
    folder, count = drawing.folder, len(run.prompts)
    name, size = drawing.variant.name, run.config.generate.batch_size
    told = _own_header(drawing)
    settings = {"variant": name, **told.made_from, "fingerprint": told.fingerprint}
    batches = [range(start, min(start + size, count)) for start in range(0, count, size)]
    missing = [batch for batch in batches if drawing.lacks(batch)]
    mine = dealt(of_first(missing))
    drawn = sum(map(len, mine))
    progress = counter(name, count, done=count - drawn, console=run.progress_console, part=run.part)
    with together(), progress as advance:
        for numbers in mine:
            results, latents = draw_batch(numbers)
            save_latents(folder, numbers, latents)
            transformer = run.teacher.transformer
            share = {TEACHER_SHARE: transformer.teacher_share} if isinstance(transformer, ByNoiseLevel) else {}
            for number, one in zip(numbers, results, strict=True):
                text = settings | {"prompt": run.prompts[number].text, "seed": run.config.seed + number} | share
                save_drawn(one, picture_path(folder, number), text)
            advance(len(numbers))
    if run.writes:
        _finish(run, drawing)
    return gathered(drawn)


def _finish(run: Run, drawing: Drawing) -> None:
    """Write what belongs to the pictures of a variant, once all of them are there: prompts, grid and manifest."""
    folder, count = drawing.folder, len(run.prompts)
    save_prompts(run, folder)
    first = range(min(count, IN_GRID))
    image_grid(folder / "grid.png", (read_picture(picture_path(folder, number)) for number in first))
    _complete(folder, drawing.header, count)


def _complete(folder: Path, header: Header, count: int) -> None:
    """Record that a folder has all `count` pictures, in place of the record of unfinished ones."""
    write_json(folder / "manifest.json", header.to_json() | {"num_images": count} | list_files(folder))
    (folder / "unfinished.json").unlink(missing_ok=True)


def _own_header(drawing: Drawing) -> Header:
    """Return the header of the drawing, for the teacher without what only changes the pruned variants of its set."""
    made_from = dict(drawing.header.made_from)
    if drawing.variant.name == "teacher":
        made_from.pop("teacher_above", None)
    return replace(drawing.header, made_from=made_from)


def _teacher_cache(run: Run, drawing: Drawing) -> Drawing:
    """Return the drawing in the cache with the teacher's pictures, which all runs of a sweep share."""
    header = _own_header(drawing)
    return replace(drawing, folder=Path(run.config.paths.cache_dir) / "images" / header.fingerprint, header=header)


def _reuse_teacher(run: Run, drawing: Drawing) -> bool:
    """Copy the teacher's pictures from the cache, and return whether that was possible."""
    cached = _teacher_cache(run, drawing)
    if drawing.variant.name != "teacher" or not _is_sound(cached):
        return False
    folder = claim(run, drawing)
    try:
        _copy_all(cached.folder, folder)
    except FileNotFoundError:  # another job has just replaced them
        return False
    _complete(folder, drawing.header, len(run.prompts))
    run.say("generate", f"reused {cached.folder}, in {folder}")
    return True


def _share_teacher(run: Run, drawing: Drawing, folder: Path) -> None:
    """Copy the teacher's pictures from `folder` to the cache, unless it has them or one says that it is another's.

    Damaged ones in the cache are replaced.
    """
    cached = _teacher_cache(run, drawing)
    ours = (told_by(picture_path(folder, number)).get("fingerprint") for number in range(len(run.prompts)))
    if _is_sound(cached) or any(found != cached.header.fingerprint for found in ours):
        return
    with suppress(OSError), atomic_folder(cached.folder) as temporary:  # another job of the sweep may store them, too
        _copy_all(folder, temporary)
        _complete(temporary, cached.header, len(run.prompts))


def _is_sound(cached: Drawing) -> bool:
    """Return whether the cache has these pictures, and none of them has changed since."""
    try:
        if not cached.is_complete:
            return False
        cached.check()
        for number in range(cached.header.made_from["prompts"]["count"]):
            read_picture(picture_path(cached.folder, number))  # folders of earlier versions have no checksums
    except UsageError:
        return False
    return True


def _copy_all(source: Path, target: Path) -> None:
    """Copy a folder of pictures without its records. Files that `target` already has stay.

    They are no hard links: a file that is spoilt in one run must not be spoilt in all others.
    """

    def copy(path: str, to: str) -> None:
        if not Path(to).exists():
            with atomic_path(Path(to)) as temporary:
                shutil.copy2(path, temporary)

    records = shutil.ignore_patterns("manifest.json", "unfinished.json", ".*")
    shutil.copytree(source, target, copy_function=copy, ignore=records, dirs_exist_ok=True)


def run(run: Run) -> None:
    """Draw all variants into the folder of this set of pictures. Complete sets are reused, interrupted ones completed.

    Raises `UsageError` if a variant is not available, if a prompt does not suit the model, or if the folder holds
    pictures of other settings.
    """
    variants, plugs = variants_of(run)
    every = drawings(run, variants, plugs)
    run.say("generate", f"{', '.join(variant.name for variant in variants)}: in {run.set_folder}")
    missing = of_first([drawing for drawing in every if not drawing.is_complete])
    for drawing in every:
        if drawing not in missing:
            drawing.check()
            run.say("generate", f"reused {drawing.folder}")
    if missing:
        _draw(run, missing, plugs)
    package = lacks_encoder()
    if package and run.writes and told_by(picture_path(run.image_folders[variants[0].name], 0)).get(FRAMES):
        run.say("generate", f"videos are sheets of their frames alone: pip install {package}, for an mp4 of each")
    if run.config.generate.layout is not None and run.writes:
        for variant in variants:
            run.say("generate", f"wrote {write_layout(run, variant.name)}")


def _draw(run: Run, missing: list[Drawing], plugs: Plugs) -> None:
    """Draw the pictures that are missing, or take the teacher's from the cache."""
    loras = read_loras(run)  # before any weights are loaded, since it may refuse some
    with together():
        if run.writes:
            missing = [drawing for drawing in missing if not _reuse_teacher(run, drawing)]
    missing = of_first(missing)
    run.family.check_prompts(run.teacher.pipeline, prompts_of(run))
    switch = Switch(run, plugs, alone=True)
    for number, drawing in enumerate(missing, start=1):
        run.part = Part(number, len(missing), "variants") if len(missing) > 1 else None
        transformer = switch(drawing.variant, run.config.generate.teacher_above)
        by_rank = _draw_variant(run, drawing, switch.board, loras)
        drawn, name = sum(by_rank), drawing.variant.name
        folder = run.image_folders[name]
        if name == "teacher" and run.writes:
            _share_teacher(run, drawing, folder)
        share = ""
        if isinstance(transformer, ByNoiseLevel) and by_rank[0]:
            share = f", {100 * transformer.teacher_share:.0f}% of the steps by the teacher"
        told = f"{drawn} of {len(run.prompts)} pictures drawn{by_ranks(by_rank)}{share}"
        run.say("generate", f"{name}: {told}, in {folder}")
    run.part = None
    switch.restore()
