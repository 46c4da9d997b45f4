"""Stage 2: replace text streams and FFNs by linear projectors, and train these (paper Eq. 8-12)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ppcl.artifacts.headers import Header, fingerprint, is_current
from ppcl.artifacts.plan import PruningPlan, Width
from ppcl.artifacts.plugs import Projector, check_losses, is_stored, load_projectors
from ppcl.context import Run
from ppcl.data.batches import StepLoader, TrainingBatch, batch_numbers
from ppcl.distill.width import Place, PrunedPlace, WidthDistillation, places
from ppcl.layers import references
from ppcl.methods.similarity import similarity_maps
from ppcl.methods.width import ffn_errors, select_ffn, select_text
from ppcl.options import identity
from ppcl.parallel import barrier
from ppcl.report.text import counted, show_plan, show_risen
from ppcl.surgery.count import count_parameters
from ppcl.surgery.plugboard import load_student
from ppcl.surgery.width import width_surgery
from ppcl.training.drawing import Drawn
from ppcl.training.loop import check_resumable, discard_checkpoint, fit
from ppcl.training.sharding import place, whole_state
from ppcl.variants.plugs import required_removals, required_students
from ppcl.variants.reach import check_reachable


def projector_header(run: Run, item: PrunedPlace, students: Mapping[str, str]) -> Header:
    """Return the header of the projector of `item`, which lists everything that its weights depend on.

    `students`: fingerprints of the trained students, by name. A projector depends on the student that it is part of,
        and on the one that it reads text from.
    """
    width, distill = run.config.width, identity(run.config.distill)
    for key in ("mode", "init", "steps", "lr"):
        del distill[key]  # `width` has its own keys for these, or only students use them
    if width.relative_update is not None:
        distill["relative_update"] = width.relative_update
    place, reference = item.place, item.reference
    made_from = {
        "model": run.teacher.identity,
        "projector": item.name,
        "base": students.get(place.base or ""),
        "reference": None if reference is None else [reference.index, students.get(reference.base or "")],
        "text_output": width.text_output,
        "width": {key: getattr(width, key) for key in ("ridge", "num_batches", "steps", "lr", "linear_weight")},
        "distill": distill,
        "precision": run.precision,
        "data": run.data.identity,
    }
    return Header("ppcl.projector", made_from)


def _calibration(run: Run, start: int, stop: int, description: str, *, shared: bool = False) -> Iterator[TrainingBatch]:
    """Yield held-out batches `start` to `stop` of at least 16 samples each, with a progress bar named `description`.

    They come in as small batches as a step trains on. With `shared`, each rank gets its own rows of every batch;
    otherwise every rank gets all rows.
    """
    size, parts = run.config.distill.batch_size, run.config.distill.accumulate
    stream = (run.data.shared_stream if shared else run.data.stream)(run.config.data.calibration_seed, size)
    for step in run.track(batch_numbers(size, start, stop), description):
        yield from map(run.data.to_device, stream.divided(step, parts))


def _select(run: Run, kept: Sequence[Place]) -> tuple[Width, dict[str, Any]]:
    """Return the width sets that `width=auto` selects, and the CKA values and errors that they were selected by.

    Text streams are selected by CKA with the output of their reference, FFNs by the held-out error of their linear fit.
    """
    config, family, teacher = run.config.width, run.family, run.teacher.transformer
    if family.width is None:
        kind = type(teacher).__name__
        run.say("width", f"nothing is pruned in width: {kind} has no feed-forward network that can become linear")
        return {}, {}
    here = {stack: {place.index: place for place in kept if place.stack == stack} for stack in family.stacks}
    stop = config.num_batches

    surgery = width_surgery(family)
    every: Width = {stack: {"text": [], "ffn": surgery.ffn_blocks(stack, blocks)} for stack, blocks in here.items()}
    linear = WidthDistillation(family, teacher, kept, every, run.layout, run.config.distill, precision=run.precision)
    place(run, linear)
    linear.fit_linear(_calibration(run, 0, stop, "linear FFNs"), ridge=config.ridge)
    errors = ffn_errors(linear, _calibration(run, stop, stop + 2, "held-out FFN errors", shared=True))
    chosen = select_ffn(errors, config.num_ffn)

    batches = _calibration(run, 0, min(4, stop), "text similarity") if family.facts.text_stacks else ()
    maps = [
        torch.from_numpy(np.array(similarity_maps(family, teacher, batch)["text"], np.float32)) for batch in batches
    ]
    table = torch.stack(maps).mean(dim=0) if maps else torch.empty(0)  # over the blocks of all stacks
    rows = {key: row for row, key in enumerate(family.blocks(teacher))}
    width: Width = {}
    scores: dict[str, Any] = {}
    for stack, blocks in here.items():

        def similarity(reference: int, pruned: int, stack: str = stack, blocks: dict[int, Place] = blocks) -> float:
            return table[rows[stack, blocks[reference].end], rows[stack, blocks[pruned].end]].item()

        prunable = list(blocks) if stack in family.facts.text_stacks else []
        text = select_text(similarity, prunable, config.text_threshold, config.num_text)
        width[stack] = {"text": text, "ffn": sorted(index for s, index in chosen if s == stack)}
        reads = references(prunable, text)
        scores[stack] = {
            "text_cka": {str(index): similarity(reads[index], index) for index in text},
            "ffn_error": {str(index): error for (s, index), error in errors.items() if s == stack},
        }
    return {stack: sets for stack, sets in width.items() if any(sets.values())}, scores


def _has_plan(path: Path, plan: PruningPlan) -> bool:
    """Return whether `path` holds exactly this plan.

    A plan with given sets may be replaced. One with selected sets may not, so that raises `UsageError` if it differs.
    """
    if path.exists():
        found = PruningPlan.load(path, stage="width")
        if found.made_from.get("width", {}).get("source") in ("given", "plan"):
            return found.header().fingerprint == plan.header().fingerprint
    return is_current(path, plan.header(), "delete that file to select anew")


def _plan(run: Run, kept: Sequence[Place], students: Mapping[str, str]) -> PruningPlan:
    """Return the run's plan with its width sets: read from disk, given, or selected now. A new plan is written."""
    config = run.config.width
    selection = {key: getattr(config, key) for key in ("source", "text_output", "keep_text_query")}
    if config.source == "auto":
        keys = ("text_threshold", "num_text", "num_ffn", "ridge", "num_batches")
        selection |= {key: getattr(config, key) for key in keys}
    else:
        selection["sets"] = run.width
    made_from = {"model": run.teacher.identity, "intervals": run.intervals, "students": students, "width": selection}
    plan = PruningPlan(run.config.model.family, run.num_layers, run.intervals, made_from)
    if _has_plan(run.width_path, plan):
        return PruningPlan.load(run.width_path, stage="width")
    if config.source == "auto":
        plan.width, plan.scores = _select(run, kept)
    else:
        plan.width = run.width
    plan.parameters = count_parameters(run.family, run.config.model.arch, run.intervals, plan.width, run.layout)
    if run.writes:
        plan.save(run.width_path)
    run.say("width", f"wrote {run.width_path}")
    return plan


