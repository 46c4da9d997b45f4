"""Record the transformer's calls while the pipeline draws the prompts of `data.path`, for `stages=[cache]`."""

from __future__ import annotations

import inspect
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch

from ppcl.artifacts.files import sweep, write_json
from ppcl.artifacts.headers import is_current
from ppcl.context import Run
from ppcl.data.recording.earlier import take_over
from ppcl.data.recording.files import (
    ARGUMENTS,
    JOINING,
    OUTPUT,
    RECORD,
    Joining,
    is_whole,
    read_call,
    read_entries,
    record_of,
    write_calls,
    write_joining,
)
from ppcl.data.recording.nested import Axes, NoAxesError
from ppcl.data.recording.recorder import (
    Recording,
    check_joined,
    find_axes,
    for_two,
    is_finite,
    recorded,
    rows_of,
    spread,
)
from ppcl.data.recording.renoise import NoRenoisingError, find_renoising
from ppcl.data.recording.table import Row, check_rows, loaded, read_rows
from ppcl.disk import check_space, in_bytes
from ppcl.errors import UsageError, root
from ppcl.families.traced.family import sampling_arguments
from ppcl.launch import rank
from ppcl.progress import counter
from ppcl.report.text import counted
from ppcl.tracing import ensure_traced

PATHS = (ARGUMENTS, OUTPUT)


def check_prompts(run: Run) -> None:
    """Check every row of `data.path`, without loading weights; raises `UsageError` for the first that is not usable."""
    rows = read_rows(Path(str(run.config.data.path)))
    check_rows(rows, run.teacher.pipeline_class.__call__, given=run.family.facts.max_references > 0)
    if len(rows) == 1:
        raise UsageError(
            f"data.path={run.config.data.path} holds one prompt, and one is kept from training: give two or more."
        )


def record_prompts(run: Run) -> None:
    """Record every prompt that is not recorded yet. Several ranks divide the prompts among themselves.

    Raises `UsageError` if a row cannot be used, if the pipeline refuses one, or if the disk has too little space.
    """
    rows, folder, header = read_rows(Path(str(run.config.data.path))), run.data.cache_folder, run.data.cache_header
    number, ranks = rank()
    if not is_current(folder / RECORD, header):
        write_json(folder / RECORD, header.to_json())  # written first, to identify the files that follow
    own = range(number, len(rows), ranks)
    missing = [prompt for prompt in own if not is_whole(folder, prompt)]
    joins = number == 0 and not (folder / JOINING).exists()
    sweep(folder)
    taken = take_over(folder, header, rows, missing, joins=joins) if missing or joins else set[int]()
    if taken:
        run.say("cache", f"{counted(len(taken), 'prompt')} taken from earlier recordings, which have the same rows")
        missing = [prompt for prompt in missing if prompt not in taken]
        joins = joins and not (folder / JOINING).exists()
    if not (missing or joins):
        run.say("cache", f"reused {folder}: {counted(len(own), 'prompt')} recorded")
    else:
        _check_texts(run, rows)
        if joins:  # what the first prompt shows of the pipeline is in memory only while it is recorded
            missing = [0, *(prompt for prompt in missing if prompt)]
        _record(run, rows, missing, folder)
    others = sum(not is_whole(folder, prompt) for prompt in range(len(rows)))
    if others:
        run.say("cache", f"other ranks record {counted(others, 'prompt')} of {len(rows)}")


def _check_texts(run: Run, rows: list[Row]) -> None:
    """Raise `UsageError` for the first prompt that the model cannot take, such as a class that it does not have."""
    for row in rows:
        try:
            run.family.check_prompts(run.teacher.pipeline, [] if row.prompt is None else [row.prompt])
        except UsageError as error:
            raise UsageError(f"{row.place}: {error}") from None


def _record(run: Run, rows: list[Row], missing: list[int], folder: Path) -> None:
    """Record the prompts with these numbers; after the first, say how much space all of them take."""
    config, fingerprint, size = run.config, run.data.cache_header.fingerprint, 0
    with counter("recording", len(missing), console=run.progress_console) as advance:
        for place, prompt in enumerate(missing):
            found = _drawn(run, rows[prompt], prompt)
            assert found.latents is not None
            row = rows[prompt]
            size += write_calls(folder, prompt, fingerprint, row.identity, row.caption, found.calls, found.latents)
            ensure_traced(run, record_of(folder, prompt))  # before the others are recorded for nothing
            advance(1)
            if place == 0 and found.partial:
                passes = "a pass of guidance that leaves blocks out is not recorded, as nothing can be learnt from it"
                run.say("cache", passes)
            if place == 0:
                _say_size(run, tuple(found.latents.shape))
            if prompt == 0 and not (folder / JOINING).exists():
                write_joining(folder, _joining(run, rows[0], folder, found))
            if place == 0 and len(missing) > 1:
                remedy = "name another folder, lower data.record_steps, or give fewer prompts"
                cache = f"paths.cache_dir={config.paths.cache_dir}"
                left = counted(len(missing) - 1, "more prompt")
                run.say("cache", check_space(folder, size * (len(missing) - 1), left, remedy, place=cache))
    run.say("cache", f"{counted(len(missing), 'prompt')} recorded, {in_bytes(size)}, in {folder}")


