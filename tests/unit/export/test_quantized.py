"""torchao's tensors and diffusers' configs as we make them."""

import pytest
import torch
from torch import nn

from ppcl.errors import UsageError
from ppcl.export.quantized import (
    nf4_settings,
    num_bytes,
    require_bitsandbytes,
    require_torchao,
    round_to_nearest,
    split_linears,
    torchao_config,
    torchao_tensor,
    unambiguous,
    weight_bytes,
)
from ppcl.ops.rounding import spanning_grid

DTYPES = [torch.float32, torch.bfloat16]


def weight(dim_out=6, dim_in=64, dtype=torch.float32):
    return torch.randn(dim_out, dim_in, generator=torch.Generator().manual_seed(0)).to(dtype)


def our_tensor(scheme, dtype):
    """A weight, the values of its integers on a grid, and torchao's tensor of them."""
    original, int8 = weight(dtype=dtype), scheme == "int8"
    stored = torch.float32 if int8 else dtype
    grid = spanning_grid(original, 64 if int8 else 16, 8 if int8 else 4, stored, symmetric=int8)
    if not int8:
        grid.zero = (grid.zero + 0.25).to(dtype).double()  # not whole
    ints = grid.nearest(original.double())
    return original, grid.values(ints), ints, torchao_tensor(ints, grid, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_torchao_reads_integers_and_grid_as_we_mean_them(scheme, dtype):
    original, values, ints, tensor = our_tensor(scheme, dtype)
    assert tensor.shape == original.shape
    assert tensor.dtype == dtype
    assert torch.equal(tensor.qdata, ints)
    exact = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(tensor.dequantize().double(), values, rtol=exact, atol=exact)
    inputs = weight(5, dtype=dtype)
    expected = (inputs.double() @ values.T).to(dtype)
    found = nn.functional.linear(inputs, tensor)
    torch.testing.assert_close(found, expected, rtol=exact, atol=20 * exact)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_to_the_nearest_our_grid_is_torchaos(scheme):
    linear = nn.Linear(64, 6)
    linear.weight = nn.Parameter(weight())
    round_to_nearest(linear, torchao_config(scheme, 16 if scheme == "int4" else None, []))
    size = (64, 8) if scheme == "int8" else (16, 4)
    grid = spanning_grid(weight(), *size, torch.float32, symmetric=scheme == "int8")
    ours = torchao_tensor(grid.nearest(weight().double()), grid, torch.float32)
    assert type(ours) is type(linear.weight.data)
    assert (ours.qdata != linear.weight.qdata).float().mean() < 0.01  # ties
    torch.testing.assert_close(ours.dequantize(), linear.weight.dequantize(), rtol=0, atol=grid.scale.max().item())


def test_bytes_are_those_that_are_stored():
    linear = nn.Linear(64, 6)
    assert weight_bytes(linear) == 4 * (64 * 6 + 6)
    round_to_nearest(linear, torchao_config("int4", 16, []))
    assert num_bytes(linear.weight) == 64 * 6 + 6 * 4 * (4 + 1)  # a byte each, a scale and an int8 zero a group
    assert weight_bytes(linear) == num_bytes(linear.weight) + 4 * 6
    linear = nn.Linear(64, 6)
    round_to_nearest(linear, torchao_config("int8", None, []))
    assert 64 * 6 + 6 * 4 <= num_bytes(linear.weight) <= 64 * 6 + 6 * (4 + 1)


def test_nf4_is_what_the_qlora_paper_describes():
    settings = nf4_settings(torch.bfloat16, ["proj_out", "img_in"])
    assert settings["load_in_4bit"]
    assert settings["bnb_4bit_quant_type"] == "nf4"
    assert settings["bnb_4bit_use_double_quant"]
    assert settings["bnb_4bit_compute_dtype"] == torch.bfloat16
    assert settings["llm_int8_skip_modules"] == ["proj_out", "img_in"]


def test_diffusers_takes_these_settings_for_nf4():
    pytest.importorskip("bitsandbytes")
    from diffusers import BitsAndBytesConfig

    config = BitsAndBytesConfig(**nf4_settings(torch.bfloat16, ["proj_out"]))
    assert config.quantization_method() == "nf4"
    assert BitsAndBytesConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_nf4_says_what_it_needs():
    with pytest.raises(UsageError, match="needs a CUDA GPU"):
        require_bitsandbytes()


def test_without_torchao_it_says_how_to_get_it(monkeypatch):
    require_torchao("this")
    monkeypatch.setitem(__import__("sys").modules, "torchao", None)
    with pytest.raises(UsageError, match="this needs torchao, which is not installed: pip install"):
        require_torchao("this")


def test_patterns_are_of_whole_names():
    model = nn.ModuleDict(
        {
            "proj_out": nn.Linear(64, 6),
            "blocks": nn.ModuleList([nn.ModuleDict({"proj_out": nn.Linear(64, 64), "odd": nn.Linear(48, 64)})]),
            "norm": nn.LayerNorm(64),
        }
    )
    assert split_linears(model, ["proj_out"], 32) == (["blocks.0.proj_out"], ["proj_out"], ["blocks.0.odd"])
    assert split_linears(model, ["*.proj_out"], None) == (["proj_out", "blocks.0.odd"], ["blocks.0.proj_out"], [])
    assert split_linears(model, ["blocks.*"], 128) == ([], ["blocks.0.proj_out", "blocks.0.odd"], ["proj_out"])


def test_diffusers_is_told_no_name_that_it_would_find_in_another():
    assert unambiguous(["proj_out", "img_in"], ["blocks.0.proj_out", "blocks.0.to_q"]) == ["img_in"]
    assert unambiguous(["proj_out"], ["blocks.0.proj_outer"]) == ["proj_out"]