def run(run: Run) -> None:
    """Select the width sets if they are not given, then fit and train the projectors that do not exist yet.

    Least squares initialise the projectors, and `width.steps` steps train them. Each is written to `plugs/` with its
    held-out losses. A killed training resumes from its last checkpoint. Raises `UsageError` if students are missing, if
    the budget cannot be reached, or if projectors or the checkpoint have other settings.
    """
    config, folder = run.config.width, run.plugs_folder
    plugs = required_students(run)
    students = {name: plug.header.fingerprint for name, plug in plugs.items()}
    students |= dict.fromkeys(required_removals(run), "removed")

    def parts() -> tuple[Any, list[Place]]:
        teacher = run.teacher.transformer
        modules = {name: load_student(run.family, teacher, plug) for name, plug in plugs.items()}
        return teacher, places(run.family, teacher, run.intervals, modules)

    teacher, kept = parts()
    plan = _plan(run, kept, students)
    if run.teacher.sharded:  # `_plan` may have sharded blocks that are needed whole from here on
        run.teacher.forget_pipeline()
        teacher, kept = parts()
    show_plan(run, plan)
    check_reachable(run, run.intervals, plan.width)
    if not plan.width:
        return
    distill = replace(run.config.distill, steps=max(config.steps, 1), lr=config.lr, mode="parallel")
    if config.relative_update is not None:
        distill = replace(distill, relative_update=config.relative_update)

    def distillation(only: Collection[str] | None = None) -> WidthDistillation:
        arguments = run.family, teacher, kept, plan.width, run.layout, distill
        return WidthDistillation(*arguments, linear_weight=config.linear_weight, only=only, precision=run.precision)

    headers = {item.name: projector_header(run, item, students) for item in distillation().pruned}
    advice = f"delete {folder}/*.text.json and {folder}/*.ffn.json to train all projectors anew"
    stale = [name for name, header in headers.items() if not is_stored(folder / f"{name}.json", header, advice)]
    made_from = {"projectors": {name: header.fingerprint for name, header in headers.items()}}
    header = Header("ppcl.width", made_from)
    begun = _begun(folder, [*headers], stale)
    if not stale:
        for path in begun:
            discard_checkpoint(run, path)  # the training was killed when its last projector was written
        run.say("width", f"reused {folder}")
        return
    checkpoints = _checkpoint_folder(folder, stale)
    if begun and checkpoints not in begun:
        checkpoints, stale = next(iter(begun.items()))
    barrier()  # all ranks must have looked before one changes these folders
    check_resumable(checkpoints, header, sharded=run.teacher.sharded)
    module = distillation(stale)
    place(run, module)
    module.fit_linear(_calibration(run, 0, config.num_batches, "least squares"), ridge=config.ridge)

    def measure() -> list[dict[str, float]]:
        first = config.num_batches
        return module.heldout(_calibration(run, first, first + 4, "held-out losses", shared=True))

    def watched(count: int) -> dict[str, float]:
        steps = batch_numbers(distill.batch_size, config.num_batches, config.num_batches + 4)[:count]
        calibration = run.data.shared_stream(run.config.data.calibration_seed, distill.batch_size)
        batches = (batch for step in steps for batch in calibration.divided(step, distill.accumulate))
        found = module.heldout(map(run.data.to_device, batches))
        return {item.name: losses["loss"] for item, losses in zip(module.pruned, found, strict=True)}

    before = measure()
    for item, found in zip(module.pruned, before, strict=True):
        check_losses(item.name, found)  # before the training, whose rate would be blamed
    if config.steps:
        stream = run.data.shared_stream(run.config.data.train_seed, distill.batch_size)
        run.say_once("width", stream.remark)
        divided = partial(stream.divided, parts=distill.accumulate)
        loader = StepLoader(divided, config.steps, ahead=run.data.from_disk)
        blocks = run.family.blocks(teacher).values()
        others = {name: item for name, item in load_projectors(folder).items() if name in headers and name not in stale}
        drawn = Drawn(module.names, teacher, partial(module.plugged, others))
        fit(run, "width", module, loader, checkpoints, header, distill, blocks, watched, drawn)
        place(run, module)
    after = measure()
    for item, found in zip(module.pruned, after, strict=True):
        check_losses(item.name, found)  # of all, before the first is written
    each_losses: dict[str, dict[str, float]] = {}
    for number, item in enumerate(module.pruned):
        each_losses[item.name] = losses = {"heldout_before": before[number]["loss"]}
        losses |= {f"heldout_{key}": value for key, value in after[number].items()}
        projector = _projector(run, module, number, headers[item.name], losses)
        if run.writes:
            projector.save(folder)
        change = f"{losses['heldout_before']:.4f} -> {losses['heldout_loss']:.4f}"
        run.say("width", f"{item.name}: held-out loss {change}")
    rate, leave_out = next(iter(module.rates())), "name the other projectors in width.names (width.source=given)"
    show_risen(run, "width", each_losses, rate, leave_out)
    for path in {checkpoints, *begun}:
        discard_checkpoint(run, path)
    run.say("width", f"wrote {counted(len(stale), 'projector')} to {folder}")


def _checkpoint_folder(folder: Path, names: Sequence[str]) -> Path:
    """Return the checkpoint folder of a training of exactly these projectors, in `folder`."""
    return folder / f"checkpoint-width-{fingerprint({'projectors': names})}"


def _begun(folder: Path, names: Sequence[str], stale: Sequence[str]) -> dict[Path, list[str]]:
    """Return the checkpoint folders of trainings that a killed command has left, and the projectors of each.

    `names`: all projectors, in the order in which they are written. `stale`: those that are missing. A command that was
    killed while it wrote them has trained those that it had written, too.
    """
    first = names.index(stale[0]) if stale else len(names)
    sets = [[*names[start:first], *stale] for start in range(first, -1, -1)]
    return {path: found for found in sets if found and (path := _checkpoint_folder(folder, found)).is_dir()}


def _projector(run: Run, module: WidthDistillation, number: int, header: Header, losses: dict[str, float]) -> Projector:
    """Return the trained projector of `module.pruned[number]`. With several ranks only rank 0 gets its tensors."""

    def state_of(projector: nn.Module) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in whole_state(projector, run.teacher.dtype_of).items()}

    return module.projector(number, state_of, header, losses)
