"""Lightning's side of a training in several processes: which ones there are, and how its checkpoints are written.

`ddp` does not wrap the module: several losses of a step are back-propagated within the teacher's forward, which
DistributedDataParallel does not know. Modules average their gradients themselves (`ppcl.parallel.average_gradients`).
`fsdp` has sharded the module before Lightning sees it (`ppcl.stages.sharding`).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from ppcl.artifacts.files import atomic_path, read_json, write_json
from ppcl.config import StrategyConfig
from ppcl.launch import local_rank, rank
from ppcl.parallel import barrier, copy_from_first

SHARDED = "sharded.json"  # beside the folders of sharded checkpoints: which of them is whole


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints as all else here: beside their final name, then renamed; and never whole in memory first."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        with atomic_path(Path(path)) as temporary, temporary.open("wb") as handle:
            try:
                torch.save(checkpoint, handle)
            except RuntimeError as error:  # torch's own end of a file that could not be written
                raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None


class Replicated(DDPStrategy):
    """Every rank holds all of the module, so that a checkpoint is the file that a single process writes."""

    def configure_ddp(self) -> None:
        copy_from_first(cast(Any, self.lightning_module))

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        barrier()


class Sharded(ModelParallelStrategy):
    """FSDP2 on modules that come sharded; checkpoints are distributed, and atomic."""

    def __init__(self, size: int) -> None:
        super().__init__(data_parallel_size=size, tensor_parallel_size=1)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        barrier()

    def model_to_device(self) -> None:
        """It is where it belongs; shards may stay in host memory."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """A folder of its own, then its name in `sharded.json`, then the folder before goes."""
        parent = Path(filepath).parent
        folder = parent / f"sharded-{checkpoint['global_step']:08d}"
        if self.broadcast(_last(parent) == folder):
            return  # the state of this step is there, and whole
        if self.is_global_zero:
            shutil.rmtree(folder, ignore_errors=True)  # of a try that was killed
        self.barrier()
        super().save_checkpoint(checkpoint, folder, storage_options)
        self.barrier()
        if self.is_global_zero:
            write_json(parent / SHARDED, {"folder": folder.name})
            for other in parent.glob("sharded-*"):
                if other != folder:
                    shutil.rmtree(other, ignore_errors=True)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return super().load_checkpoint(cast(Path, _last(Path(checkpoint_path).parent)), weights_only)


def _last(parent: Path) -> Path | None:
    """The last sharded checkpoint that is whole."""
    record = parent / SHARDED
    return parent / read_json(record, "The record of the last checkpoint")["folder"] if record.exists() else None


def processes(strategy: StrategyConfig) -> dict[str, Any]:
    """`strategy` as arguments of the trainer."""
    if strategy.kind == "single":
        return {"devices": 1, "plugins": [AtomicCheckpointIO()]}
    (_, size), (_, here) = rank(), local_rank()
    arguments = {"devices": here, "num_nodes": size // here, "use_distributed_sampler": False}
    environment = TorchElasticEnvironment()
    if strategy.kind == "ddp":
        return arguments | {"strategy": Replicated(), "plugins": [AtomicCheckpointIO(), environment]}
    return arguments | {"strategy": Sharded(size), "plugins": [environment]}
