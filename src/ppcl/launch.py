"""Reads this process's rank from the variables of torchrun or SLURM, and gives workers of a sweep a GPU each.

Importing this loads no torch.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

# SLURM_NTASKS would not do: sbatch sets it, too, for a script that starts a single process without srun.
_NAMES = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))

_locks: list[Any] = []  # of this process, open until it ends


def launched() -> bool:
    """Whether torchrun or srun started this process, possibly as the only one."""
    return any(number in os.environ and count in os.environ for number, count in _NAMES)


def rank() -> tuple[int, int]:
    """Return the rank of this process and the number of ranks; 0 and 1 without a launcher."""
    for number, count in _NAMES:
        if number in os.environ and count in os.environ:
            return int(os.environ[number]), int(os.environ[count])
    return 0, 1


def is_first() -> bool:
    """Whether this is rank 0, which alone prints and writes."""
    return rank()[0] == 0


def export_slurm() -> None:
    """Set torchrun's variables from those of srun, unless torchrun started this process."""
    if "RANK" in os.environ or not launched():
        return
    from lightning.fabric.plugins.environments import SLURMEnvironment

    number, count = rank()
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES", "1"))
    slurm = SLURMEnvironment(auto_requeue=False)
    os.environ |= {
        "RANK": str(number),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(local_rank()[0]),
        "LOCAL_WORLD_SIZE": str(count // nodes),
        "GROUP_RANK": os.environ.get("SLURM_NODEID", "0"),
        "MASTER_ADDR": slurm.main_address,
        "MASTER_PORT": str(slurm.main_port),
    }


def local_rank() -> tuple[int, int]:
    """Return the rank of this process on its machine, and the number of ranks on each machine.

    The number is right only after `export_slurm`.
    """
    number = os.environ.get("LOCAL_RANK") or (os.environ.get("SLURM_LOCALID") if launched() else None)
    return int(number or 0), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def shard_ranks(shard_over: str) -> int:
    """Return how many ranks share the shards of a model: those of a machine, or all (`strategy.shard_over`).

    If each machine has one rank, all ranks share. It is right only after `export_slurm`.
    """
    (_, ranks), (_, here) = rank(), local_rank()
    return here if shard_over == "machine" and here > 1 and ranks % here == 0 else ranks


def take_gpu(job: int) -> None:
    """Let this process see one GPU only, which no other process that called this has: for a worker of a sweep.

    It keeps that GPU for all its jobs, until it ends. If all are taken it shares one, which `job`, the number of its
    first job, chooses. Call this before CUDA is used. With less than two GPUs, or under torchrun or srun, nothing
    changes.
    """
    if _locks or launched():
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    if visible == [""]:
        import torch

        visible = [str(number) for number in range(torch.cuda.device_count())]
    if len(visible) < 2:
        return
    import fcntl

    os.environ["CUDA_VISIBLE_DEVICES"] = visible[job % len(visible)]
    for gpu in visible:
        lock = (Path(tempfile.gettempdir()) / f"ppcl-{os.getuid()}-gpu-{gpu}.lock").open("w")
        _locks.append(lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue  # another process has it
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        return
