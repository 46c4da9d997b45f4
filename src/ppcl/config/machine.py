"""The keys of the machine a run works on: `trainer`, `strategy`, `logger` and `paths`."""

from __future__ import annotations

from dataclasses import dataclass

from ppcl.options import option


@dataclass
class TrainerConfig:
    """The device, and how training computes.

    `accelerator`: `auto`, `cpu`, `gpu` or `cuda`. `auto` takes a GPU where there is one.
    `precision`: of trained modules: `32-true` or `bf16-mixed` (autocast). Their parameters are float32 in both. None:
        `bf16-mixed` if `model.dtype` is a half precision, else `32-true`.
    `num_threads`: CPU threads of torch. None: as many as torch chooses.
    `compile`: whether trainings run the blocks through `torch.compile`, each on its own. Compiling takes a minute or
        two, which pays from about 1,000 steps on.
    `tf32`: whether trainings on a CUDA device multiply float32 matrices in TF32, which has 10 bits and is several times
        as fast. Where `precision` is `bf16-mixed` there are few such products.
    `deterministic`: whether trainings on a CUDA device give the same bits each time, and after a kill, for more time.
    `progress`: whether to show progress.
    `check_memory`: whether a command is refused at its start if the device has too little memory by estimate.
    `memory_gb`: the memory of the device in GB (1e9 bytes) that estimates and `distill.groups=auto` reckon with. None:
        what it has.
    """

    accelerator: str = option("auto", choices=("auto", "cpu", "gpu", "cuda"))
    precision: str | None = None
    num_threads: int | None = option(None, least=1, most=4096)
    compile: bool = False
    tf32: bool = True
    deterministic: bool = False
    progress: bool = True
    check_memory: bool = True
    memory_gb: float | None = option(None, above=0, most=1e6)


@dataclass
class StrategyConfig:
    """How the ranks that torchrun or srun started share the work.

    `kind`: `single` is one process. `ddp`: each rank holds the teacher and all trained modules, and computes on its own
        rows of each batch. `fsdp`: teacher, students and optimiser states are sharded over the ranks. With both, probe,
        detect, generate and evaluate divide whole batches, and each rank holds the whole teacher meanwhile.
    `cpu_offload`: with `fsdp`, whether shards stay in host memory except while their block runs.
    `shard_over`: with `fsdp`, which ranks share the shards. `machine`: those of one machine, so that each machine has
        all parameters and only gradients go over the network. `all`: those of all machines, which needs less memory.
    `timeout_minutes`: how long a rank waits for another one within a training before it gives up.
    """

    kind: str = option("single", choices=("single", "ddp", "fsdp"))
    cpu_offload: bool = False
    shard_over: str = option("machine", choices=("machine", "all"))
    timeout_minutes: float = option(30.0, above=0, most=100_000)


@dataclass
class LoggerConfig:
    """Where the metrics of trainings and evaluations are logged.

    `kind`: `csv` writes files in the run's folder, `wandb` logs to Weights & Biases, `none` logs nothing.
    `project`, `mode`: the project and the mode of wandb. The modes `offline` and `disabled` need no account.
    `upload`: whether W&B also gets the weights of plugs and models. False: it is told where they lie.
    """

    kind: str = option("csv", choices=("csv", "wandb", "none"))
    project: str = "ppcl"
    mode: str = option("offline", choices=("online", "offline", "disabled"))
    upload: bool = False


@dataclass
class PathsConfig:
    """Folders on disk.

    `runs_dir`: the parent folder of all runs.
    `cache_dir`: encoded data, probes and the teacher's pictures, which all runs share.
    `base_run`: the folder of an earlier run whose intervals, width sets, students, projectors and measured costs this
        run reads. It is not changed. None: this run has its own.
    """

    runs_dir: str = "runs"
    cache_dir: str = "runs/cache"
    base_run: str | None = None
