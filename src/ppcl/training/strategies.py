"""Lightning strategies for trainings in several processes, and atomic checkpoints.

`strategy=ddp` does not wrap the module in DistributedDataParallel, which does not support several losses that are
back-propagated during the teacher's forward. Trainings average their gradients by `ppcl.parallel.average_gradients`
instead. With `strategy=fsdp` the module is sharded before Lightning sees it (`ppcl.training.sharding`).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments import LightningEnvironment, TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from ppcl.artifacts.files import atomic_path, read_json, write_json
from ppcl.config import StrategyConfig
from ppcl.launch import local_rank, rank
from ppcl.parallel import barrier, copy_from_first
from ppcl.training.sharded_files import load_sharded

SHARDED = "sharded.json"  # names the last complete sharded checkpoint, a folder beside this file


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file, then renames it, so that a killed run leaves no partial checkpoint.

    The file is written while it is serialised: Lightning's own version would build it in memory first.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_path(Path(path)) as temporary, temporary.open("wb") as handle:
            try:
                torch.save(checkpoint, handle)
            except RuntimeError as error:  # torch.save turns an OSError, such as a full disk, into a RuntimeError
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


class Replicated(DDPStrategy):
    """DDP without its wrapper. Every rank has the whole module, so checkpoints are the same as of a single process."""

    def configure_ddp(self) -> None:
        copy_from_first(cast(Any, self.lightning_module))

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        barrier()


class Sharded(ModelParallelStrategy):
    """FSDP2 for modules that are sharded already, with distributed checkpoints that are written atomically."""

    def __init__(self, size: int) -> None:
        super().__init__(data_parallel_size=size, tensor_parallel_size=1)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        barrier()

    def model_to_device(self) -> None:
        """Do nothing: the module is on its device, and offloaded shards stay in host memory."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the checkpoint to a new folder, record its name in `sharded.json`, then delete the earlier one."""
        parent = Path(filepath).parent
        folder = parent / f"sharded-{checkpoint['global_step']:08d}"
        if self.broadcast(_last(parent) == folder):
            return  # this step's checkpoint is complete already
        if self.is_global_zero:
            shutil.rmtree(folder, ignore_errors=True)  # an incomplete one, left when a run was killed
        self.barrier()
        super().save_checkpoint(checkpoint, folder, storage_options)
        self.barrier()
        if self.is_global_zero:
            write_json(parent / SHARDED, {"folder": folder.name})
            discard_others(parent)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Load what `save_checkpoint` has written last. Not by Lightning, which refuses it where states are missing.

        A parameter without gradients, such as those of the last block's text output, has no optimiser state in the
        checkpoint. torch makes states for all parameters before it loads, so some of these keep their zeros.
        """
        folder, model = cast(Path, _last(Path(checkpoint_path).parent)), cast(Any, self.model)
        whole = {"state_dict": get_model_state_dict(model)}
        load_sharded(whole, folder)
        model.load_state_dict(whole["state_dict"])
        for number, optimizer in enumerate(self.optimizers):
            state = {f"optimizer_{number}": get_optimizer_state_dict(model, optimizer)}
            load_sharded(state, folder, partial=True)
            (found,), options = state.values(), StateDictOptions(cpu_offload=True)
            set_optimizer_state_dict(model, optimizer, found, options=options)
        return torch.load(folder / "meta.pt", weights_only=True)


def _last(parent: Path) -> Path | None:
    """Return the folder of the last complete sharded checkpoint, or None."""
    record = parent / SHARDED
    return parent / read_json(record, "The record of the last checkpoint")["folder"] if record.exists() else None


def discard_others(folder: Path) -> None:
    """Delete all checkpoints in `folder` but the last complete one, also those that a process was killed in writing."""
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    for other in folder.glob("sharded-*"):
        if other != _last(folder):
            shutil.rmtree(other, ignore_errors=True)


def processes(strategy: StrategyConfig) -> dict[str, Any]:
    """Return the keyword arguments of `lightning.Trainer` for `strategy`: devices, nodes, strategy and plugins."""
    if strategy.kind == "single":
        # Named, because Lightning would choose SLURM's in a job of SLURM, and write checkpoints of its own at SIGUSR1.
        return {"devices": 1, "plugins": [AtomicCheckpointIO(), LightningEnvironment()]}
    (_, size), (_, here) = rank(), local_rank()
    arguments = {"devices": here, "num_nodes": size // here, "use_distributed_sampler": False}
    environment = TorchElasticEnvironment()
    if strategy.kind == "ddp":
        return arguments | {"strategy": Replicated(), "plugins": [AtomicCheckpointIO(), environment]}
    return arguments | {"strategy": Sharded(size), "plugins": [environment]}
