"""Checks of the model and its weights."""

from __future__ import annotations

import inspect
from collections.abc import Container, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ppcl.artifacts.files import check_safetensors, parse_json, read_json
from ppcl.artifacts.model_files import (
    check_streamable,
    component_files,
    components_of,
    has_weights,
    variants_of,
    weight_files,
)
from ppcl.components import DEFAULT, check_component
from ppcl.config import Config, ModelConfig
from ppcl.errors import UsageError
from ppcl.families.facts import FamilyFacts
from ppcl.families.registry import FAMILIES, builders, family_of_pipeline, get_family, stock_name
from ppcl.options import Bounds
from ppcl.paths import is_single_file, is_toy_folder, local_folder
from ppcl.stages import STAGES
from ppcl.validation.traced import TRACED, introduce, introduce_class
from ppcl.validation.values import one_of

_MOST_BLOCKS = 10_000


def is_toy(model: ModelConfig) -> bool:
    """Return whether the model draws toy pictures: a shipped teacher, or a folder of one that was trained like them."""
    if model.builder is not None:
        return True
    return model.pipeline is not None and is_toy_folder(local_folder(model.pipeline))


def model_folder(model: ModelConfig) -> Path | None:
    """Return the local pipeline folder of the model; None for a Hub id, or for a model without weights.

    Of a transformer in a single file it is that of `model.base`.
    """
    source = model.pipeline
    if source is None:
        return None
    path = local_folder(source)
    # `owner/name` is a Hub id unless such a folder exists. Everything else is a path.
    looks_like_hub_id = source.count("/") == 1 and not source.startswith((".", "/", "~"))
    return None if looks_like_hub_id and not path.exists() else path


def has_vae(folder: Path) -> bool:
    """Return whether the pipeline in a folder has a VAE, by its `model_index.json`."""
    entry = parse_json((folder / "model_index.json").read_text(encoding="utf-8")).get("vae")
    return bool(entry and entry[0])


def num_layers(config: Config) -> dict[str, int]:
    """Return the number of blocks of the configured model, by block stack; `UsageError` if `model.arch` lacks it."""
    stacks, found = FAMILIES[config.model.family].stacks, {}
    for stack, key in stacks.items():
        count = config.model.arch.get(key)
        if type(count) is not int or not 0 <= count <= _MOST_BLOCKS:
            raise UsageError(
                f"model.arch.{key}={count} is no number of blocks: give one from 0 to {_MOST_BLOCKS}, or model.path of "
                f"a folder whose {config.model.component}/config.json has it."
            )
        found[stack] = count
    if not any(found.values()):
        raise UsageError(f"model.arch.{next(iter(stacks.values()))}=0 is a model without blocks: give their number.")
    return found


def _check_arch(model: ModelConfig, known: Container[str]) -> None:
    """Raise `UsageError` for a key of `model.arch` that is not in `known` and no setting of the transformer's class."""
    strange = [key for key in model.arch if key not in known and key != "ppcl" and not key.startswith("_")]
    if strange:
        settings = inspect.signature(get_family(model.family, model.arch).transformer_class.__init__).parameters
        for key in strange:
            if key not in settings:
                raise UsageError(f"model.arch.{key} is no setting of the model's class: leave it out.")


def check_categories(config: Config) -> None:
    """Check `model.categories`, and for `stages=[pretrain]` also `pretrain.categories`; raises `UsageError`.

    They must name categories of the toy world of `model.family`, which is known by now.
    """
    given = {"model.categories": config.model.categories}
    if "pretrain" in config.stages:
        given["pretrain.categories"] = config.pretrain.categories
    for key, names in given.items():
        if names is None:
            continue
        known = import_module(f"ppcl.data.worlds.{FAMILIES[config.model.family].world}").ALL_CATEGORIES
        if not names:
            raise UsageError(f"{key}=[] names no category; there are {', '.join(known)}.")
        for name in names:
            one_of(key, name, known)
            if key == "model.categories" and names.count(name) > 1:
                raise UsageError(
                    f"{key} names {name} twice: repeat it in pretrain.categories to train on it more often."
                )


