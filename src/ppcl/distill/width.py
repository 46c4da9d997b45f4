"""Width distillation: linear projectors that replace text streams and FFNs, and their training (paper Eq. 8-12)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.artifacts.headers import Header
from ppcl.artifacts.plan import Intervals, Width, plug_name, projector_name, removal_name
from ppcl.artifacts.plugs import Projector
from ppcl.config import DistillConfig
from ppcl.data.batches import TrainingBatch
from ppcl.distill.local import LocalDistillation, device_of
from ppcl.distill.losses import Terms, with_loss
from ppcl.families.base import Family
from ppcl.families.pruning import ResidualLinear
from ppcl.families.width import Replacement
from ppcl.layers import Layout, kept_layers, references
from ppcl.methods.probes import changes, rows, solved
from ppcl.ops.least_squares import NormalEquations
from ppcl.ops.losses import Average, relative_error
from ppcl.precision import computing
from ppcl.streaming import resident
from ppcl.surgery.plugboard import Plugboard
from ppcl.surgery.width import width_surgery
from ppcl.taps import BlockCall, BlockKey, Streams, free_bytes, observe_each, stack_of
from ppcl.training.sharding import Sharding, assign, whole_call


@dataclass
class Place:
    """A block of the depth-pruned model, and its position in the teacher.

    A block that replaces the interval [u, v] has `index` u and `end` v. Any other block has `end == index`.
    """

    stack: str
    index: int
    end: int  # the teacher block whose output this block has to give
    module: nn.Module  # a student, or a block of the teacher
    base: str | None  # name of the student or of the removal, None outside of all intervals

    @property
    def is_student(self) -> bool:
        """Whether the block is a student, and not one of the teacher's."""
        return self.base is not None and not self.base.endswith(".removed")


def places(family: Family, teacher: nn.Module, intervals: Intervals, students: Mapping[str, nn.Module]) -> list[Place]:
    """Return all blocks of the depth-pruned model, in order of execution.

    `students`: by plug name. An interval [u, v] without a student is cut to the teacher's block u (a removal).
    """
    found = []
    for stack in family.stacks:
        blocks, pairs = list(stack_of(teacher, stack)), intervals.get(stack, [])
        ends = dict(pairs)
        for index in kept_layers(len(blocks), pairs):
            end = ends.get(index, index)
            student = students.get(plug_name(stack, (index, end)))
            if student is not None:
                found.append(Place(stack, index, end, student, plug_name(stack, (index, end))))
            else:
                base = removal_name(stack, (index, end)) if index in ends else None
                # A removal's block u is called after the teacher has passed v. If blocks are streamed, u has no weights
                # any more by then, so a copy is taken.
                found.append(Place(stack, index, end, resident(blocks[index]) if base else blocks[index], base))
    return found


@dataclass
class PrunedPlace:
    """A place whose text stream or FFN is replaced by projectors."""

    place: Place
    block: nn.Module  # the pruned block
    kind: str  # what is replaced: `text` or `ffn`
    reference: Place | None  # of `text`: the nearest earlier place with a text stream, whose text the block reads

    @property
    def name(self) -> str:
        return projector_name(self.place.stack, self.place.index, self.kind)


