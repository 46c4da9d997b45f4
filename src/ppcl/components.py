"""The denoisers of a pipeline, of which `model.component` names the one to prune: where they are, and their weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppcl.artifacts.files import read_json
from ppcl.artifacts.model_files import components_of, weight_files
from ppcl.config import ModelConfig
from ppcl.errors import UsageError
from ppcl.families.registry import stock_name

if TYPE_CHECKING:
    import torch

DEFAULT = "transformer"
_MODULE = "diffusers.models.transformers"
_BOUNDARY = "boundary_ratio"  # of the pipelines of Wan: `transformer` draws from this share of the timesteps on


def class_named(name: str) -> Any:
    """Return the class of diffusers that a component's class has or is made from; None if diffusers lacks it."""
    import diffusers

    name = stock_name(name)  # an export that is pruned in width names a class made from that
    return getattr(diffusers, name, None) or getattr(import_module(_MODULE), name, None)


def is_denoiser(kind: Any) -> bool:
    """Return whether a class is, or is made from, one of diffusers' transformers."""
    return isinstance(kind, type) and any(base.__module__.startswith(_MODULE) for base in kind.__mro__)


def denoisers_of(index: Mapping[str, Any]) -> list[str]:
    """Return the components in the content of a `model_index.json` that are transformers of diffusers."""
    return [name for name, (_, kind) in components_of(index).items() if kind and is_denoiser(class_named(kind))]


def check_component(model: ModelConfig, index: Mapping[str, Any]) -> None:
    """Raise `UsageError` if `model.component` names no denoiser of the pipeline, or one that it never calls.

    `index`: the content of the pipeline's `model_index.json`. A pipeline that has no denoiser at all is left to others.
    """
    name, kind = model.component, index.get("_class_name")
    if name == DEFAULT and components_of(index).get(DEFAULT, [None, None])[1]:
        return
    able = denoisers_of(index)
    if name not in able and (able or name != DEFAULT):
        remedy = f"set it to {' or '.join(able)}" if able else "leave it out"
        raise UsageError(
            f"model.component={name} is no transformer of the {kind} in model.path={model.path}: {remedy}."
        )
    if name != DEFAULT and index.get(_BOUNDARY) is None and _has_boundary(kind):
        raise UsageError(
            f"model.component={name} is never called, since {_BOUNDARY} is null in model_index.json of "
            f"model.path={model.path}: leave it out, or set that to the share of noise below which it draws, as 0.875."
        )


def _has_boundary(pipeline_class: Any) -> bool:
    import diffusers

    kind = getattr(diffusers, str(pipeline_class), None)
    return kind is not None and _BOUNDARY in inspect.signature(kind.__init__).parameters


def steps_of(pipeline: Any, component: str) -> list[int]:
    """Return the numbers of the denoising steps at which a pipeline that draws calls a component.

    These are all steps, but for a pipeline that changes its denoiser at a timestep. Raises `UsageError` for none.
    """
    timesteps, ratio = getattr(pipeline.scheduler, "timesteps", None), pipeline.config.get(_BOUNDARY)
    if timesteps is None or ratio is None:
        return [*range(0 if timesteps is None else len(timesteps))]
    boundary = ratio * pipeline.scheduler.config.num_train_timesteps
    noisy = component == DEFAULT
    found = [step for step, timestep in enumerate(timesteps) if (float(timestep) >= boundary) == noisy]
    if not found:
        side = "above" if noisy else "below"
        raise UsageError(
            f"model.component={component} is never called, since none of the {len(timesteps)} sampling steps is {side} "
            f"the pipeline's {_BOUNDARY}={ratio}: raise model.sampling.num_inference_steps."
        )
    return found


def other_denoisers(pipeline: Any, component: str) -> dict[str, Any]:
    """Return the denoisers in a loaded pipeline but for `component`, by name."""
    parts = pipeline.components.items()
    return {name: part for name, part in parts if name != component and is_denoiser(type(part))}


def other_bytes(model: ModelConfig, folder: Path | None) -> dict[str, float]:
    """Return the bytes of the weights of a pipeline's other denoisers, by name; none without a local folder."""
    if folder is None or model.family != "traced":
        return {}
    index = read_json(folder / "model_index.json", "The pipeline's index")
    others = [name for name in denoisers_of(index) if name != model.component]
    return {name: sum(file.stat().st_size for file in weight_files(folder / name, model.variant)) for name in others}


def loading_into(component: str) -> dict[str, bool]:
    """Return the argument of a pipeline's `load_lora_weights` that says which component gets the LoRA."""
    return {} if component == DEFAULT else {f"load_into_{component}": True}


def dtype_of(kind: Any, weight: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of a weight with this name, in a model of class `kind` or in one of its blocks.

    It is the model's `dtype`, but float32 in the modules that diffusers keeps so in any model of the class.
    """
    import torch

    kept = getattr(kind, "_keep_in_fp32_modules", None) or ()
    return torch.float32 if {*kept} & {*weight.split(".")} else dtype
