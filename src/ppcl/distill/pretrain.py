"""Flow-matching training of the small teachers that are shipped with the suite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from ppcl.data.batches import TrainingBatch
from ppcl.distill.objective import ManualOptimization
from ppcl.families.base import Family
from ppcl.precision import computing
from ppcl.training.optimizers import muon, split_for_muon


class Pretrain(ManualOptimization):
    """Trains a transformer by flow matching: the mean squared error between its prediction and n - x_0.

    Muon updates the matrices in blocks, AdamW all other parameters (see `split_for_muon`). `text_encoder` is trained
    too, by AdamW with the rate `text_encoder_lr`; None trains the transformer alone.

    A step gets its number and makes its batch with `make_batch`, because Lightning prefetches: captions would be
    encoded before the text encoder has taken the last step.

    The learning rates rise linearly over `warmup_steps`, stay constant, and fall linearly to zero over the last part
    of the training, a fraction `decay` of `max_steps`. With this decay no moving average of the weights is needed.
    """

    def __init__(
        self,
        family: Family,
        transformer: nn.Module,
        make_batch: Callable[[int], TrainingBatch],
        text_encoder: nn.Module | None = None,
        *,
        max_steps: int,
        muon_lr: float = 0.02,
        adam_lr: float = 2e-3,
        text_encoder_lr: float | None = None,
        warmup_steps: int = 50,
        decay: float = 0.4,
        max_grad_norm: float = 1.0,
        precision: str = "32-true",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["family", "transformer", "make_batch", "text_encoder", "text_encoder_lr"])
        self.family = family
        self.transformer = transformer
        self.text_encoder, self.text_encoder_lr = text_encoder, text_encoder_lr
        self.make_batch = make_batch

    def training_step(self, number: int, batch_idx: int) -> Tensor:
        batch = move_data_to_device(self.make_batch(number), self.device)
        with computing(self.hparams["precision"], batch.sigmas.device):
            output = self.transformer(**batch.inputs)
        loss = (batch.prediction(output) - batch.target).square().mean()
        self.refuse_infinite(loss, self.global_step)
        self.manual_backward(loss)
        self.take_step(self, self.hparams["max_grad_norm"])
        self.log("pretrain/loss", loss, prog_bar=True)
        return loss.detach()

    def rates(self) -> dict[str, float | None]:
        return {f"pretrain.{key}": self.hparams[key] for key in ("muon_lr", "adam_lr")}

    def configure_optimizers(self) -> tuple[list, list]:
        blocks = self.family.blocks(self.transformer).values()
        hidden, rest = split_for_muon(self.family, self.transformer, blocks)
        groups: list[dict[str, Any]] = [{"params": rest}]
        if self.text_encoder is not None:
            groups.append({"params": list(self.text_encoder.parameters()), "lr": self.text_encoder_lr})
        adam = torch.optim.AdamW(groups, lr=self.hparams["adam_lr"], betas=(0.9, 0.95), fused=True)
        optimizers = [muon(hidden, self.hparams["muon_lr"], 0.01), adam]
        return optimizers, [torch.optim.lr_scheduler.LambdaLR(o, self._lr_factor) for o in optimizers]

    def _lr_factor(self, step: int) -> float:
        """Return the factor of all learning rates at `step`."""
        total = self.hparams["max_steps"]
        left = (total - step) / max(1.0, self.hparams["decay"] * total)
        return min(1.0, (step + 1) / self.hparams["warmup_steps"], max(0.0, left))
