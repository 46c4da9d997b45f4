"""Communication between the ranks of one run: barriers, shared failures, shares of work, and sums by all-reduce.

Call `start` once, in runs of several processes only. Without it every function here assumes a single process: nothing
is sent, a rank's share of the work is all of it, and a mean over ranks is the value itself.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from ppcl.errors import SaidElsewhere, UsageError
from ppcl.launch import export_slurm, local_rank, rank
from ppcl.ops.losses import Average, own
from ppcl.watch import Watch

Value = TypeVar("Value")

_STAGE_TIMEOUT = timedelta(days=7)  # the longest that ranks wait for one that works alone or has more to do
_STRAGGLERS = timedelta(seconds=20)  # how long a rank that failed waits for the others before it raises


@dataclass
class _Ranks:
    """The channels by which ranks communicate outside of training steps.

    `store`: a key-value store; waiting for a key uses neither CPU nor GPU.
    `group`: a gloo process group, which needs no GPU.
    `sections`: counts the calls of `together`, so that every call has keys of its own in the store.
    """

    store: Any
    group: Any
    sections: Iterator[int]


_ranks: _Ranks | None = None


def start(accelerator: str, timeout: timedelta) -> None:
    """Join the process group of this run. Later calls, from further jobs of a sweep, do nothing.

    `accelerator`: the value of `trainer.accelerator`. With a GPU, tensors on it are reduced by NCCL; all else by gloo.
    `timeout`: how long a rank waits for another in a collective operation during training.

    Raises `UsageError` if this rank has no GPU of its own on its machine.
    """
    global _ranks
    if _ranks is not None:
        return
    export_slurm()
    number, size = rank()
    gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    if gpu:
        local, there = local_rank()[0], torch.cuda.device_count()
        if local >= there:
            raise UsageError(
                f"rank {number} has local rank {local} but sees only {there} GPUs: start one rank per GPU, and let "
                "each rank see all GPUs of its machine (srun --gpus-per-node, not --gpus-per-task)."
            )
        torch.cuda.set_device(local)
    store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo",
        store=dist.PrefixStore("training", store),
        rank=number,
        world_size=size,
        timeout=timeout,
    )
    group = dist.new_group(backend="gloo", timeout=_STAGE_TIMEOUT)
    atexit.register(dist.destroy_process_group)  # NCCL warns at exit if this was not called
    _ranks = _Ranks(dist.PrefixStore("stages", store), group, count())
    Watch(number, size, partial(_ranks.store.set, "watch"), lambda: _ranks.store.get("watch").decode())


def barrier() -> None:
    """Wait until all ranks have called this."""
    if _ranks is not None:
        dist.barrier(group=_ranks.group)


@contextmanager
def together() -> Iterator[None]:
    """Run the `with` body on every rank, wait for all ranks at its end, and raise on all of them if one failed.

    The lowest rank that failed raises its own error, which gives the cause. All others raise `SaidElsewhere`, so that
    the cause is printed once. A rank may have nothing to do in the body: it just waits. Bodies may be nested.

    Only `UsageError`, `OSError` and OmegaConf's errors are passed on in this way. If the other ranks do not reach the
    end of the body within 20 seconds, a rank that failed raises its own error without them.
    """
    if _ranks is None:
        yield
        return
    number, size = rank()
    section = next(_ranks.sections)
    failure: Exception | None = None
    try:
        yield
    except (UsageError, OSError, OmegaConfBaseException) as error:
        failure = error
    keys = [f"{section}/{other}" for other in range(size)]
    end = "done" if failure is None else "failed"
    if isinstance(failure, SaidElsewhere):  # an inner context has told this rank of another's failure
        end = "told"
    _ranks.store.set(keys[number], end)
    try:
        _ranks.store.wait(keys, _STRAGGLERS if failure else _STAGE_TIMEOUT)
    except RuntimeError:
        if failure is None:
            raise
        raise failure from None  # the others still wait for this rank in the training; the launcher will end them
    found = [_ranks.store.get(key) for key in keys]
    barrier()  # rank 0 may host the store: it must not raise and exit before the others have read their keys
    if failure is not None and b"failed" not in found[:number]:
        raise failure
    if {*found} != {b"done"}:
        raise SaidElsewhere


def share() -> tuple[int, int]:
    """Return the number of this rank among those that share the work, and how many they are; 0 and 1 if it is alone."""
    return (0, 1) if _ranks is None else rank()


def dealt(items: Sequence[Value]) -> Sequence[Value]:
    """Return this rank's share of `items`: of n ranks, rank r takes every n-th item, from number r on."""
    number, count = share()
    return items[number::count]


def gathered(value: Value) -> list[Value]:
    """Return the `value` of every rank in the order of ranks. Every rank must call this, with a value to pickle."""
    if _ranks is None:
        return [value]
    found: list[Any] = [None] * rank()[1]
    dist.all_gather_object(found, value, group=_ranks.group)
    return found


def merged(values: Sequence[Value]) -> list[Value]:
    """Return the values of all ranks in the order of the items that were `dealt`. `values`: one for each of its own."""
    parts = gathered(values)
    return [parts[i % len(parts)][i // len(parts)] for i in range(sum(map(len, parts)))]


def of_first(value: Value) -> Value:
    """Return rank 0's `value` on every rank, for what ranks that look by themselves could see differently."""
    return gathered(value)[0]


def total(tensor: Tensor) -> Tensor:
    """Add `tensor` up over ranks in place, by an all-reduce that every rank must call, and return it."""
    if _ranks is not None:
        dist.all_reduce(tensor)
    return tensor


def mean(tensor: Tensor) -> Tensor:
    """Return the mean of `tensor` over ranks, by an all-reduce that every rank must call.

    The result has no gradient. In a single process it is `tensor` itself, with its gradient.
    """
    if _ranks is None:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / rank()[1]


def largest(*numbers: int) -> list[int]:
    """Return the largest value over ranks of each of `numbers`, by an all-reduce that every rank must call."""
    if _ranks is None:
        return list(numbers)
    found = torch.tensor(numbers)  # on the CPU: gloo reduces it, and no GPU has to finish its work for that
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def mean_terms(terms: Sequence[Mapping[str, Tensor]], average: Average) -> list[dict[str, Tensor]]:
    """Return `terms` with every value averaged over ranks, by one all-reduce for all of them.

    `terms`: for each trained part its losses and logged values, scalar tensors by name.
    `average`: `mean`, or `own`, which returns the values as they are.
    """
    if average is own:
        return [dict(each) for each in terms]
    values = iter(average(torch.stack([value.detach().float() for each in terms for value in each.values()])))
    return [{key: next(values) for key in each} for each in terms]


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over ranks; the all-reduce runs in float32.

    Skips parameters without a gradient, and sharded ones, whose gradients FSDP has averaged in the backward pass.
    """
    if _ranks is None:
        return
    gradients = [p.grad for p in parameters if p.grad is not None and type(p.grad) is Tensor]
    wide = [gradient.float() for gradient in gradients]
    for work in [dist.all_reduce(gradient, async_op=True) for gradient in wide]:
        work.wait()
    for gradient, total in zip(gradients, wide, strict=True):
        gradient.copy_(total / rank()[1])


def copy_from_first(module: nn.Module) -> None:
    """Broadcast the parameters of `module` from rank 0, so that all ranks train the same model."""
    if _ranks is not None:
        for parameter in module.parameters():
            dist.broadcast(parameter.detach(), src=0)
