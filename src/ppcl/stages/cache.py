"""Encode pictures and captions once and store the results, so that no later stage loads a text encoder or a VAE.

Of prompts alone, calls of the transformer are stored.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from glob import escape
from itertools import islice
from pathlib import Path
from typing import Any

from ppcl.artifacts.files import sweep, write_json
from ppcl.artifacts.headers import Header, is_current
from ppcl.artifacts.tensors import write_tensors
from ppcl.context import Run
from ppcl.data.cached import EMPTY, is_whole, part_record, read_part, read_unit, unit_record
from ppcl.data.encoding import Encoder, encode_samples
from ppcl.data.recording.record import record_prompts
from ppcl.data.sources import ClassFolder, Sample, Skipped, Unit, find_units
from ppcl.disk import check_space
from ppcl.errors import UsageError
from ppcl.launch import rank
from ppcl.progress import counter
from ppcl.report.text import counted

FEW = 50  # samples, of which a handful are held out
TOLD = 3  # samples of each unit that are named if they are left out


def run(run: Run) -> None:
    """Encode every unit of `data.path` (a shard, or up to 1,000 rows or pictures of a class) that is not cached yet.

    With `data=prompts` the calls of the pipeline's transformer are recorded in their place.
    Several ranks divide the units among themselves. Samples that cannot be used are left out and counted. Raises
    `UsageError` if the disk has too little space, if no sample can be used, if the model does not have the class of a
    folder, or if another version of the libraries has encoded this data.
    """
    config = run.config.data
    if config.name == "prompts":
        record_prompts(run)
        return
    units, folder = find_units(config), run.data.cache_folder
    header = run.data.cache_header
    number, count = rank()
    if not is_current(folder / "cache.json", header):
        run.data.refuse_encoding_again()
        write_json(folder / "cache.json", header.to_json())  # written first, to identify the files that follow
    own = units[number::count]
    mine = [unit for unit in own if not is_whole(folder, unit.name)]
    if mine or not (folder / EMPTY).exists():
        _name_classes(run, units)
        _cache(run, mine, folder, header)
    else:
        run.say("cache", f"reused {folder}: {_told(own, folder)}")
    others = sum(not is_whole(folder, unit.name) for unit in units)
    if others:
        run.say("cache", f"other ranks cache {counted(others, 'unit')} of {len(units)}")
        return
    stored = sum(record["samples"] for record in _records(units, folder))
    if not stored:
        raise _nothing(run, units, folder)
    if mine and stored < FEW:
        run.say("cache", f"{stored} are few: held-out figures will rest on a handful; a few hundred say more")


def _name_classes(run: Run, units: Sequence[Unit]) -> None:
    """Give the pictures of class folders the captions that the model has for these classes.

    Raises `UsageError` for a folder of which it has none.
    """
    folders = [unit for unit in units if isinstance(unit, ClassFolder)]
    names = list(dict.fromkeys(unit.caption for unit in folders))
    try:
        captions = run.family.class_captions(run.teacher.pipeline, names) if names else []
    except UsageError as error:
        raise UsageError(f"data.path={run.config.data.path} has a folder for each class: {error}") from None
    named = dict(zip(names, captions, strict=True))
    for unit in folders:
        unit.caption = named[unit.caption]


def _cache(run: Run, units: list[Unit], folder: Path, header: Header) -> None:
    """Encode `units`, and say how many samples of them are cached and which are left out."""
    encoder = Encoder(run.config, run.family, run.teacher.pipeline)
    write_tensors(folder / EMPTY, encoder.empty_prompt(), {"fingerprint": header.fingerprint})
    samples = sum(unit.count() for unit in units)
    _check_space(run, encoder, units, samples, folder)
    with counter("caching", samples, console=run.progress_console) as advance:
        for unit in units:
            skipped = _cache_unit(run, encoder, unit, folder, advance)
            for item in skipped[:TOLD]:
                run.say("cache", f"{unit.name}: left out {item['key']}: {item['why']}")
            if len(skipped) > TOLD:
                run.say("cache", f"{unit.name}: {len(skipped) - TOLD} more are in {folder / unit_record(unit.name)}")
    run.say("cache", f"{_told(units, folder)}, in {folder}")


def _records(units: Sequence[Unit], folder: Path) -> list[dict[str, Any]]:
    """Return the records of cached units."""
    return [read_unit(folder / unit_record(unit.name)) for unit in units]


def _told(units: Sequence[Unit], folder: Path) -> str:
    """Return how many samples of cached units there are, and how many were left out."""
    records = _records(units, folder)
    stored, left_out = sum(item["samples"] for item in records), sum(len(item["skipped"]) for item in records)
    return f"{counted(stored, 'sample')} of {counted(len(units), 'unit')} cached, {left_out} left out"


def _nothing(run: Run, units: Sequence[Unit], folder: Path) -> UsageError:
    """Return the error for data without a sample that can be used, and delete the records that say so.

    Otherwise the same command would take them for a finished cache after the pictures have been corrected.
    """
    reasons = Counter(item["why"] for record in _records(units, folder) for item in record["skipped"])
    path = run.config.data.path
    for record in folder.glob("*.json"):
        if record.name != "cache.json":
            record.unlink(missing_ok=True)  # another rank may do the same
    if not reasons:
        return UsageError(f"data.path={path} is empty: there is no picture in it.")
    (why, number), total = reasons.most_common(1)[0], reasons.total()
    return UsageError(
        f"data.path={path} has no sample that can be used: {total} are left out, {number} of them for this reason: "
        f"{why}; correct that, and run this again."
    )


def _check_space(run: Run, encoder: Encoder, units: list[Unit], samples: int, folder: Path) -> None:
    """Print an estimate of the disk space that `samples` samples take, from the size of the first one.

    Raises `UsageError` if less is free.
    """
    first = next((item for unit in units for item in unit.read(run.config.data) if isinstance(item, Sample)), None)
    if first is None:
        return
    (found, _), _ = encode_samples(encoder, [first])
    if not found:
        return  # `_cache_unit` reports why the sample is left out
    each = sum(tensor.nbytes for tensor in found.values())
    remedy, place = "name another folder, or cache fewer samples", f"paths.cache_dir={run.config.paths.cache_dir}"
    run.say("cache", check_space(folder, each * samples, counted(samples, "sample"), remedy, place=place))


def _cache_unit(
    run: Run, encoder: Encoder, unit: Unit, folder: Path, advance: Callable[[int], None]
) -> list[dict[str, str]]:
    """Encode one unit, and write its parts and then its record. Whole parts of an earlier, killed attempt are kept.

    `advance`: called with the number of samples encoded since its last call. Returns key and reason (`key`, `why`) of
        each sample that was left out.
    """
    size, skipped, stored = run.config.data.samples_per_file, [], 0
    fingerprint = run.data.cache_header.fingerprint
    sweep(folder, f"{escape(unit_record(unit.name).removesuffix('.json'))}*")
    for part, chunk in enumerate(_chunks(unit.read(run.config.data), size)):
        skipped += [{"key": item.key, "why": item.why} for item in chunk if isinstance(item, Skipped)]
        record = folder / part_record(unit.name, part)
        if not (record.exists() and record.with_suffix(".safetensors").exists()):
            found, bad = encode_samples(encoder, [item for item in chunk if isinstance(item, Sample)], advance)
            write_tensors(record.with_suffix(".safetensors"), found[0], {"unit": unit.name, "fingerprint": fingerprint})
            write_json(record, {"samples": found[1], "skipped": bad})
        content = read_part(record)
        skipped += content["skipped"]
        stored += len(content["samples"])
    write_json(folder / unit_record(unit.name), {"unit": unit.name, "samples": stored, "skipped": skipped})
    return skipped


def _chunks(items: Iterable[Sample | Skipped], size: int) -> Iterator[list[Sample | Skipped]]:
    """Yield lists of `size` items, skipped ones included: a sample's part must not depend on the other samples."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
