"""The width-pruned DiT against stock blocks whose FFN gives nothing, and Eq. 9 after them."""

import copy

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from ppcl.families.dit.transformer_dit_pruned import PrunedDiTTransformer2DModel
from ppcl.families.registry import get_family
from ppcl.layers import Layout
from ppcl.surgery.plugboard import Plugboard

STACK = "transformer_blocks"


class Reference(nn.Module):
    """A stock block with a silent FFN, then x + W x + b."""

    def __init__(self, block, weight, bias):
        super().__init__()
        self.block, self.weight, self.bias = copy.deepcopy(block), weight, bias
        self.norm1 = self.block.norm1  # where the output head looks
        for parameter in self.block.ff.net[2].parameters():
            parameter.zero_()

    def forward(self, *args, **kwargs):
        state = self.block(*args, **kwargs)
        return state + state @ self.weight.T + self.bias


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=4, sample_size=8
    ).eval()


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    noise, labels = torch.randn(3, 4, 8, 8), {"class_labels": torch.tensor([0, 7, 1000])}
    batch = get_family("dit").training_batch(noise, labels, noise.flip(0), torch.tensor([0.0, 0.4, 1.0]), (8, 8))
    assert batch.inputs["timestep"].tolist() == [0, 400, 999]
    return batch.inputs


@pytest.mark.parametrize("pruned", [[0], [3], [0, 1, 2, 3], [1, 2]])
@torch.no_grad()
def test_the_forward_equals_a_plain_reference(model, inputs, pruned):
    """Block 0 too, whose embedding of time and label the output head reads."""
    family = get_family("dit", model.config)
    roles = family.width.roles(STACK, [], pruned, 4, Layout())
    ours, reference = [], []
    for index, (block, role) in enumerate(zip(model.transformer_blocks, roles, strict=True)):
        projector = {"img_ffn_proj.weight": 0.1 * torch.randn(32, 32), "img_ffn_proj.bias": 0.1 * torch.randn(32)}
        ours.append(block if role is None else family.width.prune(block, role, projector))
        reference.append(block if index not in pruned else Reference(block, *projector.values()))
    outputs = []
    for blocks in (ours, reference):
        model.transformer_blocks = nn.ModuleList(blocks)
        outputs.append(model(**inputs)[0])
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-5)


@torch.no_grad()
def test_standalone_models_share_save_and_load(model, inputs, tmp_path):
    family = get_family("dit", model.config)
    board = Plugboard(family, model, {STACK: [(1, 2)]})
    board.remove()
    short = board.standalone()
    assert torch.equal(short(**inputs)[0], model(**inputs)[0])
    pruned = PrunedDiTTransformer2DModel.from_config(dict(model.config) | {"pruned_ffn": [1]})
    pruned.save_pretrained(tmp_path)
    loaded = PrunedDiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.eval()(**inputs)[0], pruned.eval()(**inputs)[0])
    assert len(loaded.transformer_blocks) == 3


def test_what_is_pruned_is_gone(model):
    count = sum(parameter.numel() for parameter in model.parameters())
    pruned = PrunedDiTTransformer2DModel.from_config(dict(model.config) | {"pruned_ffn": [1]})
    # FFN 8 D^2 + 5 D and half of a modulation, 3 D^2 + 3 D, for a projector, D^2 + D.
    assert count - sum(parameter.numel() for parameter in pruned.parameters()) == 10 * 32**2 + 7 * 32
