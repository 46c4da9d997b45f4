"""The plugboard: swaps students, removals and projectors in a loaded model for the teacher's blocks, and back.

Blocks are shared and never copied: a switch copies no tensor.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl.artifacts.plan import Intervals, plug_name, read_plug_name, removal_name
from ppcl.artifacts.plugs import Plug, Projector, load_plugs, load_projectors
from ppcl.components import DEFAULT
from ppcl.errors import UsageError
from ppcl.families.base import Family
from ppcl.layers import BlockMap, Layout, check_counts, check_width_sets, kept_layers, references
from ppcl.streaming import still
from ppcl.surgery.controlnet import hook_residuals
from ppcl.surgery.share import load_shared
from ppcl.surgery.width import prune_blocks, width_surgery
from ppcl.taps import BlockKey, replace_stack, stack_of


class Plugboard:
    """Arranges a loaded transformer: each interval is the teacher's, a student, or cut to its first block.

    Call it with names to plug in just those; `ppcl.plug(pipeline, folder)` builds one:

        board = ppcl.plug(pipeline, "runs/demo/plugs")   # every student and projector in
        print(board)                                     # the names, and what is plugged in
        board("transformer_blocks.3-5")                  # this student, teacher elsewhere
        board("transformer_blocks.3-5.removed")          # that interval cut to its first block
        board("transformer_blocks.7.text")               # block 7 without its text stream
        board()                                          # the teacher again

    After a call `kept` has the teacher's indices of the blocks in place by stack, `plugged` the intervals that are
    students, `removed` those that are cut, and `width` the blocks pruned in width by stack and kind. `teacher_blocks`
    says which blocks of a full model the teacher has kept, if it was pruned itself. `pipeline` is the pipeline that the
    transformer belongs to, where the board was made for one.
    """

    pipeline: Any = None

    def __init__(
        self,
        family: Family,
        transformer: nn.Module,
        intervals: Intervals,
        students: Mapping[str, nn.Module] | None = None,
        projectors: Mapping[str, Projector] | None = None,
        layout: Layout | None = None,
    ) -> None:
        self.family = family
        self.transformer: Any = transformer
        self.intervals = intervals
        self.students: Mapping[str, nn.Module] = students or {}
        self.projectors = dict(projectors or {})
        self.layout = layout or Layout()
        self._pruned: dict[tuple, nn.Module] = {}
        self._teacher = {stack: list(stack_of(transformer, stack)) for stack in family.stacks}
        self.kept = {stack: list(range(len(blocks))) for stack, blocks in self._teacher.items()}
        self.teacher_blocks = BlockMap.of(getattr(transformer, "config", {}).get("ppcl"), self.counts)
        self.plugged: list[str] = []
        self.removed: list[str] = []
        self.width: dict[str, dict[str, list[int]]] = {}

    def __repr__(self) -> str:
        """Return the names that the board can be called with, and which of them are in."""
        model = f"{type(self.transformer).__name__}, {sum(map(len, self.kept.values()))} of {sum(self.counts.values())}"
        lines = [f"Plugboard of {model} blocks"]
        for name in self.names:
            state = (
                "student" if name in self.plugged else "cut to its first block" if name in self.removed else "teacher"
            )
            lines.append(f"  {name:<34} {state}" + ("" if name in self.students else " (no student is trained)"))
        for name, item in self.projectors.items():
            state = "projector" if item.index in self.width.get(item.stack, {}).get(item.kind, []) else "teacher"
            lines.append(f"  {name:<34} {state}")
        lines.append("board(NAME, ...) plugs in these alone; INTERVAL.removed cuts an interval to its first block;")
        lines.append("board() is the teacher; board.all() every student and projector.")
        return "\n".join(lines)

    @property
    def names(self) -> list[str]:
        """Names of all intervals, in order of execution."""
        return [plug_name(stack, pair) for stack in self._teacher for pair in self.intervals.get(stack, [])]

    @property
    def counts(self) -> dict[str, int]:
        """The number of blocks that the teacher has, by stack."""
        return {stack: len(blocks) for stack, blocks in self._teacher.items()}

    @property
    def blocks(self) -> BlockMap:
        """The blocks of the full model that are in place. That is the teacher, or what the teacher was pruned from."""
        return self.teacher_blocks.then(self.kept)

    @property
    def removed_intervals(self) -> dict[str, list[list[int]]]:
        """The intervals that are a single block now (a student, or their first block), by stack."""
        short = {*self.plugged, *self.removed}
        return {
            stack: [[u, v] for u, v in self.intervals.get(stack, []) if plug_name(stack, (u, v)) in short]
            for stack in self._teacher
        }

    @property
    def stands_for(self) -> dict[BlockKey, BlockKey]:
        """Map each block in place to the teacher's block whose output it approximates: v of [u, v]."""
        found: dict[BlockKey, BlockKey] = {}
        for stack, kept in self.kept.items():
            ends = {pair[0]: pair[1] for pair in self.removed_intervals[stack]}
            found |= {(stack, place): (stack, ends.get(index, index)) for place, index in enumerate(kept)}
        return found

    def __call__(self, *names: str) -> Plugboard:
        """Plug in the named students, removals and projectors, with teacher blocks elsewhere."""
        for name in names:
            if not isinstance(name, str):
                raise UsageError(f"{name!r} is not a name: pass names one by one, as board(*names).")
        projectors = [name for name in names if name in self.projectors]
        removed = [name.removesuffix(".removed") for name in names if name.endswith(".removed")]
        students = [name for name in names if name not in projectors and not name.endswith(".removed")]
        return self.arrange(students=students, removed=removed, projectors=projectors)

    def all(self) -> Plugboard:
        """Make every interval a student and plug in every projector."""
        return self.arrange(students=self.names, projectors=self.projectors)

    def remove(self) -> Plugboard:
        """Keep of every interval [u, v] only the teacher's block u: pruning without distillation."""
        return self.arrange(removed=self.names)

    def arrange(
        self, *, students: Iterable[str] = (), removed: Iterable[str] = (), projectors: Iterable[str] = ()
    ) -> Plugboard:
        """Arrange the whole model: intervals in `students`, those in `removed`, teacher blocks elsewhere; `projectors`.

        Raises `UsageError` for an unknown name, and for a projector that was fitted in another arrangement. The model
        then stays as it was.
        """
        students, removed, projectors = set(students), set(removed), set(projectors)
        self._check_names(students, removed, projectors)
        arranged: dict[str, tuple[list[int], list[nn.Module], dict[str, list[int]]]] = {}
        for stack, blocks in self._teacher.items():
            short = {
                pair: plug_name(stack, pair)
                for pair in self.intervals.get(stack, [])
                if plug_name(stack, pair) in students | removed
            }
            kept = kept_layers(len(blocks), short)
            stand_in = {u: name for (u, _), name in short.items() if name in students}
            modules = [self.students[stand_in[i]] if i in stand_in else blocks[i] for i in kept]
            bases = stand_in | {pair[0]: removal_name(stack, pair) for pair, name in short.items() if name in removed}
            chosen = [item for name, item in self.projectors.items() if name in projectors and item.stack == stack]
            sets = {kind: [item.index for item in chosen if item.kind == kind] for kind in ("text", "ffn")}
            if chosen:
                check_width_sets(stack, kept, sets["text"], sets["ffn"], "projectors")
                self._check_bases(chosen, bases, references(kept, sets["text"]))
                states = {item.name: item.state_dict for item in chosen}
                modules = prune_blocks(
                    self.family, stack, kept, modules, sets["text"], sets["ffn"], self.layout, states, self._pruned
                )
            arranged[stack] = kept, modules, sets
        # Nothing is touched before everything fits.
        self.kept = {stack: kept for stack, (kept, _, _) in arranged.items()}
        self.width = {stack: sets for stack, (_, _, sets) in arranged.items() if any(sets.values())}
        for stack, (_, modules, _) in arranged.items():
            replace_stack(self.transformer, stack, nn.ModuleList(modules))
            self.transformer.register_to_config(**{self.family.stacks[stack]: len(modules)})
        hook_residuals(self.transformer, self.family.facts, self.blocks)
        self.plugged = sorted(students, key=self.names.index)
        self.removed = sorted(removed, key=self.names.index)
        return self

    def _check_names(self, students: set[str], removed: set[str], projectors: set[str]) -> None:
        both = students & removed
        if both:
            raise UsageError(f"{min(both)} cannot be a student and removed at once: name one of them.")
        for name in sorted(students | removed):
            if name not in self.names:
                known = ", ".join([*self.names, *self.projectors])
                raise UsageError(f"{name} is no interval or projector of this model; it has {known}.")
            if name in students and name not in self.students:
                raise UsageError(f"{name} has no trained student; run 'stages=[depth]' for it first.")
        for name in sorted(projectors - self.projectors.keys()):
            raise UsageError(f"{name} has no trained projector; run 'stages=[width]' for it first.")

    @staticmethod
    def _check_bases(chosen: list[Projector], bases: dict[int, str], reads: dict[int, int]) -> None:
        """Raise `UsageError` for a projector whose block, or whose reference, is not the one it was fitted with."""
        for item in chosen:
            base = bases.get(item.index)
            if base != item.base:
                raise UsageError(
                    f"projector {item.name} was fitted in {item.base or 'the teacher'}; here block {item.index} is "
                    f"{base or 'the teacher'}: plug in both or neither."
                )
            if item.kind == "text" and reads[item.index] != item.reference:
                raise UsageError(
                    f"projector {item.name} was fitted on the text of block {item.reference}; here it would read "
                    f"block {reads[item.index]}: plug in every student and text projector between the two."
                )

    def standalone(self) -> Any:
        """Return the present arrangement as a model of its own, to save or to copy; it shares every parameter."""
        check_counts(self.family.stacks, {stack: len(kept) for stack, kept in self.kept.items()})
        config = {key: value for key, value in self.transformer.config.items() if not key.startswith("_")}
        config.pop("ppcl", None)
        model_class = self.family.transformer_class
        if self.width:
            surgery = width_surgery(self.family)
            model_class = surgery.transformer_class
            places = {
                stack: {kind: sorted(kept.index(index) for index in sets.get(kind, [])) for kind in ("text", "ffn")}
                for stack, kept in self.kept.items()
                for sets in [self.width.get(stack, {})]
            }
            config |= surgery.config(places, self.layout)
        with torch.device("meta"):
            model = model_class.from_config(config)
        state = self.transformer.state_dict(keep_vars=True)
        load_shared(model, state)
        # Modules without parameters and buffers are not all in the state dict: share them too.
        for name, child in self.transformer.named_children():
            if not list(child.parameters()):
                setattr(model, name, child)
        for name, buffer in self.transformer.named_buffers():
            owner, _, attribute = name.rpartition(".")
            model.get_submodule(owner)._buffers[attribute] = buffer
        return model.train(self.transformer.training)