def _say_size(run: Run, latents: tuple[int, ...]) -> None:
    """Say if the pipeline does not draw the size of `model.sampling`, as its final latents `[.., H, W]` show.

    Some pipelines draw the nearest size that they were trained for, and cut or scale that.
    """
    pipeline, sampling = run.teacher.pipeline, run.config.model.sampling
    scales = (getattr(pipeline, name, None) for name in ("vae_scale_factor", "vae_scale_factor_spatial"))
    scale = next((number for number in scales if isinstance(number, int)), None)
    if scale is None or len(latents) < 4 or sampling.height is None or sampling.width is None:
        return
    height, width = (scale * number for number in latents[-2:])
    if abs(height - sampling.height) < scale and abs(width - sampling.width) < scale:
        return
    binned = "use_resolution_binning" in inspect.signature(type(pipeline).__call__).parameters
    remedy = "; for the size asked for add model.sampling.arguments.use_resolution_binning=false" if binned else ""
    asked = f"model.sampling asks for {sampling.height}x{sampling.width}"
    run.say("cache", f"{asked}, but the pipeline draws {height}x{width} and resizes that{remedy}")


def _drawn(run: Run, row: Row, prompt: int) -> Recording:
    """Draw a prompt, and return what is recorded of it."""
    pipeline = run.teacher.pipeline
    arguments = call_arguments(run, row, prompt)
    wanted = partial(spread, run.config.data.record_steps, number=prompt)
    with recorded(pipeline, run.teacher.component, lambda steps: wanted(steps)) as found:
        try:
            pipeline(**arguments)
        except UsageError:
            raise
        except (ValueError, TypeError, LookupError) as error:  # the last for sizes that a model has no positions for
            raise UsageError(f"{row.place}: the pipeline refuses its arguments: {_short(error)}") from error
        except NameError as error:  # diffusers imports packages that it does not require only where they are installed
            raise UsageError(
                f"{type(pipeline).__name__} needs {error.name}, which is not installed: pip install {error.name}."
            ) from error
        except RuntimeError as error:  # such as embeddings of another size
            if "out of memory" in str(error):
                raise
            raise UsageError(f"{row.place}: the pipeline fails with its arguments: {_short(root(error))}") from error
    if not found.calls or found.latents is None:
        raise UsageError(
            f"{type(pipeline).__name__} calls its transformer or its scheduler in a way that cannot be recorded: give "
            "pictures with captions as data.path=FOLDER."
        )
    if not is_finite([*(call.output for call in found.calls), found.latents]):
        raise UsageError(
            f"{row.place}: what the transformer predicts is not finite: set model.dtype=float32 if it overflows, or "
            "give another model."
        )
    return found


def _short(error: object) -> str:
    """Return what an error says, cut where it goes on for long: diffusers prints whole tensors."""
    return shorten(str(error), 400, placeholder=" ...")


def call_arguments(run: Run, row: Row, prompt: int) -> dict[str, Any]:
    """Return all arguments of the pipeline's call for a row, which is prompt number `prompt`.

    Its noise has the seed `seed` + `prompt`, as with pictures that are drawn.
    """
    pipeline, family, sampling = run.teacher.pipeline, run.family, run.config.model.sampling
    parameters = inspect.signature(type(pipeline).__call__).parameters
    found = family.sampling_arguments(sampling, 1) if family.draws else sampling_arguments(sampling, parameters)
    if row.prompt is not None:
        found |= family.prompt_arguments(pipeline, [row.prompt]) if family.draws else {"prompt": row.prompt}
    found |= loaded(row, parameters)
    own: dict[str, Any] = {
        "generator": torch.Generator().manual_seed(run.config.seed + prompt),
        "output_type": "latent",
    }
    # With a cache of keys a call depends on those before it. Pipelines that have one can do without.
    own |= {name: False for name, parameter in parameters.items() if "cache" in name and parameter.default is True}
    return found | {name: value for name, value in own.items() if name in parameters}


def _joining(run: Run, row: Row, folder: Path, found: Recording) -> Joining:
    """Return how calls are joined into batches and made anew, as the pipeline shows it, and say so.

    `found`: what was recorded of `row`, the first prompt.
    """
    joining = _axes(run, row, folder, found)
    try:
        renoising = find_renoising(run.teacher.pipeline.scheduler, found)
    except NoRenoisingError as error:
        run.say("cache", f"training sees the recorded noise levels alone: {error}")
        return replace(joining, as_recorded=str(error))
    run.say("cache", "training gets fresh noise at any level, since the pipeline is seen to do flow matching")
    return replace(joining, renoising=asdict(renoising))


def _axes(run: Run, row: Row, folder: Path, found: Recording) -> Joining:
    """Return how calls are joined into batches, and say so; see `_joining`."""
    pipeline, transformer, why = run.teacher.pipeline, run.teacher.transformer, "the pipeline takes one sample at once"
    arguments = call_arguments(run, row, 0)
    for two in for_two(pipeline, arguments):
        try:
            axes = find_axes(pipeline, transformer, call_arguments(run, row, 0), two, PATHS)
            _check_joined(transformer, folder, axes)
        except NoAxesError as error:
            why = str(error)
            continue
        run.say("cache", "calls of one shape are joined into batches, along the dimension that two samples show")
        one = found.latents is not None and len(found.latents) == 1  # else rows may be the frames of a video
        rows = rows_of(transformer, found.calls[0], axes, PATHS) if one else 1
        if rows > 1:
            run.say("cache", f"each call has {rows} passes of guidance, which are taken as calls of their own")
        return Joining(axes, rows=rows)
    run.say("cache", f"calls are taken one by one: {why}")
    return Joining(None, why)


def _check_joined(transformer: Any, folder: Path, axes: Axes) -> None:
    """Check that calls of the first prompt, joined by `axes`, have the output that they have apart."""
    entries = read_entries(folder, 1, axes)
    alike = [entry for entry in entries if entry.alike == entries[0].alike]
    if len(alike) > 1:
        calls = [read_call(entry.record, entry.number) for entry in (alike[0], alike[-1])]
        check_joined(transformer, calls, axes, PATHS)
