"""Reads models that the PPCL authors published, and checkpoints of their training, into ppcl's classes and plugs.

Facts of their format (from github.com/OPPO-Mente-Lab/Qwen-Image-Pruning; no code is copied from there):
- Their transformer class has the name of the stock one. Lists of block positions in its config tell the two apart:
  `single_stream_index` (blocks without a text stream) and, since the 10B model, `ffn_proj_index` and `ehs_proj_index`.
- Their parameters have the same names as ours. A text-pruned block of theirs still holds a text output projection and
  text queries, on which no output depends. `ehs_proj` can be in any text-pruned block, or in none.
- All projectors are residual, as ours are, except in the 12B model. That one is older: its txt_proj is the whole map.
- A checkpoint of their width training numbers projectors, not blocks. `attn_proj_list` (our txt_proj) has one for each
  kept block of every group [a, b] in `ehs_same`, except block a, whose text the others read. `ehs_proj_list` has one
  per group, for its last block. `ffn_proj_list` has two per kept block, text then image.
- A checkpoint of their depth training holds the students alone.
"""

from __future__ import annotations

import inspect
import pickle
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from safetensors import safe_open
from torch import Tensor

from ppcl.artifacts.files import check_safetensors, read_json
from ppcl.artifacts.plan import Interval
from ppcl.errors import UsageError
from ppcl.families.qwen_image.transformer_qwen_image_pruned import PrunedQwenImageTransformer2DModel
from ppcl.layers import kept_layers

STACK = "transformer_blocks"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
_TEXT, _FFN, _OUTPUT = "single_stream_index", "ffn_proj_index", "ehs_proj_index"
_DEAD = ("attn.to_add_out.weight", "attn.to_add_out.bias")
_DEAD_QUERY = ("attn.add_q_proj.weight", "attn.add_q_proj.bias", "attn.norm_added_q.weight")
_STUDENTS, _TEXT_IN, _TEXT_OUT, _FFNS = "transformer_distill_blocks", "attn_proj_list", "ehs_proj_list", "ffn_proj_list"
Shape = tuple[int, ...]
State = dict[str, Tensor]


# Models.


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
        _check_shape(key, shapes[key], shape, where, "its config asks for", "config and weights must be of one model")
    for key in shapes:
        if key in published.identity or key not in published.shapes.keys() | published.dead:
            raise UsageError(f"{where} holds {key}, for which its config has no place: they are not of one model.")


def _check_shape(key: str, found: Sequence[int], needed: Sequence[int], where: str, because: str, remedy: str) -> None:
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


# Training checkpoints.


@dataclass(frozen=True)
class TrainedProjector:
    """Projectors of one block, taken from a training checkpoint.

    `index` and `reference` are blocks of the teacher; a text projector reads the text of `reference`. `kind` is `text`
    or `ffn`. `entries` names the modules of the checkpoint that they come from, such as `ehs_proj_list.0`.
    """

    index: int
    kind: str
    reference: int | None
    state_dict: State
    entries: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Training:
    """The students and projectors that a training checkpoint holds for given intervals and width sets."""

    students: dict[Interval, State]
    projectors: list[TrainedProjector]


def read_checkpoint(path: Path) -> dict[str, list[State]]:
    """Return the module lists of a training checkpoint by name: one state dict per module.

    Tensors are mapped from the file, so reading them costs memory only when they are used. Raises `UsageError` for a
    file that is damaged, holds more than tensors, or is not such a checkpoint.
    """
    if not zipfile.is_zipfile(path):
        raise UsageError(f"{path} is cut short or not a torch.save file; other pickles can hold code and are not read.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise UsageError(
            f"{path} holds more than tensors, which could run code when unpickled: it is not read; save the state "
            "dicts alone."
        ) from None
    except (RuntimeError, ValueError, KeyError, EOFError, OSError):
        raise UsageError(f"{path} is damaged: torch.load does not read it; fetch it again.") from None
    if not isinstance(content, Mapping):
        raise UsageError(f"{path} holds a {type(content).__name__}, not the state dicts of a training.")
    if content and all(isinstance(value, Tensor) for value in content.values()):
        content = {_STUDENTS: content}  # a checkpoint of the depth training
    if _STUDENTS not in content:
        raise UsageError(
            f"{path} lacks {_STUDENTS}: it has {', '.join(map(str, content))}; give a training checkpoint."
        )
    wanted = (_STUDENTS, _TEXT_IN, _TEXT_OUT, _FFNS)
    return {name: _modules(content[name], name, path) for name in wanted if name in content}


