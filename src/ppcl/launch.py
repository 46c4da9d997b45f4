"""Rank of this process, as torchrun or SLURM say. Importing this loads no torch, so that ranks can be checked first."""

from __future__ import annotations

import os

_NAMES = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_NTASKS"))


def launched() -> bool:
    """Whether torchrun or srun started this process, be it as the only one."""
    return any(number in os.environ and count in os.environ for number, count in _NAMES)


def rank() -> tuple[int, int]:
    """This process's number and how many there are."""
    for number, count in _NAMES:
        if number in os.environ and count in os.environ:
            return int(os.environ[number]), int(os.environ[count])
    return 0, 1


def is_first() -> bool:
    """Whether this process speaks, writes and does what takes one process."""
    return rank()[0] == 0


def export_slurm() -> None:
    """Say in torchrun's variables what srun said in its own."""
    if "RANK" in os.environ or "SLURM_PROCID" not in os.environ:
        return
    from lightning.fabric.plugins.environments import SLURMEnvironment

    number, count = rank()
    nodes = int(os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES", "1"))
    slurm = SLURMEnvironment(auto_requeue=False)
    os.environ |= {
        "RANK": str(number),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": os.environ.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(count // nodes),
        "GROUP_RANK": os.environ.get("SLURM_NODEID", "0"),
        "MASTER_ADDR": slurm.main_address,
        "MASTER_PORT": str(slurm.main_port),
    }


def local_rank() -> tuple[int, int]:
    """This process's number on its machine, and how many there are on each."""
    return int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
