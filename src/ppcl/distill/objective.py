"""The optimisation step that all trainings share.

Trainings optimise manually: Lightning's automatic optimisation knows neither losses that are back-propagated within the
teacher's forward nor two optimisers that take turns on one step.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from ppcl.errors import UsageError
from ppcl.parallel import average_gradients


class ManualOptimization(L.LightningModule):
    """A training whose steps call `take_step` after the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_model(self) -> None:
        """Do nothing: where a model is sharded, that has been done before Lightning asks for it."""

    def refuse_infinite(self, loss: Tensor, rates: Mapping[str, float]) -> None:
        """Raise `UsageError` for a loss that is infinite or not a number; `rates` are the keys to lower."""
        if torch.isfinite(loss):
            return
        named = " and ".join(f"{key}={value}" for key, value in rates.items())
        them = "it" if len(rates) == 1 else "them"
        raise UsageError(
            f"{named} made the loss {loss.item()} at step {self.global_step}; lower {them}. The last checkpoint is "
            "intact."
        )

    @staticmethod
    def prepare_gradients(parameters: Iterable[nn.Parameter], max_grad_norm: float | None) -> None:
        """Average gradients over ranks, then clip their norm; None does not clip."""
        parameters = list(parameters)
        average_gradients(parameters)
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, max_grad_norm)

    def take_step(self, module: nn.Module, max_grad_norm: float | None) -> None:
        """Take one step of every optimiser with the gradients of `module`, which then go."""
        self.prepare_gradients(module.parameters(), max_grad_norm)
        optimizers, schedulers = _listed(self.optimizers()), _listed(self.lr_schedulers())
        optimizers[0].step()
        for other in optimizers[1:]:
            other.optimizer.step()  # the bare optimiser: Lightning would count a second step
        module.zero_grad()
        for scheduler in schedulers:
            scheduler.step()


def _listed(found: Any) -> list[Any]:
    return found if isinstance(found, list) else [found]
