"""Checks of everything that is drawn, exported, quantised or imported, and of LoRAs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn

from ppcl.artifacts.files import check_safetensors
from ppcl.benchmarks.base import load_benchmark
from ppcl.config import Config
from ppcl.errors import UsageError
from ppcl.export.single_file import DTYPES, layouts
from ppcl.families.registry import FAMILIES
from ppcl.pictures.opening import UnusablePictureError, open_picture
from ppcl.validation.model import check_takes_lora, is_toy
from ppcl.validation.prompts import check_layout
from ppcl.validation.pruning import budget_of, resolve_width
from ppcl.validation.values import one_of

# Benchmarks without a score. They draw the user's prompts, or else captions of held-out data.
UNSCORED = ("none", "fidelity")


def has_own_prompts(config: Config) -> bool:
    """Return whether the user gives prompts (`generate.prompt` or `prompt_file`), so the benchmark's are not used."""
    return config.generate.prompt is not None or config.generate.prompt_file is not None


def resolve_benchmark(config: Config) -> None:
    """Replace `benchmark=auto` by `shapes` or `fidelity`.

    Raises `UsageError` if `shapes` is asked for and the model or the data are no toy ones, or if pictures are to be
    drawn and there are no prompts for them.
    """
    toy, data = is_toy(config.model), config.data.name
    if config.benchmark.name == "auto":
        config.benchmark.name = "shapes" if toy and data == "shapes" else "fidelity"
    draws = {"generate", "evaluate", "report"} & set(config.stages)
    if not draws or has_own_prompts(config) or config.explain:
        return
    edits = FAMILIES[config.model.family].max_references > 0
    if config.benchmark.name in UNSCORED and (data == "none" or (edits and data != "shapes")):
        why = "there are no captions to draw" if data == "none" else "a cache has no given pictures to draw from"
        images = " and generate.images=[...]" if edits else ""
        raise UsageError(
            f"data={data}: {why}, so give generate.prompt_file=FILE, with a prompt a line,{images} or generate.prompt."
        )
    if config.benchmark.name == "shapes" and not (toy and data == "shapes"):
        what = f"data={data}" if data != "shapes" else f"model={config.model.name}"
        raise UsageError(
            f"benchmark=shapes scores pictures of the shapes world alone, which {what} does not draw: leave it out, or "
            "give benchmark=fidelity."
        )


def check_benchmark(config: Config) -> None:
    """Check `benchmark.settings` by loading the benchmark with them, if a stage uses it or there are any."""
    draws = {"generate", "evaluate", "report"} & set(config.stages) and not has_own_prompts(config)
    if draws or config.benchmark.settings:
        load_benchmark(config.benchmark.name, config.benchmark.settings)


def check_generate(config: Config) -> None:
    """Check the prompts, LoRAs, ControlNet and given pictures of `generate`; raises `UsageError`."""
    generate, family = config.generate, config.model.family
    if generate.offload != "none":
        if {*config.stages} - {"plan", "generate"}:
            raise UsageError(f"generate.offload={generate.offload} is for 'stages=[generate]' alone.")
        if generate.variants is None or len(generate.variants) > 1:
            raise UsageError(
                f"generate.offload={generate.offload} draws one variant a command: give generate.variants=[NAME]."
            )
    if generate.prompt is not None and generate.prompt_file is not None:
        raise UsageError(
            f"generate.prompt_file={generate.prompt_file} and generate.prompt exclude each other: give one."
        )
    if generate.prompt is not None and not generate.prompt.strip():
        raise UsageError("generate.prompt is empty; describe the picture, or leave it out.")
    for path in generate.loras:
        _check_lora_file("generate.loras", path)
        check_takes_lora(f"generate.loras={path}", config.model)
    if generate.controlnet is not None:
        if not FAMILIES[family].controlnet_classes:
            raise UsageError(
                f"generate.controlnet={generate.controlnet}: diffusers has no ControlNet for model.family={family}; "
                "leave it out."
            )
        if generate.control_image is None:
            raise UsageError(f"generate.controlnet={generate.controlnet} needs generate.control_image, a picture.")
        _check_picture("generate.control_image", generate.control_image)
    elif generate.control_image is not None:
        raise UsageError(f"generate.control_image={generate.control_image} needs generate.controlnet.")
    elif generate.control_mode is not None:
        raise UsageError(f"generate.control_mode={generate.control_mode} needs generate.controlnet.")
    if generate.name is not None and not re.fullmatch(r"[^\W_][\w. -]*", generate.name):
        raise UsageError(
            f"generate.name={generate.name} is no name of a folder: begin with a letter or a digit, and go on with "
            "those, spaces and any of ._-"
        )
    _check_given_images(config)
    _check_teacher_above(config)
    check_layout(config)


def _check_teacher_above(config: Config) -> None:
    """Check that with `generate.teacher_above` no other key asks for what a pair of models cannot do."""
    generate, above = config.generate, config.generate.teacher_above
    if above is None:
        return
    if generate.variants == ["teacher"]:
        raise UsageError(
            f"generate.teacher_above={above:g} has no effect on the teacher: name a pruned variant in "
            "generate.variants, or leave it out."
        )
    if generate.offload != "none":
        raise UsageError(
            f"generate.offload={generate.offload} is for one model, and generate.teacher_above={above:g} keeps the "
            "teacher and the pruned one in memory: leave one of them out."
        )
    for key in ("loras", "controlnet"):
        if getattr(generate, key):
            raise UsageError(
                f"generate.{key} is put onto one model, and generate.teacher_above={above:g} draws with two: leave one "
                "of them out."
            )


