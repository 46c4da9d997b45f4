"""Reads LoRAs of every plain format: for each layer of a model the pair (A, B) that diffusers would add to it.

diffusers' own readers convert the names. A file whose names they do not know is read by the names of the model's
layers, in any of the spellings below. Scales end up in B. What is no plain LoRA is refused, and so is a LoRA with a
name that no layer of the model has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ppcl.artifacts.files import parse_json
from ppcl.errors import UsageError
from ppcl.surgery.lora_layers import SPELLINGS, Layers

METADATA_KEY = "lora_adapter_metadata"  # diffusers stores PEFT's configuration under this key
_PREFIX = "transformer."
_TEXT = ("text_encoder.", "text_encoder_2.")
# Tensors of a plain LoRA: `.lora_A.weight`, `.lora_A.default.weight`, `.lora_down.weight`, `.lora.down.weight`, ...
_HALF = re.compile(r"(.+?)\.(?:lora_(A|B)(?:\.[^.]+)?|(?:lora[_.]|lora_linear_layer\.)?(down|up))\.weight")
_TEXT_MODULE = re.compile(r"(base_model\.model\.)?(lora_te\d*_|text_encoder|text_model|te\d?\.)")
_KINDS = {
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    "lokr_": "a LoKr",
    "hada_": "a LoHa",
    "oft_": "an OFT",
    "lora_mid": "a LoCon with a middle matrix",
    "diff": "a weight that was tuned as a whole",
    "diff_b": "a bias that was tuned as a whole",
    "bias": "a bias",
}


@dataclass
class Lora:
    """A LoRA of a model: pairs of A `[r, in, ...]` and B `[out, r, ...]`, each adding B A to the weight of a layer.

    `state`: keys such as `transformer.NAME.lora_A.weight`, and `text_encoder.` ones. Every scale is multiplied into B.
    `left_out`: names in the file that diffusers leaves out on the full model too.
    """

    state: dict[str, Tensor]
    left_out: list[str] = field(default_factory=list)


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Return a LoRA file's tensors, and PEFT's metadata or None.

    PEFT's own files have their metadata in `adapter_config.json` beside them. Raises `UsageError` for a file that does
    not read.
    """
    try:
        state = load_file(path)
        with safe_open(path, framework="pt") as file:
            stored = (file.metadata() or {}).get(METADATA_KEY)
        beside = path.with_name("adapter_config.json")
        if stored is None and beside.is_file() and any(key.startswith("base_model.model.") for key in state):
            stored = beside.read_text(encoding="utf-8")
        metadata = parse_json(stored) if stored else None
    except (OSError, SafetensorError):
        raise UsageError(f"{path} is no safetensors file that reads: give the file of a LoRA.") from None
    except ValueError:
        raise UsageError(f"{path}: its metadata, {METADATA_KEY}, do not read as JSON: save the LoRA anew.") from None
    if metadata is not None and not isinstance(metadata, dict):
        raise UsageError(f"{path}: its metadata, {METADATA_KEY}, are no mapping: save the LoRA anew.")
    return state, metadata


def read_lora(raw: Mapping[str, Tensor], metadata: Mapping[str, Any] | None, layers: Layers) -> Lora:
    """Return the LoRA that a file's tensors `raw` and its `metadata` describe, for the model with these `layers`.

    Raises `UsageError` if it is no plain LoRA, if it names a layer that the model does not have or is of another size,
    and if a value is no finite number.
    """
    plain = _plain(raw, layers)
    loader = layers.loader
    modules = sorted({half[0] for key in plain if (half := _half(key))})
    text = [name for name in modules if _TEXT_MODULE.match(name)]
    direct = {name: layers.find(name) for name in modules if name not in text}
    for tried in (plain, _respelt(plain)):
        arrivals = _Arrivals(tried, loader, layers)
        if arrivals.complete:
            state, alphas = _converted(tried, loader)
            left_out = arrivals.left_out + [key for key in state if key.endswith(".alpha") and key not in alphas]
            break
    else:
        if unknown := [name for name, found in direct.items() if found is None]:
            raise layers.refuse(unknown[0])
        words = {key: value for key, value in plain.items() if _TEXT_MODULE.match(key)}
        arrivals = _Arrivals(words, loader, layers)
        state, alphas = _converted(words, loader) if arrivals.reached else ({}, {})
        left_out = arrivals.left_out
        state |= _renamed(plain, {name: found for name, found in direct.items() if found})
    state = {key: value for key, value in state.items() if key.startswith((_PREFIX, *_TEXT)) and _half(key)}
    return Lora(_scaled(state, metadata, alphas, layers), left_out)