def load_student(family: Family, transformer: nn.Module, plug: Plug) -> nn.Module:
    """Return the student block that `plug` holds, in the teacher's dtype and on its device."""
    blocks = list(stack_of(transformer, plug.stack))
    if plug.interval[1] >= len(blocks):
        raise UsageError(f"plug {plug.name} does not fit a model with {len(blocks)} blocks in {plug.stack}.")
    with still(blocks[plug.interval[0]]):
        student = copy.deepcopy(blocks[plug.interval[0]])
    try:
        student.load_state_dict(plug.state_dict)
    except RuntimeError:
        raise UsageError(f"plug {plug.name} does not fit this model: its tensors have other names or sizes.") from None
    return student.requires_grad_(False).eval()


def _transformer_of(pipeline: Any, folder: Path, plugs: Iterable[Plug | Projector]) -> Any:
    """Return the transformer of a pipeline that the `plugs` in `folder` are of; `UsageError` if there is none."""
    for item in plugs:
        component = item.header.made_from.get("model", {}).get("component", DEFAULT)
        found = getattr(pipeline, component, None)
        if found is None:
            raise UsageError(
                f"{folder} holds plugs of {component}, which this {type(pipeline).__name__} is without: load it whole."
            )
        return found
    raise UsageError(f"{folder} holds no plug; run 'stages=[depth]' or 'stages=[width]' first.")


