"""diffusers' caches and layer skipping on models pruned in width: blocks are registered as what they stand for."""

import runpy
import sys

import pytest
import torch
from diffusers import hooks
from diffusers.hooks import FirstBlockCacheConfig, LayerSkipConfig, apply_first_block_cache, apply_layer_skip
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

from ppcl.export.remote_code import _self_contained
from ppcl.families.dit import transformer_dit_pruned as dit
from ppcl.families.dit.tiny import build_pipeline as build_dit
from ppcl.families.flux import transformer_flux_pruned as flux
from ppcl.families.flux.tiny import build_pipeline as build_flux
from ppcl.families.qwen_image import transformer_qwen_image_pruned as qwen
from ppcl.families.qwen_image.tiny import build_pipeline as build_qwen

BLOCKS = {
    qwen.PrunedQwenImageTransformerBlock: QwenImageTransformerBlock,
    flux.PrunedFluxTransformerBlock: FluxTransformerBlock,
    flux.PrunedFluxSingleTransformerBlock: FluxSingleTransformerBlock,
    dit.PrunedDiTBlock: BasicTransformerBlock,
}
CLASSES = {
    "qwen": (build_qwen, qwen.PrunedQwenImageTransformer2DModel),
    "flux": (build_flux, flux.PrunedFluxTransformer2DModel),
}
# Block 1 reads block 0, whose text then is wider than the last block's; a run in the middle; FFNs at both ends.
SETS = {
    "qwen": [
        {"pruned_text": (1, 2, 4), "pruned_ffn": (0, 5)},
        {"pruned_text": (3, 4), "pruned_ffn": (4,)},
        {"pruned_text": (5,), "pruned_ffn": ()},
    ],
    "flux": [
        {"pruned_text": (1, 2), "pruned_ffn": (0,), "pruned_single_ffn": (1,)},
        {"pruned_text": (2,), "pruned_ffn": (2,), "pruned_single_ffn": ()},
        {"pruned_text": (), "pruned_ffn": (1,), "pruned_single_ffn": (0, 1)},
    ],
}
CASES = [(name, sets) for name, found in SETS.items() for sets in found]
LAYERS = {"qwen": 6, "flux": 3}


def make_pipeline(name, sets):
    """A tiny pipeline whose transformer is pruned in width, with projectors drawn at random."""
    build, pruned_class = CLASSES[name]
    pipeline = build(0, LAYERS[name])
    config = {key: value for key, value in pipeline.transformer.config.items() if not key.startswith("_")}
    torch.manual_seed(0)
    model = pruned_class(**config | sets).eval().requires_grad_(False)
    for key, parameter in model.named_parameters():
        if key.split(".")[-2] in ("txt_proj", "ehs_proj", "img_ffn_proj", "txt_ffn_proj"):
            parameter.normal_(std=0.1)
    pipeline.transformer = model
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline):
    guided = {"true_cfg_scale": 3.0, "negative_prompt": ["", ""]}  # two passes a step, each with a cache of its own
    return pipeline(
        ["a red circle", "two squares"],
        height=32,
        width=32,
        num_inference_steps=4,
        output_type="latent",
        generator=[torch.Generator().manual_seed(number) for number in range(2)],
        **guided,
    ).images


def blocks_of(model):
    return [*model.transformer_blocks, *getattr(model, "single_transformer_blocks", [])]


def computed(model, draw_it):
    """What `draw_it` gives, and how often each block computed its attention."""
    counts = [0] * len(blocks_of(model))

    def count(index):
        def hook(module, args, output):
            counts[index] += 1

        return hook

    handles = [block.attn.register_forward_hook(count(index)) for index, block in enumerate(blocks_of(model))]
    found = draw_it()
    for handle in handles:
        handle.remove()
    return found, counts


@pytest.mark.parametrize(("block", "stock"), BLOCKS.items())
def test_blocks_are_registered_as_what_they_stand_for(block, stock):
    ours, theirs = TransformerBlockRegistry.get(block), TransformerBlockRegistry.get(stock)
    assert ours.return_hidden_states_index == theirs.return_hidden_states_index
    assert ours.return_encoder_hidden_states_index == theirs.return_encoder_hidden_states_index
    assert (ours._cls, theirs._cls) == (block, stock)


@pytest.mark.parametrize(("name", "sets"), CASES)
@torch.no_grad()
def test_a_cache_that_reuses_nothing_changes_no_bit(name, sets):
    pipeline = make_pipeline(name, sets)
    plain, counts = computed(pipeline.transformer, lambda: draw(pipeline))
    assert set(counts) == {8}
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0))
    cached, counts = computed(pipeline.transformer, lambda: draw(pipeline))
    assert torch.equal(cached, plain)
    assert set(counts) == {8}
    pipeline.transformer.disable_cache()
    assert torch.equal(draw(pipeline), plain)


