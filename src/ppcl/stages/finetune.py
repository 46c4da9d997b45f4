"""Stage 3: train all parameters of the pruned model on the teacher's output (paper section 4.1)."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from ppcl.artifacts.files import atomic_folder, check_finite, read_json, write_json
from ppcl.artifacts.folders import check_model, list_files
from ppcl.artifacts.headers import Header, is_current
from ppcl.context import Run
from ppcl.data.batches import StepLoader, TrainingBatch, batch_numbers
from ppcl.data.streams import Stream
from ppcl.disk import check_space
from ppcl.distill.finetune import FineTune
from ppcl.distill.frozen import before_removal
from ppcl.distill.targets import STEPS_PER_FILE, Batches, Targets
from ppcl.errors import UsageError
from ppcl.layers import BlockMap
from ppcl.options import identity
from ppcl.streaming import follow, still
from ppcl.surgery.adapter import cast_weights, merge_lora, save_lora, save_merged
from ppcl.taps import BlockKey
from ppcl.training.drawing import Drawn
from ppcl.training.loop import check_resumable, discard_checkpoint, fit
from ppcl.training.sharding import Sharding, place
from ppcl.variants.costs import FIRST_BATCH
from ppcl.variants.plugs import Plugs, required_plugs
from ppcl.variants.switch import Switch
from ppcl.variants.variants import Variant, another_run, finetuned_folder, made_of, planned


def finetune_header(run: Run, arranged: dict[str, Any]) -> Header:
    """Return the header of a fine-tuned model, which lists everything that its weights depend on.

    `arranged`: the students, projectors and removals that the training starts from.
    """
    made_from = {
        "model": run.teacher.identity,
        "layout": asdict(run.layout),
        "finetune": identity(run.config.finetune),
        "precision": run.precision,
        "data": run.data.identity,
    }
    return Header("ppcl.finetuned", made_from | arranged)


def run(run: Run) -> None:
    """Fine-tune the planned model and write it to `finetuned/`, with its held-out velocity error before and after.

    Without a budget the planned model has every student and projector. A killed training resumes from its last
    checkpoint. Raises `UsageError` if students or projectors are missing, or if `finetuned/` or the checkpoint has
    other settings.
    """
    config, folder = run.config.finetune, finetuned_folder(run)
    plugs = required_plugs(run)
    plan = planned(run, plugs)
    if not (plan.students or plan.removed or plan.projectors):
        raise UsageError(
            "'stages=[finetune]' has nothing to tune: the teacher fits the budget, so that no plug is in; lower the "
            "budget, or leave out finetune."
        )
    if config.trains == "after_first_removed" and not (plan.students or plan.removed):
        raise UsageError(
            "finetune.trains=after_first_removed has no removed block to begin after, since only projectors are in: "
            "use finetune.trains=all."
        )
    header = finetune_header(run, made_of(plan, plugs))
    if is_current(folder / "ppcl.json", header, another_run(run, folder)):
        check_model(folder, read_json(folder / "ppcl.json", "The record", "finetune"), "finetune")
        run.say("finetune", f"reused {folder}")
        return
    checkpoints = run.folder / "finetune-checkpoint"
    check_resumable(checkpoints, header, sharded=run.teacher.sharded)
    streamed = bool(config.lora_rank) and run.config.model.streaming
    if streamed:  # the weights of a block are gone when its backward pass begins
        config = replace(config, gradient_checkpointing=True)
    seed = run.config.data.train_seed
    # Other batches than those that the stages depth and width train on.
    stream = run.data.shared_stream(seed, config.batch_size)
    run.say_once("finetune", stream.remark)
    batches: Batches = partial(_later, stream, config.accumulate)
    heldout = _heldout(run)
    if config.recorded:  # before there is a student, so that only the teacher is in memory
        batches, heldout = _record(run, batches, heldout)
    student, stands_for, kept = _student(run, plugs, plan)
    sharding = Sharding.of(run) if run.teacher.sharded else None
    teacher = run.teacher.transformer
    frozen: list[Any] = []
    if config.trains == "after_first_removed":
        frozen = before_removal(run.family, student, stands_for, plan.students)
    module = FineTune(run.family, teacher, student, config, stands_for, sharding, seed, run.precision, frozen)
    if config.recorded:
        module.forget_teacher()
        run.teacher.forget_pipeline()
    blocks = [b for model in (*module.teachers, student) for b in run.family.blocks(model).values()]
    del teacher
    loader = StepLoader(batches, config.steps, ahead=config.recorded or run.data.from_disk)
    before = _velocity_error(run, module, heldout, "before tuning")

    def watched(count: int) -> dict[str, float]:
        steps = _heldout_steps(run)[:count]
        found = module.velocity_error(run.data.to_device(batch) for step in steps for batch in heldout(step))
        return {"velocity error": found}

    drawn = Drawn(["the whole model"], module.teachers[0], module.result_to_run) if module.teachers else None
    fit(run, "finetune", module, loader, checkpoints, header, config, blocks, watched, drawn)
    after = _velocity_error(run, module, heldout, "after tuning")
    result = cast(Any, module.whole_result())
    if run.writes:
        with atomic_folder(folder) as temporary:
            if config.lora_rank:
                save_lora(result, run.teacher.pipeline_class, temporary, kept)
            if streamed:
                save_merged(run.family, result, temporary / run.teacher.component, run.teacher.dtype_of)
            else:
                if config.lora_rank:
                    merge_lora(result)
                cast_weights(result, run.teacher.dtype_of)
                result.save_pretrained(temporary / run.teacher.component)
            facts = {
                "plugged": [*plan.students, *plan.removed, *plan.projectors],
                "velocity_error": {"before": before, "after": after},  # held-out
            }
            write_json(temporary / "ppcl.json", header.to_json() | facts | list_files(temporary))
    discard_checkpoint(run, checkpoints)
    run.say("finetune", f"held-out velocity error {before:.4f} -> {after:.4f}")
    if after >= before:
        rate = "finetune.lr" if config.relative_update is None else "finetune.relative_update"
        run.say("finetune", f"this is no better than untuned: raise finetune.steps, lower {rate}, or use ppcl-planned")
    run.say("finetune", f"wrote {folder}")


def _student(run: Run, plugs: Plugs, plan: Variant) -> tuple[Any, dict[BlockKey, BlockKey], BlockMap]:
    """Return the model to tune, for each of its blocks the teacher's block that it stands for, and those it has kept.

    It has its own copy of every parameter, unless it is going to be sharded, which copies, or only a LoRA learns. Then
    its blocks stream the weights that they share with those of a streamed teacher.
    """
    teacher = run.family.blocks(run.teacher.transformer)
    switch = Switch(run, plugs)
    switch(plan)
    student = switch.board.standalone()
    sources = [teacher[stack, index] for stack, kept in switch.board.kept.items() for index in kept]
    if run.config.finetune.lora_rank:
        for block, source in zip(run.family.blocks(student).values(), sources, strict=True):
            follow(block, source)
    elif not run.teacher.sharded:
        with still(*sources):
            student = copy.deepcopy(student)
    stands_for, kept = switch.board.stands_for, switch.board.blocks
    switch.restore()
    return student, stands_for, kept


def _heldout(run: Run) -> Batches:
    """Return the held-out batches that the plan's costs are measured on, as a function of a step."""
    size, parts = run.config.finetune.batch_size, run.config.finetune.accumulate
    return partial(run.data.shared_stream(run.config.data.calibration_seed, size).divided, parts=parts)


