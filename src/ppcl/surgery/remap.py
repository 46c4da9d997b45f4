"""Maps LoRAs of the full model to a pruned model.

A LoRA names blocks by number. On a model with fewer blocks, diffusers would load it into the wrong blocks and warn only
about the numbers that do not exist. So this module renumbers blocks by the `kept_layers` in an export's config.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.artifacts.headers import fingerprint
from ppcl.errors import UsageError

SOURCES = ("first", "mean", "sum")
_PREFIX = "transformer."
_SIDES = {"lora_A.weight": "A", "lora_B.weight": "B"}


@dataclass
class RemappedLora:
    """A LoRA for a pruned model.

    `state` has PEFT's keys; alpha / rank is multiplied into B. `dropped` names the full model's modules whose LoRA has
    no counterpart in the pruned model.
    """

    state: dict[str, Tensor]
    dropped: list[str] = field(default_factory=list)


def _place(name: str, stacks: Iterable[str]) -> tuple[str, int, str] | None:
    """Split the name of a module into stack, block number and name within the block; None if it is in no stack."""
    for stack in stacks:
        number, _, inner = name.removeprefix(f"{stack}.").partition(".")
        if name.startswith(f"{stack}.") and number.isdigit() and inner:
            return stack, int(number), inner
    return None


def provenance_of(transformer: nn.Module) -> dict[str, Any]:
    """Return the provenance in an exported transformer's config; `UsageError` if it has none."""
    config: Any = transformer.config
    found = config.get("ppcl")
    if not found:
        raise UsageError("this transformer's config has no ppcl key: it is not a model that ppcl exported.")
    return dict(found)


def scales_of(metadata: Mapping[str, Any] | None, modules: Iterable[str]) -> dict[str, float]:
    """Return the scale alpha / rank of each module, from the metadata that PEFT saves; 1 without metadata."""
    if not metadata:
        return dict.fromkeys(modules, 1.0)
    plain = {key.removeprefix(_PREFIX): value for key, value in metadata.items()}
    scales = {}
    for module in modules:
        values = []
        for default, pattern in (("lora_alpha", "alpha_pattern"), ("r", "rank_pattern")):
            patterns: Mapping[str, float] = plain.get(pattern) or {}
            special = [value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)]
            values.append(special[0] if special else plain[default])
        alpha, rank = values
        scales[module] = alpha / (rank**0.5 if plain.get("use_rslora") else rank)
    return scales


def remap_lora(
    state: Mapping[str, Tensor],
    transformer: nn.Module,
    *,
    source: str = "first",
    metadata: Mapping[str, Any] | None = None,
) -> RemappedLora:
    """Map the LoRA `state` of a full model to an exported `transformer`, which may be on the meta device.

    `state` and `metadata` are as `pipeline.lora_state_dict` returns them. A student block replaces blocks u to v. With
    `source=first` it gets the LoRA of block u. With `mean` or `sum` it gets the mean or the sum of the LoRAs of all
    these blocks, as one LoRA of higher rank. LoRAs of modules that a width-pruned block does not have are dropped. If
    it has kept half of a modulation, that half of the LoRA is kept. Raises `UsageError` if the LoRA is of another
    architecture or incomplete.
    """
    provenance = provenance_of(transformer)
    kept, removed = provenance["kept_layers"], provenance["removed_intervals"]
    return map_blocks(state, dict(transformer.named_modules()), kept, removed, source=source, metadata=metadata)


def map_blocks(
    state: Mapping[str, Tensor],
    modules: Mapping[str, nn.Module],
    kept: Mapping[str, Sequence[int]],
    removed: Mapping[str, list[Any]],
    *,
    source: str = "first",
    metadata: Mapping[str, Any] | None = None,
) -> RemappedLora:
    """Do what `remap_lora` does, for a transformer given by its named `modules`.

    For each stack, `kept` holds the full model's indices of its blocks, and `removed` the intervals [u, v].
    """
    if source not in SOURCES:
        raise UsageError(f"lora.source={source} is not one of {', '.join(SOURCES)}.")
    pairs, others = _pairs(state)
    scales = scales_of(metadata, pairs)
    ends = {stack: dict(found) for stack, found in removed.items()}
    _check_stacks(pairs, kept, modules)
    places = {name: _place(name, kept) for name in pairs}
    result, used = RemappedLora(dict(others)), set()
    for stack, indices in kept.items():
        for place, u in enumerate(indices):
            last = u if source == "first" else ends.get(stack, {}).get(u, u)
            inside = [found for found in places.values() if found and found[0] == stack and u <= found[1] <= last]
            for inner in sorted({name for _, _, name in inside}):
                members = [f"{stack}.{index}.{inner}" for index in range(u, last + 1)]
                members = [name for name in members if name in pairs]
                found = modules.get(f"{stack}.{place}.{inner}")
                target = getattr(found, "base_layer", found)  # PEFT wraps a layer that has a LoRA already
                if not isinstance(target, nn.Linear):
                    continue
                share = 1 / (last - u + 1) if source == "mean" else 1.0
                joined = _join([(*pairs[name], share * scales[name]) for name in members], target)
                if joined is None:
                    raise UsageError(f"this LoRA does not fit: {members[0]} is of another size than the model's.")
                used.update(members)
                for side, value in zip(_SIDES, joined, strict=True):
                    result.state[f"{_PREFIX}{stack}.{place}.{inner}.{side}"] = value
    for name in pairs:
        if places[name] is None:
            a, b = pairs[name]
            result.state[f"{_PREFIX}{name}.lora_A.weight"] = a
            result.state[f"{_PREFIX}{name}.lora_B.weight"] = b * scales[name]
        elif name not in used:
            result.dropped.append(name)
    return result


