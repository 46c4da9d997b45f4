"""Communication between the ranks of one run: means over ranks, and whether all of them may go on.

Everything here does nothing in a run of one process, where `start` is not called.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from ppcl.errors import SaidElsewhere, UsageError
from ppcl.launch import export_slurm, local_rank, rank
from ppcl.ops.losses import Average, own

_STAGE_TIMEOUT = timedelta(days=7)  # others wait as long for the first rank's probes or pictures
_STRAGGLERS = timedelta(seconds=20)


@dataclass
class _Ranks:
    """A store that waiting on takes neither CPU nor GPU, and a group that speaks without a GPU."""

    store: Any
    group: Any
    sections: Iterator[int]


_ranks: _Ranks | None = None


def start(accelerator: str, timeout: timedelta) -> None:
    """Meet the other ranks; a second job of a sweep finds them met.

    `timeout`: how long a rank waits for another within a training.
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
                f"rank {number} is number {local} of its machine and sees {there} GPUs: start one rank a GPU, and let "
                "each see all of them (srun --gpus-per-node, not --gpus-per-task)."
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
    atexit.register(dist.destroy_process_group)  # NCCL complains otherwise
    _ranks = _Ranks(dist.PrefixStore("stages", store), group, count())


def barrier() -> None:
    if _ranks is not None:
        dist.barrier(group=_ranks.group)


@contextmanager
def together() -> Iterator[None]:
    """Run the block on every rank; if one rank raises, all raise. The first rank that failed says why.

    A rank that has nothing to do in it waits here.
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
    _ranks.store.set(keys[number], "failed" if failure else "done")
    try:
        _ranks.store.wait(keys, _STRAGGLERS if failure else _STAGE_TIMEOUT)
    except RuntimeError:
        if failure is None:
            raise
        raise failure from None  # the others wait for this rank inside the training: the launcher ends them
    failed = [other for other in range(size) if _ranks.store.get(keys[other]) == b"failed"]
    barrier()  # the first rank may be the one that holds the store
    if failed:
        raise failure if failure is not None and failed[0] == number else SaidElsewhere()


def mean(tensor: Tensor) -> Tensor:
    """The mean over ranks, without gradient; itself where there is one rank."""
    if _ranks is None:
        return tensor
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total / rank()[1]


def mean_terms(terms: Sequence[Mapping[str, Tensor]], average: Average) -> list[dict[str, Tensor]]:
    """Losses and what is logged beside them, averaged all at once."""
    if average is own:
        return [dict(each) for each in terms]
    values = iter(average(torch.stack([value.detach().float() for each in terms for value in each.values()])))
    return [{key: next(values) for key in each} for each in terms]


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Make every gradient its mean over ranks, in float32; sharded parameters have seen to that themselves."""
    if _ranks is None:
        return
    gradients = [p.grad for p in parameters if p.grad is not None and type(p.grad) is Tensor]
    wide = [gradient.float() for gradient in gradients]
    for work in [dist.all_reduce(gradient, async_op=True) for gradient in wide]:
        work.wait()
    for gradient, total in zip(gradients, wide, strict=True):
        gradient.copy_(total / rank()[1])


def copy_from_first(module: nn.Module) -> None:
    """Give every rank the first one's parameters: a LoRA starts from random numbers."""
    if _ranks is not None:
        for parameter in module.parameters():
            dist.broadcast(parameter.detach(), src=0)
