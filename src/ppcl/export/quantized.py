"""Quantised models as diffusers knows them: its own configs, and torchao's tensors made from integers of ours.

What torchao 0.18 holds on a CPU and in safetensors: int8, and int4 as a byte a weight (`IntxWeightOnlyConfig`). Its
packed int4 formats need kernels of a GPU, or are written to no safetensors file.
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
    if find_spec("torchao") is None:
        raise UsageError(f"{what} needs torchao, which is not installed: pip install 'torchao>=0.18'.")


def require_bitsandbytes() -> None:
    """bitsandbytes quantises on a GPU alone; nothing is written without one."""
    lacks = [] if torch.cuda.is_available() else ["a CUDA GPU"]
    if find_spec("bitsandbytes") is None:
        lacks.append("bitsandbytes (pip install bitsandbytes)")
    if lacks:
        raise UsageError(f"quantize.scheme=nf4 needs {' and '.join(lacks)}: quantize=int8 and int4 need neither.")


def torchao_config(scheme: str, group_size: int | None, kept: list[str]) -> Any:
    """diffusers' config of a torchao scheme; modules named in `kept` are not converted.

    int8 has a scale a row, int4 a scale and a zero point for each `group_size` neighbouring weights of a row.
    """
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, MappingType
    from torchao.quantization.granularity import PerGroup

    if scheme == "int8":
        # Its inductor settings are for the whole process, among them less exact float32 products.
        return TorchAoConfig(Int8WeightOnlyConfig(set_inductor_config=False), kept)
    assert group_size is not None, "checked in the configuration"
    return TorchAoConfig(IntxWeightOnlyConfig(INT4, PerGroup(group_size), MappingType.ASYMMETRIC), kept)


def nf4_settings(dtype: torch.dtype, kept: list[str]) -> dict[str, Any]:
    """Arguments of diffusers' `BitsAndBytesConfig`, which cannot be made where bitsandbytes is not installed.

    NF4 with its scales quantised too, as QLoRA has it (arXiv 2305.14314, section 3).
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
    """The linear layers to quantise, those that a pattern in `skip` names, and those that groups do not divide."""
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
    """The names of `kept` that diffusers takes for no part of a name in `chosen`: it looks for them anywhere in it."""
    paths = [f"{name}.weight" for name in chosen]
    return [name for name in kept if not any(f"{name}." in path for path in paths)]


def round_to_nearest(linear: nn.Linear, config: Any) -> None:
    """Round as diffusers does when it loads a model with `config`."""
    from torchao.quantization import quantize_

    quantize_(linear, config.get_apply_tensor_subclass())


def torchao_tensor(ints: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """torchao's tensor of just these integers `[dim_out, dim_in]` on that grid: nothing is rounded again."""
    from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor

    scale, block = grid.scale.to(grid.dtype), [1, grid.group_size]
    if grid.bits == 8:
        assert grid.symmetric
        return Int8Tensor(ints, scale, block, dtype, zero_point=torch.zeros_like(scale, dtype=torch.int8))
    zero = grid.zero.to(grid.dtype)
    return IntxUnpackedToInt8Tensor(ints, scale, zero, INT4, tuple(block), dtype, None)


def declare(model: Any, config: Any) -> None:
    """Make diffusers take `model` for one it has quantised itself, so that it saves it as such."""
    from diffusers.quantizers import DiffusersAutoQuantizer

    quantizer = DiffusersAutoQuantizer.from_config(config)
    quantizer.validate_environment()
    quantizer.preprocess_model(model, device_map=None)
    model.hf_quantizer = quantizer
    model.register_to_config(quantization_config=config)


def num_bytes(tensor: Tensor) -> int:
    """Return the bytes of a tensor; torchao's wrappers themselves say what they would take unquantised."""
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(num_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.numel() * tensor.element_size()


def weight_bytes(model: nn.Module) -> int:
    return sum(num_bytes(parameter) for parameter in model.parameters())