def adapter_metadata(state: Mapping[str, Tensor], transformer: nn.Module) -> dict[str, Any]:
    """Return PEFT's metadata for a mapped `state`, with scale 1 for every module.

    It marks the LoRA as one for this pruned model, so that `refuse_unmapped` accepts it.
    """
    names = {key: value.shape[1] for key, value in state.items() if key.endswith(".lora_B.weight")}
    ranks = {key.removeprefix(_PREFIX).removesuffix(".lora_B.weight"): rank for key, rank in names.items()}
    usual = max(set(ranks.values()), key=list(ranks.values()).count, default=1)
    pattern = {f"^{name}": rank for name, rank in ranks.items() if rank != usual}
    metadata = {
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "base_model_name_or_path": _base_name(transformer),
    }
    return {f"{_PREFIX}{key}": value for key, value in metadata.items()}


def _base_name(transformer: nn.Module) -> str:
    return f"ppcl:{fingerprint(provenance_of(transformer)['kept_layers'])}"


def refuse_unmapped(transformer: nn.Module, state: Iterable[str], metadata: Mapping[str, Any] | None) -> None:
    """Raise `UsageError` for a LoRA that was made for the full model, not for this pruned model.

    Accepted are a LoRA that was mapped to this model (its metadata says so), and one whose highest block number is that
    of this model's last block, as in a LoRA that was trained on this model.
    """
    config: Any = transformer.config
    kept = (config.get("ppcl") or {}).get("kept_layers") or {}
    if all(indices == list(range(len(indices))) for indices in kept.values()):
        return  # not pruned in depth, or not exported by ppcl
    if ((metadata or {}).get("base_model_name_or_path") or "") == _base_name(transformer):
        return
    numbers: dict[str, set[int]] = {}
    for key in state:
        place = _place(key.removeprefix(_PREFIX), kept)
        if place is not None:
            numbers.setdefault(place[0], set()).add(place[1])
    if all(max(found) == len(kept[stack]) - 1 for stack, found in numbers.items()):
        return
    raise UsageError(
        "this LoRA numbers the blocks of the full model, and this model is pruned: map it with "
        "`ppcl ... 'stages=[remap_lora]' lora.path=FILE lora.model=EXPORT` and load the file that this writes."
    )


def _pairs(state: Mapping[str, Tensor]) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Return A and B for every module of the transformer, and the tensors of other components."""
    halves: dict[str, dict[str, Tensor]] = {}
    others = {}
    for key, value in state.items():
        if key.startswith("text_encoder"):
            others[key] = value
            continue
        name = key.removeprefix(_PREFIX)
        side = next((side for side in _SIDES if name.endswith(f".{side}")), None)
        if side is None:
            raise UsageError(f"{key} is no LoRA key that can be mapped; only plain LoRAs (A and B) can.")
        halves.setdefault(name.removesuffix(f".{side}"), {})[_SIDES[side]] = value
    incomplete = [name for name, found in halves.items() if len(found) < 2]
    if incomplete:
        raise UsageError(f"this LoRA is incomplete: {incomplete[0]} has only one of A and B.")
    return {name: (found["A"], found["B"]) for name, found in halves.items()}, others


def _check_stacks(pairs: Iterable[str], kept: Mapping[str, Sequence[int]], modules: Iterable[str]) -> None:
    """Raise `UsageError` if the LoRA has numbered modules outside of this model's stacks and modules."""
    known = {*kept, *modules}
    for name in pairs:
        found = re.fullmatch(r"(.+?)\.\d+\..+", name)
        if found and found[1] not in known:
            raise UsageError(f"this LoRA is of another architecture: it has {name}, the model has {', '.join(kept)}.")


def _join(members: list[tuple[Tensor, Tensor, float]], target: nn.Linear) -> tuple[Tensor, Tensor] | None:
    """Join the (A, B, scale) of `members` to one pair with B A = sum of scale_i B_i A_i.

    Returns None if that does not fit the shape of `target`. Two larger shapes are cut to the part that a width-pruned
    block keeps: the attention's half of a modulation (rows), and the fifth of a single-stream output projection that
    reads the attention (columns).
    """
    a = torch.cat([a for a, _, _ in members])
    b = torch.cat([scale * b for _, b, scale in members], dim=1)
    rows, columns = target.out_features, target.in_features
    if (len(b), a.shape[1]) not in ((rows, columns), (2 * rows, columns), (rows, 5 * columns)):
        return None
    return a[:, :columns].contiguous(), b[:rows].contiguous()
