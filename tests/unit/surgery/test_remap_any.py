"""LoRAs of transformers of no known family, on a Wan with fewer blocks than the full one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel, WanPipeline, WanTransformer3DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

import ppcl
from ppcl.errors import UsageError
from ppcl.surgery.lora_layers import Layers, lora_loader
from ppcl.surgery.remap import remap_lora

KEPT, COUNT = [0, 1, 3, 5], 6
PROVENANCE = {"kept_layers": {"blocks": KEPT}, "removed_intervals": {"blocks": [[1, 2], [3, 4]]}}
HEADS = len(KEPT)  # another entry of the config with the number of kept blocks
SIZES = {"num_attention_heads": HEADS, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16}
SIZES |= {"freq_dim": 16, "ffn_dim": 32, "rope_max_seq_len": 32}
TARGETS = ["attn1.to_q", "attn1.to_out.0", "attn2.to_k", "ffn.net.2", "proj_out"]


def wan(kind: Any = WanTransformer3DModel, **settings: Any) -> Any:
    torch.manual_seed(0)
    return kind(**SIZES, **settings).eval()


@pytest.fixture(scope="module")
def whole() -> Any:
    """The full model with a random LoRA on it."""
    model = wan(num_layers=COUNT)
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS, init_lora_weights=False))
    return model


@pytest.fixture(scope="module")
def lora(whole: Any) -> dict[str, Tensor]:
    """That LoRA with diffusers' names."""
    return {f"transformer.{key}": value for key, value in get_peft_model_state_dict(whole).items()}


@pytest.fixture
def pruned(whole: Any) -> Any:
    """The full model's blocks `KEPT`, as an export has them."""
    model = wan(num_layers=len(KEPT))
    plain = {key.replace(".base_layer.", "."): value for key, value in whole.state_dict().items() if "lora_" not in key}
    for place, index in enumerate(KEPT):
        start = f"blocks.{index}."
        block = {key.removeprefix(start): value for key, value in plain.items() if key.startswith(start)}
        model.blocks[place].load_state_dict(block)
    model.load_state_dict({key: value for key, value in plain.items() if not key.startswith("blocks.")}, strict=False)
    model.register_to_config(ppcl=PROVENANCE)
    return model


def output(model: Any) -> Tensor:
    torch.manual_seed(2)
    video, text = torch.randn(1, 4, 1, 4, 4), torch.randn(1, 3, SIZES["text_dim"])
    with torch.no_grad():
        found: Tensor = model(video, torch.tensor([500.0]), text, return_dict=False)[0]
    return found


def as_peft(name: str) -> str:
    return name.replace("transformer.", "base_model.model.", 1)


def as_wan(name: str) -> str:
    """Return the name that Wan's authors have, which ComfyUI and trainers use."""
    pairs = {"transformer.proj_out": "diffusion_model.head.head", "transformer.": "diffusion_model."}
    pairs |= {"attn1.to_out.0": "self_attn.o", "attn1.to_q": "self_attn.q", "attn2.to_k": "cross_attn.k"}
    pairs |= {"ffn.net.2": "ffn.2", "lora_A": "lora_down", "lora_B": "lora_up"}
    for ours, theirs in pairs.items():
        name = name.replace(ours, theirs)
    return name


@pytest.mark.parametrize("spelling", [str, as_peft, as_wan])
def test_the_pruned_model_with_a_mapped_lora_is_the_full_one_with_blocks_taken_out(
    whole: Any, pruned: Any, lora: dict[str, Tensor], spelling: Any
) -> None:
    plain = output(pruned)
    respelt = {spelling(key): value for key, value in lora.items()}
    found = remap_lora(respelt, pruned, pipeline_class=WanPipeline if spelling is as_wan else None)
    assert {name.split(".")[1] for name in found.dropped} == {"2", "4"}
    WanPipeline(None, None, None, None, pruned).load_lora_weights(found.state)
    blocks = whole.blocks
    whole.blocks = nn.ModuleList(blocks[index] for index in KEPT)
    wanted = output(whole)
    whole.blocks = blocks
    assert torch.equal(output(pruned), wanted)
    assert not torch.equal(plain, wanted)


def test_students_may_take_it_from_all_their_blocks(pruned: Any, lora: dict[str, Tensor]) -> None:
    found = remap_lora(lora, pruned, source="sum")
    assert found.dropped == []
    own, theirs = (f"transformer.blocks.{number}.attn1.to_q.lora_{{}}.weight" for number in (1, 2))
    wanted = sum(lora[name.format("B")] @ lora[name.format("A")] for name in (own, theirs))
    result = found.state[own.format("B")] @ found.state[own.format("A")]
    torch.testing.assert_close(result, wanted)


def test_what_a_linear_map_has_replaced_is_dropped(lora: dict[str, Tensor]) -> None:
    kind: Any = ppcl.PrunedWanTransformer3DModel  # type: ignore[attr-defined]
    width = HEADS * SIZES["attention_head_dim"]
    pruned = wan(kind, num_layers=len(KEPT), pruned_feed_forwards={"blocks.0.ffn": width})
    pruned.register_to_config(ppcl=PROVENANCE)
    found = remap_lora(lora, pruned)
    assert "blocks.0.ffn.net.2" in found.dropped
    assert "blocks.1.ffn.net.2" in found.layers


def test_a_name_of_no_layer_is_refused(pruned: Any, lora: dict[str, Tensor]) -> None:
    renamed = {key.replace("attn1", "attention"): value for key, value in lora.items()}
    with pytest.raises(UsageError, match=r"blocks\.0\.attention\.to_out\.0 is no layer .* in 6 blocks"):
        remap_lora(renamed, pruned)


def test_a_config_that_counts_no_such_blocks_is_refused(pruned: Any, lora: dict[str, Tensor]) -> None:
    pruned.register_to_config(num_layers=5)
    with pytest.raises(UsageError, match="no entry of the config counts blocks of this WanTransformer3DModel"):
        remap_lora(lora, pruned)


def test_a_model_whose_pipelines_load_no_lora_is_refused(lora: dict[str, Tensor]) -> None:
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, cross_attention_dim=16
    )
    model.register_to_config(ppcl={"kept_layers": {"transformer_blocks": [0, 1, 3]}})
    with pytest.raises(UsageError, match="PixArtTransformer2DModel of diffusers loads no LoRAs"):
        remap_lora(lora, model)
    with pytest.raises(UsageError, match="PixArtSigmaPipeline of diffusers loads no LoRAs"):
        lora_loader(None, PixArtSigmaPipeline)


def test_the_examples_of_a_refusal_are_layers_within_a_block() -> None:
    assert Layers(wan(num_layers=1), ["blocks"], None).example == "blocks.0.attn1.to_q"
