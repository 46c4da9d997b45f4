"""Stage 1.3: one student block per interval, distilled from the teacher's own activations (Eq. 6-7)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn

from ppcl.artifacts import Header, Interval, Intervals, Plug, fingerprint, is_current, plug_name, read_tensors
from ppcl.config import DistillConfig
from ppcl.data.batches import StepLoader, TrainingBatch
from ppcl.data.boundaries import HELD_OUT, TRAIN, BoundaryStream
from ppcl.errors import UsageError
from ppcl.families.base import Family
from ppcl.precision import computing
from ppcl.stages.boundaries import boundaries_folder, held_out_steps, num_stored, read_record
from ppcl.stages.local import LocalDistillation, Terms
from ppcl.stages.run import Run
from ppcl.stages.sharding import Sharding, place, whole_state
from ppcl.stages.training import check_resumable, discard_checkpoint, fit
from ppcl.surgery.depth import student_block
from ppcl.surgery.plugboard import Plugboard
from ppcl.taps import BlockCall, BlockKey, Streams, observe


def select_intervals(intervals: Intervals, names: list[str] | None) -> Intervals:
    """The intervals called `names` (`transformer_blocks.3-5`, or `3-5` where that is plain); None for all."""
    if names is None:
        return intervals
    every = {plug_name(stack, pair): (stack, pair) for stack, pairs in intervals.items() for pair in pairs}
    chosen: Intervals = {}
    for name in names:
        matches = [full for full in every if full == name or full.endswith(f".{name}")]
        if len(matches) != 1:
            raise UsageError(f"distill.intervals={name} is not one of this run's intervals: {', '.join(every)}.")
        stack, pair = every[matches[0]]
        chosen.setdefault(stack, []).append(pair)
    return {stack: sorted(pairs) for stack, pairs in chosen.items()}


class DepthDistillation(LocalDistillation):
    """Trains the students of `intervals` against a frozen teacher.

    Parallel mode: the teacher runs once without gradient; as soon as it has passed block v, the
    student of [u, v] is called with the very arguments block u was called with. The teacher stops
    after the last v.

    Sequential mode (the paper's ablation): students are fed by the chain of students instead.
    """

    stage_name, lr_key = "depth", "distill.lr"

    def __init__(
        self,
        family: Family,
        teacher: nn.Module,
        intervals: Intervals,
        config: DistillConfig,
        precision: str = "32-true",
    ) -> None:
        self.pairs = [(stack, pair) for stack in family.stacks for pair in intervals.get(stack, [])]
        students = {
            plug_name(stack, pair): student_block(list(getattr(teacher, stack)), pair, config.init)
            for stack, pair in self.pairs
        }
        super().__init__(family, teacher, students, config, precision)
        if config.mode == "sequential":
            self._board = (Plugboard(family, teacher, intervals, students),)

    def student(self, stack: str, pair: Interval) -> nn.Module:
        return self.parts[self.key(plug_name(stack, pair))]

    @property
    def last(self) -> BlockKey:
        """The block after which the teacher has nothing left to teach."""
        stack, (_, v) = self.pairs[-1]
        return stack, v

    def shard(self, sharding: Sharding) -> None:
        for student in self.parts.values():
            sharding.unit(student, learns=True)
        super().shard(sharding)

    def _call_student(self, stack: str, pair: Interval, kwargs: dict[str, Any]) -> Streams:
        return self.call(stack, self.student(stack, pair), kwargs)

    def each_loss(self, batch: TrainingBatch, visit: Callable[[int, Terms], None]) -> None:
        starts = {(stack, pair[0]): number for number, (stack, pair) in enumerate(self.pairs)}
        ends = {(stack, pair[1]): number for number, (stack, pair) in enumerate(self.pairs)}
        masks = self.family.masks(batch.inputs)
        waiting: dict[int, dict[str, Any]] = {}
        gradients = torch.is_grad_enabled()

        def on_block(call: BlockCall) -> None:
            if call.key in starts:
                waiting[starts[call.key]] = call.kwargs
            if call.key in ends:
                number = ends[call.key]
                with torch.set_grad_enabled(gradients):
                    student = self._call_student(*self.pairs[number], waiting.pop(number))
                    visit(number, self.with_sum(self.output_terms(student, call.outputs, masks, batch.average)))

        with torch.no_grad():
            observe(self.family, self._teacher[0], batch.inputs, on_block, last=self.last)

    def learn(self, batch: TrainingBatch, done: Callable[[nn.Module], None] | None = None) -> list[Terms]:
        return super().learn(batch, done) if self.config.mode == "parallel" else self._sequential_step(batch)

    def _sequential_step(self, batch: TrainingBatch) -> list[Terms]:
        board = self._board[0]
        masks = self.family.masks(batch.inputs)
        ends = {(stack, pair[1]) for stack, pair in self.pairs}
        targets: list[Streams] = []

        def keep_target(call: BlockCall) -> None:
            if call.key in ends:
                targets.append(call.outputs)

        board()
        with torch.no_grad():
            observe(self.family, board.transformer, batch.inputs, keep_target, last=self.last)
        board.all()
        starts = [(stack, board.kept[stack].index(pair[0])) for stack, pair in self.pairs]
        outputs: list[Streams] = []

        def keep_output(call: BlockCall) -> None:
            if call.key in starts:
                outputs.append(call.outputs)

        with computing(self.precision, batch.sigmas.device):
            observe(self.family, board.transformer, batch.inputs, keep_output, last=starts[-1])
        board()
        logged = [
            self.with_sum(self.output_terms(student, target, masks, batch.average))
            for student, target in zip(outputs, targets, strict=True)
        ]
        self.manual_backward(torch.stack([terms["loss"] for terms in logged]).sum())
        return [{key: value.detach() for key, value in terms.items()} for terms in logged]


class DepthFromBoundaries(DepthDistillation):
    """The same from activations on disk: no teacher is held, and each interval's file is read only for it."""

    def __init__(
        self,
        family: Family,
        intervals: Intervals,
        students: dict[str, nn.Module],
        config: DistillConfig,
        precision: str = "32-true",
    ) -> None:
        self.pairs = [(stack, pair) for stack in family.stacks for pair in intervals.get(stack, [])]
        LocalDistillation.__init__(self, family, nn.Identity(), students, config, precision)

    def each_loss(self, batch: Any, visit: Callable[[int, Terms], None]) -> None:
        for number, part in enumerate(batch.parts):
            student = self._call_student(*self.pairs[number], part.kwargs)
            visit(number, self.with_sum(self.output_terms(student, part.outputs, part.masks, batch.average)))


def initial_students(run: Run, intervals: Intervals, folder: Path) -> dict[str, nn.Module]:
    """The students that boundaries were written for, in their first state; the teacher stays on the meta device."""
    with torch.device("meta"):
        teacher = run.family.transformer_class.from_config(run.config.model.arch)
    students = {}
    for stack, pairs in intervals.items():
        for pair in pairs:
            name = plug_name(stack, pair)
            student = copy.deepcopy(getattr(teacher, stack)[pair[0]])
            state, _ = read_tensors(folder / name / "init.safetensors")
            student.load_state_dict(state, assign=True)
            students[name] = student.requires_grad_(True)
    return students


def plug_header(run: Run, stack: str, pair: Interval) -> Header:
    """What one student is made from; parallel students do not depend on one another."""
    settings = asdict(run.config.distill)
    for key in ("intervals", "checkpoint_every", "gradient_checkpointing", "from_boundaries", "boundaries", "replay"):
        del settings[key]  # none of them changes the weights, or it is said below
    if run.config.distill.from_boundaries:
        record = read_record(run)
        made_from = {
            "model": record["made_from"]["model"],
            "stack": stack,
            "interval": list(pair),
            "distill": settings,
            "precision": run.precision,
            "boundaries": record["fingerprint"],
            "stored": num_stored(run),
        }
        return Header("ppcl.plug", made_from)
    made_from = {
        "model": run.model_identity,
        "stack": stack,
        "interval": list(pair),
        "distill": settings,
        "precision": run.precision,
        "data": run.data_identity,
    }
    if run.config.distill.mode == "sequential":
        made_from["chain"] = {s: [list(p) for p in pairs] for s, pairs in run.intervals.items()}
    return Header("ppcl.plug", made_from)


def _checkpoint_of(run: Run, intervals: Intervals) -> tuple[Path, Header]:
    """Where training just these intervals keeps its state: jobs that share a run's folder share no checkpoint."""
    names = [plug_name(stack, pair) for stack, pairs in intervals.items() for pair in pairs]
    header = Header("ppcl.depth", plug_header(run, "", (0, 0)).made_from | {"intervals": names})
    return run.plugs_folder / f"checkpoint-{fingerprint({'intervals': names})}", header


def _from_teacher(run: Run, intervals: Intervals) -> tuple[DepthDistillation, Any, Any, list[nn.Module]]:
    """The module, its batches by step, held-out batches by step, and the teacher's blocks."""
    config, transformer = run.config.distill, run.pipeline.transformer
    module = DepthDistillation(run.family, transformer, intervals, config, run.precision)
    stream = run.shared_stream(run.config.data.train_seed, config.batch_size)
    heldout = run.shared_stream(run.config.data.calibration_seed, config.batch_size)
    return module, stream, heldout, list(run.family.blocks(transformer).values())


def _from_boundaries(run: Run, intervals: Intervals) -> tuple[DepthDistillation, Any, Any, list[nn.Module]]:
    """The same without a teacher."""
    folder = boundaries_folder(run)
    students = initial_students(run, intervals, folder)
    module = DepthFromBoundaries(run.family, intervals, students, run.config.distill, run.precision)
    folders = [folder / plug_name(stack, pair) for stack, pair in module.pairs]
    stream = BoundaryStream(folders, TRAIN, num_stored(run))
    return module, stream, BoundaryStream(folders, HELD_OUT, len(held_out_steps(run))), []


def run(run: Run) -> None:
    config, folder = run.config.distill, run.plugs_folder
    chosen = select_intervals(run.intervals, config.intervals)
    missing: Intervals = {}
    for stack, pairs in chosen.items():
        for pair in pairs:
            record = folder / f"{plug_name(stack, pair)}.json"
            if not is_current(record, plug_header(run, stack, pair)):
                missing.setdefault(stack, []).append(pair)
    if not missing:
        discard_checkpoint(run, _checkpoint_of(run, chosen)[0])
        run.say("depth", f"reused {folder}")
        return
    checkpoints, header = _checkpoint_of(run, chosen)
    if config.mode == "sequential" or check_resumable(checkpoints, header, sharded=run.sharded):
        missing = chosen  # a chain trains as one; a run killed between two plugs has only to write them
    else:
        checkpoints, header = _checkpoint_of(run, missing)
        check_resumable(checkpoints, header, sharded=run.sharded)
    module, stream, heldout, blocks = (_from_boundaries if config.from_boundaries else _from_teacher)(run, missing)

    def measure(description: str) -> list[dict[str, float]]:
        steps = track(held_out_steps(run), description, console=run.console, transient=True)
        place(run, module)
        return module.heldout(run.to_device(heldout(step)) for step in steps)

    before = measure("before distillation")
    loader = StepLoader(stream, config.steps, ahead=stream.from_disk)
    blocks = [*blocks, *module.parts.values()]
    fit(run, "depth", module, loader, checkpoints, header, config.checkpoint_every, blocks)
    after = measure("after distillation")
    for number, (stack, pair) in enumerate(module.pairs):
        losses = {
            "train": module.average_losses[number].item(),
            "heldout_before": before[number]["loss"],
            **{f"heldout_{key}": value for key, value in after[number].items()},
        }
        state = whole_state(module.student(stack, pair), run.dtype)
        plug = Plug(plug_header(run, stack, pair), stack, state, losses, pair)
        if run.writes:
            plug.save(folder)
        run.say(
            "depth",
            f"{plug.name}: held-out loss {losses['heldout_before']:.4f} -> {losses['heldout_loss']:.4f}",
        )
    for finished in (checkpoints, _checkpoint_of(run, chosen)[0]):
        discard_checkpoint(run, finished)
    run.say("depth", f"wrote {len(module.pairs)} plugs to {folder}")
