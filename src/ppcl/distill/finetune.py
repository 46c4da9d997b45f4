"""Fine-tuning of the pruned model on the teacher's output (paper section 4.1)."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.config import FinetuneConfig
from ppcl.data.batches import TrainingBatch
from ppcl.distill.objective import ManualOptimization, listed, mean_of
from ppcl.families.base import Family
from ppcl.launch import is_first
from ppcl.ops.losses import Average, masked_error, relative_error
from ppcl.parallel import mean_terms
from ppcl.precision import computing
from ppcl.surgery.adapter import add_lora
from ppcl.surgery.share import skeleton
from ppcl.taps import BlockCall, BlockKey, observe
from ppcl.training.optimizers import cosine_schedule, optimizers_of
from ppcl.training.sharding import Sharding, whole_state


class FineTune(ManualOptimization):
    """Output distillation, ||v_S - v_T||^2, with an optional flow-matching loss, ||v_S - (n - x_0)||^2.

    `stands_for`: for each block of the student, the teacher's block whose output it should reproduce. With
        `feature_weight` their image streams are compared too, which the paper does not do.
    `frozen`: parameters of the student that stay as they are, see `ppcl.distill.frozen`.
    `sharding`: shards teacher, student and moving average. The student may then share parameters with the teacher.
    `seed`: initialises the LoRA with `lora_rank`, when only the LoRA is trained.
    `precision`: of the student's forward. Trainable parameters are float32 whatever the teacher's dtype is.

    The teacher is not a submodule, so it is neither trained nor saved in checkpoints. Batches may hold its recorded
    velocity in its place (`forget_teacher`). `ema` is the exponential moving
    average of the student's parameters, or None with `ema_decay=0`. `result` is the model to keep.
    """

    def __init__(
        self,
        family: Family,
        teacher: nn.Module,
        student: nn.Module,
        config: FinetuneConfig,
        stands_for: dict[BlockKey, BlockKey] | None = None,
        sharding: Sharding | None = None,
        seed: int = 0,
        precision: str = "32-true",
        frozen: Iterable[nn.Parameter] = (),
    ) -> None:
        super().__init__()
        self.family, self.stands_for, self.precision = family, stands_for or {}, precision
        self._teacher: tuple[nn.Module, ...] = (teacher.requires_grad_(False),)
        if config.lora_rank:
            add_lora(family, student, config.lora_rank, seed=seed)
        else:
            student.requires_grad_(True)
            for parameter in frozen:
                parameter.requires_grad_(False)
        self.student: Any = student
        self.config = config
        self.is_sharded = sharding is not None
        self.strict_loading = self.is_sharded or not config.lora_rank
        self._skeleton: tuple[Any, ...] = ()
        if sharding is not None:
            self._skeleton = (skeleton(student),)
            sharding.model(family, student, learns=True)
            sharding.model(family, teacher)
        else:
            from diffusers.training_utils import cast_training_params  # loads pipelines, which takes seconds

            cast_training_params(student)
        self.ema: Any = self._copy().requires_grad_(False) if config.ema_decay else None
        if config.gradient_checkpointing:
            student_model: Any = student
            student_model.enable_gradient_checkpointing()

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return what a checkpoint holds. With a LoRA, the frozen weights are left out: teacher and plugs have them."""
        state = super().state_dict(*args, **kwargs)
        if self.strict_loading:
            return state
        frozen = [name for name, parameter in self.student.named_parameters() if not parameter.requires_grad]
        left_out = {f"{model}.{name}" for model in ("student", "ema") for name in frozen}
        return {key: value for key, value in state.items() if key not in left_out}

    @property
    def result(self) -> nn.Module:
        """The model to keep: the moving average of the weights if there is one, else the student."""
        return self.ema if self.ema is not None else self.student

    def whole_result(self) -> nn.Module:
        """Return `result` with all parameters. If they are gathered from shards, only rank 0 has them."""
        if not self._skeleton:
            return self.result
        self._skeleton[0].load_state_dict(whole_state(self.result), assign=True, strict=is_first())
        return self._skeleton[0]

    def _copy(self) -> nn.Module:
        """Return a copy of the student, which shares frozen parameters.

        Of a sharded student it is a plain module with copies of the shards.
        """
        if not self._skeleton:
            frozen = {
                id(parameter): parameter for parameter in self.student.parameters() if not parameter.requires_grad
            }
            return copy.deepcopy(self.student, dict(frozen))
        copied = copy.deepcopy(self._skeleton[0])
        copied.load_state_dict({key: value.clone() for key, value in self.student.state_dict().items()}, assign=True)
        return copied

    def setup(self, stage: str) -> None:
        for teacher in self._teacher:
            teacher.eval()
            if not self._skeleton:
                teacher.to(self.device)

    @property
    def teachers(self) -> tuple[nn.Module, ...]:
        """The teacher alone, or nothing once it is forgotten."""
        return self._teacher

    def forget_teacher(self) -> None:
        """Release the teacher: from now on every batch has its recorded velocity."""
        self._teacher = ()

    @torch.no_grad()
    def teacher_velocity(self, batch: TrainingBatch) -> Tensor:
        """Return the teacher's velocity for a batch, recorded or computed."""
        return batch.prediction(self._teacher[0](**batch.inputs)) if batch.teacher is None else batch.teacher

    @torch.no_grad()
    def velocity_error(self, batches: Iterable[TrainingBatch]) -> float:
        """Return ||v_S - v_T||^2 / ||v_T||^2 over `batches`, with the velocity v_S of `result`.

        All ranks must call it, each with its own rows of the batches. Each gets the value over all rows.
        """
        sums = torch.zeros(2, dtype=torch.float64)
        with self.result_to_run() as model:
            for batch in batches:
                with computing(self.precision, batch.sigmas.device):
                    velocity = batch.prediction(model(**batch.inputs)).double()
                target = self.teacher_velocity(batch).double()
                found = torch.stack([(velocity - target).square().sum(), target.square().sum()])
                sums += batch.average(found).cpu()
        return (sums[0] / sums[1]).item()  # NaN where the teacher's velocity is 0 everywhere

    @contextmanager
    def result_to_run(self) -> Iterator[nn.Module]:
        """Provide a model within the context that runs with the weights of `result`.

        A sharded moving average cannot run, so the student takes over its weights within the context.
        """
        if self.ema is None or not self.is_sharded:
            yield self.result
            return
        own = [parameter.detach().clone() for parameter in self.student.parameters()]
        for parameter, mean in zip(self.student.parameters(), self.ema.parameters(), strict=True):
            parameter.copy_(mean)
        try:
            yield self.student
        finally:
            for parameter, value in zip(self.student.parameters(), own, strict=True):
                parameter.copy_(value)

    def losses(self, batch: TrainingBatch) -> dict[str, Tensor]:
        """Return each loss with a weight above 0, unweighted, and their weighted sum as `loss`. All are scalars.

        `output`: the mean of (v_S - v_T)^2. `flow`: the mean of (v_S - (n - x_0))^2. `feature`: the distance of the
            blocks' image streams that `feature_loss` names.
        """
        config = self.config
        weights = {"output": config.output_weight, "flow": config.flow_weight, "feature": self.feature_weight}
        with computing(self.precision, batch.sigmas.device):
            velocity, features = self._run(self.student, batch)
        terms: dict[str, Tensor] = {}
        if config.feature_weight:
            with torch.no_grad():
                target, wanted = self._run(self._teacher[0], batch)
        elif config.output_weight:
            target = self.teacher_velocity(batch)
        if config.output_weight:
            terms["output"] = (velocity.float() - target.float()).square().mean()
        if config.flow_weight:
            terms["flow"] = (velocity.float() - batch.target.float()).square().mean()
        if config.feature_weight:
            pairs = [
                (features[here], wanted[its])
                for here, its in self.stands_for.items()
                if here in features and its in wanted
            ]
            terms["feature"] = self._feature_loss(pairs, batch.average)
        return terms | {"loss": torch.stack([weights[key] * value for key, value in terms.items()]).sum()}

    @property
    def feature_weight(self) -> float:
        """The weight of the feature loss in this step. It depends on the step alone, for trainings that resume."""
        left = 1 - self.global_step / self.config.steps if self.config.feature_decay else 1.0
        return self.config.feature_weight * left

    def _feature_loss(self, pairs: list[tuple[Tensor, Tensor]], average: Average) -> Tensor:
        """Return the distance of the image streams `[B, tokens, D]` of student and teacher in `pairs`, a scalar."""
        kind = self.config.feature_loss
        if kind == "masked":
            return torch.stack([masked_error(s, t, self.config.mask_sigmas) for s, t in pairs]).mean()
        if kind == "summed":
            return torch.stack([(s.float() - t.float()).square().mean() for s, t in pairs]).sum()
        return torch.stack([relative_error(s, t, average=average) for s, t in pairs]).mean()

    def _run(self, model: nn.Module, batch: TrainingBatch) -> tuple[Tensor, dict[BlockKey, Tensor]]:
        """Return a model's velocity and, with `feature_weight`, the image stream of each of its blocks."""
        features: dict[BlockKey, Tensor] = {}
        if not self.config.feature_weight:
            return batch.prediction(model(**batch.inputs)), features

        def keep(call: BlockCall) -> None:
            if self.family.main_stream in call.outputs:  # some stacks have only a text stream
                features[call.key] = call.outputs[self.family.main_stream]

        output = observe(self.family, model, batch.inputs, keep)
        return batch.prediction(output), features

    def training_step(self, batch: TrainingBatch | list[TrainingBatch], batch_idx: int) -> Tensor:
        batches, found = listed(batch), []
        for each in batches:
            terms = self.losses(each)
            self.manual_backward(terms["loss"] / len(batches))
            found.append({key: value.detach() for key, value in terms.items()})
        (logged,) = mean_terms([mean_of(found)], batches[0].average)
        loss = logged["loss"]
        self.refuse_infinite(loss, self.global_step)
        self.take_step(self.student, self.config.max_grad_norm)
        if self.ema is not None:
            self._average()
        self.log_dict({f"finetune/{key}": value for key, value in logged.items()}, batch_size=len(batches[0].sigmas))
        return loss

    @torch.no_grad()
    def _average(self) -> None:
        # The decay is smaller at first, so that the initial weights do not dominate the average.
        decay = min(self.config.ema_decay, (1 + self.global_step) / (10 + self.global_step))
        for mean, now in zip(self.ema.parameters(), self.student.parameters(), strict=True):
            if now.requires_grad:
                mean.lerp_(now.to(mean.dtype), 1 - decay)

    def rates(self) -> dict[str, float | None]:
        key = "lr" if self.config.relative_update is None else "relative_update"
        return {f"finetune.{key}": getattr(self.config, key)}

    def configure_optimizers(self) -> tuple[list, list]:
        config = self.config
        blocks = list(self.family.blocks(self.student).values())
        optimizers = optimizers_of(self.family, self.student, blocks, config)
        return optimizers, [cosine_schedule(optimizer, config) for optimizer in optimizers]