def check_model(config: Config) -> None:
    """Check that `model.path` is a readable pipeline of a known family. Take `model.family` and `model.arch` from it.

    Raises `UsageError` if it is not, or if a stage needs weights and there are none.
    """
    model = config.model
    _check_parts(model)
    folder = model_folder(model)
    if folder is not None:
        index = _index_of(folder, model)
        pipeline_class = index["_class_name"]
        check_component(model, index)
        name = model.component
        arch = _read(folder, f"{name}/config.json", model) if index.get(name, [None])[0] else {}
        check_not_quantised(model, arch)
        kind = str(arch.get("_class_name"))
        known = name == DEFAULT and not model.trace and stock_name(kind) == kind
        found = family_of_pipeline(pipeline_class) if known else None
        if found is None:
            found = TRACED
            introduce(config, folder, index, arch)
        if model.family not in ("auto", found) and not model.trace:
            raise UsageError(f"model.family={model.family} does not fit model.path={model.path}, a {found}.")
        _check_whole(config, arch, FAMILIES[found])
        for key in FAMILIES[found].stacks.values():
            if type(arch.get(key)) is not int or arch[key] < 1:
                raise UsageError(
                    f"{folder / name / 'config.json'} has {key}={arch.get(key)}, which must be the number of "
                    "blocks: fetch it again."
                )
        model.family = found
        _check_arch(model, arch)
        model.arch = {key: value for key, value in arch.items() if not key.startswith("_")}
        _check_weights(config, folder, index)
    elif model.family == "auto":
        raise UsageError("model=auto needs model.path, the folder of a diffusers pipeline.")
    elif model.family == TRACED:
        introduce_class(config)
    elif model.component != DEFAULT:
        raise UsageError(
            f"model.component={model.component} is no transformer of model.family={model.family}: leave it out."
        )
    elif (
        model.path is None
        and not config.explain
        and (needing := [stage for stage in config.stages if needs_weights(config, stage)])
    ):
        needs = ", ".join(needing)
        raise UsageError(f"'stages=[{needs}]' need weights: set model.path to a pipeline folder.")
    one_of("model.family", model.family, tuple(FAMILIES))
    if model.path is None:
        _check_arch(model, ())
    num_layers(config)
    kind = "original" if str(model.path).endswith(".pt") else "single_file"
    if is_single_file(model.path) and getattr(FAMILIES[model.family], kind) is None:
        able = ", ".join(name for name, known in FAMILIES.items() if getattr(known, kind) is not None)
        what = "original checkpoints (.pt)" if kind == "original" else "single files"
        raise UsageError(
            f"model.path={model.path}: there are no {what} of model.family={model.family}, only of {able}; give a "
            "pipeline folder."
        )
    if model.lora is not None:
        check_takes_lora(f"model.lora={model.lora}", model)
    check_categories(config)


def check_takes_lora(key: str, model: ModelConfig) -> None:
    """Raise `UsageError` if the model's pipeline loads no LoRAs, or peft is missing.

    `key`: the key that asks for a LoRA, with its value.
    """
    if not FAMILIES[model.family].takes_lora:
        whose = f"model.path={model.path}" if model.family == TRACED else f"model.family={model.family}"
        raise UsageError(f"{key}: the pipeline of {whose} cannot load LoRAs in diffusers; leave it out.")
    if find_spec("peft") is None:
        raise UsageError(f"{key} needs peft: pip install 'peft>=0.18'.")


def _check_parts(model: ModelConfig) -> None:
    """Check that the files of a teacher in parts are there, and go together: one file and its base, a LoRA."""
    if is_single_file(model.path):
        if model.base is None:
            raise UsageError(
                f"model.path={model.path} is a file with a transformer alone: add model.base=FOLDER, the pipeline that "
                "its config, VAE and text encoders are taken from."
            )
        if str(model.path).endswith(".safetensors"):
            check_safetensors(Path(str(model.path)), "model.path: ")
        elif not Path(str(model.path)).is_file():
            raise UsageError(f"model.path={model.path} does not exist: name a checkpoint of the model.")
    elif model.base is not None:
        raise UsageError(
            f"model.base={model.base} goes only with a model.path that is a .safetensors or .pt file: leave it out."
        )
    if model.lora is not None:
        if model.path is None:
            raise UsageError(f"model.lora={model.lora} needs model.path, the model that it is merged into.")
        if not model.lora.endswith(".safetensors"):
            raise UsageError(f"model.lora={model.lora} must be a .safetensors file; other formats are not read.")
        check_safetensors(Path(model.lora), "model.lora: ")


