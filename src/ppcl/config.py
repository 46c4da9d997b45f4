"""The typed configuration: parsed from Hydra once, checked once, before anything is loaded.

Below this boundary stages see plain dataclasses and never ask whether a value makes sense.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ppcl.artifacts import Interval, Intervals, PruningPlan, check_safetensors
from ppcl.errors import UsageError

STAGE_ORDER = ("pretrain", "plan", "probe", "detect", "depth", "export", "generate", "evaluate", "report")
BUILDERS = ("tiny_qwen_image",)
EMBEDDED = "embedded:"
ASSETS = Path(__file__).parent / "assets"


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

    `first` and `last` bound the blocks that may lie in an interval; `min_cka` is the acceptance threshold:
    an interval is cut back to the longest prefix whose surrogate keeps that CKA, or dropped.
    """

    name: str = "ppcl"
    rule: str = "lp"
    stream: str = "mean"
    debiased: bool = False
    first: int = 0
    last: int | None = None
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

    variants: list[str] = field(default_factory=lambda: ["teacher", "removed", "ppcl-depth", "ppcl-mixed"])
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


def parse(raw: DictConfig) -> Config:
    """The composed Hydra config as a checked `Config`; raises `UsageError`."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), raw)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "the configuration"
        raise UsageError(f"{key}: {str(error).splitlines()[0]}.") from None
    assert isinstance(config, Config)
    check(config)
    return config


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{key}={value} is not one of {', '.join(allowed)}.")


def _at_least(bounds: dict[str, tuple[float, float]]) -> None:
    for key, (value, least) in bounds.items():
        if value < least:
            raise UsageError(f"{key}={value} must be at least {least:g}.")


def check(config: Config) -> None:
    """Every check that needs no model: values, their combinations, and the files that are named."""
    if not config.stages:
        raise UsageError(f"stages=[] asks for nothing: name some of {', '.join(STAGE_ORDER)}.")
    for stage in config.stages:
        _one_of("stages", stage, STAGE_ORDER)
    method, distill = config.method, config.distill
    _one_of("method.rule", method.rule, ("lp", "lp_a", "lp_b", "cka_sensitivity"))
    _one_of("method.stream", method.stream, ("image", "text", "mean"))
    _one_of("distill.mode", distill.mode, ("parallel", "sequential"))
    _one_of("distill.init", distill.init, ("first", "middle", "average"))
    _one_of("probe.init", config.probe.init, ("closed_form", "zero"))
    _one_of("data.name", config.data.name, ("shapes",))
    _one_of("benchmark.name", config.benchmark.name, ("shapes",))
    _one_of("data.timesteps", config.data.timesteps, ("logit_normal", "uniform"))
    _one_of("logger.kind", config.logger.kind, ("wandb", "csv", "none"))
    _one_of("logger.mode", config.logger.mode, ("online", "offline", "disabled"))
    _one_of("model.dtype", config.model.dtype, ("float32", "bfloat16", "float16"))
    for variant in config.generate.variants:
        _one_of("generate.variants", variant, ("teacher", "removed", "ppcl-depth", "ppcl-mixed"))
    _at_least(
        {
            "distill.steps": (distill.steps, 1),
            "distill.batch_size": (distill.batch_size, 1),
            "distill.checkpoint_every": (distill.checkpoint_every, 1),
            "distill.lr": (distill.lr, 0),
            "probe.num_batches": (config.probe.num_batches, 1),
            "probe.num_heldout_batches": (config.probe.num_heldout_batches, 1),
            "probe.ridge": (config.probe.ridge, 0),
            "method.min_length": (method.min_length, 2),
            "method.num_timesteps": (method.num_timesteps, 1),
            "generate.batch_size": (config.generate.batch_size, 1),
            "benchmark.prompts_per_category": (config.benchmark.prompts_per_category, 1),
        }
    )
    if method.rule == "cka_sensitivity" and not method.num_remove:
        raise UsageError("method.rule=cka_sensitivity needs method.num_remove, the number of blocks to remove.")
    if method.extend is not None and method.rule != "lp_b":
        raise UsageError(f"method.extend={method.extend} means nothing to method.rule={method.rule}: use lp_b.")
    if not 0 < config.generate.plug_fraction < 1:
        raise UsageError(f"generate.plug_fraction={config.generate.plug_fraction} must lie between 0 and 1.")
    seeds = (config.data.train_seed, config.data.calibration_seed, config.data.eval_seed)
    if len(set(seeds)) < 3:
        raise UsageError(
            f"data.train_seed, calibration_seed and eval_seed are {seeds}: they must differ, or a stage would be "
            "judged on what it was fitted to."
        )
    if config.generate.prompt_file:
        read_prompts(Path(config.generate.prompt_file))
        if {"evaluate", "report"} & set(config.stages):
            raise UsageError(
                f"generate.prompt_file={config.generate.prompt_file} has no ground truth to score: "
                "drop evaluate and report from stages."
            )
    if distill.mode == "sequential" and distill.intervals is not None:
        raise UsageError(
            f"distill.intervals={distill.intervals} needs distill.mode=parallel: a sequential chain trains as one."
        )
    if "pretrain" in config.stages:
        _check_pretrain(config)
        return
    _check_model(config)
    if config.intervals.source not in ("detect", "plan"):
        raise UsageError(f"intervals.source={config.intervals.source} is not one of detect, plan.")
    if resolve_intervals(config) is not None and "detect" in config.stages:
        raise UsageError("intervals are given, so stages=[detect] would decide nothing: drop one of them.")


def read_prompts(path: Path) -> list[str]:
    """The non-empty lines of a UTF-8 prompt file."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (FileNotFoundError, IsADirectoryError):
        raise UsageError(
            f"generate.prompt_file={path} does not exist; name a text file with a prompt a line."
        ) from None
    except UnicodeDecodeError:
        raise UsageError(f"generate.prompt_file={path} is not UTF-8; save it with that encoding.") from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise UsageError(f"generate.prompt_file={path} holds no prompt; write one a line.")
    return prompts


