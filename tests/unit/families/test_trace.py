"""`ppcl.trace` finds stacks, streams and masks by running a model, and says why it cannot where it cannot."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, QwenImageTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

import ppcl
from tests.models_tiny.build import build
from tests.models_tiny.case import Case
from tests.models_tiny.cases import CASES
from tests.models_tiny.draws import normals, padding

FLUX = {
    "in_channels": 4,
    "num_layers": 5,
    "num_single_layers": 4,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 4, 8),
}


def flux() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    inputs = {
        "hidden_states": torch.randn(2, 9, 4),
        "encoder_hidden_states": torch.randn(2, 7, 24),
        "pooled_projections": torch.randn(2, 20),
        "timestep": torch.rand(2),
        "img_ids": torch.zeros(9, 3),
        "txt_ids": torch.zeros(7, 3),
        "return_dict": False,
    }
    return FluxTransformer2DModel(**FLUX).eval(), inputs


def traced_case(name: str, config: dict[str, Any], inputs: dict[str, Any]) -> ppcl.Trace:
    """The trace of a tiny case with other settings and other arguments of the call."""
    case = CASES[name]
    assert not isinstance(case, str)
    given = case.inputs() | inputs
    return ppcl.trace(build(name, Case(case.config | config, lambda: given)), given)


def test_stacks_streams_and_feed_forwards_of_flux_are_found() -> None:
    found = ppcl.trace(*flux())
    assert {stack.path: (stack.key, stack.blocks) for stack in found.stacks} == {
        "transformer_blocks": ("num_layers", 5),
        "single_transformer_blocks": ("num_single_layers", 4),
    }
    for stack in found.stacks:
        assert [(s.argument, s.slot, s.tokens) for s in stack.streams] == [
            (("encoder_hidden_states",), (0,), 7),
            (("hidden_states",), (1,), 9),
        ]
    assert [(item.name, item.dim, item.streams) for item in found.stacks[0].feed_forwards] == [
        ("ff", 32, ("hidden_states",)),
        ("ff_context", 32, ("encoder_hidden_states",)),
    ]
    assert found.stacks[0].share + found.stacks[1].share > 0.9


def test_a_trace_goes_through_json_and_prints_its_stacks() -> None:
    found = ppcl.trace(*flux())
    assert ppcl.Trace.from_json(json.loads(json.dumps(found.to_json()))) == found
    assert "single_transformer_blocks: 4 blocks (num_single_layers)" in str(found)


def test_the_model_is_left_as_it_was() -> None:
    model, inputs = flux()
    model.train()
    before, config = {name: value.clone() for name, value in model.state_dict().items()}, dict(model.config)
    ppcl.trace(model, inputs)
    assert model.training
    assert dict(model.config) == config
    assert len(model.transformer_blocks) == 5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(block) for block in model.transformer_blocks)
    assert all(not value.requires_grad or value.grad is None for value in model.parameters())


@pytest.mark.parametrize("valid", [5, 7])
def test_padding_is_found_by_its_mask(valid: int) -> None:
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=5,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, valid:] = False
    inputs = {
        "hidden_states": torch.randn(2, 12, 16),
        "encoder_hidden_states": torch.randn(2, 7, 24),
        "encoder_hidden_states_mask": mask,
        "timestep": torch.rand(2),
        "img_shapes": [[(1, 3, 4)]] * 2,
        "return_dict": False,
    }
    (stack,) = ppcl.trace(model, inputs).stacks
    assert {stream.name: stream.mask for stream in stack.streams} == {
        "encoder_hidden_states": "encoder_hidden_states_mask",
        "hidden_states": None,
    }


@pytest.mark.parametrize("valid", [4, 16])
def test_a_mask_of_the_text_is_not_taken_for_one_of_a_picture_with_as_many_tokens(valid: int) -> None:
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 16, 40),
        "encoder_attention_mask": padding(16, valid),
    }
    (stack,) = traced_case("PixArtTransformer2DModel", {}, inputs).stacks
    assert {stream.name: (stream.tokens, stream.mask) for stream in stack.streams} == {"hidden_states": (16, None)}


@pytest.mark.parametrize(
    ("name", "inputs", "mask"),
    [
        # Which tokens lose their prior: none. All would be padding.
        ("GlmImageTransformer2DModel", {}, None),
        # All tokens are of segment 1. Those of another one would not be seen, whatever its number.
        ("Ideogram4Transformer2DModel", {"segment_ids": torch.ones(2, 33, dtype=torch.long)}, None),
        # A mask of the text comes first.
        (
            "LongCatAudioDiTTransformer",
            {"encoder_hidden_states": normals()(2, 11, 40), "encoder_attention_mask": padding(11, 4).bool()},
            "attention_mask",
        ),
        # The gates of the untrained blocks are 0: no token depends on another.
        (
            "PRXTransformer2DModel",
            {"encoder_hidden_states": normals()(2, 12, 40), "attention_mask": padding(12, 5).bool()},
            None,
        ),
    ],
)
def test_only_what_marks_padding_of_a_stream_is_its_mask(name: str, inputs: dict[str, Any], mask: str | None) -> None:
    (stack,) = traced_case(name, {}, inputs).stacks
    assert {stream.name: stream.mask for stream in stack.streams}["hidden_states"] == mask


def test_a_stream_of_the_text_is_no_stream_of_the_picture_with_as_many_tokens() -> None:
    inputs = {"encoder_hidden_states": normals()(2, 72, 20), "encoder_attention_mask": padding(72, 40)}
    refiner, dual, _ = traced_case("HunyuanVideoTransformer3DModel", {}, inputs).stacks
    masks = {stream.name: (stream.tokens, stream.mask) for stack in (refiner, dual) for stream in stack.streams}
    assert masks == {
        "hidden_states": (72, "encoder_attention_mask"),
        "hidden_states_of_transformer_blocks": (72, None),
        "encoder_hidden_states": (72, "encoder_attention_mask"),
    }


def test_a_projection_that_is_wider_than_all_blocks_is_no_stack() -> None:
    picture = {"encoder_hidden_states_image": normals()(2, 11, 1280)}
    found = traced_case("ChronoEditTransformer3DModel", {"image_dim": 1280}, picture)
    assert [stack.path for stack in found.stacks] == ["blocks"]
    assert found.left_alone == {"condition_embedder.image_embedder.ff.net": "no integer of the config counts it"}
    with pytest.raises(ppcl.UsageError, match="blocks: it has fewer than 3 blocks"):
        traced_case("ChronoEditTransformer3DModel", {"num_layers": 2}, {})


def test_a_stack_beside_larger_lists_that_are_counted_together_is_traced() -> None:
    found = traced_case("Flux3Transformer2DModel", {"num_layers": 3, "num_single_layers": 3}, {})
    assert [(stack.path, stack.blocks) for stack in found.stacks] == [("single_transformer_blocks", 3)]
    assert found.left_alone.keys() == {"mode_blocks.image", "mode_blocks.image_cond", "txt_mode_blocks"}


def test_blocks_are_pruned_of_which_the_class_makes_fewer() -> None:
    """As Stable Diffusion 3.5 medium: the first blocks, which a list in the config names, are larger."""
    (stack,) = traced_case("SD3Transformer2DModel", {"num_layers": 7, "dual_attention_layers": (0, 1, 2)}, {}).stacks
    assert (stack.first_block, stack.last_blocks) == (3, 1)


def test_what_is_added_between_blocks_is_refused() -> None:
    with pytest.raises(ppcl.UsageError, match="hidden_states of block 1 is not what block 0 was given or returned"):
        traced_case("SD3Transformer2DModel", {}, {"block_controlnet_hidden_states": [torch.ones(2, 12, 48)]})


def test_tokens_of_one_sample_may_be_the_first_dimension() -> None:
    case = CASES["ErnieImageTransformer2DModel"]
    assert not isinstance(case, str)
    one = {name: value[:1] for name, value in case.inputs().items() if isinstance(value, Tensor)}
    (stack,) = traced_case("ErnieImageTransformer2DModel", {}, one).stacks
    assert [item.name for item in stack.feed_forwards] == ["mlp"]


def test_the_last_block_of_another_kind_is_not_pruned() -> None:
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=24,
    ).eval()
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 7, 32),
        "pooled_projections": torch.randn(2, 24),
        "timestep": torch.rand(2) * 1000,
        "return_dict": False,
    }
    (stack,) = ppcl.trace(model, inputs).stacks
    assert (stack.first_block, stack.last_blocks) == (0, 1)


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ff = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return x + scale * self.ff(x)


class Model(ModelMixin, ConfigMixin):
    """A model of blocks in a chain. `trap` makes it one that cannot be pruned."""

    @register_to_config
    def __init__(self, depth: int = 6, dim: int = 16, trap: str = "") -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        if trap == "kinds":
            for block in self.blocks[::2]:
                block.ff = nn.Linear(dim, dim)
        if trap == "shape":
            self.weights = nn.Parameter(torch.ones(depth))
        if trap == "twice":
            self.more = nn.ModuleList(Block(dim) for _ in range(depth))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        trap, states, one = self.config.trap, [], torch.ones(())
        for number, block in enumerate(self.blocks):
            scale = one
            if trap == "rows":
                scale = torch.arange(float(len(self.blocks)))[number] / len(self.blocks)
            if trap == "position":
                scale = one * (1 + number % 2)
            if trap == "skip" and number >= len(self.blocks) // 2 and states:
                scale = states.pop()
            if trap == "repeat":
                x = block(x, scale)
            if trap == "between":
                x = x * 1.01
            x = block(x, scale)
            if trap == "in_place":
                x += 1
            if trap in ("skip", "sum"):
                states.append(x)
        if trap == "twice":
            for block in self.more:
                x = block(x, one)
        if trap == "sum":
            x = torch.stack(states).sum(0)
        if trap == "count":
            x = x / len(self.blocks)
        if trap == "noise":
            x = x + torch.randn_like(x)
        return (x,)


def model(trap: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Model(trap=trap).eval(), {"x": torch.randn(2, 5, 16)}


def test_a_chain_of_blocks_is_traced() -> None:
    (stack,) = ppcl.trace(*model("")).stacks
    assert (stack.path, stack.key, stack.blocks) == ("blocks", "depth", 6)
    assert [stream.name for stream in stack.streams] == ["x"]
    assert [item.name for item in stack.feed_forwards] == ["ff"]


@pytest.mark.parametrize(
    ("trap", "reason"),
    [
        ("kinds", "unequal kinds"),
        ("shape", "depth also changes the shape of weights"),
        ("twice", "depth counts blocks and more at once"),
        ("rows", "scale of blocks.2 changes when blocks.1 is taken out"),
        ("position", "changes when blocks.1 is taken out"),
        ("skip", "taken out"),
        ("repeat", "called 2 times"),
        ("between", "not what the next block is given"),
        ("in_place", "changed in place"),
        ("sum", "depends on their number"),
        ("count", "depends on their number"),
        ("noise", "differ"),
    ],
)
def test_what_cannot_be_pruned_is_refused_with_the_reason(trap: str, reason: str) -> None:
    with pytest.raises(ppcl.UsageError, match=reason) as caught:
        ppcl.trace(*model(trap))
    assert str(caught.value).startswith("Model cannot be traced: ")


def test_a_compiled_or_quantised_transformer_is_refused() -> None:
    whole, inputs = flux()
    with pytest.raises(ppcl.UsageError, match="compiled"):
        ppcl.trace(torch.compile(whole), inputs)
    whole.transformer_blocks[0].ff.net[2].weight = nn.Parameter(
        torch.zeros(2, 2, dtype=torch.int8), requires_grad=False
    )
    with pytest.raises(ppcl.UsageError, match="quantised"):
        ppcl.trace(whole, inputs)


def test_a_unet_is_refused() -> None:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    inputs = {"sample": torch.randn(1, 4, 8, 8), "timestep": 1, "encoder_hidden_states": torch.randn(1, 3, 8)}
    with pytest.raises(ppcl.UsageError, match="cannot be traced"):
        ppcl.trace(unet, inputs)