def _family_of(pipeline: Any, transformer: Any, folder: Path) -> Family:
    """Return the family of a pipeline: the one that the trace beside the plugs in `folder` tells, or a known one."""
    from ppcl.families.registry import family_of_pipeline, get_family
    from ppcl.families.traced.family import Traced, facts_of
    from ppcl.families.traced.known import TRACE, read_trace

    trace = read_trace(folder.parent / TRACE)
    if trace is not None and trace.model == type(transformer).__name__:
        traced = Traced(facts_of(trace), transformer.config)
        traced.adopt(trace)
        return traced
    name = family_of_pipeline(type(pipeline).__name__)
    if name is None:
        raise UsageError(
            f"{type(pipeline).__name__} is of no known family, and there is no {folder.parent / TRACE}: give the "
            "folder plugs/ of a run on this model."
        )
    return get_family(name, transformer.config)


def plug(pipeline: Any, folder: str | Path) -> Plugboard:
    """Plug all students and projectors in `folder`, a run's `plugs/`, into a loaded diffusers pipeline.

    Returns the board that switches them. Raises `UsageError` for a folder without plugs, for plugs of another model,
    and for intervals that overlap.
    """
    plugs, projectors = load_plugs(Path(folder)), load_projectors(Path(folder))
    transformer = _transformer_of(pipeline, Path(folder), [*plugs.values(), *projectors.values()])
    family = _family_of(pipeline, transformer, Path(folder))
    intervals: Intervals = {}
    for item in plugs.values():
        intervals.setdefault(item.stack, []).append(item.interval)
    removed = sorted({item.base for item in projectors.values() if item.base and item.base.endswith(".removed")})
    for base in removed:
        stack, interval = read_plug_name(base.removesuffix(".removed")) or ("", (0, 0))
        intervals.setdefault(stack, []).append(interval)
    for stack, pairs in intervals.items():
        pairs.sort()
        for pair, following in pairwise(pairs):
            if following[0] <= pair[1]:
                names = plug_name(stack, pair), plug_name(stack, following)
                raise UsageError(f"{folder} holds {' and '.join(names)}, which overlap: delete one of them.")
    students = {name: load_student(family, transformer, item) for name, item in plugs.items()}
    layouts = {item.header.made_from["text_output"] for item in projectors.values()}
    if len(layouts) > 1:
        raise UsageError(f"{folder} holds text projectors of two layouts ({', '.join(layouts)}): keep those of one.")
    layout = Layout(*layouts)
    board = Plugboard(family, transformer, intervals, students, projectors, layout)
    board.pipeline = pipeline
    return board(*students, *removed, *projectors)