def model_folder(model: ModelConfig) -> Path | None:
    """The local folder of the model's pipeline; None for a hub id or a model without weights."""
    if model.path is None:
        return None
    if model.path.startswith(EMBEDDED):
        return ASSETS / model.path.removeprefix(EMBEDDED)
    path = Path(model.path)
    # `owner/name` that is no folder here is a hub id; anything else was meant as a path.
    looks_like_hub_id = model.path.count("/") == 1 and not model.path.startswith((".", "/", "~"))
    return None if looks_like_hub_id and not path.exists() else path


WEIGHT_STAGES = {"probe", "detect", "depth", "export", "generate", "evaluate"}


def _check_model(config: Config) -> None:
    from ppcl.families import FAMILIES, family_of_pipeline

    model = config.model
    folder = model_folder(model)
    if folder is not None:
        index = folder / "model_index.json"
        if not index.is_file():
            raise UsageError(f"model.path={model.path} is not a pipeline folder: {index} does not exist.")
        try:
            pipeline_class = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
            arch = json.loads((folder / "transformer" / "config.json").read_text(encoding="utf-8"))
        except (OSError, KeyError, ValueError):
            raise UsageError(f"model.path={model.path} is not a pipeline folder: its JSON files do not read.") from None
        found = family_of_pipeline(pipeline_class)
        if found is None:
            raise UsageError(
                f"model.path={model.path} holds a {pipeline_class}, of no known family ({', '.join(FAMILIES)})."
            )
        if model.family not in ("auto", found):
            raise UsageError(f"model.family={model.family} does not fit model.path={model.path}, a {found}.")
        model.family = found
        model.arch = {key: value for key, value in arch.items() if not key.startswith("_")}
        for file in sorted(folder.rglob("*.safetensors")):
            check_safetensors(file)
    elif model.family == "auto":
        raise UsageError("model=auto needs model.path, the folder of a diffusers pipeline.")
    elif model.path is None and WEIGHT_STAGES & set(config.stages):
        needs = ", ".join(stage for stage in config.stages if stage in WEIGHT_STAGES)
        raise UsageError(f"stages=[{needs}] need weights: set model.path to a pipeline folder.")
    _one_of("model.family", model.family, tuple(FAMILIES))


