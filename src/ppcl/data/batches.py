"""Batches as every stage takes them: the keyword arguments of a forward plus the velocity target.

Batch number `step` is a pure function of the seed and `step`, so resuming needs one integer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ppcl.ops.losses import Average, own
from ppcl.parallel import mean


def unchanged(output: Any) -> Tensor:
    """The output of a model that returns one tensor."""
    return output


@dataclass
class TrainingBatch:
    """`inputs` go to the transformer's forward as they are; `target` is what `prediction` of its output should be.

    `divided`: whether other ranks have more rows of it. `as_tensor`: what makes one tensor of the output.
    """

    inputs: dict[str, Any]
    target: Tensor  # [B, tokens, C], or [B, C, ...] of a model that takes pictures or videos
    sigmas: Float[Tensor, " batch"]
    divided: bool = False
    as_tensor: Callable[[Any], Tensor] = unchanged

    @property
    def average(self) -> Average:
        """The mean over ranks that share the batch; the number itself where none do."""
        return mean if self.divided else own

    def prediction(self, output: Any) -> Tensor:
        """Cut an output to the prediction: tokens of given pictures or predicted variances stand behind it."""
        return self.as_tensor(output)[:, : self.target.shape[1]]


def batch_numbers(batch_size: int, start: int, stop: int) -> range:
    """Return the numbers of batches that hold the samples of batches `start` to `stop` of at least 16.

    Fewer say little of a held-out loss; but what measures takes no more at once than a training step does, or it
    would set a run's peak of memory.
    """
    parts = -(-16 // batch_size)
    return range(start * parts, stop * parts)


def own_rows(batch_size: int, share: tuple[int, int]) -> slice:
    """The rows of rank `share[0]` of `share[1]`, neighbours; they divide `batch_size`."""
    number, count = share
    assert batch_size % count == 0, "checked in validation"
    each = batch_size // count
    return slice(number * each, (number + 1) * each)


class StepLoader:
    """Yields `make_batch(step)` for the steps that are left; Lightning saves and restores `step`.

    `ahead`: the next batch is read, in a thread of its own, while one is learned from. For batches that come from
    disk: what computes would share the cores with the training.
    """

    def __init__(self, make_batch: Callable[[int], TrainingBatch], num_steps: int, *, ahead: bool = False) -> None:
        self.make_batch = make_batch
        self.num_steps = num_steps
        self.ahead = ahead
        self.step = 0

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[TrainingBatch]:
        return self._iterate_ahead() if self.ahead else self._iterate()

    def _iterate(self) -> Iterator[TrainingBatch]:
        while self.step < self.num_steps:
            self.step += 1
            yield self.make_batch(self.step - 1)

    def _iterate_ahead(self) -> Iterator[TrainingBatch]:
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as reader:

            def read(step: int) -> Future[TrainingBatch] | None:
                return reader.submit(self.make_batch, step) if step < self.num_steps else None

            following = read(self.step)
            while following is not None:
                batch = following.result()
                self.step += 1
                following = read(self.step)
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step = state["step"]
