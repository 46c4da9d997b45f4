"""Training of gates on the blocks of a frozen teacher, which learn the blocks that a pruned model can do without."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.artifacts.decisions import Decisions, GroupDecisions
from ppcl.data.batches import TrainingBatch
from ppcl.distill.objective import ManualOptimization
from ppcl.families.base import Family
from ppcl.methods.patterns import Group
from ppcl.ops.gumbel import gumbel_noise, straight_through
from ppcl.parallel import mean_terms, share
from ppcl.precision import computing
from ppcl.surgery.adapter import add_lora
from ppcl.surgery.gates import gated
from ppcl.taps import BlockKey

_RECORDS = 100  # of the decisions, in a training
_INIT = 0.02  # of every logit; only their differences matter
_SEED_STRIDE = 1_000_003  # steps of two seeds share no noise


class Choices(nn.Module):
    """One logit for every choice of blocks to keep, for each group.

    `scaling`: what logits are multiplied by, so that small steps of them decide.
    """

    def __init__(self, groups: Sequence[Group], scaling: float) -> None:
        super().__init__()
        self.groups, self.scaling = groups, scaling
        self.logits = nn.ParameterList(torch.full((group.num_choices,), _INIT) for group in groups)
        for number, group in enumerate(groups):
            kept = [[index not in removed for index in group.blocks] for removed in group.choices()]
            self.register_buffer(f"kept_{number}", torch.tensor(kept, dtype=torch.float32), persistent=False)

    def _kept(self, number: int) -> Tensor:
        """Return 1 for each block that a choice of group `number` keeps, else 0: `[choices, blocks]`."""
        return self.get_buffer(f"kept_{number}")

    def sample(self, noise: Sequence[Tensor], tau: float) -> dict[BlockKey, Tensor]:
        """Draw a choice for each sample, and return the gate `[B]` of each block that some choice removes.

        `noise`: for each group `[B, choices]`.
        """
        found: dict[BlockKey, Tensor] = {}
        for number, (group, logits) in enumerate(zip(self.groups, self.logits, strict=True)):
            if not group.num_removed:
                continue
            gates = straight_through(logits * self.scaling, noise[number], tau) @ self._kept(number)
            found |= {(group.stack, index): gates[:, index - group.blocks[0]] for index in group.free}
        return found

    @torch.no_grad()
    def decided(self) -> tuple[list[Tensor], Tensor]:
        """Return for each group the probabilities `[blocks]` that blocks stay, and of all groups the confidence."""
        found = [(logits * self.scaling).softmax(dim=0) for logits in self.logits]
        stay = [each @ self._kept(number) for number, each in enumerate(found)]
        return stay, torch.stack([each.max() for each in found])

    def removed(self) -> dict[str, list[int]]:
        """Return the blocks that the likeliest choices remove, by stack."""
        found: dict[str, list[int]] = {}
        for group, logits in zip(self.groups, self.logits, strict=True):
            found.setdefault(group.stack, []).extend(group.choices()[int(logits.argmax())])
        return found


class LearnGates(ManualOptimization):
    """Trains the choices of blocks jointly with weights that may adapt to them.

    The teacher is not changed: its copy is trained, which shares the parameters that are frozen.

    `weights`: what is trained beside the choices: a `lora` on all linear layers of the blocks, the `full` model, or
        `none`. It is lost at the end.
    `loss`: `task`, the mean of (v - target)^2, or `output`, that of (v - v_T)^2 with the teacher's output v_T.
    `settings`: those of the method, `ppcl.methods.tinyfusion.TinyFusionSettings`.
    `precision`: of the forward. Trained parameters are float32 whatever the teacher's dtype is.

    Noise depends on the seed, the step and the row of the batch alone, so that a resumed training draws the same, and
    several ranks together draw what one would.
    """

    def __init__(
        self, family: Family, teacher: nn.Module, groups: Sequence[Group], settings: Any, precision: str = "32-true"
    ) -> None:
        super().__init__()
        self.family, self.settings, self.precision = family, settings, precision
        self.strict_loading = settings.weights == "full"
        self._teacher = (teacher,)  # in a tuple it is not a submodule, and not saved in checkpoints
        self.student: Any = _copy(family, teacher, settings)
        self.choices = Choices(groups, settings.scaling)
        count = min(_RECORDS, settings.steps)
        self.recorded = [round(number * settings.steps / count) for number in range(count + 1)]
        blocks = sum(len(group.blocks) for group in groups)
        self.register_buffer("history", torch.full((count + 1, blocks + len(groups)), torch.nan))
        self.history: Tensor
        self._record(0)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return what a checkpoint holds: not the frozen weights, which the teacher has."""
        state = super().state_dict(*args, **kwargs)
        frozen = {f"student.{name}" for name, value in self.student.named_parameters() if not value.requires_grad}
        return {key: value for key, value in state.items() if key not in frozen}

    def tau(self, step: int) -> float:
        """Return the temperature at a step, which falls linearly from `tau_start` to `tau_end`."""
        done = step / max(1, self.settings.steps - 1)
        return self.settings.tau_start + (self.settings.tau_end - self.settings.tau_start) * min(1.0, done)

    def gates(self, batch: TrainingBatch, step: int) -> dict[BlockKey, Tensor]:
        """Draw the gates `[B]` of the blocks for a batch."""
        number, ranks = share() if batch.divided else (0, 1)
        count = len(batch.sigmas)
        generator = torch.Generator().manual_seed(self.settings.seed * _SEED_STRIDE + step)
        drawn = [gumbel_noise(count * ranks, len(logits), generator) for logits in self.choices.logits]
        mine = slice(number * count, (number + 1) * count)
        return self.choices.sample([noise[mine].to(batch.sigmas.device) for noise in drawn], self.tau(step))

    def learn(self, batch: TrainingBatch, step: int, backward: Callable[[Tensor], Any]) -> Tensor:
        """Return the loss of a batch, after `backward` has computed its gradients."""
        target = batch.target
        if self.settings.loss == "output":
            with torch.no_grad(), computing(self.precision, batch.sigmas.device):
                target = batch.prediction(self._teacher[0](**batch.inputs))
        with gated(self.family, self.student, batch.inputs, self.gates(batch, step)):
            with computing(self.precision, batch.sigmas.device):
                velocity = batch.prediction(self.student(**batch.inputs))
            loss = (velocity.float() - target.float()).square().mean()
            backward(loss)  # checkpointed blocks run again in it, with their gates
        return loss.detach()

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        step = self.global_step
        loss = self.learn(batch, step, self.manual_backward)
        (logged,) = mean_terms([{"loss": loss}], batch.average)
        self.refuse_infinite(logged["loss"], step)
        self.take_step(self, None)
        confidence = self._record(step + 1)
        names = [group.name for group in self.choices.groups]
        sure = {f"detect/confidence/{name}": value for name, value in zip(names, confidence, strict=True)}
        values: dict[str, Any] = logged | {"tau": self.tau(step), "confidence": confidence.mean()}
        self.log_dict({f"detect/{key}": value for key, value in values.items()} | sure, batch_size=len(batch.sigmas))
        return logged["loss"]

    def _record(self, step: int) -> Tensor:
        """Note the decisions after so many steps, if they are recorded then. Returns the confidence of each group."""
        stay, confidence = self.choices.decided()
        if step in self.recorded:
            self.history[self.recorded.index(step)] = torch.cat([*stay, confidence])
        return confidence

    def decisions(self) -> Decisions:
        """Return the decisions over time."""
        rows, begin, found = self.history.tolist(), 0, {}
        for number, group in enumerate(self.choices.groups, start=-len(self.choices.groups)):
            mine = slice(begin, begin + len(group.blocks))
            probabilities, confidence = [row[mine] for row in rows], [row[number] for row in rows]
            found[group.name] = GroupDecisions(group.stack, list(group.blocks), group.keep, probabilities, confidence)
            begin += len(group.blocks)
        return Decisions(self.recorded, found)

    def rates(self) -> dict[str, float | None]:
        return {"method.settings.lr": self.settings.lr}

    def configure_optimizers(self) -> tuple[list, list]:
        rate = self.settings.lr
        groups: list[dict[str, Any]] = [
            {"params": list(self.choices.parameters()), "lr": rate * self.settings.gate_ratio}
        ]
        weights = [parameter for parameter in self.student.parameters() if parameter.requires_grad]
        if weights:
            groups.insert(0, {"params": weights, "lr": rate})
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
        return [optimizer], [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)]


def _copy(family: Family, teacher: nn.Module, settings: Any) -> nn.Module:
    """Return a copy of the teacher with the trainable weights that the settings ask for; it shares all others."""
    from diffusers.training_utils import cast_training_params  # loads pipelines, which takes seconds

    full = settings.weights == "full"
    shared = {} if full else {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in teacher.parameters()}
    student: Any = copy.deepcopy(teacher, dict(shared)).requires_grad_(full)
    if settings.weights == "lora":
        add_lora(family, student, settings.lora_rank, seed=settings.seed, alpha=settings.lora_alpha)
    cast_training_params(student)
    if settings.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    return student
