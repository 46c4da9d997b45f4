"""Says which model's blocks a LoRA counts, and refuses LoRAs that count those of another model.

A LoRA names blocks by number, and nothing in those numbers tells a pruned model from the full one. So LoRAs that ppcl
writes carry a mark: PEFT's metadata name the model as `base_model_name_or_path`. Tensors that ppcl hands on in memory
carry the same name as an attribute, since diffusers drops metadata there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ppcl.artifacts.headers import fingerprint
from ppcl.errors import UsageError
from ppcl.layers import BlockMap
from ppcl.surgery.lora_files import in_peft_names
from ppcl.surgery.provenance import earlier_models, pruned_blocks

_COMPONENTS = ("transformer", "text_encoder", "text_encoder_2")
COUNTS = ("full", "pruned")
_ATTRIBUTE = "_ppcl_counts"
_BEGIN = "ppcl:"


def mark_of(kept: Mapping[str, Sequence[int]]) -> str:
    """Return the mark of LoRAs that count the blocks of a pruned model, which has kept the blocks `kept`."""
    return f"{_BEGIN}{fingerprint(kept)}"


def with_mark(state: Mapping[str, Tensor], mark: str) -> dict[str, Tensor]:
    """Return `state` with marked tensors that share the memory of those given."""
    found = {}
    for key, value in state.items():
        found[key] = value.detach().view_as(value)
        setattr(found[key], _ATTRIBUTE, mark)
    return found


def read_mark(state: Mapping[str, Any], metadata: Mapping[str, Any] | None) -> str | None:
    """Return the mark of a LoRA, or None if it has none."""
    for key in ("transformer.base_model_name_or_path", "base_model_name_or_path"):
        name = (metadata or {}).get(key)
        if isinstance(name, str) and name.startswith(_BEGIN):
            return name
    marks = {getattr(value, _ATTRIBUTE, None) for value in state.values()}
    return marks.pop() if len(marks) == 1 else None


def marked_metadata(state: Mapping[str, Tensor], mark: str) -> dict[str, Any]:
    """Return PEFT's metadata for a LoRA with the scale 1 in every module, and with a mark.

    `state`: keys as diffusers has them, such as `transformer.NAME.lora_B.weight`.
    """
    metadata: dict[str, Any] = {}
    for component in _COMPONENTS:
        begin = f"{component}."
        part = {key.removeprefix(begin): value for key, value in state.items() if key.startswith(begin)}
        if not part:
            continue
        ranks = {
            key.removesuffix(".lora_B.weight"): value.shape[1]
            for key, value in (part if component == "transformer" else in_peft_names(part)).items()
            if key.endswith(".lora_B.weight")
        }
        # PEFT searches for a pattern at the end of a module's name, so `^` tells `a.b` from `c.a.b`.
        anchor = "^" if component == "transformer" else ""
        if component != "transformer":  # its modules may or may not begin with `text_model.`
            ranks = {name.removeprefix("text_model."): rank for name, rank in ranks.items()}
        usual = max(set(ranks.values()), key=list(ranks.values()).count, default=1)
        pattern = {anchor + name: rank for name, rank in ranks.items() if rank != usual}
        own = {"r": usual, "lora_alpha": usual, "rank_pattern": pattern, "alpha_pattern": pattern}
        own |= {"target_modules": sorted(ranks), "base_model_name_or_path": mark}
        metadata |= {begin + key: value for key, value in own.items()}
    return metadata


def blocks_for(mark: str | None, blocks: BlockMap, earlier: Iterable[Mapping[str, Sequence[int]]]) -> BlockMap:
    """Return the map to a pruned model from the model whose blocks a LoRA with this mark counts.

    `blocks`: the map from the full model, which a LoRA without a mark counts. `earlier`: the kept blocks of the pruned
    models that this one was pruned from. Raises `UsageError` for a LoRA of any other pruned model.
    """
    if mark is None:
        return blocks
    for kept in [blocks.kept, *earlier]:
        if mark == mark_of(kept):
            return blocks.since(kept)
    raise UsageError(
        "this LoRA was made for another pruned model, whose blocks it counts: give the LoRA of the full model, or the "
        "pruned model that it was made for."
    )


def refuse_unmapped(transformer: nn.Module, state: Mapping[str, Any], metadata: Mapping[str, Any] | None) -> None:
    """Raise `UsageError` for a LoRA that is not known to count the blocks of this pruned `transformer`.

    Known are those with this model's mark. Models that ppcl did not prune in depth take any LoRA, and so do all models
    one that names no block of a stack that was pruned.
    """
    blocks = pruned_blocks(transformer)
    if blocks is None or not blocks.renumbered:
        return
    stacks = tuple(f"{stack}." for stack in blocks.renumbered)
    numbered = [key for key in state if key.removeprefix("transformer.").startswith(stacks)]
    if not numbered:
        return
    mark = read_mark({key: state[key] for key in numbered}, metadata)
    if mark == mark_of(blocks.kept):
        return
    if mark is not None:
        blocks_for(mark, blocks, earlier_models(transformer))  # a sentence of its own for another pruned model
    raise UsageError(
        "this model is pruned, and this LoRA does not say that it counts the pruned model's blocks: map a LoRA of the "
        "full model with `ppcl ... 'stages=[remap_lora]' lora.path=FILE lora.model=EXPORT` and load the file that this "
        "writes; if it was trained on this pruned model, say so by lora.counts=pruned, or load the state of "
        "ppcl.remap_lora(FILE, pipeline.transformer, counts='pruned')."
    )
