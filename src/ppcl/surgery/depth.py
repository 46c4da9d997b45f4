"""Depth surgery: which blocks a pruned model keeps, and a teacher whose intervals switch at run time.

A depth-pruned model is the stock class with a shorter ModuleList. The kept blocks are the teacher's
own modules, shared, so a switch copies nothing and takes no time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl.artifacts import Interval, Intervals, Plug, load_plugs, plug_name
from ppcl.errors import UsageError
from ppcl.families.base import Family


def kept_layers(num_layers: int, intervals: Iterable[Interval]) -> list[int]:
    """Teacher indices that remain when each [u, v] becomes one block in the place of u."""
    removed = {index for u, v in intervals for index in range(u + 1, v + 1)}
    return [index for index in range(num_layers) if index not in removed]


def student_block(blocks: list[nn.Module], interval: Interval, init: str) -> nn.Module:
    """A trainable block for `interval`: a copy of block u (`first`), of the middle one, or the mean of all."""
    u, v = interval
    source = {"first": u, "middle": (u + v) // 2, "average": u}[init]
    student = copy.deepcopy(blocks[source])
    if init == "average":
        states = [blocks[index].state_dict() for index in range(u, v + 1)]
        student.load_state_dict({k: torch.stack([s[k] for s in states]).mean(dim=0) for k in states[0]})
    return student.requires_grad_(True)


class Plugboard:
    """A loaded transformer each of whose intervals is teacher, student, or plain removed, at will.

    Calling it with interval names makes just those students; `ppcl.plug(pipeline, folder)` builds one:

        board = ppcl.plug(pipeline, "runs/demo/plugs")   # every student in
        board("transformer_blocks.3-5")                  # this student, teacher elsewhere
        board()                                          # the teacher again
    """

    def __init__(
        self,
        family: Family,
        transformer: nn.Module,
        intervals: Intervals,
        students: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.family = family
        self.transformer: Any = transformer
        self.intervals = intervals
        self.students = dict(students or {})
        self._teacher = {stack: list(getattr(transformer, stack)) for stack in family.stacks}

    @property
    def names(self) -> list[str]:
        """Every interval, in order of execution."""
        return [plug_name(stack, pair) for stack in self._teacher for pair in self.intervals.get(stack, [])]

    def __call__(self, *students: str) -> Plugboard:
        """Make the named intervals students and all others teacher."""
        return self.arrange(students=students)

    def all(self) -> Plugboard:
        """Make every interval a student."""
        return self.arrange(students=self.names)

    def remove(self) -> Plugboard:
        """Keep only teacher block u of every interval: what pruning costs without distillation."""
        return self.arrange(removed=self.names)

    def arrange(self, *, students: Iterable[str] = (), removed: Iterable[str] = ()) -> Plugboard:
        """Set every interval at once: in `students`, in `removed`, or else teacher."""
        students, removed = set(students), set(removed)
        for name in sorted(students | removed):
            if name not in self.names:
                raise UsageError(f"{name} is no interval of this model; it has {', '.join(self.names)}.")
            if name in students and name not in self.students:
                raise UsageError(f"{name} has no trained student; run stages=[depth] for it first.")
        self.kept: dict[str, list[int]] = {}
        for stack, blocks in self._teacher.items():
            short = {
                pair: plug_name(stack, pair)
                for pair in self.intervals.get(stack, [])
                if plug_name(stack, pair) in students | removed
            }
            self.kept[stack] = kept_layers(len(blocks), short)
            stand_in = {u: self.students[name] for (u, _), name in short.items() if name in students}
            modules = [stand_in.get(index, blocks[index]) for index in self.kept[stack]]
            setattr(self.transformer, stack, nn.ModuleList(modules))
            self.transformer.register_to_config(**{self.family.stacks[stack]: len(modules)})
        self.plugged = sorted(students, key=self.names.index)
        return self


def load_student(family: Family, transformer: nn.Module, plug: Plug) -> nn.Module:
    """The block that `plug` holds, in the teacher's dtype and on its device."""
    blocks = list(getattr(transformer, plug.stack))
    if plug.interval[1] >= len(blocks):
        raise UsageError(f"plug {plug.name} does not fit a model with {len(blocks)} blocks in {plug.stack}.")
    student = copy.deepcopy(blocks[plug.interval[0]])
    try:
        student.load_state_dict(plug.state_dict)
    except RuntimeError:
        raise UsageError(f"plug {plug.name} does not fit this model: its tensors have other names or sizes.") from None
    return student.requires_grad_(False).eval()


def plug(pipeline: Any, folder: str | Path) -> Plugboard:
    """Put every trained student in `folder` (a run's `plugs/`) into a loaded diffusers pipeline."""
    from ppcl.families import family_of_pipeline, get_family

    name = family_of_pipeline(type(pipeline).__name__)
    if name is None:
        raise UsageError(f"{type(pipeline).__name__} is of no known family.")
    family = get_family(name)
    plugs = load_plugs(Path(folder))
    if not plugs:
        raise UsageError(f"{folder} holds no plug; run stages=[depth] first.")
    intervals: Intervals = {}
    for item in plugs.values():
        intervals.setdefault(item.stack, []).append(item.interval)
    for item, following in pairwise(plugs.values()):
        if item.stack == following.stack and following.interval[0] <= item.interval[1]:
            raise UsageError(f"{folder} holds {item.name} and {following.name}, which overlap: delete one of them.")
    students = {name: load_student(family, pipeline.transformer, item) for name, item in plugs.items()}
    return Plugboard(family, pipeline.transformer, intervals, students).all()