class WidthDistillation(LocalDistillation):
    """Trains the projectors that replace text streams and FFNs; all other parameters are frozen.

    The text stream and the FFN of a block are parts of their own, each in a pruned block of its own, trained
    independently. A pruned block j gets the teacher's activations T_{j-1} as input. If its text stream is pruned, it
    reads the text that the teacher has at its reference block.

    The loss of a part is that of the block's output per stream, weighted by `distill.losses` (in Eq. 11 the direction
    loss), plus `linear_weight` times Eq. 12 for each projector: ||p - t||^2 / ||t||^2, where p is the projector's
    output and t its target.

    `kept`: all blocks of the depth-pruned model, see `places`.
    `width`: the indices of the pruned blocks by stack.
    `layout`: with `text_output="last"` l_h reads the text output of the reference block, with `"each"` the text that
    enters block j.
    `only`: names of the parts to train, such as `transformer_blocks.37.text`; None for all. Reference blocks are those
    of the whole `width` in either case.
    """

    stage_name, lr_key, relative_key = "width", "width.lr", "width.relative_update"

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
        precision: str = "32-true",
    ) -> None:
        self.kept, self.layout, self.linear_weight = kept, layout, linear_weight
        self.surgery = width_surgery(family)
        self._inputs: dict[str, Any] = {}  # inputs of the teacher's forward that is running
        pruned = [item for stack in family.stacks for item in _prune(family, stack, kept, width)]
        self.pruned = [item for item in pruned if only is None or item.name in only]
        projectors = {item.name: nn.ModuleDict(self._projectors(family, item)) for item in self.pruned}
        super().__init__(family, teacher, projectors, distill, precision)
        for item in self.pruned:
            item.block.requires_grad_(False)
        self.parts.requires_grad_(True)

    @staticmethod
    def _projectors(family: Family, item: PrunedPlace) -> dict[str, nn.Module]:
        found = width_surgery(family).replacements(item.place.stack, item.kind)
        return {key: item.block.get_submodule(each.attribute) for key, each in found.items()}

    def projectors(self, number: int) -> dict[str, nn.Module]:
        """Return the projectors of pruned place `number` by the keys of `WidthSurgery.replacements`.

        A text-pruned place has `text_in` (l_z) and `text_out` (l_h), an FFN-pruned one those that its streams need.
        """
        return dict(self.parts[self.key(self.names[number])].named_children())

    def projector(
        self,
        number: int,
        state_of: Callable[[nn.Module], Mapping[str, Tensor]],
        header: Header,
        losses: dict[str, float],
    ) -> Projector:
        """Return the projectors of pruned place `number` as a plug. `state_of`: returns the state dict of a module."""
        item, replacements = self.pruned[number], self._replacements(number)
        state = {
            f"{replacements[key].attribute}.{name}": value
            for key, projector in self.projectors(number).items()
            for name, value in state_of(projector).items()
        }
        place, reference = item.place, item.reference.index if item.reference else None
        return Projector(
            header, place.stack, state, losses, index=place.index, kind=item.kind, base=place.base, reference=reference
        )

    @contextmanager
    def plugged(self, others: Mapping[str, Projector]) -> Iterator[nn.Module]:
        """Provide the teacher with all students and projectors in place, within the context.

        `others`: the projectors that are not trained here.
        """
        intervals: Intervals = {}
        for place in self.kept:
            if place.base is not None:
                intervals.setdefault(place.stack, []).append((place.index, place.end))
        students = {place.base: place.module for place in self.kept if place.base is not None and place.is_student}
        removed = [place.base for place in self.kept if place.base is not None and not place.is_student]
        header = Header("ppcl.projector", {})  # only a saved one needs it
        trained = [self.projector(n, nn.Module.state_dict, header, {}) for n in range(len(self.pruned))]
        projectors = {**others, **{item.name: item for item in trained}}
        board = Plugboard(self.family, self._teacher[0], intervals, students, projectors, self.layout)
        try:
            yield board(*students, *removed, *projectors).transformer
        finally:
            board()

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for item in self.pruned:
            item.block.eval()
            if not self.is_sharded:
                item.block.to(self.device)

    def shard(self, sharding: Sharding) -> None:
        for part in self.parts.values():
            for projector in part.children():
                sharding.unit(projector, learns=True)
        read = [place for item in self.pruned for place in (item.place, item.reference) if place is not None]
        for block in [item.block for item in self.pruned] + [place.module for place in read if place.is_student]:
            sharding.unit(block)
        super().shard(sharding)

    @property
    def last(self) -> BlockKey:
        """The last block that a pruned place stands for; the teacher's forward stops after it."""
        place = self.pruned[-1].place
        return place.stack, place.end

    def watch_calls(
        self, batch: TrainingBatch, visit: Callable[[int, dict[str, Any], Streams], None]
    ) -> Callable[[BlockCall], None]:
        """Return what is to be called after each block of the teacher's forward on `batch`, without gradient.

        It calls `visit(number, arguments, target)` for each pruned place.

        `number`: the index in `pruned`. `arguments`: the keyword arguments for the pruned block. `target`: the output
        streams `[B, tokens, D]` of the teacher block that the place stands for. The call comes as soon as the teacher
        has passed that block.

        For a text-pruned block the text input of `arguments` already packs z_r and the text that the block reads. Three
        more keys, which are not arguments of the block, hold single tensors `[B, tokens, D]`: `z_reference` (z_r, the
        input of l_z), `z` (the target of l_z), and `text` (the input of l_h).
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
            self._inputs = batch.inputs
            if call.key in read:
                z_of[call.key] = self._text_qkv_input(read[call.key], call.kwargs)
            if call.key in text_of:
                h_of[text_of[call.key]] = call.outputs["text"]
            for number in starts.get(call.key, []):
                waiting[number] = call.kwargs
                if (reference := self.pruned[number].reference) is not None:
                    key = (reference.stack, reference.index)
                    text = call.inputs["text"] if self.layout.text_output == "each" else h_of[key]
                    waiting[number] = self.surgery.with_text(call.kwargs, text, z_of[key]) | {
                        "z": self._text_qkv_input(self.pruned[number].place, call.kwargs),
                        "z_reference": z_of[key],
                        "text": text,
                    }
            for number in ends.get(call.key, []):
                visit(number, waiting.pop(number), call.outputs)

        return on_block

    def _text_qkv_input(self, place: Place, kwargs: dict[str, Any]) -> Tensor:
        return whole_call(place.module, self.surgery.text_qkv_input, kwargs)

    def _replacements(self, number: int) -> dict[str, Replacement]:
        item = self.pruned[number]
        return self.surgery.replacements(item.place.stack, item.kind)

    def _call(self, number: int, arguments: dict[str, Any]) -> Streams:
        item = self.pruned[number]
        arguments = {key: value for key, value in arguments.items() if key not in ("z", "z_reference", "text")}
        return self.call(item.place.stack, item.block, arguments, self._inputs)

    def terms(
        self,
        number: int,
        arguments: dict[str, Any],
        student: Streams,
        teacher: Streams,
        masks: dict[str, Any],
        average_of: Callable[[str], Average],
    ) -> Terms:
        """Return the loss terms of pruned place `number`: those of each stream, Eq. 12 per projector, and norm ratios.

        `arguments`: from `watch_calls`. `student`, `teacher`: output streams `[B, tokens, D]`. `masks`: valid tokens
        `[B, tokens]` per stream, None for all. `average_of`: for each stream, what turns a denominator into the whole
        step's.
        """
        linear: Terms = {}
        replacements = self._replacements(number)
        for key, projector in self.projectors(number).items():
            if key == "text_in":
                with computing(self.precision, arguments["z"].device):
                    guess = projector(arguments["z_reference"])
                linear["linear_z"] = relative_error(guess, arguments["z"], masks["text"], average_of("text"))
                continue
            for stream in replacements[key].streams:
                sides = student[stream], teacher[stream], masks[stream]
                linear[f"linear_{stream}"] = relative_error(*sides, average_of(stream))
        weighted = {key: self.linear_weight * value for key, value in linear.items()}
        descended, logged = self.output_terms(student, teacher, masks, average_of)
        return with_loss(descended | weighted, logged)

    def watch(self, batch: TrainingBatch, visit: Callable[[int, Terms], None]) -> Callable[[BlockCall], None]:
        masks = self.family.masks(batch.inputs)
        gradients = torch.is_grad_enabled()

        def learn(number: int, arguments: dict[str, Any], teacher: Streams) -> None:
            with torch.set_grad_enabled(gradients):
                student = self._call(number, arguments)
                visit(number, self.terms(number, arguments, student, teacher, masks, batch.average_of))

        return self.watch_calls(batch, learn)

    @torch.no_grad()
    def fit_linear(self, batches: Iterable[TrainingBatch], *, ridge: float) -> None:
        """Set the weight and bias of every projector to their least-squares solution over `batches`.

        `ridge`: the damping, relative to the mean diagonal of X^T X. Call this before training, while the projectors
        are still identities.
        """
        equations: dict[tuple[int, str], NormalEquations] = {}
        projectors: list[Any] = [
            each for number in range(len(self.pruned)) for each in self.projectors(number).values()
        ]
        shapes = [each.weight.shape for each in projectors]
        size = 8 * sum((dim_in + 1) * (dim_in + 1 + dim_out) for dim_out, dim_in in shapes)
        home: torch.device | None = None

        def add(masks: dict[str, Tensor | None], number: int, arguments: dict[str, Any], teacher: Streams) -> None:
            nonlocal home
            pairs = self._pairs(number, arguments, teacher, masks)
            for key, projector in self.projectors(number).items():
                x, y, mask = pairs[key]
                # The systems of all blocks grow at once: at 3,072 channels 151 MB each, and `width=auto` has 70 for 35
                # blocks. Copying them to the host with every batch takes long, so they stay where the samples are if
                # half of the free memory there is enough.
                home = home or (x.device if size < free_bytes(x.device) / 2 else torch.device("cpu"))
                if (number, key) not in equations:
                    equations[number, key] = NormalEquations(x.shape[-1], y.shape[-1], home)
                for given, wanted in (changes if isinstance(projector, ResidualLinear) else rows)(x, y, mask):
                    equations[number, key].add(given, wanted)

        for group in self.abreast(batches):
            watches = [self.watch_calls(batch, partial(add, self.family.masks(batch.inputs))) for batch in group]
            observe_each(self.family, self._teacher[0], [batch.inputs for batch in group], watches, last=self.last)
        for (number, key), system in equations.items():
            weight, bias = solved(system, f"{self.pruned[number].name} ({key})", ridge=ridge)
            projector: Any = self.projectors(number)[key]
            assign(projector.weight, weight)
            assign(projector.bias, bias)

    def _pairs(
        self, number: int, arguments: dict[str, Any], teacher: Streams, masks: dict[str, Any]
    ) -> dict[str, tuple[Tensor, Tensor, Tensor | None]]:
        """Return the input and target `[B, tokens, D]` of each projector, and the valid tokens (None for all)."""
        item = self.pruned[number]
        if item.kind == "text":
            return {
                "text_in": (arguments["z_reference"], arguments["z"], masks["text"]),
                "text_out": (arguments["text"], teacher["text"], masks["text"]),
            }
        streams = {key: each.streams for key, each in self._replacements(number).items()}
        inner = self._inner_pairs(item.place, arguments)
        if inner is None:
            # The projectors are still identities, so the block returns their input, the state after attention.
            state = self._call(number, arguments)
            return {key: (state[stream], teacher[stream], masks[stream]) for key, (stream,) in streams.items()}
        return {key: (x, y, _mask_of(x, [masks[name] for name in streams[key]])) for key, (x, y) in inner.items()}

    def _inner_pairs(self, place: Place, arguments: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]] | None:
        with computing(self.precision, device_of(arguments)):
            return whole_call(place.module, partial(self.surgery.inner_pairs, place.stack), arguments)


def _mask_of(x: Tensor, masks: Sequence[Tensor | None]) -> Tensor | None:
    """Return the mask of the stream that the tokens `[B, tokens, D]` are of; None if they are of several joined."""
    mask = masks[0] if len(masks) == 1 else None
    return mask if mask is not None and mask.shape == x.shape[:2] else None


def _prune(family: Family, stack: str, kept: Sequence[Place], width: Width) -> list[PrunedPlace]:
    """Return the places of `stack` that `width` names, with their pruned blocks."""
    sets = width.get(stack, {"text": [], "ffn": []})
    here = {place.index: place for place in kept if place.stack == stack}
    reads = references(list(here), sets["text"])
    pruned: list[PrunedPlace] = []
    if not any(sets.values()):
        return pruned
    surgery = width_surgery(family)
    # Each is pruned as a run of one block, so that it has an output projector and carries no packed text to the next.
    roles = {
        "text": surgery.roles(stack, [1], [], 2, Layout("each"))[1],
        "ffn": surgery.roles(stack, [], [1], 2, Layout("each"))[1],
    }
    for index, place in here.items():
        for kind, role in roles.items():
            if index in sets[kind]:
                assert role is not None
                block = surgery.prune(place.module, role, {})
                pruned.append(PrunedPlace(place, block, kind, here[reads[index]] if kind == "text" else None))
    return pruned