def _heldout_steps(run: Run) -> range:
    return batch_numbers(run.config.finetune.batch_size, FIRST_BATCH, FIRST_BATCH + 4)


def _velocity_error(run: Run, module: FineTune, heldout: Batches, description: str) -> float:
    """Return the velocity error on the held-out batches; `UsageError` if it is no number."""
    place(run, module)
    steps = run.track(_heldout_steps(run), description)
    found = module.velocity_error(run.data.to_device(batch) for step in steps for batch in heldout(step))
    check_finite(found, "nothing is written", f"the held-out velocity error {description}")
    return found


def _record(run: Run, *streams: Batches) -> tuple[Batches, Batches]:
    """Write the teacher's velocities for training and held-out batches, as far as they are not on disk.

    Returns both kinds of batches with these velocities. They lie in the cache, where a later training with the same
    teacher, data and batch size finds them. Recorded calls have theirs. Raises `UsageError` if the disk has
    too little space.
    """
    config = run.config.finetune
    if streams[1](0)[0].teacher is not None:
        return streams[0], streams[1]
    steps = {"train": range(config.steps), "held_out": _heldout_steps(run)}
    teacher = run.teacher.transformer
    found: list[Batches] = []

    def velocity(batch: TrainingBatch) -> Tensor:
        return batch.prediction(teacher(**batch.inputs))

    for (kind, numbers), batches in zip(steps.items(), streams, strict=True):
        made_from = {"model": run.teacher.identity, "data": run.data.identity, "batch_size": config.batch_size}
        header = Header("ppcl.velocities", made_from | {"kind": kind})
        targets = Targets(Path(run.config.paths.cache_dir) / "velocities" / header.fingerprint, header)
        missing = targets.missing(numbers)
        if missing:
            size = STEPS_PER_FILE * sum(batch.target.nbytes for batch in batches(numbers[0]))
            remedy = "lower finetune.steps, or name a larger disk as paths.cache_dir="
            told = check_space(targets.folder, size * len(missing), "the teacher's velocities", remedy)
            run.say("finetune", told)
        for number in run.track(missing, f"the teacher's velocities, {kind.replace('_', '-')}"):
            moved = partial(_moved, run, batches)
            targets.write(number, moved, velocity)
        found.append(partial(_with_targets, targets, batches))
    return found[0], found[1]


def _moved(run: Run, batches: Batches, step: int) -> list[TrainingBatch]:
    return [run.data.to_device(batch) for batch in batches(step)]


def _with_targets(targets: Targets, batches: Batches, step: int) -> list[TrainingBatch]:
    return targets.on(step, batches(step))


def _later(stream: Stream, parts: int, step: int) -> list[TrainingBatch]:
    """Return batch number `step` after the first 500,000 samples of `stream`, divided into `parts`."""
    return stream.divided(500_000 // stream.batch_size + step, parts)
