"""Default values that depend on the model and the data: resolvers for `conf/`, used as in `${by_size:400,6000}`.

They read small files and headers only. They never raise, since the validation that follows reports wrong paths.
Importing this loads no torch.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from ppcl.artifacts.files import parse_json
from ppcl.artifacts.model_files import PICKLED, pickled_tensors, read_header, weight_files
from ppcl.errors import UsageError
from ppcl.paths import conf_dir, is_single_file, is_toy_folder, local_folder

TINY = 100_000_000  # parameters; smaller models train better with the toy teachers' settings than with the paper's

# Pictures that are encoded or decoded at once have so many pixels. The VAE of Qwen-Image decodes as many in 7 GB.
PIXELS = 1 << 21

_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def register_resolvers() -> None:
    """Register the functions below with OmegaConf, under their own names."""
    OmegaConf.register_new_resolver("by_size", by_size, replace=True)
    OmegaConf.register_new_resolver("optimizer", optimizer, replace=True)
    OmegaConf.register_new_resolver("by_lora", by_lora, replace=True)
    OmegaConf.register_new_resolver("with_muon", with_muon, replace=True)
    OmegaConf.register_new_resolver("rate", rate, replace=True)
    OmegaConf.register_new_resolver("by_data", by_data, replace=True)
    OmegaConf.register_new_resolver("by_pixels", by_pixels, replace=True)
    OmegaConf.register_new_resolver("data_name", data_name, replace=True)
    OmegaConf.register_new_resolver("of_model", of_model, replace=True)


def by_size(tiny: Any, large: Any, *, _root_: Any) -> Any:
    """Return `tiny` for a model with fewer than 100M parameters, else `large` (also if the number is unknown)."""
    model = _root_.model
    if model.path is None:
        return tiny if model.get("builder") else large
    count, _ = stored_weights(local_folder(model.path), model.get("variant"), model.get("component", "transformer"))
    return tiny if 0 < count < TINY else large


def rate(lr: float, group: str = "distill", *, _root_: Any) -> float | None:
    """Return the learning rate `lr`, or None if `relative_update` of `group` sets the rates instead.

    Width distillation takes the one of `distill` if it has none of its own.
    """
    groups = ("width", "distill") if group == "width" else (group,)
    return lr if all(_root_[name].get("relative_update") is None for name in groups) else None


def with_muon(relative_update: float, *, _root_: Any) -> float | None:
    """Return `relative_update` if fine-tuning gives Muon the matrices, else None."""
    config = _root_.finetune
    return relative_update if config.optimizer == "muon" and not config.lora_rank else None


def by_lora(lora: Any, full: Any, *, _root_: Any) -> Any:
    """Return `lora` if fine-tuning trains a LoRA, else `full`."""
    return lora if _root_.finetune.lora_rank else full


def optimizer(*, _root_: Any) -> str:
    """Return the optimiser of fine-tuning: AdamW for a LoRA, else by the size of the model."""
    return by_lora("adamw", by_size("muon", "adamw", _root_=_root_), _root_=_root_)


def by_pixels(most: int, *, _root_: Any) -> int:
    """Return how many pictures the VAE takes at once: those that have `PIXELS` together, at least 1, at most `most`."""
    sampling = _root_.model.sampling
    height, width = sampling.height or 1024, sampling.width or 1024  # as `SamplingConfig.size`
    return max(1, min(most, PIXELS // max(1, height * width)))


def by_data(toy: Any, own: Any, *, _root_: Any) -> Any:
    """Return `toy` if the data are rendered toy pictures (`data=shapes`), else `own`."""
    return toy if _root_.data.name == "shapes" else own


def data_name(*, _root_: Any) -> str:
    """Return the value of `data.name` for `data=auto`: `webdataset`, `folder`, `prompts`, `shapes` or `none`.

    `data.path` or `data.cache` decide. Without both it is `shapes` for a toy model and `none` for any other.
    """
    path, cache = _root_.data.path, _root_.data.cache
    if path is not None:
        suffix = Path(path).suffix.lower()
        if suffix == ".txt" or (suffix == ".jsonl" and not _lists_pictures(Path(path))):
            return "prompts"
        # A pattern such as DIR/{000..099}.tar does not exist as a path. For a folder, its files decide.
        tars = ".tar" in str(path) or (Path(path).is_dir() and any(Path(path).glob("*.tar")))
        return "webdataset" if tars else "folder"
    if cache is not None:
        return "prompts" if (Path(cache) / "recording.json").is_file() else "webdataset"
    model = _root_.model
    if model.get("builder") or (model.path is not None and is_toy_folder(_pipeline(model))):
        return "shapes"
    return "none"


def _lists_pictures(table: Path) -> bool:
    """Return whether a .jsonl lists pictures with captions, by its first line; else it is one of prompts.

    One of prompts has a `prompt`, or `prompt_embeds`.
    """
    try:
        with table.open(encoding="utf-8") as lines:
            first = parse_json(next(lines))
    except (OSError, ValueError, StopIteration):
        return table.name == "metadata.jsonl"
    prompts = isinstance(first, dict) and any(key.startswith("prompt") for key in first)
    return isinstance(first, dict) and ("file_name" in first or ("image" in first and not prompts))


def of_model(key: str, otherwise: Any, *, _root_: Any) -> Any:
    """Return the default value of a setting for the model in `model.path`, or `otherwise` if that is unknown.

    `key`: `dtype`, for the dtype of the stored weights, or a key of `model.sampling`, which is taken from `conf/model`
        for the model's family.
    """
    path = _root_.model.path
    folder = None if path is None else local_folder(path)
    if key == "dtype":
        model = _root_.model
        component = model.get("component", "transformer")
        return otherwise if folder is None else stored_weights(folder, model.get("variant"), component)[1]
    if folder is None:
        return otherwise
    pipeline = _pipeline(_root_.model)
    found = _family_sampling(_pipeline_class(pipeline), is_toy_folder(pipeline))
    return found.get(key, otherwise)


def stored_weights(folder: Path, variant: str | None = None, component: str = "transformer") -> tuple[int, str]:
    """Return the number of parameters of the transformer in a pipeline folder, and the dtype of most of them.

    `folder` may also be a single file with a transformer. `variant`, `component`: see `model.variant` and
    `model.component`. Returns 0 and `float32` if there are no readable weights.
    """
    counts: Counter[str] = Counter()
    try:
        files = [folder] if is_single_file(folder.name) else weight_files(folder / component, variant)
        for file in files:
            if file.suffix in PICKLED:
                for tensor in pickled_tensors(file).values():
                    counts[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
            else:
                for stored in read_header(file).values():
                    counts[_DTYPES.get(stored.dtype, "float32")] += stored.numel
    except (OSError, UsageError):  # the checks of the model say what is wrong
        return 0, "float32"
    most = counts.most_common(1)
    return sum(counts.values()), most[0][0] if most and most[0][0] in _DTYPES.values() else "float32"


def _pipeline(model: Any) -> Path:
    """Return the folder of the pipeline, which of a single file is `model.base`."""
    return local_folder(str(model.get("base")) if is_single_file(model.path) else model.path)


def _pipeline_class(folder: Path) -> str:
    try:
        return str(parse_json((folder / "model_index.json").read_text(encoding="utf-8"))["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _family_sampling(pipeline_class: str, toy: bool) -> dict[str, Any]:
    """Return `sampling` from `conf/model` for a model of the same family that is also a toy model, or also not one."""
    from ppcl.families.registry import family_of_pipeline

    family = family_of_pipeline(pipeline_class)
    if family is None and pipeline_class:
        from ppcl.families.traced.known import own_sampling  # loads torch

        return own_sampling(pipeline_class)
    models = [_read_model(path.stem) for path in sorted((conf_dir() / "model").glob("*.yaml"))]
    same = [model for model in models if model.get("family") == family and ("builder" in model) == toy]
    return same[0].get("sampling", {}) if same and family is not None else {}


def _read_model(name: str) -> dict[str, Any]:
    """Return the content of a file in `conf/model`, merged with the files that it inherits from."""
    content = yaml.safe_load((conf_dir() / "model" / f"{name}.yaml").read_text(encoding="utf-8"))
    merged: dict[str, Any] = {}
    for parent in [_read_model(other) for other in content.pop("defaults", []) if other != "_self_"]:
        merged |= parent
    sampling = merged.get("sampling", {}) | content.get("sampling", {})
    return merged | content | ({"sampling": sampling} if sampling else {})