def _half(key: str) -> tuple[str, str] | None:
    """Return the module and the half (A or B) of a LoRA's key, or None if it is another kind of key."""
    found = _HALF.fullmatch(key)
    return (found[1], found[2] or {"down": "A", "up": "B"}[found[3]]) if found else None


def _kind(key: str) -> str:
    """Return what a tensor with this key is part of, in words."""
    for part in key.split(".")[::-1]:
        for name, kind in _KINDS.items():
            if part == name or (name.endswith("_") and part.startswith(name)):
                return kind
    return "something that ppcl does not know"


def _plain(raw: Mapping[str, Tensor], layers: Layers) -> dict[str, Tensor]:
    """Return the tensors of a plain LoRA, with floats of 8 bits as bfloat16, which has all of their values.

    Raises `UsageError` for a tensor of another kind, for a pair that lacks a half, and for values that are not finite.
    """
    found: dict[str, Tensor] = {}
    halves: dict[str, dict[str, Tensor]] = {}
    alphas = set()
    for key, value in raw.items():
        module, _, end = key.rpartition(".")
        half = _half(key)
        if end in ("diff", "diff_b") and not value.any():
            continue  # changes nothing
        if half is None and end != "alpha":
            raise UsageError(
                f"{key} is no LoRA key that can be mapped, but of {_kind(key)}: give a plain LoRA, which has two "
                f"tensors for a layer, such as {layers.example}.lora_A.weight and {layers.example}.lora_B.weight."
            )
        if not value.is_floating_point() and half is not None:
            raise UsageError(f"{key} holds {value.dtype}, and a LoRA must hold floats: save it in bfloat16.")
        value = value.detach()
        if value.itemsize == 1 or not value.is_floating_point():
            value = value.to(torch.bfloat16 if half is not None else torch.float32)
        if not value.isfinite().all():
            raise UsageError(
                f"{key} has values that are no finite numbers: give a LoRA whose training did not diverge."
            )
        if half is None:
            if value.numel() != 1 or value < 0:
                shown = value.item() if value.numel() == 1 else f"{value.numel()} numbers"
                raise UsageError(f"{key} is {shown}, and an alpha is one number, 0 or more: save the LoRA anew.")
            alphas.add(module)
        else:
            halves.setdefault(half[0], {})[half[1]] = value
        found[key] = value
    for name, both in halves.items():
        if len(both) < 2:
            raise UsageError(
                f"this LoRA is incomplete: {name} has only one of A and B, and a layer needs both, such as "
                f"{layers.example}.lora_A.weight and {layers.example}.lora_B.weight."
            )
        if min(both["A"].ndim, both["B"].ndim) < 2 or not both["A"].shape[0] == both["B"].shape[1] > 0:
            shapes = " and ".join(str(list(both[side].shape)) for side in "AB")
            raise UsageError(f"this LoRA does not fit: {name} has {shapes}, which cannot be multiplied as B A.")
    if alone := sorted(alphas - halves.keys()):
        raise UsageError(
            f"this LoRA is incomplete: {alone[0]} has an alpha and no tensors like those of {layers.example} "
            "(.lora_A.weight and .lora_B.weight)."
        )
    if not halves:
        raise UsageError(
            f"this file has no tensor of a LoRA: expected are pairs like {layers.example}.lora_A.weight and "
            f"{layers.example}.lora_B.weight."
        )
    return found


