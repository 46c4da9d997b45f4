"""Reads this process's rank from the variables of torchrun or SLURM. Importing this loads no torch."""

from __future__ import annotations

import os

# SLURM_NTASKS would not do: sbatch sets it, too, for a script that starts a single process without srun.
_NAMES = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"))


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