def _check_pretrain(config: Config) -> None:
    """Pretraining makes a teacher; the stages after it read one, from `model.path`, in a run of their own."""
    if len(set(config.stages)) > 1:
        raise UsageError(
            f"stages={config.stages} mixes pretrain with stages that read a teacher: run stages=[pretrain] alone, "
            "then model=auto model.path=<its run>/teacher."
        )
    if config.model.builder is None:
        raise UsageError(
            f"stages=[pretrain] trains the embedded teachers only; model={config.model.name} has no model.builder."
        )
    _one_of("model.builder", config.model.builder, BUILDERS)


def num_layers(config: Config) -> dict[str, int]:
    """Blocks per stack of the configured model."""
    from ppcl.families import FAMILIES

    return {stack: int(config.model.arch[key]) for stack, key in FAMILIES[config.model.family].stacks.items()}


def check_intervals(intervals: Intervals, layers: dict[str, int], where: str) -> None:
    """Each [u, v] has u < v, lies in its stack, and follows the one before it."""
    for stack, pairs in intervals.items():
        if stack not in layers:
            raise UsageError(f"{where}: the model has no block stack {stack} (it has {', '.join(layers)}).")
        previous: Interval = (-1, -1)
        for pair in pairs:
            if len(pair) != 2:
                raise UsageError(f"{where}.{stack}: {list(pair)} is not a pair [u, v].")
            u, v = pair
            if u >= v:
                raise UsageError(f"{where}.{stack}: [{u}, {v}] is reversed or empty; an interval needs u < v.")
            if u < 0 or v >= layers[stack]:
                raise UsageError(
                    f"{where}.{stack}: [{u}, {v}] is out of range; the model's blocks are 0 to {layers[stack] - 1}."
                )
            if u <= previous[1]:
                raise UsageError(
                    f"{where}.{stack}: [{u}, {v}] overlaps or precedes {list(previous)}; "
                    "intervals are disjoint and ordered."
                )
            previous = (u, v)


def check_plan(plan: PruningPlan, config: Config, path: Path) -> None:
    """A plan serves only a model of its family and depth."""
    layers = num_layers(config)
    if plan.family != config.model.family or plan.num_layers != layers:
        raise UsageError(
            f"{path} was made for {plan.family} with {plan.num_layers}; model={config.model.name} is "
            f"{config.model.family} with {layers}."
        )
    check_intervals(plan.intervals, layers, str(path))


def resolve_intervals(config: Config) -> Intervals | None:
    """The intervals the configuration gives; None where detection is to find them."""
    given: Intervals = {
        stack: [tuple(pair) for pair in pairs]  # type: ignore[misc]
        for stack in ("transformer_blocks", "single_transformer_blocks")
        if (pairs := getattr(config.intervals, stack)) is not None
    }
    if config.intervals.source == "plan":
        if given:
            raise UsageError(f"intervals.{next(iter(given))} and intervals=from_plan exclude each other.")
        if config.intervals.path is None:
            raise UsageError("intervals=from_plan needs intervals.path, the JSON file of a pruning plan.")
        path = Path(config.intervals.path)
        plan = PruningPlan.load(path)
        check_plan(plan, config, path)
        return plan.intervals
    if config.intervals.path is not None:
        raise UsageError(f"intervals.path={config.intervals.path} is read only with intervals=from_plan.")
    if not given:
        return None
    if config.intervals.family not in (None, config.model.family):
        raise UsageError(
            f"these intervals are of family {config.intervals.family}; model={config.model.name} is "
            f"{config.model.family}."
        )
    check_intervals(given, num_layers(config), "intervals")
    return given
