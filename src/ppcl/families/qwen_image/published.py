"""Reads models that the PPCL authors published into ppcl's classes.

Facts of their format (from github.com/OPPO-Mente-Lab/Qwen-Image-Pruning; no code is copied from there):
- Their transformer class has the name of the stock one. Lists of block positions in its config tell the two apart:
  `single_stream_index` (blocks without a text stream) and, since the 10B model, `ffn_proj_index` and `ehs_proj_index`.
- Their parameters have the same names as ours. A text-pruned block of theirs still holds a text output projection and
  text queries, on which no output depends. `ehs_proj` can be in any text-pruned block, or in none.
- All projectors are residual, as ours are, except in the 12B model. That one is older: its txt_proj is the whole map.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from safetensors import safe_open
from torch import Tensor

from ppcl.artifacts.files import check_safetensors, read_json
from ppcl.errors import UsageError
from ppcl.families.qwen_image.transformer_qwen_image_pruned import PrunedQwenImageTransformer2DModel

STACK = "transformer_blocks"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
_TEXT, _FFN, _OUTPUT = "single_stream_index", "ffn_proj_index", "ehs_proj_index"
_DEAD = ("attn.to_add_out.weight", "attn.to_add_out.bias")
_DEAD_QUERY = ("attn.add_q_proj.weight", "attn.add_q_proj.bias", "attn.norm_added_q.weight")
Shape = tuple[int, ...]
State = dict[str, Tensor]


@dataclass(frozen=True)
class Published:
    """How a published transformer is converted, as read from its config.

    `model_class`, `arch`, `shapes`: the class, config and parameter shapes of the converted model.
    `text`, `ffn`: positions of the blocks without a text stream, and of those without FFNs.
    `dead`: published parameters that no output depends on; they are dropped.
    `identity`: parameters of ours that the published model does not have. They become zeros, so that the projector
        returns the text unchanged.
    `plain`: weights W of projectors that are whole maps; they become W - I, since our projectors are residual.
    """

    model_class: Any
    arch: dict[str, Any]
    shapes: dict[str, Shape]
    text: list[int]
    ffn: list[int]
    dead: frozenset[str]
    identity: frozenset[str]
    plain: frozenset[str]
    is_stock: bool  # plain diffusers loads it as it is

    @property
    def num_layers(self) -> int:
        return int(self.arch["num_layers"])


def read_config(
    config: Mapping[str, Any], *, keep_text_query: bool = False, residual: bool | None = None, where: str = "config"
) -> Published:
    """Read the config of a published transformer.

    `keep_text_query` keeps the text's query projections, which no output depends on. `residual` says whether txt_proj
    is added to its input. None means: yes, unless the config has neither `ffn_proj_index` nor `ehs_proj_index`, as that
    of the 12B model. `where` starts the error sentences. Raises `UsageError` for the config of another model, and for
    positions that are out of range or contradict each other.
    """
    if config.get("_class_name") != QwenImageTransformer2DModel.__name__:
        raise UsageError(
            f"{where} holds a {config.get('_class_name')}, but the authors' models are of class "
            f"{QwenImageTransformer2DModel.__name__}: give the folder of one."
        )
    known = inspect.signature(QwenImageTransformer2DModel.__init__).parameters
    arch = {key: value for key, value in config.items() if key in known}
    arch.setdefault("num_layers", known["num_layers"].default)
    if type(arch["num_layers"]) is not int:
        raise UsageError(f"{where}: num_layers={arch['num_layers']} is not a number of blocks.")
    text, ffn, outputs = (_positions(config, key, arch["num_layers"], where) for key in (_TEXT, _FFN, _OUTPUT))
    if stray := sorted({*outputs} - {*text}):
        raise UsageError(f"{where}: {_OUTPUT} names block {stray[0]}, which {_TEXT} does not: only those have one.")
    if 0 in text:
        raise UsageError(f"{where}: {_TEXT} names block 0, which has no earlier block whose text it could read.")
    if residual is not None and not text:
        raise UsageError(f"{where}: published.residual={residual} is for txt_proj, and no block has one: leave it out.")
    if residual is None:
        residual = _FFN in config or _OUTPUT in config
    ends = [index for index in text if index + 1 not in text]
    last = {*outputs} <= {*ends}
    model_class: Any = QwenImageTransformer2DModel
    if text or ffn:
        model_class = PrunedQwenImageTransformer2DModel
        arch |= {"pruned_text": text, "pruned_ffn": ffn, "text_output": "last" if last else "each"}
        arch["keep_text_query"] = keep_text_query
    with torch.device("meta"):
        state = model_class.from_config(arch).state_dict()
    dead = _DEAD if keep_text_query else _DEAD + _DEAD_QUERY
    return Published(
        model_class,
        arch,
        {key: tuple(value.shape) for key, value in state.items()},
        text,
        ffn,
        frozenset(f"{STACK}.{index}.{name}" for index in text for name in dead),
        frozenset(
            f"{STACK}.{index}.ehs_proj.{name}"
            for index in {*(ends if last else text)} - {*outputs}
            for name in ("weight", "bias")
        ),
        frozenset() if residual else frozenset(f"{STACK}.{index}.txt_proj.weight" for index in text),
        is_stock=not {_TEXT, _FFN, _OUTPUT} & config.keys(),
    )


def _positions(config: Mapping[str, Any], key: str, num_layers: int, where: str) -> list[int]:
    found = config.get(key, [])
    if not isinstance(found, list) or not all(type(index) is int for index in found):
        raise UsageError(f"{where}: {key}={found} is not a list of block numbers.")
    for index in found:
        if not 0 <= index < num_layers:
            raise UsageError(f"{where}: {key} names block {index}; the transformer's blocks are 0 to {num_layers - 1}.")
    return sorted({*found})


def check_shapes(published: Published, shapes: Mapping[str, Sequence[int]], where: str = "the state dict") -> None:
    """Raise `UsageError` for the first parameter that is missing, has another shape, or is not in the model."""
    for key, shape in published.shapes.items():
        if key in published.identity:
            continue
        if key not in shapes:
            raise UsageError(f"{where} lacks {key} {list(shape)}, which its config asks for: fetch it again.")
        check_shape(key, shapes[key], shape, where, "its config asks for", "config and weights must be of one model")
    for key in shapes:
        if key in published.identity or key not in published.shapes.keys() | published.dead:
            raise UsageError(f"{where} holds {key}, for which its config has no place: they are not of one model.")


def check_shape(key: str, found: Sequence[int], needed: Sequence[int], where: str, because: str, remedy: str) -> None:
    """Raise `UsageError` unless the parameter `key` has the shape that `because` says is needed."""
    if tuple(found) != tuple(needed):
        raise UsageError(f"{where}: {key} is {list(found)}, {because} {list(needed)}: {remedy}.")


def convert(published: Published, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the converted parameters of a published state dict, one at a time and in their dtypes.

    So a caller can write the model shard by shard, without all weights in memory.
    """
    for key, value in tensors:
        if key in published.dead:
            continue
        yield key, to_residual(value) if key in published.plain else value
        if key.endswith(".txt_proj.weight"):
            block = key.removesuffix("txt_proj.weight")
            for name in ("ehs_proj.weight", "ehs_proj.bias"):
                if block + name in published.identity:
                    yield block + name, value.new_zeros(published.shapes[block + name])