def _converted(raw: Mapping[str, Tensor], loader: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what diffusers makes of a LoRA's tensors, and the alphas that it applies later, by key.

    `loader`: the class of the model's pipeline.
    """
    own = {key: value.clone() if _TEXT_MODULE.match(key) else value for key, value in raw.items()}  # scaled in place
    state, *rest = loader.lora_state_dict(own, return_alphas=True, return_lora_metadata=True)
    return dict(state), dict((rest[0] if len(rest) == 2 else None) or {})


def _respelt(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors in ComfyUI's spelling, for the names of layers that only diffusers' converter knows."""
    found: dict[str, Tensor] = {}
    for key, value in raw.items():
        half = _half(key)
        end = ".alpha" if half is None else f".lora_{'down' if half[1] == 'A' else 'up'}.weight"
        name = key.removesuffix(".alpha") if half is None else half[0]
        for prefix in SPELLINGS:
            name = name.removeprefix(prefix)
        found[f"diffusion_model.{name}{end}"] = value
    return found if len(found) == len(raw) else {}  # two names of one layer are refused later


class _Arrivals:
    """Says which modules of a file diffusers loads onto the model.

    To find that out, diffusers converts a LoRA of the same names and sizes, of rank 1, in which every B holds the
    number of its module.

    `reached`: modules that arrive. `left_out`: modules that diffusers leaves out although the model has a place for
    them: some outside of the blocks, and text encoders. `complete`: whether these are all of them, and some arrive.
    """

    def __init__(self, raw: Mapping[str, Tensor], loader: Any, layers: Layers) -> None:
        self.modules = sorted({half[0] for key in raw if (half := _half(key))})
        self.reached: set[str] = set()
        aside: set[str] = set()
        astray: set[str] = set()
        components = () if loader is None else tuple(f"{part}." for part in loader._lora_loadable_modules)
        components = tuple(part for part in components if part in _TEXT)
        for key, value in self._converted_numbers(raw, loader).items():
            if (half := _half(key)) is None or half[1] != "B":
                continue
            name = self.modules[int(value.flatten()[0]) - 1]
            known = key.endswith(".lora_B.weight") and half[0].removeprefix(_PREFIX) in layers.shapes
            if key.startswith(components) or (known and key.startswith(_PREFIX)):
                self.reached.add(name)
            else:
                (aside if known else astray).add(name)
        self.reached -= aside | astray
        words = {name for name in self.modules if _TEXT_MODULE.match(name)} - self.reached
        self.left_out = sorted((aside - astray) | words)
        self.complete = bool(self.reached) and {*self.modules} == self.reached | {*self.left_out}

    def _converted_numbers(self, raw: Mapping[str, Tensor], loader: Any) -> dict[str, Tensor]:
        numbers = {name: float(number) for number, name in enumerate(self.modules, 1)}
        numbered: dict[str, Tensor] = {}
        for key, value in raw.items():
            half = _half(key)
            if half is None:
                numbered[key] = torch.ones(value.shape)
            elif half[1] == "A":
                numbered[key] = torch.ones(1, *value.shape[1:])
            else:
                numbered[key] = torch.full((len(value), 1, *value.shape[2:]), numbers[half[0]])
        try:
            return _converted(numbered, loader)[0] if numbered and loader is not None else {}
        except Exception:  # whatever the converter meets: then these are not names that it knows
            return {}


def _renamed(raw: Mapping[str, Tensor], layers_of: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the tensors under the names of their layers, with alpha / rank multiplied into B."""
    found: dict[str, Tensor] = {}
    for key, value in raw.items():
        half = _half(key)
        if half is None or half[0] not in layers_of:
            continue
        if half[1] == "B" and (alpha := raw.get(f"{half[0]}.alpha")) is not None:
            value = _sound(scaled(value, float(alpha) / value.shape[1]), half[0])
        target = f"{_PREFIX}{layers_of[half[0]]}.lora_{half[1]}.weight"
        if target in found:
            raise UsageError(
                f"this LoRA has {layers_of[half[0]]} twice, the second time as {half[0]}: keep one of them."
            )
        found[target] = value
    return found


def _scaled(
    state: Mapping[str, Tensor], metadata: Mapping[str, Any] | None, alphas: Mapping[str, Tensor], layers: Layers
) -> dict[str, Tensor]:
    """Return the tensors with the scales of `metadata` and `alphas` multiplied into B."""
    if alphas and metadata:
        raise UsageError(
            f"this LoRA has scales both in {METADATA_KEY} and in {next(iter(alphas))}, and diffusers takes it in one "
            "place only: remove one of them."
        )
    result: dict[str, Tensor] = {}
    for prefix in (_PREFIX, *_TEXT):
        part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        if not part:
            continue
        if prefix == _PREFIX:
            _check_shapes(part, layers)
        named = part if prefix == _PREFIX else in_peft_names(part)
        own = {key.removeprefix(prefix): value for key, value in (metadata or {}).items() if _is_of(prefix, key)}
        given = {key.removeprefix(prefix): value for key, value in alphas.items() if key.startswith(prefix)}
        scales = scales_of(named, own, given, text=prefix != _PREFIX)
        for (key, value), name in zip(part.items(), named, strict=True):
            module = name.removesuffix(".lora_B.weight")
            result[prefix + key] = _sound(scaled(value, scales[module]), module) if module != name else value
    return result


def _is_of(prefix: str, key: str) -> bool:
    """Whether an entry of the metadata is of the component `prefix`. Those without a prefix are the transformer's."""
    return key.startswith(prefix) or (prefix == _PREFIX and not key.startswith(_TEXT))


def in_peft_names(text: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the LoRA of a text encoder with the keys that diffusers gives PEFT, in the same order."""
    from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft

    try:
        return convert_state_dict_to_peft(convert_state_dict_to_diffusers(dict(text)))
    except ValueError:
        raise UsageError(
            f"diffusers does not know the names in the text encoder's part of this LoRA, such as {next(iter(text))}: "
            "leave that part out."
        ) from None


def _check_shapes(part: Mapping[str, Tensor], layers: Layers) -> None:
    for key, value in part.items():
        name, half = _half(key) or ("", "")
        shape = layers.shapes[name]
        if (half == "A" and value.shape[1:] != shape[1:]) or (half == "B" and len(value) != shape[0]):
            raise UsageError(
                f"this LoRA does not fit: {name} is of another size than the model's ({half} is {list(value.shape)}, "
                f"the weight {list(shape)}); give a LoRA that was trained on {layers.model}."
            )


def scales_of(
    part: Mapping[str, Tensor],
    metadata: Mapping[str, Any] | None = None,
    alphas: Mapping[str, Tensor] | None = None,
    *,
    text: bool = False,
) -> dict[str, float]:
    """Return the scale of each module, as PEFT computes it: alpha / rank, or alpha / sqrt(rank) for rsLoRA.

    `part`: the LoRA of one component, with keys such as `NAME.lora_B.weight`. `metadata`: the configuration that PEFT
    saved. `alphas`: tensors by key. Without both, scales are 1. `text`: whether the component is a text encoder.
    """
    ranks = {key: value.shape[1] for key, value in part.items() if key.endswith(".lora_B.weight")}
    modules = {key.removesuffix(".lora_B.weight"): rank for key, rank in ranks.items()}
    if not metadata and not alphas:
        return dict.fromkeys(modules, 1.0)
    from diffusers.utils.peft_utils import get_peft_kwargs
    from peft import LoraConfig
    from peft.utils.other import get_pattern_key

    if not metadata:
        begin = "" if text else "^"
        metadata = get_peft_kwargs(
            {f"{begin}{key}": rank for key, rank in ranks.items()}, dict(alphas or {}), dict(part), not text
        )

    def refused(error: Exception) -> UsageError:
        first = str(error).partition("\n")[0]
        return UsageError(f"PEFT does not take the {METADATA_KEY} of this LoRA ({first}): save the LoRA anew.")

    try:
        config: Any = LoraConfig(**metadata)
    except (TypeError, ValueError, AttributeError) as error:
        raise refused(error) from None
    for key in ("use_dora", "lora_bias"):
        if getattr(config, key, False):
            raise UsageError(f"the {METADATA_KEY} of this LoRA say {key}, and only plain LoRAs can be mapped.")
    scales: dict[str, float] = {}
    for name, rank in modules.items():
        try:
            r = config.rank_pattern.get(get_pattern_key(config.rank_pattern.keys(), name), config.r)
            alpha = float(
                config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), name), config.lora_alpha)
            )
        except (TypeError, ValueError, AttributeError, re.error) as error:
            raise refused(error) from None
        if r != rank:
            raise UsageError(f"this LoRA does not fit its {METADATA_KEY}: {name} has rank {rank}, and they say {r}.")
        scales[name] = alpha / (r**0.5 if config.use_rslora else r)
    return scales


def _sound(value: Tensor, module: str) -> Tensor:
    """Return `value`, which was multiplied by the scale of `module`; `UsageError` if it is not finite any more."""
    if not value.isfinite().all():
        raise UsageError(f"the scale of this LoRA for {module} makes values that are no finite numbers: correct it.")
    return value


def scaled(value: Tensor, scale: float) -> Tensor:
    """Return `scale` times `value`, in the dtype of `value` if that has the exact result, else in float32."""
    if scale == 1:
        return value
    wide = value.to(torch.promote_types(value.dtype, torch.float32)) * scale
    narrow = wide.to(value.dtype)
    return narrow if torch.equal(narrow.to(wide.dtype), wide) else wide


def layer_names(keys: Iterable[str]) -> list[str]:
    """Return the names of the transformer's layers among the keys of a LoRA, sorted."""
    return sorted({half[0].removeprefix(_PREFIX) for key in keys if key.startswith(_PREFIX) and (half := _half(key))})
