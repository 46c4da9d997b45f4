"""The typed configuration: every key there is, its type and its default."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from ppcl.options import option

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
    scheduler: dict[str, Any] = option(factory=dict, before={})  # over the model's own, such as shift: 3.0


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
    dtype: str = option("float32", choices=("float32", "bfloat16", "float16"))
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

    source: str = option("detect", choices=("detect", "plan"))
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
    """Blocks whose text stream or FFN becomes linear projectors (Eq. 8-9), and how these are trained.

    `source`: `none`, `given` (the sets), `plan` (the file `path`), or `auto`: text streams whose output has a
    CKA of `text_threshold` or more with their reference's, deeper ones first and at most `num_text`, and the
    `num_ffn` FFNs that are most nearly linear.
    `text_output`: `last` keeps one output projector per run of text-pruned blocks, which reads the text of the
    run's reference; `each` one per block, which reads the text of the block before it.
    `names`: the sets of `given` by name, `STACK.N.text` and `STACK.N.ffn` each, of any stack that the model has; the
    two stacks that most models have can be given as keys of their own instead.
    """

    source: str = option("none", choices=("none", "given", "plan", "auto"))
    path: str | None = None
    family: str | None = None
    names: list[str] | None = None
    transformer_blocks: WidthSet = field(default_factory=WidthSet)
    single_transformer_blocks: WidthSet = field(default_factory=WidthSet)
    text_threshold: float = 0.999
    num_text: int | None = option(None, least=0)
    num_ffn: int = option(3, least=0)
    text_output: str = option("last", choices=("last", "each"))
    keep_text_query: bool = False
    ridge: float = option(1e-6, least=0)
    num_batches: int = option(16, least=1)
    steps: int = option(2000, least=0)
    lr: float = option(1e-5, least=0)
    linear_weight: float = option(1.0, least=0)


@dataclass
class BudgetConfig:
    """Limits on the pruned model's cost; at most one is set. None of them: everything that has a plug goes in.

    `params` up to 1 is a share of the teacher's parameters, above 1 a count. `cost` is what a plug is charged
    with: `velocity`, the error of the model's output with that plug alone, or `loss`, its distillation loss.
    """

    params: float | None = None
    memory_gb: float | None = None
    latency_ratio: float | None = None
    cost: str = option("velocity", choices=("velocity", "loss"))
    num_batches: int = option(4, least=1)


@dataclass
class ProbeConfig:
    num_batches: int = option(16, least=1)
    num_heldout_batches: int = option(4, least=1)
    batch_size: int = 32
    ridge: float = option(1e-6, least=0)
    bias: bool = True
    init: str = option("closed_form", choices=("closed_form", "zero"))
    train_steps: int = option(0, least=0)
    lr: float = 1e-4


@dataclass
class MethodConfig:
    """How intervals are found: `rule` is a module of `ppcl.methods`, the rest are its parameters.

    `start` and `end` bound the blocks that may lie in an interval; `min_cka` is the acceptance threshold:
    an interval whose surrogate's cka lies below it is left out. `settings` are keys that only that rule has.
    """

    name: str = "ppcl"
    rule: str = "lp"
    stream: str = option("mean", choices=("image", "text", "mean"))
    debiased: bool = False
    start: int = 0
    end: int | None = None
    min_length: int = option(2, least=2)
    min_cka: float = 0.0
    threshold: float = 0.98
    extend: list[int] | None = None
    num_remove: int | None = None
    num_samples: int = 16
    num_timesteps: int = option(8, least=1)
    batch_size: int = 16
    settings: dict[str, Any] = option(factory=dict, before={})


@dataclass
class DataConfig:
    """Streams of the shapes world, or of what `stages=[cache]` made of `path` (`webdataset` or `folder`).

    The three seeds must differ, so that no stage sees another's samples. `held_out` is the share of the cached samples
    that is kept from training, for calibration and held-out losses; None means 32 samples, but at least 0.02 and at
    most 0.2 of all. `cache` names the folder of a cache, where its source is not. `given` names, for an edit model,
    where a sample's given pictures stand.
    """

    name: str = option("shapes", choices=("shapes", "webdataset", "folder", "none"))
    path: str | None = None
    cache: str | None = None
    captions: list[str] = field(default_factory=lambda: ["prompt_en", "caption_en", "prompt_zh"])
    given: list[str] | None = None
    min_text_accuracy: float | None = None
    aspects: list[str] = field(default_factory=lambda: ["1:1"])
    held_out: float | None = None
    samples_per_file: int = 256
    encode_batch_size: int = option(8, least=1)
    train_seed: int = 0
    calibration_seed: int = 1
    eval_seed: int = 2
    caption_dropout: float = 0.1
    timesteps: str = option("logit_normal", choices=("logit_normal", "uniform"))
    shift: float = 1.0


@dataclass
class TrainingConfig:
    """AdamW under a cosine with warm-up; the values are the paper's."""

    steps: int = option(6000, least=1)
    batch_size: int = option(2, least=1)
    lr: float = option(1e-5, least=0)
    min_lr_ratio: float = 0.0
    warmup_steps: int = 16
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.02
    max_grad_norm: float | None = None
    gradient_checkpointing: bool = option(True, identity=False)
    checkpoint_every: int = option(500, least=1, identity=False)


