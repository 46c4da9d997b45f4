"""Builds quantised models that diffusers can save and load, with torchao's tensors made from given integers.

torchao 0.18 supports two formats both on a CPU and in safetensors: int8, and int4 stored as one byte per weight
(`IntxWeightOnlyConfig`). Its packed int4 formats need GPU kernels, or cannot be written to safetensors.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.errors import UsageError
from ppcl.ops.rounding import Grid

BITS = {"int8": 8, "int4": 4}
INT4: Any = getattr(torch, "int4")  # torch's stubs do not have it  # noqa: B009


def require_torchao(what: str) -> None:
    """Raise `UsageError` if torchao is not installed; `what` needs it and starts the sentence."""
    if find_spec("torchao") is None:
        raise UsageError(f"{what} needs torchao, which is not installed: pip install 'torchao>=0.18'.")


def require_bitsandbytes() -> None:
    """Raise `UsageError` without bitsandbytes or without a CUDA GPU, on which alone it can quantise."""
    lacks = [] if torch.cuda.is_available() else ["a CUDA GPU"]
    if find_spec("bitsandbytes") is None:
        lacks.append("bitsandbytes (pip install bitsandbytes)")
    if lacks:
        raise UsageError(f"quantize.scheme=nf4 needs {' and '.join(lacks)}: quantize=int8 and int4 need neither.")


def torchao_config(scheme: str, group_size: int | None, kept: list[str]) -> Any:
    """Return diffusers' config of a torchao `scheme`; modules named in `kept` are not quantised.

    int8 has one scale per row. int4 has a scale and a zero point for every `group_size` neighbouring weights of a row.
    """
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, MappingType
    from torchao.quantization.granularity import PerGroup

    if scheme == "int8":
        # torchao would change inductor's settings for the whole process, among them the precision of float32 matmuls.
        return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False), kept)
    assert group_size is not None, "checked in the configuration"
    return TorchAoConfig(IntxWeightOnlyConfig(INT4, PerGroup(group_size), MappingType.ASYMMETRIC), kept)


def nf4_settings(dtype: torch.dtype, kept: list[str]) -> dict[str, Any]:
    """Return the arguments of diffusers' `BitsAndBytesConfig`, which cannot be built without bitsandbytes.

    They are NF4 with quantised scales, as in QLoRA (arXiv 2305.14314, section 3).
    """
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": dtype,
        "llm_int8_skip_modules": kept,
    }


def split_linears(
    model: nn.Module, skip: Iterable[str], group_size: int | None
) -> tuple[list[str], list[str], list[str]]:
    """Return the names of the linear layers to quantise, of those to skip, and of those whose rows do not fit.

    A layer is skipped if its name matches a pattern in `skip`. Its rows do not fit if their length is not a multiple of
    `group_size`.
    """
    chosen, skipped, undivided = [], [], []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if any(fnmatchcase(name, pattern) for pattern in skip):
            skipped.append(name)
        elif group_size is not None and module.in_features % group_size:
            undivided.append(name)
        else:
            chosen.append(name)
    return chosen, skipped, undivided


def unambiguous(kept: Iterable[str], chosen: Iterable[str]) -> list[str]:
    """Return the names in `kept` that are no part of the name of a layer in `chosen`.

    diffusers leaves every layer unquantised whose name contains one of the names it is given.
    """
    paths = [f"{name}.weight" for name in chosen]
    return [name for name in kept if not any(f"{name}." in path for path in paths)]


def round_to_nearest(linear: nn.Linear, config: Any) -> None:
    """Quantise `linear` in place, by rounding to nearest, as diffusers does when it loads a model with `config`."""
    from torchao.quantization import quantize_

    quantize_(linear, config.get_apply_tensor_subclass())


def torchao_tensor(ints: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Return torchao's tensor with the integers `ints` `[dim_out, dim_in]` on `grid`, without rounding again.

    `dtype` is the dtype of the weight that the tensor stands for.
    """
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor

    scale, block = grid.scale.to(grid.dtype), [1, grid.group_size]
    if grid.bits == 8:
        assert grid.symmetric
        return Int8Tensor(ints, scale, block, dtype, zero_point=torch.zeros_like(scale, dtype=torch.int8))
    zero = grid.zero.to(grid.dtype)
    return IntxUnpackedToInt8Tensor(ints, scale, zero, INT4, tuple(block), dtype, None)


def declare(model: Any, config: Any) -> None:
    """Mark `model` as quantised by diffusers with `config`, so that diffusers saves it as a quantised model."""
    from diffusers.quantizers import DiffusersAutoQuantizer

    quantizer = DiffusersAutoQuantizer.from_config(config)
    quantizer.validate_environment()
    quantizer.preprocess_model(model, device_map=None)
    model.hf_quantizer = quantizer
    model.register_to_config(quantization_config=config)


def num_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor as stored. (A torchao tensor itself reports its unquantised size.)"""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(num_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def weight_bytes(model: nn.Module) -> int:
    return sum(num_bytes(parameter) for parameter in model.parameters())
