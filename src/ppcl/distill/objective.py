"""The optimiser step that all trainings share, for Lightning's manual optimisation.

Automatic optimisation supports neither losses that are back-propagated during the teacher's forward, nor one step by
two optimisers that share out the parameters (Muon and AdamW).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ppcl.errors import UsageError
from ppcl.parallel import average_gradients, largest


class ManualOptimization(L.LightningModule):
    """Base class of all trainings. A `training_step` runs the backward pass and the optimisers by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self._gradient_squares: list[Tensor] = []

    def configure_model(self) -> None:
        """Do nothing: a model that has to be sharded is sharded before Lightning calls this."""

    @abstractmethod
    def rates(self) -> dict[str, float | None]:
        """Return the learning rates by their configuration keys, which an error message tells to lower."""

    def refuse_infinite(self, loss: Tensor, step: int, whose: Sequence[str] = ()) -> None:
        """Raise `UsageError` if the scalar `loss` is infinite or NaN.

        `step`: the number of steps before this loss. `whose`: the names of the parts that it is of, if it is of some.
        """
        if torch.isfinite(loss):
            return
        more = f" and {len(whose) - 3} more" if len(whose) > 3 else ""
        of = f" of {', '.join(whose[:3])}{more}" if whose else ""
        if not step:
            raise UsageError(
                f"the loss{of} is {loss.item()} at the first step, before anything was learnt: look for NaN and for "
                "values that overflow in the teacher's weights and in the data."
            )
        self._blame(f"the loss{of} {loss.item()} at step {step}")

    def refuse_infinite_weights(self) -> None:
        """Raise `UsageError` on all ranks if a trained parameter on any of them has an infinite value or a NaN."""
        weights = [
            parameter.to_local() if isinstance(parameter, DTensor) else parameter
            for parameter in self.parameters()
            if parameter.requires_grad
        ]
        (wrong,) = largest(int(not all(bool(weight.isfinite().all()) for weight in weights)))
        if wrong:
            self._blame(f"weights infinite or NaN at step {self.global_step}")

    def _blame(self, what: str) -> NoReturn:
        rates = self.rates()
        named = " and ".join(f"{key}={value}" for key, value in rates.items())
        them = "it" if len(rates) == 1 else "them"
        raise UsageError(f"{named} made {what}; lower {them}. The last checkpoint is intact.")

    def ready_gradients(self, parameters: Iterable[nn.Parameter], max_grad_norm: float | None) -> None:
        """Do as `prepare_gradients`; where the step will be logged, also note the norm before it is clipped."""
        parameters = list(parameters)
        norm = self.prepare_gradients(parameters, max_grad_norm)
        trainer: Any = self._trainer
        if trainer is None or (self.global_step + 1) % trainer.log_every_n_steps:
            return
        if norm is None:
            norm = nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        self._gradient_squares.append(whole.detach().float().square())

    def gradient_norm(self) -> float | None:
        """Return the L2 norm of all gradients of the last step, before clipping; None if it was not noted."""
        squares, self._gradient_squares = self._gradient_squares, []
        return torch.stack(squares).sum().sqrt().item() if squares else None

    @staticmethod
    def prepare_gradients(parameters: Iterable[nn.Parameter], max_grad_norm: float | None) -> Tensor | None:
        """Average gradients over ranks, then clip their total L2 norm to `max_grad_norm`; None does not clip.

        Returns the norm before clipping, or None if nothing is clipped.
        """
        parameters = list(parameters)
        average_gradients(parameters)
        return None if max_grad_norm is None else nn.utils.clip_grad_norm_(parameters, max_grad_norm)

    def take_step(self, module: nn.Module, max_grad_norm: float | None) -> None:
        """Step every optimiser and scheduler once with the gradients of `module`, then free the gradients.

        `max_grad_norm`: the L2 norm that gradients are clipped to, None for no clipping.
        """
        self.ready_gradients(module.parameters(), max_grad_norm)
        optimizers, schedulers = listed(self.optimizers()), listed(self.lr_schedulers())
        optimizers[0].step()
        for other in optimizers[1:]:
            other.optimizer.step()  # the bare optimiser: Lightning's wrapper would count another global step
        module.zero_grad()
        for scheduler in schedulers:
            scheduler.step()


def listed(found: Any) -> list[Any]:
    """Return what may be a single object or a list of such as a list.

    Lightning gives a single optimiser or scheduler bare, and a step's samples are one batch, or several smaller ones
    with `accumulate`.
    """
    return found if isinstance(found, list) else [found]


def mean_of(terms: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of every value over the batches of a step. `terms`: scalars by name, for each batch."""
    return {key: torch.stack([each[key] for each in terms]).mean() for key in terms[0]}