def _read(folder: Path, name: str, model: ModelConfig) -> dict[str, Any]:
    """Return the JSON object in the file `name` of a pipeline folder; `UsageError` if there is none."""
    try:
        return read_json(folder / name, "model.path:")
    except UsageError:
        raise UsageError(
            f"model.path={model.path} is not a pipeline folder: its {name} does not read as a JSON object; fetch it "
            "again."
        ) from None


def _index_of(folder: Path, model: ModelConfig) -> dict[str, Any]:
    """Return the content of `model_index.json`, whose components are pairs of a library and a class."""
    path = folder / "model_index.json"
    if not path.is_file():
        if (folder / "modular_model_index.json").is_file():
            raise UsageError(
                f"model.path={model.path} is a modular pipeline, whose call is put together from blocks after loading, "
                "so ppcl cannot tell which arguments it takes: give a pipeline folder that has a model_index.json."
            )
        raise UsageError(f"model.path={model.path} is not a pipeline folder: {path} does not exist.")
    index = _read(folder, path.name, model)
    if not isinstance(index.get("_class_name"), str):
        raise UsageError(f"model.path={model.path} is not a pipeline folder: its {path.name} has no _class_name.")
    return index


def _check_weights(config: Config, folder: Path, index: Mapping[str, Any]) -> None:
    """Raise `UsageError` if weight files that diffusers would load are missing, cut short or damaged."""
    model, parts = config.model, [name for name, entry in components_of(index).items() if any(entry)]
    if model.variant is not None and not any(
        found.startswith(model.variant) for name in parts for found in variants_of(folder / name)
    ):
        raise UsageError(f"model.variant={model.variant}: {folder} has no files of this variant; leave it out.")
    needed = any(needs_weights(config, stage) for stage in config.stages)
    for name in parts:
        if name == model.component and is_single_file(model.path):
            continue
        part = folder / name
        pruned = name == model.component
        if has_weights(part) or (pruned and needed):
            files = weight_files(part, model.variant) if pruned else component_files(part, model.variant)
            if pruned and model.streaming and model.lora is None:
                check_streamable(files[0])
            for file in files:
                if file.suffix == ".safetensors":
                    check_safetensors(file, "model.path: ")


def check_not_quantised(model: ModelConfig, arch: Mapping[str, Any]) -> None:
    """Raise `UsageError` if the config of a transformer says that it is quantised."""
    found = arch.get("quantization_config")
    if found:
        kind = found.get("quant_method", "quantised") if isinstance(found, dict) else "quantised"
        raise UsageError(
            f"model.path={model.path} has a quantised transformer ({kind}), which can be neither trained nor pruned: "
            "set model.path to the model that it was made from; quantize=int8 quantises the pruned one."
        )


def _check_whole(config: Config, arch: dict[str, Any], facts: FamilyFacts) -> None:
    """Raise `UsageError` if a stage would prune a model that is already pruned in width.

    Stages can only prune the stock blocks of diffusers. `arch`: the transformer's config.
    """
    kind = arch.get("_class_name")
    if kind not in facts.pruned_models:
        return
    draws = {"generate", "evaluate", "report"}
    pruning = [f"'stages=[{stage}]'" for stage in config.stages if stage not in {"cache", "remap_lora", *draws}]
    if draws & {*config.stages}:
        pruning += [f"variant {name}" for name in config.generate.variants or () if name != "teacher"]
    if pruning:
        base = arch.get("ppcl", {}).get("base_model")
        raise UsageError(
            f"{pruning[0]} cannot prune model.path={config.model.path}, whose transformer is pruned in width ({kind}): "
            f"set model.path to its teacher{f', {base},' if base else ''} or to an export that is pruned in depth "
            "alone; generate.variants=[teacher] draws it as it is."
        )