@dataclass
class DistillConfig(TrainingConfig):
    """Settings of students, which learn from the teacher's activations.

    `mode`: students learn in `parallel`, each by itself, or in a `sequential` chain. With `none` there are no students,
    and intervals are cut to their first block.
    `losses`: the weight of each loss between a block's output and the teacher's; `ppcl.distill.losses` has them.

    `from_boundaries`: students learn from what `stages=[boundaries]` wrote, in `boundaries` or the cache.
    `replay`: how many steps learn from one pass of the teacher then.
    """

    mode: str = option("parallel", choices=("parallel", "sequential", "none"))
    init: str = option("first", choices=("first", "middle", "average"))
    losses: dict[str, float] = option(factory=lambda: {"direction": 1.0}, least=0, before={"direction": 1.0})
    magnitude_weight: float = option(0.0, least=0)
    intervals: list[str] | None = option(None, identity=False)
    from_boundaries: bool = option(False, identity=False)
    boundaries: str | None = option(None, identity=False)
    replay: int = option(1, least=1, identity=False)


@dataclass
class FinetuneConfig(TrainingConfig):
    """Full-parameter tuning of what the plan plugs in; without a budget that is every plug there is.

    `output_weight` weighs the squared distance to the teacher's velocity, `flow_weight` the flow-matching loss,
    `feature_weight` the relative distance of each block's image stream to what the teacher has there.
    `optimizer`: `adamw`, or `muon` for the matrices inside blocks with AdamW on the rest. `lora_rank` above 0
    trains a LoRA of all linear layers in the blocks in place of all parameters.
    """

    steps: int = option(1000, least=1)
    batch_size: int = option(4, least=1)
    max_grad_norm: float | None = 1.0
    checkpoint_every: int = option(250, least=1, identity=False)
    lora_rank: int = option(0, least=0, before=0)
    optimizer: str = option("adamw", choices=("adamw", "muon"))
    muon_lr: float = option(0.01, least=0)
    output_weight: float = option(1.0, least=0)
    flow_weight: float = option(0.0, least=0)
    feature_weight: float = option(0.0, least=0)
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
    checkpoint_every: int = option(250, identity=False)


@dataclass
class ExportConfig:
    """`variant` as in `generate.variants`; None exports the furthest that the run has come.

    `single_file` writes what ComfyUI loads beside the folder, in `single_file_dtype`. `push_to_hub` is the name of
    a repository, `owner/name`; `private` None is the account's default for one that is made.
    """

    variant: str | None = option(None, choices=VARIANTS[1:])
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
    source: str = option("first", choices=("first", "mean", "sum"))


@dataclass
class ImportConfig:
    """A model or checkpoint that the PPCL authors published, for `stages=[import_published]`.

    `path` is a pipeline's folder, a transformer's, or the `diffusion_pytorch_model.bin` of their training.

    `residual`: whether a folder's txt_proj adds to what it reads; None leaves that to its config. `ehs_same`: the
    groups [a, b] that a checkpoint's text projectors were trained in, all of them.
    """

    path: str | None = None
    residual: bool | None = None
    ehs_same: list[list[int]] | None = None


@dataclass
class GenerateConfig:
    """`variants` is any of `VARIANTS`; None draws the teacher, `removed`, and the newest result of the run.

    `name` names the set of pictures: they lie in `images/<name>`. `plug_fraction` is ppcl-mixed's share of students.
    `prompt`, or `prompt_file` with one a line, takes the benchmark's place; `images` are the pictures that an
    edit model is given with each. `num_images` is of each prompt that is no benchmark's.
    """

    variants: list[str] | None = option(None, choices=STORED_VARIANTS)
    name: str | None = None
    plug_fraction: float = 0.5
    batch_size: int = option(60, least=1)
    prompt: str | None = None
    prompt_file: str | None = None
    num_images: int = option(1, least=1)
    images: list[str] = field(default_factory=list)
    loras: list[str] = field(default_factory=list)
    lora_scale: float = 1.0
    controlnet: str | None = None
    control_image: str | None = None
    control_scale: float = 1.0
    compile: bool = False
    offload: str = option("none", choices=("none", "model", "group"))


@dataclass
class BenchmarkConfig:
    """`name` is a module of `ppcl.benchmarks`, `settings` what its class has of its own.

    `auto` is `shapes` for a teacher and data of the shapes world, else `none`, which scores nothing.
    """

    name: str = "auto"
    settings: dict[str, Any] = field(default_factory=dict)
    prompts_per_category: int = option(60, least=1)
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

    kind: str = option("single", choices=("single", "ddp", "fsdp"))
    cpu_offload: bool = False
    timeout_minutes: float = 30.0


@dataclass
class LoggerConfig:
    kind: str = option("csv", choices=("csv", "wandb", "none"))
    project: str = "ppcl"
    mode: str = option("offline", choices=("online", "offline", "disabled"))


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

    scheme: str = option("none", choices=("none", "int8", "int4", "nf4"))
    group_size: int | None = None
    rounding: str = option("nearest", choices=("nearest", "least_squares"))
    skip: list[str] = field(default_factory=list)
    num_batches: int = option(8, least=1)
    batch_size: int = option(32, least=1)
    damping: float = option(1e-3, least=0)
    variant: str | None = option(None, choices=VARIANTS)


@dataclass
class Config:
    """The root of `conf/config.yaml`. `run`: the folder of an earlier run to go on in; its record has it as None."""

    name: str = MISSING
    stages: list[str] = MISSING
    run: str | None = None
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


# Groups that take keys of their own; whoever reads them checks these.
OPEN_GROUPS = ("benchmark.settings", "distill.losses", "method.settings", "model.sampling.scheduler")
