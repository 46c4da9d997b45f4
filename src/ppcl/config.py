"""The typed configuration: every key there is, its type and its default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

STAGE_ORDER = ("pretrain", "plan", "probe", "detect", "depth", "export", "generate", "evaluate", "report")
BUILDERS = ("tiny_qwen_image",)
VARIANTS = ("teacher", "removed", "ppcl-depth", "ppcl-mixed")


@dataclass
class SamplingConfig:
    """How a picture is drawn; every variant that is compared is drawn alike."""

    height: int = 1328
    width: int = 1328
    num_inference_steps: int = 50
    true_cfg_scale: float = 4.0
    negative_prompt: str = ""


@dataclass
class ModelConfig:
    """`path` is a pipeline folder, `embedded:<name>` or a hub id; `arch` its transformer's config.

    `family=auto` reads the family from `path/model_index.json`; an empty `arch` is read from there.
    """

    name: str = MISSING
    family: str = MISSING
    path: str | None = None
    revision: str | None = None
    dtype: str = "float32"
    builder: str | None = None
    arch: dict[str, Any] = field(default_factory=dict)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass
class IntervalsConfig:
    """A list per block stack, or `source`: `detect` (this run's detection) or `plan` (the file `path`)."""

    source: str = "detect"
    path: str | None = None
    family: str | None = None
    transformer_blocks: list[list[int]] | None = None
    single_transformer_blocks: list[list[int]] | None = None
    remark: str | None = None
    as_printed: Any = None


@dataclass
class ProbeConfig:
    num_batches: int = 16
    num_heldout_batches: int = 4
    batch_size: int = 32
    ridge: float = 1e-6
    bias: bool = True
    init: str = "closed_form"
    train_steps: int = 0
    lr: float = 1e-4


@dataclass
class MethodConfig:
    """How intervals are found: `rule` names the variant, the rest are its parameters.

    `start` and `end` bound the blocks that may lie in an interval; `min_cka` is the acceptance threshold:
    an interval whose surrogate's cka lies below it is left out.
    """

    name: str = "ppcl"
    rule: str = "lp"
    stream: str = "mean"
    debiased: bool = False
    start: int = 0
    end: int | None = None
    min_length: int = 2
    min_cka: float = 0.0
    threshold: float = 0.98
    extend: list[int] | None = None
    num_remove: int | None = None
    num_samples: int = 16
    num_timesteps: int = 8
    batch_size: int = 16


@dataclass
class DataConfig:
    """Streams of the shapes world; the three seeds must differ, so that no stage sees another's samples."""

    name: str = "shapes"
    train_seed: int = 0
    calibration_seed: int = 1
    eval_seed: int = 2
    caption_dropout: float = 0.1
    timesteps: str = "logit_normal"
    shift: float = 1.0


@dataclass
class DistillConfig:
    mode: str = "parallel"
    init: str = "first"
    steps: int = 6000
    batch_size: int = 2
    lr: float = 1e-5
    min_lr_ratio: float = 0.0
    warmup_steps: int = 16
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.02
    magnitude_weight: float = 0.0
    max_grad_norm: float | None = None
    gradient_checkpointing: bool = True
    checkpoint_every: int = 500
    intervals: list[str] | None = None


@dataclass
class PretrainConfig:
    """`init` continues from a teacher folder of an earlier pretraining in place of fresh weights."""

    init: str | None = None
    num_layers: int = 20
    steps: int = 6500
    batch_size: int = 64
    muon_lr: float = 0.02
    adam_lr: float = 2e-3
    warmup_steps: int = 50
    decay: float = 0.4
    checkpoint_every: int = 250
    compile: bool = True


@dataclass
class GenerateConfig:
    """`variants` is any of teacher, removed, ppcl-depth, ppcl-mixed; `plug_fraction` is ppcl-mixed's share."""

    variants: list[str] = field(default_factory=lambda: list(VARIANTS))
    plug_fraction: float = 0.5
    batch_size: int = 60
    prompt_file: str | None = None


@dataclass
class BenchmarkConfig:
    name: str = "shapes"
    prompts_per_category: int = 60
    latency_repeats: int = 50


@dataclass
class TrainerConfig:
    accelerator: str = "auto"
    precision: str = "32-true"
    num_threads: int | None = None
    progress: bool = True


@dataclass
class LoggerConfig:
    kind: str = "csv"
    project: str = "ppcl"
    mode: str = "offline"


@dataclass
class PathsConfig:
    runs_dir: str = "runs"
    cache_dir: str = "runs/cache"


@dataclass
class Config:
    """The root of `conf/config.yaml`."""

    name: str = MISSING
    stages: list[str] = MISSING
    seed: int = 42
    model: ModelConfig = field(default_factory=ModelConfig)
    intervals: IntervalsConfig = field(default_factory=IntervalsConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    data: DataConfig = field(default_factory=DataConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)


def register_schema() -> None:
    """Make `Config` the root that `conf/config.yaml` fills, so that Hydra knows every key and type."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)
