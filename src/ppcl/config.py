"""The typed configuration: every key there is, its type and its default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from ppcl.stages import help_lines

VARIANTS = ("teacher", "removed", "ppcl-depth", "ppcl-mixed", "ppcl-width", "ppcl-planned", "ppcl-finetuned")
STORED_VARIANTS = (*VARIANTS, "ppcl-quantized")  # the last needs a folder of a stage that few runs have


@dataclass
class SamplingConfig:
    """How a picture is drawn; every variant that is compared is drawn alike."""

    height: int = 1328
    width: int = 1328
    num_inference_steps: int = 50
    true_cfg_scale: float = 4.0
    negative_prompt: str = ""
    guidance_scale: float = 3.5  # the input of a guidance-distilled model
    max_sequence_length: int = 512  # prompt tokens
    scheduler: dict[str, Any] = field(default_factory=dict)  # over the model's own, such as shift: 3.0


@dataclass
class ModelConfig:
    """`path` is a pipeline folder, `embedded:<name>` or a hub id; `arch` its transformer's config.

    `family=auto` reads the family from `path/model_index.json`; an empty `arch` is read from there.
    `streaming`: the teacher's blocks stay in their files and come one ahead of use, two at a time in memory.
    """

    name: str = MISSING
    family: str = MISSING
    path: str | None = None
    revision: str | None = None
    dtype: str = "float32"
    streaming: bool = False
    builder: str | None = None
    arch: dict[str, Any] = field(default_factory=dict)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


@dataclass
class IntervalsConfig:
    """Intervals by name or a list per block stack, or `source`: `detect` (this run's detection), `plan` (file `path`).

    `names`: `STACK.U-V` each, such as `transformer_blocks.3-5` or `encoder.blocks.5-7`, of any stack that the model
    has, as files, logs and `distill.intervals` name them. The two stacks that most models have can be given as keys
    of their own instead.
    """

    source: str = "detect"
    path: str | None = None
    family: str | None = None
    names: list[str] | None = None
    transformer_blocks: list[list[int]] | None = None
    single_transformer_blocks: list[list[int]] | None = None
    remark: str | None = None
    as_printed: Any = None


@dataclass
class WidthSet:
    """Blocks of one stack, by their index in the teacher."""

    text: list[int] = field(default_factory=list)
    ffn: list[int] = field(default_factory=list)


@dataclass
class WidthConfig:
    """Which blocks lose their text stream or FFN to linear projectors (Eq. 8-9), and how these are trained.

    `source`: `none`, `given` (the sets), `plan` (the file `path`), or `auto`: text streams whose output has a
    CKA of `text_threshold` or more with their reference's, deeper ones first and at most `num_text`, and the
    `num_ffn` FFNs that are most nearly linear.
    `text_output`: `last` keeps one output projector per run of text-pruned blocks, which reads the text of the
    run's reference; `each` one per block, which reads the text of the block before it.
    `names`: the sets of `given` by name, `STACK.N.text` and `STACK.N.ffn` each, of any stack that the model has; the
    two stacks that most models have can be given as keys of their own instead.
    """

    source: str = "none"
    path: str | None = None
    family: str | None = None
    names: list[str] | None = None
    transformer_blocks: WidthSet = field(default_factory=WidthSet)
    single_transformer_blocks: WidthSet = field(default_factory=WidthSet)
    text_threshold: float = 0.999
    num_text: int | None = None
    num_ffn: int = 3
    text_output: str = "last"
    keep_text_query: bool = False
    ridge: float = 1e-6
    num_batches: int = 16
    steps: int = 2000
    lr: float = 1e-5
    linear_weight: float = 1.0


@dataclass
class BudgetConfig:
    """What the pruned model may cost; at most one is set. None of them: everything that has a plug goes in.

    `params` up to 1 is a share of the teacher's parameters, above 1 a count. `cost` is what a plug is charged
    with: `velocity`, the error of the model's output with that plug alone, or `loss`, its distillation loss.
    """

    params: float | None = None
    memory_gb: float | None = None
    latency_ratio: float | None = None
    cost: str = "velocity"
    num_batches: int = 4


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
    """Streams of the shapes world, or of what `stages=[cache]` made of `path` (`webdataset` or `folder`).

    The three seeds must differ, so that no stage sees another's samples. `held_out` is the share of a cache that
    calibration and held-out losses have to themselves. `cache` names the folder of one, where its source is not.
    `given` names, for an edit model, where a sample's given pictures stand.
    """

    name: str = "shapes"
    path: str | None = None
    cache: str | None = None
    captions: list[str] = field(default_factory=lambda: ["prompt_en", "caption_en", "prompt_zh"])
    given: list[str] | None = None
    min_text_accuracy: float | None = None
    aspects: list[str] = field(default_factory=lambda: ["1:1"])
    held_out: float = 0.02
    samples_per_file: int = 256
    encode_batch_size: int = 8
    train_seed: int = 0
    calibration_seed: int = 1
    eval_seed: int = 2
    caption_dropout: float = 0.1
    timesteps: str = "logit_normal"
    shift: float = 1.0


@dataclass
class TrainingConfig:
    """AdamW under a cosine with warm-up; the values are the paper's."""

    steps: int = 6000
    batch_size: int = 2
    lr: float = 1e-5
    min_lr_ratio: float = 0.0
    warmup_steps: int = 16
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.02
    max_grad_norm: float | None = None
    gradient_checkpointing: bool = True
    checkpoint_every: int = 500


@dataclass
class DistillConfig(TrainingConfig):
    """`from_boundaries`: students learn from what `stages=[boundaries]` wrote, in `boundaries` or the cache.

    `replay`: how many steps learn from one pass of the teacher then.
    """

    mode: str = "parallel"
    init: str = "first"
    magnitude_weight: float = 0.0
    intervals: list[str] | None = None
    from_boundaries: bool = False
    boundaries: str | None = None
    replay: int = 1


@dataclass
class FinetuneConfig(TrainingConfig):
    """Full-parameter tuning of what the plan plugs in; without a budget that is every plug there is.

    `output_weight` weighs the squared distance to the teacher's velocity, `flow_weight` the flow-matching loss,
    `feature_weight` the relative distance of each block's image stream to what the teacher has there.
    `optimizer`: `adamw`, or `muon` for the matrices inside blocks with AdamW on the rest. `lora_rank` above 0
    trains a LoRA of all linear layers in the blocks in place of all parameters.
    """

    steps: int = 1000
    batch_size: int = 4
    max_grad_norm: float | None = 1.0
    checkpoint_every: int = 250
    lora_rank: int = 0
    optimizer: str = "adamw"
    muon_lr: float = 0.01
    output_weight: float = 1.0
    flow_weight: float = 0.0
    feature_weight: float = 0.0
    ema_decay: float = 0.0


@dataclass
class PretrainConfig:
    """`init` continues from the folder of a pretrained teacher, or `embedded:<name>`, in place of fresh weights.

    Of another family's only the transformer is taken, which must be of the same shape.
    """

    init: str | None = None
    num_layers: int | None = None
    steps: int = 6500
    batch_size: int = 64
    muon_lr: float = 0.02
    adam_lr: float = 2e-3
    warmup_steps: int = 50
    decay: float = 0.4
    checkpoint_every: int = 250


@dataclass
class ExportConfig:
    """`variant` as in `generate.variants`; None exports the furthest that the run has come.

    `single_file` writes what ComfyUI loads beside the folder, in `single_file_dtype`. `push_to_hub` is the name of
    a repository, `owner/name`; `private` None is the account's default for one that is made.
    """

    variant: str | None = None
    single_file: bool = False
    single_file_dtype: str = "bfloat16"
    max_shard_size: str | None = None
    push_to_hub: str | None = None
    private: bool | None = None
    commit_message: str | None = None


@dataclass
class LoraConfig:
    """A LoRA of the full model for `stages=[remap_lora]`; `model` is the exported one, by default this run's.

    `source`: what a student block takes of the blocks u to v it stands for: the LoRA of the `first`, u, or one
    of higher rank that adds the `mean` or the `sum` of all.
    """

    path: str | None = None
    model: str | None = None
    source: str = "first"


@dataclass
class ImportConfig:
    """What the PPCL authors published, for `stages=[import_published]`: `path` is a pipeline's folder, a
    transformer's, or the `diffusion_pytorch_model.bin` of their training.

    `residual`: whether a folder's txt_proj adds to what it reads; None leaves that to its config. `ehs_same`: the
    groups [a, b] that a checkpoint's text projectors were trained in, all of them.
    """

    path: str | None = None
    residual: bool | None = None
    ehs_same: list[list[int]] | None = None


@dataclass
class GenerateConfig:
    """`variants` is any of `VARIANTS`; `plug_fraction` is ppcl-mixed's share of students.

    `prompt`, or `prompt_file` with one a line, takes the benchmark's place; `images` are the pictures that an
    edit model is given with each.
    """

    variants: list[str] = field(default_factory=lambda: list(VARIANTS[:4]))
    plug_fraction: float = 0.5
    batch_size: int = 60
    prompt: str | None = None
    prompt_file: str | None = None
    num_images: int = 1
    images: list[str] = field(default_factory=list)
    loras: list[str] = field(default_factory=list)
    lora_scale: float = 1.0
    controlnet: str | None = None
    control_image: str | None = None
    control_scale: float = 1.0
    compile: bool = False
    offload: str = "none"


@dataclass
class BenchmarkConfig:
    name: str = "shapes"
    prompts_per_category: int = 60
    latency_repeats: int = 50


@dataclass
class TrainerConfig:
    """`precision` is of what learns, held in float32: `32-true` or `bf16-mixed`; the teacher's is `model.dtype`.
    `compile`: blocks that trainings run, each on its own; worth its minute or two from a thousand steps on.
    """

    accelerator: str = "auto"
    precision: str | None = None
    num_threads: int | None = None
    compile: bool = False
    progress: bool = True


@dataclass
class StrategyConfig:
    """How the ranks that torchrun or srun started share the training stages: `kind` is `single` (there is one),
    `ddp` (each holds everything and learns from its rows of a batch), or `fsdp` (teacher, students and optimiser
    states are sharded as well).

    `cpu_offload` keeps an fsdp's shards in host memory but while a block runs. A rank that has waited
    `timeout_minutes` for another within a training gives up.
    """

    kind: str = "single"
    cpu_offload: bool = False
    timeout_minutes: float = 30.0


@dataclass
class LoggerConfig:
    kind: str = "csv"
    project: str = "ppcl"
    mode: str = "offline"


@dataclass
class PathsConfig:
    """`base_run`: the folder of a run whose intervals, width sets, plugs and measured costs this one uses."""

    runs_dir: str = "runs"
    cache_dir: str = "runs/cache"
    base_run: str | None = None


@dataclass
class QuantizeConfig:
    """Few bits a weight for `stages=[quantize]`: `scheme` is `int8` or `int4` by torchao, or `nf4` by bitsandbytes.

    `group_size`: how many neighbouring weights of a row share an int4's scale and zero point; of int8 a row does.
    `rounding`: to the `nearest`, or by `least_squares` on `num_batches` of calibration data, to what gives most nearly
    the outputs that a layer had; then `damping` is relative to the mean square of its inputs.
    `skip`: patterns of the names of layers that stay as they are. `variant` as in `export.variant`, or the teacher.
    """

    scheme: str = "none"
    group_size: int | None = None
    rounding: str = "nearest"
    skip: list[str] = field(default_factory=list)
    num_batches: int = 8
    batch_size: int = 32
    damping: float = 1e-3
    variant: str | None = None


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
    width: WidthConfig = field(default_factory=WidthConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    published: ImportConfig = field(default_factory=ImportConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    benchmark: BenchmarkConfig = field(default_factory=BenchmarkConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    strategy: StrategyConfig = field(default_factory=StrategyConfig)
    logger: LoggerConfig = field(default_factory=LoggerConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)


def register_schema() -> None:
    """Make `Config` the root that `conf/config.yaml` fills, and the table of stages known to the help text."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("ppcl_stages", help_lines, replace=True)