@pytest.mark.parametrize(("name", "sets"), CASES)
@torch.no_grad()
def test_a_cache_skips_blocks_and_gives_the_first_with_what_the_others_added_before(name, sets):
    pipeline = make_pipeline(name, sets)
    model, plain = pipeline.transformer, draw(pipeline)
    outputs = []  # of the first block and of the last, in each pass
    model.enable_cache(FirstBlockCacheConfig(threshold=1e6))
    handles = [
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
        for block in (blocks_of(model)[0], blocks_of(model)[-1])
    ]
    cached, counts = computed(model, lambda: draw(pipeline))
    for handle in handles:
        handle.remove()
    # In the first step each of the two passes is computed whole, in the three others by its first block alone.
    assert counts == [8] + [2] * (len(counts) - 1)
    assert cached.isfinite().all()
    assert not torch.equal(cached, plain)
    later = outputs[4:]
    for first, last in zip(later[::2], later[1::2], strict=True):  # what is skipped hands on what the first gave
        assert all(torch.equal(*pair) for pair in zip(first, last, strict=True))


@torch.no_grad()
def test_a_dit_caches_too():
    pipeline = build_dit(0, 4)
    config = {key: value for key, value in pipeline.transformer.config.items() if not key.startswith("_")}
    model = dit.PrunedDiTTransformer2DModel(**config | {"pruned_ffn": (0, 2, 3)}).eval()
    size = model.config.sample_size
    inputs = {
        "hidden_states": torch.randn(2, model.config.in_channels, size, size),
        "timestep": torch.tensor([500, 500]),
        "class_labels": torch.tensor([1, 2]),
    }
    plain = model(**inputs).sample
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0))
    _set_cache_context(model, CacheContext("cond"))  # DiT has no CacheMixin, which does this
    assert torch.equal(model(**inputs).sample, plain)


# Layer skipping.


@pytest.mark.parametrize("name", ["qwen", "flux"])
@pytest.mark.parametrize("index", [0, 1])
@torch.no_grad()
def test_a_block_of_a_run_without_text_cannot_be_skipped(name, index):
    """Neither the one that others read, nor one between; diffusers 0.42 swaps the streams of any skipped block."""
    pipeline = make_pipeline(name, SETS[name][0])
    apply_layer_skip(pipeline.transformer, LayerSkipConfig([index], fqn="transformer_blocks"))
    with pytest.raises(ValueError, match="cannot be skipped"):
        draw(pipeline)


@pytest.mark.parametrize(("name", "kinds"), [("qwen", ["ffn", "attention", "scores"]), ("flux", ["ffn"])])
@torch.no_grad()
def test_ffns_and_attention_of_a_pruned_block_can_be_skipped(name, kinds):
    """diffusers 0.42 itself cannot leave out attention of FLUX, stock or pruned."""
    pipeline = make_pipeline(name, SETS[name][0])
    model, plain = pipeline.transformer, draw(pipeline)
    skips = {
        "ffn": {"skip_attention": False},
        "attention": {"skip_ff": False},
        "scores": {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False},
    }
    for kind in kinds:
        apply_layer_skip(model, LayerSkipConfig([2], fqn="transformer_blocks", **skips[kind]))
        skipped = draw(pipeline)
        assert skipped.isfinite().all()
        # Only the image asks, but of text and image: diffusers leaves such scores as they are.
        assert torch.equal(skipped, plain) == (kind == "scores")
        for module in model.transformer_blocks[2].modules():
            if hasattr(module, "_diffusers_hook"):
                module._diffusers_hook.remove_hook("layer_skip_hook", recurse=False)
        assert torch.equal(draw(pipeline), plain)


# Where diffusers has no such registry.


@pytest.mark.parametrize("lacks", ["the module", "an argument"])
def test_an_export_loads_where_diffusers_has_another_registry(tmp_path, monkeypatch, lacks):
    if lacks == "the module":
        monkeypatch.delattr(hooks, "_helpers")
        monkeypatch.setitem(sys.modules, "diffusers.hooks._helpers", None)
    else:
        monkeypatch.setattr(hooks._helpers, "TransformerBlockMetadata", lambda: None)
    for number, module in enumerate((qwen, flux, dit)):
        file = tmp_path / f"code_{number}.py"
        file.write_text(_self_contained(module), encoding="utf-8")
        found = runpy.run_path(str(file), run_name="diffusers_modules.local.code")
        assert [name for name in found if name.endswith("Transformer2DModel") and name.startswith("Pruned")]