def to_residual(weight: Tensor) -> Tensor:
    """Return W - I `[D, D]`, since x + (W - I) x = W x, in the dtype of W.

    In bfloat16 the result is exact if the diagonal of W lies between 0.5 and 2. Otherwise `lost` measures the error.
    """
    return (weight.double() - torch.eye(len(weight), dtype=torch.float64, device=weight.device)).to(weight.dtype)


def lost(weight: Tensor) -> float:
    """Return the norm of the rounding error of `to_residual`, relative to the norm of W."""
    exact = weight.double() - torch.eye(len(weight), dtype=torch.float64, device=weight.device)
    return ((to_residual(weight).double() - exact).norm() / weight.double().norm()).item()


@dataclass(frozen=True)
class PublishedFolder:
    """A published transformer on disk.

    `folder` and `files` are the transformer's folder and weights, `pipeline` the pipeline's folder that contains it, or
    None.
    """

    published: Published
    config: dict[str, Any]
    folder: Path
    pipeline: Path | None
    files: list[Path]

    def tensors(self, file: Path) -> Iterator[tuple[str, Tensor]]:
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118
                yield key, handle.get_tensor(key)

    def text_projectors(self) -> Iterator[Tensor]:
        """Yield every txt_proj weight `[D, D]` as it is stored."""
        for file in self.files:
            with safe_open(file, framework="pt") as handle:
                for key in handle.keys():  # noqa: SIM118
                    if key.endswith(".txt_proj.weight"):
                        yield handle.get_tensor(key)


