"""Checks the configuration once, before anything is loaded, and says what it names.

Below this boundary stages see plain dataclasses and never ask whether a value makes sense.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NoReturn

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image

from ppcl.artifacts import Interval, Intervals, PruningPlan, Width, check_safetensors
from ppcl.config import BUILDERS, STAGE_ORDER, VARIANTS, Config, ModelConfig
from ppcl.errors import UsageError
from ppcl.export.single_file import DTYPES, LAYOUTS
from ppcl.families import FAMILIES, family_of_pipeline
from ppcl.layers import check_width_sets, kept_layers

EMBEDDED = "embedded:"
ASSETS = Path(__file__).parent / "assets"
WEIGHT_STAGES = {"probe", "detect", "depth", "width", "finetune", "export", "generate", "evaluate"}


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
    _one_of("width.source", config.width.source, ("none", "given", "plan", "auto"))
    _one_of("width.text_output", config.width.text_output, ("last", "each"))
    _one_of("budget.cost", config.budget.cost, ("velocity", "loss"))
    _one_of("finetune.optimizer", config.finetune.optimizer, ("adamw", "muon"))
    _one_of("benchmark.name", config.benchmark.name, ("shapes",))
    _one_of("data.timesteps", config.data.timesteps, ("logit_normal", "uniform"))
    _one_of("logger.kind", config.logger.kind, ("wandb", "csv", "none"))
    _one_of("logger.mode", config.logger.mode, ("online", "offline", "disabled"))
    _one_of("model.dtype", config.model.dtype, ("float32", "bfloat16", "float16"))
    if config.export.variant is not None:
        _one_of("export.variant", config.export.variant, VARIANTS[1:])
    for variant in config.generate.variants:
        _one_of("generate.variants", variant, VARIANTS)
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
            "width.num_ffn": (config.width.num_ffn, 0),
            "width.num_text": (config.width.num_text or 0, 0),
            "width.num_batches": (config.width.num_batches, 1),
            "width.steps": (config.width.steps, 0),
            "width.lr": (config.width.lr, 0),
            "width.ridge": (config.width.ridge, 0),
            "width.linear_weight": (config.width.linear_weight, 0),
            "budget.num_batches": (config.budget.num_batches, 1),
            "finetune.steps": (config.finetune.steps, 1),
            "finetune.batch_size": (config.finetune.batch_size, 1),
            "finetune.checkpoint_every": (config.finetune.checkpoint_every, 1),
            "finetune.lr": (config.finetune.lr, 0),
            "finetune.muon_lr": (config.finetune.muon_lr, 0),
            "finetune.output_weight": (config.finetune.output_weight, 0),
            "finetune.flow_weight": (config.finetune.flow_weight, 0),
            "finetune.feature_weight": (config.finetune.feature_weight, 0),
            "generate.batch_size": (config.generate.batch_size, 1),
            "generate.num_images": (config.generate.num_images, 1),
            "benchmark.prompts_per_category": (config.benchmark.prompts_per_category, 1),
        }
    )
    if method.rule == "cka_sensitivity" and not method.num_remove:
        raise UsageError("method.rule=cka_sensitivity needs method.num_remove, the number of blocks to remove.")
    if method.extend is not None and method.rule != "lp_b":
        raise UsageError(f"method.extend={method.extend} means nothing to method.rule={method.rule}: use lp_b.")
    if method.extend is not None and min(method.extend, default=0) < 0:
        raise UsageError(f"method.extend={method.extend} numbers intervals from 0 on.")
    if not 0 < config.generate.plug_fraction < 1:
        raise UsageError(f"generate.plug_fraction={config.generate.plug_fraction} must lie between 0 and 1.")
    seeds = (config.data.train_seed, config.data.calibration_seed, config.data.eval_seed)
    if len(set(seeds)) < 3:
        raise UsageError(
            f"data.train_seed, calibration_seed and eval_seed are {seeds}: they must differ, or a stage would be "
            "judged on what it was fitted to."
        )
    base = config.paths.base_run
    if base is not None and not Path(base).is_dir():
        raise UsageError(f"paths.base_run={base} is no folder: give that of a run whose plugs are to be used.")
    if config.generate.prompt_file is not None:
        read_prompts(Path(config.generate.prompt_file))
    if has_own_prompts(config) and {"evaluate", "report"} & set(config.stages):
        key = "prompt" if config.generate.prompt is not None else "prompt_file"
        raise UsageError(
            f"generate.{key}={getattr(config.generate, key)} has no ground truth to score: "
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
    _check_generate(config)
    if config.intervals.source not in ("detect", "plan"):
        raise UsageError(f"intervals.source={config.intervals.source} is not one of detect, plan.")
    intervals = resolve_intervals(config)
    if intervals is not None and "detect" in config.stages:
        raise UsageError("intervals are given, so stages=[detect] would decide nothing: drop one of them.")
    _check_width(config, intervals)
    _check_budget(config)
    if "export" in config.stages:
        _check_export(config)
    if "remap_lora" in config.stages:
        _check_lora(config)
    if "import_published" in config.stages:
        _check_import(config)


def refuse_single_file(why: str) -> NoReturn:
    """A model pruned in width has no single file."""
    raise UsageError(
        f"export.single_file=true is not for a model pruned in width ({why}): ComfyUI would skip the keys it does not "
        "know and draw noise; set export.variant=ppcl-depth or export.single_file=false."
    )


def _check_export(config: Config) -> None:
    export, family = config.export, config.model.family
    _one_of("export.single_file_dtype", export.single_file_dtype, tuple(DTYPES))
    if export.single_file_dtype != "bfloat16" and not export.single_file:
        raise UsageError(
            f"export.single_file_dtype={export.single_file_dtype} means nothing without export.single_file=true."
        )
    if export.single_file and family not in LAYOUTS:
        raise UsageError(
            f"export.single_file=true: ComfyUI has no model of family {family}, only {', '.join(LAYOUTS)}; "
            "set export.single_file=false."
        )
    # Of a budget's choice only its plan knows what it plugs in; the stage asks it before it loads the model.
    everything = export.variant == "ppcl-width" or (
        export.variant in (None, "ppcl-planned", "ppcl-finetuned") and budget_of(config) is None
    )
    width = resolve_width(config)
    if export.single_file and everything and (width is None or any(any(sets.values()) for sets in width.values())):
        refuse_single_file(f"width.source={config.width.source}")
    size = export.max_shard_size
    if size is not None and not re.fullmatch(r"0*[1-9]\d*[KMGT]B", size):
        raise UsageError(f"export.max_shard_size={size} is no size; write one like 5GB or 500MB.")
    if export.push_to_hub is not None:
        from ppcl.export.hub import check_repo_id

        check_repo_id(export.push_to_hub)
    for key in ("private", "commit_message"):
        if getattr(export, key) is not None and export.push_to_hub is None:
            raise UsageError(f"export.{key}={getattr(export, key)} means nothing without export.push_to_hub.")


def has_own_prompts(config: Config) -> bool:
    """Whether pictures are of the user's prompts, and not of the benchmark's."""
    return config.generate.prompt is not None or config.generate.prompt_file is not None


def _check_generate(config: Config) -> None:
    """What is put on a model to draw with it."""
    generate, family = config.generate, config.model.family
    _one_of("generate.offload", generate.offload, ("none", "model", "group"))
    if generate.offload != "none":
        if {*config.stages} - {"plan", "generate"}:
            raise UsageError(f"generate.offload={generate.offload} is for stages=[generate] alone.")
        if len(generate.variants) > 1:
            raise UsageError(
                f"generate.offload={generate.offload} draws one variant a command: give generate.variants=[NAME]."
            )
    if generate.prompt is not None and generate.prompt_file is not None:
        raise UsageError(f"generate.prompt_file={generate.prompt_file} and generate.prompt exclude each other.")
    if generate.prompt is not None and not generate.prompt.strip():
        raise UsageError("generate.prompt is empty; write what the picture shall show.")
    for path in generate.loras:
        _check_lora_file("generate.loras", path)
    if generate.controlnet is not None:
        if not FAMILIES[family].controlnet_classes:
            raise UsageError(
                f"generate.controlnet={generate.controlnet}: model.family={family} takes none in diffusers."
            )
        if generate.control_image is None:
            raise UsageError(f"generate.controlnet={generate.controlnet} needs generate.control_image, a picture.")
        _check_picture("generate.control_image", generate.control_image)
    elif generate.control_image is not None:
        raise UsageError(f"generate.control_image={generate.control_image} needs generate.controlnet.")
    _check_given_images(config)


def _check_picture(key: str, path: str) -> None:
    try:
        with Image.open(path) as image:
            image.verify()
    except (OSError, SyntaxError):
        raise UsageError(f"{key}={path} is no picture that can be read; name a PNG or JPEG.") from None


def _check_given_images(config: Config) -> None:
    images, prompts = config.generate.images, has_own_prompts(config)
    most = FAMILIES[config.model.family].max_references
    if images and not prompts:
        raise UsageError(f"generate.images={images} needs generate.prompt: the benchmark has pictures of its own.")
    if prompts and not min(most, 1) <= len(images) <= most:
        wanted = "no picture" if not most else "one picture" if most == 1 else f"one to {most} pictures"
        raise UsageError(f"generate.images={images}: model.family={config.model.family} is given {wanted}.")
    for path in images:
        _check_picture("generate.images", path)


def _check_lora(config: Config) -> None:
    _one_of("lora.source", config.lora.source, ("first", "mean", "sum"))
    if config.lora.path is None:
        raise UsageError("stages=[remap_lora] needs lora.path, the safetensors file of a LoRA of the full model.")
    _check_lora_file("lora.path", config.lora.path)


def _check_lora_file(key: str, value: str) -> None:
    path = Path(value)
    if path.is_dir():
        raise UsageError(f"{key}={path} is a folder: name the safetensors file in it.")
    if path.suffix != ".safetensors":
        raise UsageError(f"{key}={path} is no safetensors file; other formats can hold code and are not read.")
    check_safetensors(path, f"{key}: ")


def _check_import(config: Config) -> None:
    """Reads headers only; a file that is no good leaves nothing behind."""
    if config.published.path is None:
        raise UsageError(
            "stages=[import_published] needs published.path: a folder that the PPCL authors published, or the .bin of "
            "their training."
        )
    if not Path(config.published.path).exists():
        raise UsageError(f"published.path={config.published.path} does not exist; fetch it first.")
    from ppcl.stages.import_published import open_source  # loads diffusers, which only this stage's check needs

    open_source(config)


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


def _check_model(config: Config) -> None:
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
            check_safetensors(file, "model.path: ")
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
    return {stack: int(config.model.arch[key]) for stack, key in FAMILIES[config.model.family].stacks.items()}


def check_intervals(intervals: Intervals, layers: dict[str, int], where: str, first: int = 0) -> None:
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
            if u < first:
                raise UsageError(
                    f"{where}.{stack}: [{u}, {v}] has a student in the place of block {u}, but blocks before {first} "
                    "must stay the teacher's in this family."
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
    check_intervals(plan.intervals, layers, str(path), FAMILIES[config.model.family].first_block)


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
        plan = PruningPlan.load(path, "intervals.path: ")
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
    check_intervals(given, num_layers(config), "intervals", FAMILIES[config.model.family].first_block)
    return given


def resolve_width(config: Config) -> Width | None:
    """The width sets the configuration gives, empty for `width=none`; None where the stage is to select them."""
    settings = config.width
    given: Width = {
        stack: {"text": sorted(sets.text), "ffn": sorted(sets.ffn)}
        for stack in ("transformer_blocks", "single_transformer_blocks")
        if (sets := getattr(settings, stack)).text or sets.ffn
    }
    if given and settings.source != "given":
        raise UsageError(f"width.{next(iter(given))} is read only with width.source=given; it is {settings.source}.")
    if settings.path is not None and settings.source != "plan":
        raise UsageError(f"width.path={settings.path} is read only with width=from_plan.")
    if settings.source == "auto":
        return None
    if settings.source == "plan":
        if settings.path is None:
            raise UsageError("width=from_plan needs width.path, the JSON file of a pruning plan.")
        path = Path(settings.path)
        plan = PruningPlan.load(path, "width.path: ")
        check_plan(plan, config, path)
        return plan.width
    if settings.source == "given":
        if not given:
            raise UsageError("width.source=given needs sets: width.transformer_blocks.text=[...] or .ffn=[...].")
        if settings.family not in (None, config.model.family):
            raise UsageError(
                f"these width sets are of family {settings.family}; model={config.model.name} is {config.model.family}."
            )
    return given


def check_width(config: Config, width: Width, intervals: Intervals, where: str = "width") -> None:
    """Every block that `width` names is kept by `intervals` and can be pruned."""
    layers, known = num_layers(config), FAMILIES[config.model.family]
    for stack, sets in width.items():
        if stack not in layers:
            raise UsageError(f"{where}: the model has no block stack {stack} (it has {', '.join(layers)}).")
        if sets["text"] and stack not in known.text_stacks:
            raise UsageError(f"{where}.{stack}.text={sets['text']}: these blocks have no text stream of their own.")
        kept = kept_layers(layers[stack], intervals.get(stack, []))
        check_width_sets(stack, kept, sets["text"], sets["ffn"], where)


def _check_width(config: Config, intervals: Intervals | None) -> None:
    width = resolve_width(config)
    if width is not None and intervals is not None:
        check_width(config, width, intervals)
    if config.width.source == "none" and "width" in config.stages:
        raise UsageError("stages=[width] needs width sets: width=auto, width=from_plan or width.source=given.")
    if config.width.source == "none" and "ppcl-width" in [*config.generate.variants, config.export.variant]:
        raise UsageError("variant ppcl-width needs width sets: width=auto, width=from_plan or width.source=given.")
    if not 0 < config.width.text_threshold <= 1:
        raise UsageError(f"width.text_threshold={config.width.text_threshold} must lie between 0 and 1.")
    if not 0 <= config.finetune.ema_decay < 1:
        raise UsageError(f"finetune.ema_decay={config.finetune.ema_decay} must lie in [0, 1).")
    if config.finetune.output_weight == config.finetune.flow_weight == 0:
        raise UsageError("finetune.output_weight and finetune.flow_weight are both 0: no loss sees the output.")


def budget_of(config: Config) -> tuple[str, float] | None:
    """The one budget that is set, by name, or None."""
    budget = config.budget
    found = {
        name: value for name in ("params", "memory_gb", "latency_ratio") if (value := getattr(budget, name)) is not None
    }
    if len(found) > 1:
        raise UsageError(f"budget.{' and budget.'.join(found)} are both set: a plan serves one budget.")
    return next(iter(found.items()), None)


def _check_budget(config: Config) -> None:
    budget = budget_of(config)
    if budget is not None and budget[1] <= 0:
        raise UsageError(f"budget.{budget[0]}={budget[1]:g} must be above 0.")
    if budget is None and "ppcl-planned" in config.generate.variants and {"generate", "evaluate"} & set(config.stages):
        raise UsageError("generate.variants names ppcl-planned, but no budget is set: give budget.params=0.6 or alike.")
    if budget is not None and config.model.path is None:
        raise UsageError(f"budget.{budget[0]} needs measurements: set model.path to a pipeline folder.")
