"""Stage 2: linear projectors in place of text streams and FFNs (paper Eq. 8-12)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ppcl.artifacts import (
    Header,
    Intervals,
    Projector,
    PruningPlan,
    Width,
    fingerprint,
    is_current,
    plug_name,
    projector_name,
)
from ppcl.config import DistillConfig
from ppcl.data.batches import StepLoader, TrainingBatch
from ppcl.errors import UsageError
from ppcl.families.base import Family
from ppcl.layers import Layout, kept_layers, references
from ppcl.ops.least_squares import NormalEquations
from ppcl.ops.losses import relative_error
from ppcl.stages.detect import similarity_maps
from ppcl.stages.local import LocalDistillation, Terms
from ppcl.stages.plan import show
from ppcl.stages.probe import valid
from ppcl.stages.run import Run
from ppcl.stages.training import check_resumable, discard_checkpoint, fit
from ppcl.stages.variants import required_students
from ppcl.surgery.count import count_parameters
from ppcl.surgery.plugboard import load_student
from ppcl.taps import BlockCall, BlockKey, Streams, observe


@dataclass
class Place:
    """A kept block: where it stands, what it stands for, and what it is (a student or the teacher's)."""

    stack: str
    index: int
    end: int  # the teacher block whose output its own stands for; `index` but in a student
    module: nn.Module
    student: str | None


def places(family: Family, teacher: nn.Module, intervals: Intervals, students: Mapping[str, nn.Module]) -> list[Place]:
    """Every block that the intervals keep, in order of execution."""
    found = []
    for stack in family.stacks:
        blocks, pairs = list(getattr(teacher, stack)), intervals.get(stack, [])
        ends = dict(pairs)
        for index in kept_layers(len(blocks), pairs):
            name = plug_name(stack, (index, ends[index])) if index in ends else None
            module = students[name] if name else blocks[index]
            found.append(Place(stack, index, ends.get(index, index), module, name))
    return found


@dataclass
class PrunedPlace:
    """A place without its `text` stream or its `ffn`: its block, and the place whose text it reads if need be."""

    place: Place
    block: nn.Module
    kind: str
    reference: Place | None

    @property
    def name(self) -> str:
        return projector_name(self.place.stack, self.place.index, self.kind)


class WidthDistillation(LocalDistillation):
    """Trains the projectors of the blocks in `width` and nothing else, text and FFN of a block each on its own.

    A pruned block is called with the teacher's T_{j-1}, and with the text that its reference block would
    hand it were the teacher run up to there. It learns Eq. 11, the direction of its output per stream, and
    Eq. 12, the distance of every projector's output to what it stands for, relative to that one's norm.
    `only` names what is trained (`transformer_blocks.37.text`); what it reads is as in all of `width`.
    """

    stage_name, lr_key = "width", "width.lr"

    def __init__(
        self,
        family: Family,
        teacher: nn.Module,
        kept: Sequence[Place],
        width: Width,
        layout: Layout,
        distill: DistillConfig,
        *,
        linear_weight: float = 1.0,
        only: Collection[str] | None = None,
    ) -> None:
        self.layout, self.linear_weight = layout, linear_weight
        pruned = [item for stack in family.stacks for item in _prune(family, stack, kept, width)]
        self.pruned = [item for item in pruned if only is None or item.name in only]
        projectors = {item.name: nn.ModuleDict(self._projectors(family, item)) for item in self.pruned}
        super().__init__(family, teacher, projectors, distill)
        for item in self.pruned:
            item.block.requires_grad_(False)
        self.parts.requires_grad_(True)

    @staticmethod
    def _projectors(family: Family, item: PrunedPlace) -> dict[str, nn.Module]:
        keys = {"text": ("text_in", "text_out"), "ffn": ("image_ffn", "text_ffn")}
        return {key: getattr(item.block, family.projectors[key]) for key in keys[item.kind]}

    def projectors(self, number: int) -> dict[str, nn.Module]:
        """The projectors of pruned place `number`: `text_in` (l_z) and `text_out` (l_h), or `image_ffn`, `text_ffn`."""
        return dict(self.parts[self.key(self.names[number])].named_children())

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for item in self.pruned:
            item.block.to(self.device).eval()

    @property
    def last(self) -> BlockKey:
        place = self.pruned[-1].place
        return place.stack, place.end

    def each_call(self, batch: TrainingBatch, visit: Callable[[int, dict[str, Any], Streams], None]) -> None:
        """Run the teacher; `visit(number, arguments, teacher's output)` for each pruned place when it is due.

        `arguments` are the block's own. For a text-pruned block z_r and the text it reads are packed in, and
        three more keys hold them plain: `z_reference` and `text`, and `z`, what its projector should give.
        """
        starts: dict[BlockKey, list[int]] = {}
        ends: dict[BlockKey, list[int]] = {}
        for number, item in enumerate(self.pruned):
            starts.setdefault((item.place.stack, item.place.index), []).append(number)
            ends.setdefault((item.place.stack, item.place.end), []).append(number)
        read = {(r.stack, r.index): r for item in self.pruned if (r := item.reference)}
        text_of = {(r.stack, r.end): (r.stack, r.index) for r in read.values()}
        z_of: dict[BlockKey, Tensor] = {}
        h_of: dict[BlockKey, Tensor] = {}
        waiting: dict[int, dict[str, Any]] = {}

        def on_block(call: BlockCall) -> None:
            if call.key in read:
                z_of[call.key] = self.family.text_qkv_input(read[call.key].module, call.kwargs)
            if call.key in text_of:
                h_of[text_of[call.key]] = call.outputs["text"]
            for number in starts.get(call.key, []):
                waiting[number] = call.kwargs
                if (reference := self.pruned[number].reference) is not None:
                    key = (reference.stack, reference.index)
                    text = call.inputs["text"] if self.layout.text_output == "each" else h_of[key]
                    waiting[number] = self.family.with_text(call.kwargs, text, z_of[key]) | {
                        "z": self.family.text_qkv_input(self.pruned[number].place.module, call.kwargs),
                        "z_reference": z_of[key],
                        "text": text,
                    }
            for number in ends.get(call.key, []):
                visit(number, waiting.pop(number), call.outputs)

        with torch.no_grad():
            observe(self.family, self._teacher[0], batch.inputs, on_block, last=self.last)

    def _call(self, number: int, arguments: dict[str, Any]) -> Streams:
        item = self.pruned[number]
        arguments = {key: value for key, value in arguments.items() if key not in ("z", "z_reference", "text")}
        if self.config.gradient_checkpointing and torch.is_grad_enabled():
            output = checkpoint(partial(item.block, **arguments), use_reentrant=False)
        else:
            output = item.block(**arguments)
        return self.family.streams_out(item.place.stack, output)

    def terms(
        self, number: int, arguments: dict[str, Any], student: Streams, teacher: Streams, masks: dict[str, Any]
    ) -> Terms:
        """Eq. 11 and Eq. 12 of one place."""
        linear: Terms = {}
        for key, projector in self.projectors(number).items():
            if key == "text_in":
                linear["linear_z"] = relative_error(projector(arguments["z_reference"]), arguments["z"], masks["text"])
            else:
                stream = "image" if key == "image_ffn" else "text"
                linear[f"linear_{stream}"] = relative_error(student[stream], teacher[stream], masks[stream])
        weighted = {key: self.linear_weight * value for key, value in linear.items()}
        return self.with_sum(self.output_terms(student, teacher, masks) | weighted)

    def each_loss(self, batch: TrainingBatch, visit: Callable[[int, Terms], None]) -> None:
        masks = self.family.masks(batch.inputs)
        gradients = torch.is_grad_enabled()

        def learn(number: int, arguments: dict[str, Any], teacher: Streams) -> None:
            with torch.set_grad_enabled(gradients):
                student = self._call(number, arguments)
                visit(number, self.terms(number, arguments, student, teacher, masks))

        self.each_call(batch, learn)

    @torch.no_grad()
    def fit_linear(self, batches: Iterable[TrainingBatch], *, ridge: float) -> None:
        """Set every projector to its least-squares solution."""
        equations: dict[tuple[int, str], NormalEquations] = {}
        masks: dict[str, Tensor | None] = {}

        def add(number: int, arguments: dict[str, Any], teacher: Streams) -> None:
            for key in self.projectors(number):
                x, y, mask = self._pair(number, key, arguments, teacher, masks)
                rows = valid(x, mask)
                system = equations.setdefault((number, key), NormalEquations(x.shape[-1], y.shape[-1]))
                system.add(rows.cpu(), (valid(y, mask) - rows).cpu())

        for batch in batches:
            masks.update(self.family.masks(batch.inputs))
            self.each_call(batch, add)
        for (number, key), system in equations.items():
            weight, bias = system.solve(ridge=ridge)
            projector: Any = self.projectors(number)[key]
            projector.weight.copy_(weight)
            projector.bias.copy_(bias)

    def _pair(
        self, number: int, key: str, arguments: dict[str, Any], teacher: Streams, masks: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the projector `key` reads, what it should give, and the valid tokens."""
        if key == "text_in":
            return arguments["z_reference"], arguments["z"], masks["text"]
        if key == "text_out":
            return arguments["text"], teacher["text"], masks["text"]
        # With its FFN projectors still the identity, the block returns the state after attention.
        stream = "image" if key == "image_ffn" else "text"
        return self._call(number, arguments)[stream], teacher[stream], masks[stream]


def _prune(family: Family, stack: str, kept: Sequence[Place], width: Width) -> list[PrunedPlace]:
    """The places of a stack that `width` names, as pruned blocks that read and write plain arguments."""
    sets = width.get(stack, {"text": [], "ffn": []})
    here = {place.index: place for place in kept if place.stack == stack}
    reads = references(list(here), sets["text"])
    pruned = []
    # As the last of a run of one: with an output projector of its own and nothing to carry on.
    roles = {
        "text": family.width_roles([1], [], 2, Layout("each"))[1],
        "ffn": family.width_roles([], [1], 2, Layout("each"))[1],
    }
    for index, place in here.items():
        for kind, role in roles.items():
            if index in sets[kind]:
                assert role is not None
                block = family.prune_block(place.module, role, {})
                pruned.append(PrunedPlace(place, block, kind, here[reads[index]] if kind == "text" else None))
    return pruned


def select_text(
    similarity: Callable[[int, int], float], kept: Sequence[int], threshold: float, most: int | None
) -> list[int]:
    """R_txt: blocks whose text output has a CKA of `threshold` or more with their reference's, deeper first.

    A block joins only if every block of its run still passes: each one added moves the reference of those
    behind it to an earlier block.
    """
    chosen: set[int] = set()
    for index in reversed(kept[1:]):
        if most is not None and len(chosen) >= most:
            break
        reads = references(kept, chosen | {index})
        if all(similarity(reference, pruned) >= threshold for pruned, reference in reads.items()):
            chosen.add(index)
    return sorted(chosen)


def select_ffn(errors: Mapping[int, float], count: int) -> list[int]:
    """R_ffn: the `count` blocks whose output differs least with the FFN's least-squares fit in its place."""
    return sorted(sorted(errors, key=lambda index: errors[index])[:count])


def ffn_errors(module: WidthDistillation, batches: Iterable[TrainingBatch]) -> dict[int, float]:
    """Relative error of every fitted place's output, the mean of its streams, by block index."""
    found = module.heldout(batches)
    errors = {}
    for item, terms in zip(module.pruned, found, strict=True):
        linear = [value for key, value in terms.items() if key.startswith("linear")]
        errors[item.place.index] = sum(linear) / len(linear)
    return errors


def projector_header(run: Run, item: PrunedPlace, students: Mapping[str, str]) -> Header:
    """What one projector is made from; `students` holds the fingerprints of trained students by name."""
    width, distill = run.config.width, asdict(run.config.distill)
    for key in ("mode", "init", "steps", "lr", "intervals", "checkpoint_every", "gradient_checkpointing"):
        del distill[key]  # width's own, or without effect on the weights
    place, reference = item.place, item.reference
    made_from = {
        "model": run.model_identity,
        "projector": item.name,
        "base": students.get(place.student or ""),
        "reference": None if reference is None else [reference.index, students.get(reference.student or "")],
        "text_output": width.text_output,
        "width": {key: getattr(width, key) for key in ("ridge", "num_batches", "steps", "lr", "linear_weight")},
        "distill": distill,
        "precision": run.config.trainer.precision,
        "data": asdict(run.config.data),
    }
    return Header("ppcl.projector", made_from)


def _batches(run: Run, seed: int, start: int, stop: int, description: str) -> Iterator[TrainingBatch]:
    stream = run.stream(seed, max(run.config.distill.batch_size, 16))
    for step in track(range(start, stop), description, console=run.console, transient=True):
        yield run.to_device(stream(step))


def _select(run: Run, kept: Sequence[Place]) -> tuple[Width, dict[str, Any]]:
    """The sets of `width=auto`, with the numbers they were chosen by."""
    config, family, teacher = run.config.width, run.family, run.pipeline.transformer
    if config.num_text == 0 and config.num_ffn == 0:
        raise UsageError("width.num_text=0 and width.num_ffn=0 leave nothing to prune: use width=none.")
    calibration = _batches(run, run.config.data.calibration_seed, 0, min(4, config.num_batches), "text similarity")
    maps = [torch.tensor(similarity_maps(family, teacher, batch)["text"]) for batch in calibration]
    table = torch.stack(maps).mean(dim=0)
    width: Width = {}
    scores: dict[str, Any] = {}
    for stack in family.stacks:
        here = {place.index: place for place in kept if place.stack == stack}
        if config.num_ffn > len(here):
            raise UsageError(f"width.num_ffn={config.num_ffn} exceeds the {len(here)} blocks that are kept.")

        def similarity(reference: int, pruned: int, here: dict[int, Place] = here) -> float:
            return table[here[reference].end, here[pruned].end].item()

        text = select_text(similarity, list(here), config.text_threshold, config.num_text)
        every = {stack: {"text": [], "ffn": list(here)}}
        linear = WidthDistillation(family, teacher, kept, every, run.layout, run.config.distill)
        linear.to(run.device).setup("fit")
        seed, stop = run.config.data.calibration_seed, config.num_batches
        linear.fit_linear(_batches(run, seed, 0, stop, "linear FFNs"), ridge=config.ridge)
        errors = ffn_errors(linear, _batches(run, seed, stop, stop + 2, "held-out FFN errors"))
        width[stack] = {"text": text, "ffn": select_ffn(errors, config.num_ffn)}
        reads = references(list(here), text)
        scores[stack] = {
            "text_cka": {str(index): similarity(reads[index], index) for index in text},
            "ffn_error": {str(index): error for index, error in errors.items()},
        }
    return width, scores


def _plan(run: Run, kept: Sequence[Place], students: Mapping[str, str]) -> PruningPlan:
    """The run's plan with width sets: given, or selected and written down."""
    config = run.config.width
    selection = {key: getattr(config, key) for key in ("source", "text_output", "keep_text_query")}
    if config.source == "auto":
        keys = ("text_threshold", "num_text", "num_ffn", "ridge", "num_batches")
        selection |= {key: getattr(config, key) for key in keys}
    else:
        selection["sets"] = run.width
    made_from = {"model": run.model_identity, "intervals": run.intervals, "students": students, "width": selection}
    plan = PruningPlan(run.config.model.family, run.num_layers, run.intervals, made_from)
    if is_current(run.width_path, plan.header()):
        return PruningPlan.load(run.width_path)
    if config.source == "auto":
        plan.width, plan.scores = _select(run, kept)
    else:
        plan.width = run.width
    plan.parameters = count_parameters(run.family, run.config.model.arch, run.intervals, plan.width, run.layout)
    plan.save(run.width_path)
    run.say("width", f"wrote {run.width_path}")
    return plan


def run(run: Run) -> None:
    config, folder = run.config.width, run.folder / "plugs"
    plugs = required_students(run)
    students = {name: plug.header.fingerprint for name, plug in plugs.items()}
    teacher = run.pipeline.transformer
    modules = {name: load_student(run.family, teacher, plug) for name, plug in plugs.items()}
    kept = places(run.family, teacher, run.intervals, modules)
    plan = _plan(run, kept, students)
    show(run, plan)
    distill = replace(run.config.distill, steps=max(config.steps, 1), lr=config.lr, mode="parallel")

    def distillation(only: Collection[str] | None = None) -> WidthDistillation:
        arguments = run.family, teacher, kept, plan.width, run.layout, distill
        return WidthDistillation(*arguments, linear_weight=config.linear_weight, only=only)

    headers = {item.name: projector_header(run, item, students) for item in distillation().pruned}
    stale = [name for name, header in headers.items() if not is_current(folder / f"{name}.json", header)]
    made_from = {"projectors": {name: header.fingerprint for name, header in headers.items()}}
    header = Header("ppcl.width", made_from)
    checkpoints = folder / f"checkpoint-width-{fingerprint({'projectors': stale})}"
    if not stale:
        run.say("width", f"reused {folder}")
        return
    check_resumable(checkpoints, header)
    module = distillation(stale)
    module.to(run.device).setup("fit")
    calibration = run.config.data.calibration_seed
    module.fit_linear(_batches(run, calibration, 0, config.num_batches, "least squares"), ridge=config.ridge)

    def measure() -> list[dict[str, float]]:
        first = config.num_batches
        return module.heldout(_batches(run, calibration, first, first + 4, "held-out losses"))

    before = measure()
    if config.steps:
        stream = run.stream(run.config.data.train_seed, distill.batch_size)
        loader = StepLoader(stream, config.steps)
        blocks = run.family.blocks(run.pipeline.transformer).values()
        fit(run, "width", module, loader, checkpoints, header, distill.checkpoint_every, blocks)
        module.to(run.device).setup("fit")
    after = measure()
    for number, item in enumerate(module.pruned):
        losses = {"heldout_before": before[number]["loss"]}
        losses |= {f"heldout_{key}": value for key, value in after[number].items()}
        _projector(run, module, number, headers[item.name], losses).save(folder)
        change = f"{losses['heldout_before']:.4f} -> {losses['heldout_loss']:.4f}"
        run.say("width", f"{item.name}: held-out loss {change}")
    discard_checkpoint(checkpoints)
    run.say("width", f"wrote {len(stale)} projectors to {folder}")


def _projector(run: Run, module: WidthDistillation, number: int, header: Header, losses: dict[str, float]) -> Projector:
    item = module.pruned[number]
    state = {
        f"{run.family.projectors[key]}.{name}": value.detach().cpu().clone()
        for key, projector in module.projectors(number).items()
        for name, value in projector.state_dict().items()
    }
    return Projector(
        header,
        item.place.stack,
        state,
        losses,
        index=item.place.index,
        kind=item.kind,
        base=item.place.student,
        reference=item.reference.index if item.reference else None,
    )