def open_folder(path: Path, *, keep_text_query: bool = False, residual: bool | None = None) -> PublishedFolder:
    """Open and check the folder of a published pipeline or transformer; reads configs and headers of weights only.

    For `keep_text_query` and `residual` see `read_config`. Raises `UsageError` if the folder lacks a config or weights,
    or if its weights do not fit its config.
    """
    pipeline = path if (path / "model_index.json").is_file() else None
    folder = path / "transformer" if pipeline else path
    if not (folder / "config.json").is_file():
        raise UsageError(f"{path} is neither a pipeline's folder nor a transformer's: {folder}/config.json is missing.")
    config = read_json(folder / "config.json", "The published config")
    published = read_config(config, keep_text_query=keep_text_query, residual=residual, where=str(folder))
    files = _weight_files(folder)
    shapes: dict[str, Shape] = {}
    for file in files:
        check_safetensors(file)
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118
                if key in shapes:
                    raise UsageError(f"{folder} holds {key} twice, the second time in {file.name}: delete one file.")
                shapes[key] = tuple(handle.get_slice(key).get_shape())
    check_shapes(published, shapes, str(folder))
    return PublishedFolder(published, config, folder, pipeline, files)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / INDEX).exists():
        names = read_json(folder / INDEX, "The index of the weights").get("weight_map")
        if not isinstance(names, dict) or any(Path(str(name)).name != name for name in names.values()):
            raise UsageError(f"{folder / INDEX} names no files beside it as its weights: fetch it again.")
        return [folder / name for name in sorted({*names.values()})]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UsageError(f"{folder} holds no safetensors file; other formats can hold code and are not read.")
    return files


def import_published(
    path: str | Path,
    *,
    keep_text_query: bool = False,
    residual: bool | None = None,
    dtype: torch.dtype | None = None,
    torch_dtype: torch.dtype | None = None,
) -> Any:
    """Load a transformer that the PPCL authors published, in evaluation mode, with the same outputs.

    It is of the stock class if it is pruned in depth alone, otherwise of ppcl's width-pruned class. `path` is the local
    folder of a pipeline or of its transformer. `dtype=None` keeps the stored dtype; `torch_dtype` is an older name of
    `dtype`. For the other arguments see `read_config`. Weights are read one file at a time, so memory holds the model
    and one file. Raises `UsageError` where `open_folder` does, and for the file of a training checkpoint.
    """
    from accelerate import init_empty_weights

    if torch_dtype is not None:
        if dtype is not None:
            raise UsageError("dtype and torch_dtype are two names of one argument: give dtype alone.")
        dtype = torch_dtype
    path = Path(path)
    if path.is_file():
        raise UsageError(f"{path} is a file; training checkpoints become plugs by 'stages=[import_published]'.")
    found = open_folder(path, keep_text_query=keep_text_query, residual=residual)
    with init_empty_weights():
        model = found.published.model_class.from_config(found.published.arch)
    for file in found.files:
        state = {key: value.to(dtype) for key, value in convert(found.published, found.tensors(file))}
        model.load_state_dict(state, strict=False, assign=True)
    return model.eval()
