"""Batches of all stages: the keyword arguments of a forward, and the velocity target.

Batch number `step` depends on the seed and `step` alone, so that one integer is enough to resume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from ppcl.ops.losses import Average, own
from ppcl.parallel import mean


def first_output(output: Any) -> Any:
    """Return the first output of a model or a scheduler, which return a tensor, a tuple, or an object of outputs."""
    return output if isinstance(output, Tensor) else output[0]


def every_output(output: Any) -> Any:
    """Return what a model predicts: its first output, or by number all outputs if others are tensors too.

    A model of video and sound returns a tensor of each.
    """
    if isinstance(output, Tensor):
        return output
    found = [output[0], *(item for item in output[1:] if isinstance(item, Tensor))]
    return {str(number): item for number, item in enumerate(found)} if len(found) > 1 else found[0]


def unchanged(output: Any) -> Tensor:
    """Return `output`: the `as_tensor` of a model that returns one tensor."""
    return output


@dataclass
class TrainingBatch:
    """One batch of noisy samples.

    `inputs`: the keyword arguments of the transformer's forward.
    `target`: the velocity n - x_0, which `prediction` of the forward's output is compared with.
    `sigmas`: the noise level of each sample.
    `divided`: whether this rank has only its rows of a batch that ranks share.
    `as_tensor`: turns the model's first output into one tensor, or with `whole` what `every_output` returns.
    `whole`: whether `target` is of all that the model predicts: of its sound too, not of the video alone.
    `tokens`: if it is one of several batches that make up a step, its number of valid tokens by stream, relative to the
        mean of these batches. Streams that are not padded have as many in each, and are left out.
    `teacher`: the teacher's velocity, if it was recorded.
    """

    inputs: dict[str, Any]
    target: Tensor  # [B, tokens, C], or [B, C, ...] if the model takes pictures or videos
    sigmas: Float[Tensor, " batch"]
    divided: bool = False
    as_tensor: Callable[[Any], Tensor] = unchanged
    tokens: Mapping[str, float] = field(default_factory=dict)
    teacher: Tensor | None = None
    whole: bool = False

    @property
    def average(self) -> Average:
        """The function that averages a number over the ranks that share this batch."""
        return mean if self.divided else own

    def average_of(self, stream: str) -> Average:
        """The function that turns the denominator of a mean over tokens of `stream` into that of the whole step.

        The mean over ranks, and over the batches of a step, of what is divided by it is then the step's own mean.
        """
        share = self.tokens.get(stream)
        return self.average if share is None else lambda number: self.average(number / share)

    def prediction(self, output: Any) -> Tensor:
        """Return the predicted velocity, in the shape of `target`, from what the model's forward returns.

        Cuts off what some models output after it: tokens of given pictures, or predicted variances.
        """
        found = every_output(output) if self.whole else first_output(output)
        return self.as_tensor(found)[:, : self.target.shape[1]]


def batch_numbers(batch_size: int, start: int, stop: int) -> range:
    """Return the numbers of the batches of `batch_size` that make up held-out batches `start` to `stop` - 1.

    A held-out batch has at least 16 samples, because the mean loss of fewer says little. It is split into batches of
    `batch_size`, so that measuring takes no more memory than a training step.
    """
    parts = -(-16 // batch_size)
    return range(start * parts, stop * parts)


def own_rows(batch_size: int, share: tuple[int, int]) -> range:
    """Return this rank's rows of a batch, where `share` is (rank, number of ranks).

    The number of ranks must divide `batch_size`.
    """
    number, count = share
    assert batch_size % count == 0, "checked in validation"
    each = batch_size // count
    return range(number * each, (number + 1) * each)


class StepLoader:
    """Yields `make_batch(step)` for all steps that are left. Lightning saves and restores `step` with checkpoints.

    `ahead`: whether a thread prefetches the next batch. This is for batches read from disk; batches that have to be
    computed would take CPU cores from the training.
    """

    def __init__(self, make_batch: Callable[[int], Any], num_steps: int, *, ahead: bool = False) -> None:
        self.make_batch = make_batch
        self.num_steps = num_steps
        self.ahead = ahead
        self.step = 0

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[Any]:
        return self._iterate_ahead() if self.ahead else self._iterate()

    def _iterate(self) -> Iterator[Any]:
        while self.step < self.num_steps:
            self.step += 1
            yield self.make_batch(self.step - 1)

    def _iterate_ahead(self) -> Iterator[Any]:
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as reader:

            def read(step: int) -> Future[Any] | None:
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