def _modules(state: Any, name: str, path: Path) -> list[State]:
    """Split the state dict of a module list into one state dict per module."""
    modules: dict[int, State] = {}
    for key, value in state.items() if isinstance(state, Mapping) else [(None, None)]:
        number, _, inner = str(key).removeprefix("module.").partition(".")
        if not number.isdecimal() or not isinstance(value, Tensor):
            raise UsageError(f"{path}: {name} is not the state dict of a list of modules; it has {key}.")
        modules.setdefault(int(number), {})[inner] = value
    if sorted(modules) != list(range(len(modules))):
        raise UsageError(f"{path}: {name} numbers its modules {sorted(modules)}, not from 0 on: it is incomplete.")
    return [modules[number] for number in range(len(modules))]


def read_training(
    path: Path,
    arch: Mapping[str, Any],
    intervals: Sequence[Interval],
    text: Sequence[int] = (),
    ffn: Sequence[int] = (),
    ehs_same: Sequence[Sequence[int]] | None = None,
) -> Training:
    """Read the students of all `intervals`, and the projectors of the blocks in `text` and `ffn`.

    All block indices are the teacher's, and `arch` is the teacher's config. `ehs_same` are the groups [a, b] that the
    text projectors were trained in; each group gets the output projector that was trained for it. (The authors' own
    conversion script gives the first group's projector to all.) Raises `UsageError` if the checkpoint does not fit the
    teacher, the intervals, the sets or the groups.
    """
    lists = read_checkpoint(path)
    num_layers = int(arch["num_layers"])
    with torch.device("meta"):
        (block,) = QwenImageTransformer2DModel.from_config({**arch, "num_layers": 1}).transformer_blocks
    kept = kept_layers(num_layers, intervals)
    _check_count(path, lists, _STUDENTS, len(intervals), f"intervals= has {len(intervals)}", "layer_indexs")
    shapes = {key: tuple(value.shape) for key, value in block.state_dict().items()}
    for number, student in enumerate(lists[_STUDENTS]):
        _check_module(path, f"{_STUDENTS}.{number}", student, shapes)
    dim: Any = block.dim
    linear = {"weight": (dim, dim), "bias": (dim,)}

    def module(name: str, number: int, target: str) -> State:
        _check_module(path, f"{name}.{number}", lists[name][number], linear)
        return {f"{target}.{key}": value for key, value in lists[name][number].items()}

    projectors = []
    if text:
        projectors += _text_projectors(path, lists, intervals, kept, text, ehs_same, num_layers, module)
    elif ehs_same is not None:
        raise UsageError(f"published.ehs_same={_plain(ehs_same)} is read only where width= names text streams.")
    if ffn:
        told = f"intervals= leaves {len(kept)} blocks, with two each"
        _check_count(path, lists, _FFNS, 2 * len(kept), told, "layer_indexs")
    for index in ffn:
        number = 2 * kept.index(index)
        state = module(_FFNS, number, "txt_ffn_proj") | module(_FFNS, number + 1, "img_ffn_proj")
        projectors.append(TrainedProjector(index, "ffn", None, state, [f"{_FFNS}.{number}", f"{_FFNS}.{number + 1}"]))
    return Training(dict(zip(intervals, lists[_STUDENTS], strict=True)), projectors)