def _check_picture(key: str, path: str) -> None:
    try:
        open_picture(path)
    except OSError as error:
        raise UsageError(f"{key}={path} cannot be read ({error.strerror}); name a PNG or JPEG.") from None
    except UnusablePictureError as error:
        raise UsageError(f"{key}={path} is no picture that can be used: it {error}; name a PNG or JPEG.") from None


def _check_given_images(config: Config) -> None:
    images, prompts = config.generate.images, has_own_prompts(config)
    most = FAMILIES[config.model.family].max_references
    if images and not prompts:
        raise UsageError(f"generate.images={images} needs generate.prompt or generate.prompt_file.")
    if prompts and not min(most, 1) <= len(images) <= most:
        wanted = "no picture" if not most else "one picture" if most == 1 else f"one to {most} pictures"
        raise UsageError(f"generate.images={images}: model.family={config.model.family} is given {wanted}.")
    for path in images:
        _check_picture("generate.images", path)


def check_adapter(config: Config) -> None:
    """Check `finetune.recorded`, and `finetune.lora_rank`: LoRAs must be possible for the family, and need AdamW."""
    finetune = config.finetune
    if finetune.recorded and finetune.feature_weight:
        raise UsageError(
            f"finetune.recorded=true writes velocities alone, and finetune.feature_weight={finetune.feature_weight:g} "
            "compares blocks with the teacher's: add finetune.feature_weight=0."
        )
    if finetune.recorded and config.strategy.kind != "single":
        raise UsageError(
            f"finetune.recorded=true is for one process, and strategy={config.strategy.kind} divides the teacher: "
            "leave one of them out."
        )
    if finetune.lora_rank:
        check_takes_lora(f"finetune.lora_rank={finetune.lora_rank}", config.model)
        if finetune.optimizer == "muon":
            raise UsageError(
                f"finetune.lora_rank={finetune.lora_rank} does not go with finetune.optimizer=muon, which is for whole "
                "matrices: use finetune.optimizer=adamw."
            )


def check_lora(config: Config) -> None:
    """Check `lora.path`, and that the model's family can load LoRAs; raises `UsageError`."""
    if config.lora.path is None:
        raise UsageError("'stages=[remap_lora]' needs lora.path, the safetensors file of a LoRA of the full model.")
    _check_lora_file("lora.path", config.lora.path)
    check_takes_lora(f"lora.path={config.lora.path}", config.model)


def _check_lora_file(key: str, value: str) -> None:
    path = Path(value)
    if path.is_dir():
        raise UsageError(f"{key}={path} is a folder: name the safetensors file in it.")
    if path.suffix != ".safetensors":
        raise UsageError(f"{key}={path} is no safetensors file; other formats can hold code and are not read.")
    check_safetensors(path, f"{key}: ")


def refuse_single_file(why: str) -> NoReturn:
    """Raise the `UsageError` that a model pruned in width cannot be one file. `why`: what prunes it in width."""
    raise UsageError(
        f"export.single_file=true is not for a model pruned in width ({why}): ComfyUI would skip the keys it does not "
        "know and draw noise; set export.variant=ppcl-depth or export.single_file=false."
    )


def check_export(config: Config) -> None:
    """Check the settings of `stages=[export]`; raises `UsageError`."""
    export, family = config.export, config.model.family
    one_of("export.single_file_dtype", export.single_file_dtype, tuple(DTYPES))
    if export.single_file_dtype != "bfloat16" and not export.single_file:
        raise UsageError(
            f"export.single_file_dtype={export.single_file_dtype} has no effect: add export.single_file=true, or leave "
            "it out."
        )
    if export.single_file and family not in layouts():
        raise UsageError(
            f"export.single_file=true: ComfyUI has no model of family {family}, only {', '.join(layouts())}; "
            "set export.single_file=false."
        )
    # With a budget only the plan tells whether projectors are plugged in, so the stage itself checks that later.
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
            raise UsageError(
                f"export.{key}={getattr(export, key)} has no effect: add export.push_to_hub, or leave it out."
            )


def check_import(config: Config) -> None:
    """Check that `published.path` can be imported, from its headers alone; raises `UsageError`."""
    if config.published.path is None:
        raise UsageError(
            "'stages=[import_published]' needs published.path: a folder that the PPCL authors published, or the .bin "
            "of their training."
        )
    if not Path(config.published.path).exists():
        raise UsageError(f"published.path={config.published.path} does not exist; fetch it first.")
    from ppcl.validation.published import open_source  # loads diffusers, which only this stage's check needs

    open_source(config)


def check_quantize(config: Config) -> None:
    """Check that there is a scheme if it is needed, and that the other settings suit it; raises `UsageError`."""
    quantize = config.quantize
    if "quantize" in config.stages and quantize.scheme == "none":
        raise UsageError("'stages=[quantize]' needs a scheme: quantize=int8, quantize=int4 or quantize=nf4.")
    if quantize.scheme == "int4":
        if quantize.group_size is None:
            raise UsageError(f"quantize.group_size={quantize.group_size} is no group: give 32, 64 or 128 for int4.")
    elif quantize.group_size is not None:
        raise UsageError(
            f"quantize.group_size={quantize.group_size} is only for int4, and quantize.scheme={quantize.scheme} is "
            "set: leave it out."
        )
    if quantize.scheme == "nf4" and quantize.rounding != "nearest":
        raise UsageError(f"quantize.rounding={quantize.rounding}: bitsandbytes rounds nf4 to the nearest by itself.")
