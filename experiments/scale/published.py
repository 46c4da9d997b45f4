"""The published training step of depth distillation, rewritten for comparison with our step.

A step of the published script, in its default setting (OPPO-Mente-Lab/Qwen-Image-Pruning, commit 4d054b3):
- The teacher's blocks run without gradient, up to the end of the last interval and no further.
- When block u of an interval has run, its student is called with block u's inputs, under gradient checkpointing.
- Then the student is called a second time, also checkpointed. Its inputs are now the outputs of the previous student's
  second call, so these calls form a chain of students. It starts with the first interval's output. No loss reads it.
- When block v has run, the loss of the first call is added to a sum, which keeps everything that its gradient needs.
- After the teacher's pass there is one backward pass over the sum, and then the optimiser's step.

Differences from the script:
- The final norm and projection are left out, since nothing reads their output. This makes the published step faster.
- DeepSpeed, 8-bit optimiser states in host memory and bf16 are left out, since they are not part of the loop. The bench
  measures bf16 separately.
- Padded text is left out of the loss, as in ours. The script has no padding, because its batch is one prompt.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from ppcl.data.batches import TrainingBatch
from ppcl.distill.depth import DepthDistillation
from ppcl.distill.losses import Terms
from ppcl.taps import BlockCall, Streams, observe


class PublishedDistillation(DepthDistillation):
    """`DepthDistillation` with the published step. Students, optimiser and trainer are the same."""

    def learn(self, batch: TrainingBatch, done: Any = None, share: float = 1.0) -> list[Terms]:
        logged = self.forward_losses(batch)  # as there, the pass's own tensors are freed before the backward
        self.manual_backward(torch.stack([terms["loss"] for terms in logged]).sum() * share)
        return [{key: value.detach() for key, value in terms.items()} for terms in logged]

    def forward_losses(self, batch: TrainingBatch) -> list[Terms]:
        """Return the loss of every interval, with its autograd graph."""
        starts = {(stack, pair[0]): number for number, (stack, pair) in enumerate(self.pairs)}
        ends = {(stack, pair[1]): number for number, (stack, pair) in enumerate(self.pairs)}
        masks = self.family.masks(batch.inputs)
        direct: Streams = {}
        chained: Streams = {}
        logged: list[Terms] = []

        def on_block(call: BlockCall) -> None:
            nonlocal direct, chained
            with torch.enable_grad():
                if call.key in starts:
                    pair = self.pairs[starts[call.key]]
                    direct = self._call_student(*pair, call.kwargs, batch.inputs)
                    if not chained:
                        chained = direct
                    else:
                        streams = {"hidden_states": chained["image"], "encoder_hidden_states": chained["text"]}
                        chained = self._call_student(*pair, call.kwargs | streams, batch.inputs)
                if call.key in ends:
                    terms = {name: plain_loss(direct[name], t, masks[name]) for name, t in call.outputs.items()}
                    logged.append(terms | {"loss": terms["text"] + terms["image"]})

        with torch.no_grad():
            observe(self.family, self._teacher[0], batch.inputs, on_block, last=self.last)
        return logged


def plain_loss(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Return Eq. 6 of one stream `[B, tokens, D]`: the mean squared distance of unit vectors over valid tokens."""
    teacher_unit = teacher.float() / teacher.float().norm(dim=-1, keepdim=True)
    student_unit = student.float() / student.float().norm(dim=-1, keepdim=True)
    distances = mse_loss(student_unit, teacher_unit, reduction="none").sum(dim=-1)  # [B, tokens]
    return (distances if mask is None else distances[mask]).mean()
