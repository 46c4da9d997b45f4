"""TinyFusion: learns which blocks to remove, jointly with weights that adapt to their removal (arXiv 2412.01199)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ppcl.artifacts.plan import Intervals
from ppcl.config import MethodConfig
from ppcl.config.bounds import MOST_RATE
from ppcl.distill.gates import LearnGates
from ppcl.errors import UsageError
from ppcl.families.base import Family
from ppcl.families.facts import FamilyFacts
from ppcl.layers import check_counts
from ppcl.methods.base import Detection, Method, Teacher
from ppcl.methods.patterns import Group, groups_of, spread
from ppcl.methods.removal import Room, check_size, runs_to_intervals
from ppcl.options import option
from ppcl.surgery.count import on_meta
from ppcl.taps import BlockKey, stack_of

_USUAL = 0.7  # the size in conf/method/tinyfusion.yaml, which is there whether groups are given or not


@dataclass
class TinyFusionSettings:
    """Settings of the training. The defaults are the paper's, for large models.

    `groups`: how the blocks of a stack are divided into groups of M adjacent ones, of which N stay: a list of [N, M],
        or a string such as `2:4` for groups of one kind. For a model with several stacks a mapping from stack to
        either, which leaves other stacks whole. None: groups of about 4 blocks, over which the removals are spread
        that `method.num_remove` or `method.params` takes. These two are read only then.
    `weights`: what is trained beside the choices: a `lora` on the blocks, the `full` model, or `none`. It is dropped.
    `loss`: `task`, the error of the prediction on the data, or `output`, its distance to the teacher's prediction.
    `lr`: learning rate of the weights. That of the choices is `gate_ratio` times as high.
    `tau_start`, `tau_end`: the temperature of the draws at the first and last step. It falls linearly.
    `scaling`: what the logits of choices are multiplied by.
    `lora_rank`, `lora_alpha`: the LoRA's rank, and `lora_alpha` / `lora_rank` is what it is multiplied by.
    `gradient_checkpointing`: recompute activations in the backward pass, which takes less memory and more time.
    """

    groups: Any = None
    weights: str = option("lora", choices=("lora", "full", "none"))
    loss: str = option("task", choices=("task", "output"))
    steps: int = option(10000, least=1)
    batch_size: int = option(8, least=1)
    lr: float = option(1e-4, above=0, most=MOST_RATE)
    gate_ratio: float = option(10.0, above=0, most=1e6)
    tau_start: float = option(4.0, above=0, most=1000)
    tau_end: float = option(0.1, above=0, most=1000)
    scaling: float = option(100.0, above=0, most=1e6)
    lora_rank: int = option(8, least=1)
    lora_alpha: float = option(16.0, above=0, most=1e6)
    gradient_checkpointing: bool = True
    seed: int = option(0, least=0)


class TinyFusion(Method):
    """Learns for each group of adjacent blocks which of them stay, by gates that are drawn for every sample.

    A sample passes through the blocks that the drawn choice keeps, and around the others. The choices are trained with
    a LoRA on the blocks on the error of the prediction, so that those win which training recovers best. In the end the
    likeliest choice of each group is taken, and the LoRA is dropped: the teacher's weights were never changed.

    The first block of a stack is never removed, because an interval begins with the kept block before it. Choices that
    remove it, or blocks that the family or `method.start` and `method.end` exclude, are not learned.
    """

    settings_class = TinyFusionSettings
    reads = ("start", "end", "num_remove", "params")
    trains = True

    @classmethod
    def check(cls, config: MethodConfig) -> None:
        if config.settings.get("groups") is None:
            check_size(config)

    def check_keys(self, facts: FamilyFacts) -> None:
        super().check_keys(facts)
        for key, usual in (("num_remove", None), ("params", _USUAL)):
            value = getattr(self.config, key)
            if self.settings.groups is not None and value not in (None, usual):
                raise UsageError(
                    f"method.{key}={value:g} has no effect with method.settings.groups, which says how many blocks "
                    "stay: leave one of them out."
                )

    def check_model(self, family: Family, layers: Mapping[str, int]) -> None:
        left = dict(layers)
        for group in self.groups(family, layers, lambda: on_meta(family, family.arch)):
            left[group.stack] -= group.num_removed
        check_counts(family.stacks, left)

    def groups(self, family: Family, layers: Mapping[str, int], transformer: Callable[[], nn.Module]) -> list[Group]:
        """Return the groups of all stacks: those given, or else groups of about 4 blocks that reach the size.

        `layers`: the number of blocks by stack. `transformer`: returns the model, on any device. Raises `UsageError` if
        the groups do not fit the model, or if the size is out of reach.
        """
        given = self.settings.groups
        sizes = replace(self.config, params=None) if given is not None else self.config
        room = Room.of(sizes, family, layers, transformer)
        if given is not None:
            return groups_of(given, layers, room.blocks)

        def reached(count: int) -> tuple[list[Group], list[BlockKey]]:
            groups = spread(count, layers, room.blocks)
            return groups, [(group.stack, index) for group in groups for index in group.free[: group.num_removed]]

        most = len(room.blocks)
        room.check(reached(most)[1], "blocks that may be removed from groups of about 4, each of which keeps one,")
        return next(groups for groups, lost in map(reached, range(1, most + 1)) if room.enough(lost))

    def detect(self, teacher: Teacher) -> Detection:
        assert teacher.train is not None, "the stage gives it to a method that trains"
        stacks = teacher.family.stacks
        layers = {stack: len(stack_of(teacher.transformer, stack)) for stack in stacks}
        groups = self.groups(teacher.family, layers, lambda: teacher.transformer)
        module = LearnGates(teacher.family, teacher.transformer, groups, self.settings, teacher.precision)
        teacher.train(module, self.settings.steps, self.settings.batch_size)
        removed, decisions = module.choices.removed(), module.decisions()
        intervals: Intervals = {stack: runs_to_intervals(removed.get(stack, [])) for stack in stacks}
        kept = {
            f"{group.stack}.{index}": probability
            for group in decisions.groups.values()
            for index, probability in zip(group.blocks, group.probabilities[-1], strict=True)
        }
        confidence = {name: group.confidence[-1] for name, group in decisions.groups.items()}
        return Detection(intervals, {"keep_probability": kept, "confidence": confidence}, decisions=decisions)
