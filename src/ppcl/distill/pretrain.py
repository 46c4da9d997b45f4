"""Flow matching from nothing, for the embedded teachers."""

from __future__ import annotations

from typing import cast

import lightning as L
import torch
from torch import Tensor, nn

from ppcl.data.batches import TrainingBatch
from ppcl.errors import UsageError
from ppcl.families.base import Family
from ppcl.precision import computing
from ppcl.training.optimizers import split_for_muon


class Pretrain(L.LightningModule):
    """Flow matching with Muon on the blocks' matrices and AdamW on everything else.

    The learning rate warms up, stays, and falls linearly to zero over the last `decay` of the steps,
    which makes an average of the weights unnecessary.
    """

    def __init__(
        self,
        family: Family,
        transformer: nn.Module,
        *,
        max_steps: int,
        muon_lr: float = 0.02,
        adam_lr: float = 2e-3,
        warmup_steps: int = 50,
        decay: float = 0.4,
        max_grad_norm: float = 1.0,
        precision: str = "32-true",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["family", "transformer"])
        self.family = family
        self.transformer = transformer
        # Two optimisers take turns on one step, which Lightning leaves to manual optimisation.
        self.automatic_optimization = False

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        with computing(self.hparams["precision"], batch.sigmas.device):
            output = self.transformer(**batch.inputs)[0]
        loss = (batch.prediction(output) - batch.target).square().mean()
        if not torch.isfinite(loss):
            raise UsageError(
                f"pretrain.muon_lr={self.hparams['muon_lr']} and pretrain.adam_lr={self.hparams['adam_lr']} made the "
                f"loss {loss.item()} at step {self.global_step}; lower them. The last checkpoint is intact."
            )
        self.manual_backward(loss)
        nn.utils.clip_grad_norm_(self.transformer.parameters(), self.hparams["max_grad_norm"])
        muon, adam = cast(list, self.optimizers())
        muon.step()
        adam.optimizer.step()  # the bare optimiser: a second counted step would halve max_steps
        self.transformer.zero_grad()
        for scheduler in cast(list, self.lr_schedulers()):
            scheduler.step()
        self.log("pretrain/loss", loss, prog_bar=True)
        return loss.detach()

    def configure_optimizers(self) -> tuple[list, list]:
        hidden, rest = split_for_muon(self.family, self.transformer)
        muon = torch.optim.Muon(hidden, lr=self.hparams["muon_lr"], weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(rest, lr=self.hparams["adam_lr"], betas=(0.9, 0.95), fused=True)
        optimizers = [muon, adam]
        return optimizers, [torch.optim.lr_scheduler.LambdaLR(o, self._lr_factor) for o in optimizers]

    def _lr_factor(self, step: int) -> float:
        total = self.hparams["max_steps"]
        left = (total - step) / max(1.0, self.hparams["decay"] * total)
        return min(1.0, (step + 1) / self.hparams["warmup_steps"], max(0.0, left))