def needs_weights(config: Config, stage: str) -> bool:
    """Return whether a stage, with its present settings, needs the teacher's weights."""
    if stage == "depth" and config.distill.from_boundaries and config.distill.boundaries is not None:
        return False  # the teacher's activations are on disk
    return STAGES[stage].weights


def check_pretrain(config: Config) -> None:
    """Check the settings of `stages=[pretrain]`; raises `UsageError`.

    It must be the only stage, since all others need the teacher that it makes.
    """
    if len(set(config.stages)) > 1:
        raise UsageError(
            f"stages={config.stages} mixes pretrain with stages that read a teacher: run 'stages=[pretrain]' alone, "
            "then model=auto model.path=<its run>/teacher."
        )
    if config.model.builder is None:
        raise UsageError(
            f"'stages=[pretrain]' trains the embedded teachers only; model={config.model.name} has no model.builder."
        )
    if config.model.component != DEFAULT:
        raise UsageError(
            f"model.component={config.model.component}: embedded teachers have one transformer; leave it out."
        )
    one_of("model.builder", config.model.builder, tuple(builders()))
    one_of("model.family", config.model.family, tuple(FAMILIES))
    check_categories(config)
    rate = config.pretrain.text_encoder_lr
    for key, value in (("model.categories", config.model.categories), ("pretrain.text_encoder_lr", rate)):
        if value is not None and not FAMILIES[config.model.family].trains_text:
            able = ", ".join(name for name, known in FAMILIES.items() if known.trains_text)
            raise UsageError(f"{key}={value} goes only with 'stages=[pretrain]' of model.family={able}: leave it out.")
    init = config.pretrain.init
    if init is None:
        return
    if not (local_folder(init) / "ppcl.json").is_file():
        raise UsageError(f"pretrain.init={init} is no teacher of an earlier pretraining; give its folder.")
    arch = read_json(local_folder(init) / "transformer" / "config.json", "pretrain.init:")
    layers = config.pretrain.num_layers
    wanted = config.model.arch | ({} if layers is None else {"num_layers": layers})
    other = [key for key, value in wanted.items() if key in arch and arch[key] != value]
    if other:
        key = other[0]
        raise UsageError(
            f"pretrain.init={init} has {key}={arch[key]}, and model={config.model.name} {wanted[key]}: continue one of "
            "the same shape, or start without."
        )


def check_size(config: Config) -> None:
    """Check `model.sampling.height` and `width`, and the shift of `scheduler`; raises `UsageError`.

    Height and width may be None for an edit model, which then takes them from a picture that it is given, and for a
    model of no known family, whose pipeline has a size of its own, or none if it draws sounds.
    """
    sampling, family = config.model.sampling, config.model.family
    shift = sampling.scheduler.get("shift")
    if shift is not None:  # as `data.shift`; of the other settings the scheduler itself knows
        if not isinstance(shift, (int, float)):
            raise UsageError(f"model.sampling.scheduler.shift={shift} is not a number; write one, such as 3.0.")
        Bounds(above=0, most=1000).check("model.sampling.scheduler.shift", shift)
    given = {"height": sampling.height, "width": sampling.width}
    lacking = [name for name, side in given.items() if side is None]
    if not lacking or family == "traced":
        return
    if not FAMILIES[family].max_references:
        raise UsageError(
            f"model.sampling.{lacking[0]}=null takes the size of a given picture, and model.family={family} is given "
            "none: set it to pixels."
        )
    if len(lacking) == 1:
        raise UsageError(f"model.sampling.{lacking[0]}=null goes only with the other side null too: set both or none.")


def check_streaming(config: Config) -> None:
    """Raise `UsageError` if `model.streaming` is set and a stage needs the whole teacher in memory."""
    if not config.model.streaming:
        return
    whole = [stage for stage in config.stages if STAGES[stage].whole]
    if whole:
        raise UsageError(
            f"'stages=[{whole[0]}]' takes the whole teacher, and model.streaming=true never holds it: run that stage "
            "in a command of its own, with model.streaming=false."
        )
    if config.distill.mode == "sequential" and "depth" in config.stages:
        raise UsageError(
            "distill.mode=sequential back-propagates through the teacher's blocks, which model.streaming=true does not "
            "hold: use distill.mode=parallel, or model.streaming=false."
        )
