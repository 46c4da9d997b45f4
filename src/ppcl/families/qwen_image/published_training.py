"""Reads checkpoints of the PPCL authors' own training into students and projectors.

Facts of their format (from github.com/OPPO-Mente-Lab/Qwen-Image-Pruning; no code is copied from there):
- A checkpoint of their width training numbers projectors, not blocks. `attn_proj_list` (our txt_proj) has one for each
  kept block of every group [a, b] in `ehs_same`, except block a, whose text the others read. `ehs_proj_list` has one
  per group, for its last block. `ffn_proj_list` has two per kept block, text then image.
- A checkpoint of their depth training holds the students alone.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from torch import Tensor

from ppcl.artifacts.plan import Interval
from ppcl.errors import UsageError
from ppcl.families.qwen_image.published import Shape, State, check_shape
from ppcl.layers import kept_layers

_STUDENTS, _TEXT_IN, _TEXT_OUT, _FFNS = "transformer_distill_blocks", "attn_proj_list", "ehs_proj_list", "ffn_proj_list"


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
        check_shape(f"{name}.{key}", state[key].shape, shape, str(path), "the teacher asks for", remedy)
    if strays := sorted(state.keys() - shapes.keys()):
        raise UsageError(f"{path} holds {name}.{strays[0]}, which no block of this teacher has.")