def _text_projectors(
    path: Path,
    lists: Mapping[str, list[State]],
    intervals: Sequence[Interval],
    kept: Sequence[int],
    text: Sequence[int],
    ehs_same: Sequence[Sequence[int]] | None,
    num_layers: int,
    module: Callable[[str, int, str], State],
) -> list[TrainedProjector]:
    if ehs_same is None:
        raise UsageError(
            f"width= names text streams {list(text)}: give published.ehs_same=[[a,b],...], every group that {path} "
            "was trained with."
        )
    check_ehs_same(ehs_same, num_layers, intervals)
    members = [[index for index in kept if a < index <= b] for a, b in ehs_same]
    total = sum(map(len, members))
    told = f"published.ehs_same={_plain(ehs_same)} has {total} kept blocks"
    _check_count(path, lists, _TEXT_IN, total, told, "ehs_same")
    if _TEXT_OUT in lists:
        told = f"published.ehs_same={_plain(ehs_same)} has {len(members)} groups"
        _check_count(path, lists, _TEXT_OUT, len(members), told, "ehs_same")
    if strays := sorted({*text} - {index for group in members for index in group}):
        raise UsageError(f"width= names text stream {strays[0]}, which lies in no group of published.ehs_same.")
    found: list[TrainedProjector] = []
    number = 0
    for group, ((a, b), blocks) in enumerate(zip(ehs_same, members, strict=True)):
        chosen = [index for index in blocks if index in text]
        if chosen and chosen != blocks:
            raise UsageError(
                f"width= names text streams {chosen} of the group [{a}, {b}], which was trained as a whole: name all "
                f"of {blocks}, or none."
            )
        for index in chosen:
            entry = number + blocks.index(index)
            state, entries = module(_TEXT_IN, entry, "txt_proj"), [f"{_TEXT_IN}.{entry}"]
            if index == blocks[-1] and _TEXT_OUT in lists:
                state, entries = state | module(_TEXT_OUT, group, "ehs_proj"), [*entries, f"{_TEXT_OUT}.{group}"]
            found.append(TrainedProjector(index, "text", a, state, entries))
        number += len(blocks)
    return found


def check_ehs_same(ehs_same: Sequence[Sequence[int]], num_layers: int, intervals: Sequence[Interval]) -> None:
    """Raise `UsageError` unless groups [a, b] are ordered and disjoint, and no interval crosses the end of a group."""
    previous = -1
    for pair in ehs_same:
        where = f"published.ehs_same: {list(pair)}"
        if len(pair) != 2 or pair[0] >= pair[1]:
            raise UsageError(f"{where} is not a pair [a, b] with a < b.")
        a, b = pair
        if a < 0 or b >= num_layers:
            raise UsageError(f"{where} is out of range; the model's blocks are 0 to {num_layers - 1}.")
        if a <= previous:
            raise UsageError(f"{where} overlaps or precedes the group before it; groups are disjoint and ordered.")
        previous = b
        for u, v in intervals:
            if not (a <= u and v <= b) and u <= b and a <= v:
                raise UsageError(f"{where} cuts the interval [{u}, {v}], which must lie in a group as a whole.")


def _plain(pairs: Iterable[Sequence[int]]) -> str:
    return str([list(pair) for pair in pairs]).replace(" ", "")


def _check_count(path: Path, lists: Mapping[str, list[State]], name: str, needed: int, told: str, flag: str) -> None:
    if name not in lists:
        raise UsageError(f"{path} lacks {name}: it has {', '.join(lists)}; leave out what is not there (width=none).")
    if len(lists[name]) != needed:
        raise UsageError(
            f"{path}: {name} holds {len(lists[name])} modules, but {told}: give the value that it was trained with "
            f"(the authors' {flag})."
        )


def _check_module(path: Path, name: str, state: State, shapes: Mapping[str, Shape]) -> None:
    for key, shape in shapes.items():
        if key not in state:
            raise UsageError(
                f"{path} lacks {name}.{key} {list(shape)}: it is no checkpoint of this teacher's training."
            )
        remedy = "choose the teacher of its training (model=, model.path=)"
        _check_shape(f"{name}.{key}", state[key].shape, shape, str(path), "the teacher asks for", remedy)
    if strays := sorted(state.keys() - shapes.keys()):
        raise UsageError(f"{path} holds {name}.{strays[0]}, which no block of this teacher has.")
