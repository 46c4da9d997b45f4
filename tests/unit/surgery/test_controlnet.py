"""A full model's ControlNet on a pruned model: every block gets the residual of its original place."""

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, QwenImageControlNetModel, QwenImageControlNetPipeline
from pruned_models import cut
from torch import nn

from ppcl.families.qwen_image.tiny import build_pipeline
from ppcl.families.registry import get_family
from ppcl.surgery.controlnet import expand, place_residuals
from ppcl.surgery.plugboard import Plugboard

INTERVALS = {"transformer_blocks": [(1, 2), (4, 6)]}
FLUX_INTERVALS = {"transformer_blocks": [(1, 2)], "single_transformer_blocks": [(0, 2)]}


class AddsResidual(nn.Module):
    """A block with its residual built in, for references without any ControlNet argument."""

    def __init__(self, block, residual):
        super().__init__()
        self.block, self.residual = block, residual

    def forward(self, *args, **kwargs):
        text, image = self.block(*args, **kwargs)
        return text, image + self.residual


def residuals(count, inputs, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (*inputs["hidden_states"].shape[:2], 64)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def test_residuals_follow_the_original_numbers():
    assert expand("abcde", [0, 11, 12, 59], 60) == ["a", "a", "b", "e"]
    assert expand("abc", [0, 1, 4, 5], 7) == ["a", "a", "b", "b"]  # three each, as ceil(7 / 3) says
    assert expand("ab", [0, 1, 2, 5], 7, repeat=True) == ["a", "b", "a", "b"]


@pytest.mark.parametrize("count", [1, 3, 8])
@torch.no_grad()
def test_the_whole_model_is_the_stock_model_bit_for_bit(family, make_transformer, make_batch, count):
    model, inputs = make_transformer(8), make_batch(0).inputs
    samples = residuals(count, inputs)
    expected = model(**inputs, controlnet_block_samples=samples)[0]
    board = Plugboard(family, model, INTERVALS)
    board.remove()
    assert not torch.equal(model(**inputs, controlnet_block_samples=samples)[0], expected)
    board()
    assert torch.equal(model(**inputs, controlnet_block_samples=samples)[0], expected)


@pytest.mark.parametrize("count", [1, 3, 8])
@torch.no_grad()
def test_kept_blocks_get_what_the_whole_model_would_give_them(family, make_transformer, make_batch, count):
    model, inputs = make_transformer(8), make_batch(0).inputs
    samples = residuals(count, inputs)
    reference = cut(family, model, INTERVALS)
    every = -(-8 // count)
    kept = [0, 1, 3, 4, 7]
    blocks = zip(reference.transformer_blocks, kept, strict=True)
    reference.transformer_blocks = nn.ModuleList(AddsResidual(block, samples[i // every]) for block, i in blocks)
    expected = reference(**inputs)[0]
    pruned = cut(family, model, INTERVALS)
    handle = place_residuals(pruned)
    assert torch.equal(pruned(**inputs, controlnet_block_samples=samples)[0], expected)
    assert torch.equal(pruned(**inputs)[0], cut(family, model, INTERVALS)(**inputs)[0])
    board = Plugboard(family, model, INTERVALS)
    Plugboard(family, model, INTERVALS)()  # another one on the same model does not get in the way
    board.remove()
    assert torch.equal(model(**inputs, controlnet_block_samples=samples)[0], expected)
    handle.remove()
    if count == 8:  # by its own count of blocks diffusers takes others
        assert not torch.equal(pruned(**inputs, controlnet_block_samples=samples)[0], expected)


@pytest.mark.parametrize("repeat", [False, True])
@torch.no_grad()
def test_both_stacks_of_flux(repeat):
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=48,
        num_layers=4,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        axes_dims_rope=(8, 12, 12),
    )
    family = get_family("flux", model.config)
    conditions = {"prompt_embeds": torch.randn(2, 5, 64), "pooled_prompt_embeds": torch.randn(2, 32)}
    noise = torch.randn(2, 16, 48)
    inputs = family.training_batch(noise, conditions, noise.flip(0), torch.rand(2), (4, 4)).inputs
    double, single = residuals(3, inputs), residuals(2, inputs, seed=1)
    control = {
        "controlnet_block_samples": double,
        "controlnet_single_block_samples": single,
        "controlnet_blocks_repeat": repeat,
    }
    expected = model(**inputs, **control)[0]
    assert torch.equal(Plugboard(family, model, FLUX_INTERVALS)().transformer(**inputs, **control)[0], expected)
    reference, pruned = (cut(family, model, FLUX_INTERVALS) for _ in range(2))
    kept = {"transformer_blocks": [0, 1, 3], "single_transformer_blocks": [0, 3, 4, 5]}
    samples = {
        "transformer_blocks": [double[i % 3 if repeat else i // 2] for i in kept["transformer_blocks"]],
        "single_transformer_blocks": [single[i // 3] for i in kept["single_transformer_blocks"]],
    }
    for stack, chosen in samples.items():
        blocks = zip(getattr(reference, stack), chosen, strict=True)
        setattr(reference, stack, nn.ModuleList(AddsResidual(block, sample) for block, sample in blocks))
    place_residuals(pruned)
    assert torch.equal(pruned(**inputs, **control)[0], reference(**inputs)[0])


@torch.no_grad()
def test_the_stock_pipeline_draws_with_a_pruned_transformer():
    pipeline = build_pipeline(0, num_layers=8)
    controlnet = QwenImageControlNetModel(
        patch_size=2,
        in_channels=48,
        out_channels=12,
        num_layers=8,
        attention_head_dim=32,
        num_attention_heads=2,
        joint_attention_dim=64,
        axes_dims_rope=(8, 12, 12),
    )
    for block in controlnet.controlnet_blocks:  # zero as made: it would do nothing
        nn.init.normal_(block.weight, std=0.1)
    family = get_family("qwen_image")
    board = Plugboard(family, pipeline.transformer, INTERVALS)

    def draw(transformer):
        stock = QwenImageControlNetPipeline(
            scheduler=pipeline.scheduler,
            vae=pipeline.vae,
            text_encoder=pipeline.text_encoder,
            tokenizer=pipeline.tokenizer,
            transformer=transformer,
            controlnet=controlnet,
        )
        stock.set_progress_bar_config(disable=True)
        image = torch.linspace(0, 1, 3 * 32 * 32).view(1, 3, 32, 32)
        generator = torch.Generator().manual_seed(0)
        arguments = {"height": 32, "width": 32, "num_inference_steps": 2, "generator": generator}
        return np.asarray(stock("a red circle", control_image=image, **arguments).images[0])

    whole = draw(board().transformer)
    pruned = cut(family, pipeline.transformer, INTERVALS)
    astray = draw(pruned)
    place_residuals(pruned)
    assert not np.array_equal(draw(pruned), astray)
    assert np.array_equal(draw(pruned), draw(board.remove().transformer))
    assert np.array_equal(draw(board().transformer), whole)
