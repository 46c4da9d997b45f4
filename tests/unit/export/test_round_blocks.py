"""Least-squares rounding of whole models: what each layer is fitted to, family by family."""

import copy
from importlib import import_module

import pytest
import torch

from ppcl.config import DataConfig
from ppcl.data.streams import ShapesStream
from ppcl.export.quantized import split_linears
from ppcl.export.rounding import round_blocks, round_linears
from ppcl.families.registry import builders, get_family
from ppcl.layers import Layout
from ppcl.ops.losses import relative_error
from ppcl.ops.rounding import InputMoments
from ppcl.surgery.width import prune_blocks
from ppcl.taps import inputs_of, observe

BUILDERS = {"tiny_qwen_image": "qwen_image", "tiny_flux": "flux", "tiny_dit": "dit"}


def names_in(model):
    return split_linears(model, [], None)[0]


@pytest.fixture(scope="module", params=BUILDERS)
def tiny(request):
    """A family, an untrained transformer of it, and two batches."""
    pipeline = import_module(builders()[request.param]).build_pipeline(0, 3)
    family = get_family(BUILDERS[request.param], pipeline.transformer.config)
    family.sampling.max_sequence_length = 16
    stream = ShapesStream(family, pipeline, DataConfig(), seed=1, batch_size=3)
    return family, pipeline.transformer.eval(), [stream(0), stream(1)]


def test_blocks_one_by_one_see_what_they_see_in_the_whole_model(tiny):
    """Unrounded, both sides are the model itself: its layers' inputs, in order of execution, all of them."""
    family, model, batches = tiny
    seen = {}
    modules = {module: name for name, module in model.named_modules()}

    def check(layers, moments):
        assert torch.equal(moments.gram, moments.cross)
        seen.update({modules[layer]: moments.gram for layer in layers})

    before = copy.deepcopy(model.state_dict())
    round_blocks(family, model, batches, names_in(model), check)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    inside = [name for name in names_in(model) if name.startswith(tuple(family.stacks))]
    assert sorted(seen) == sorted(inside)
    found = []

    def tap(name):
        # DiT calls its first block's embedding once more, behind all blocks.
        return lambda module, args: found[-1].setdefault(name, args[0])

    handles = [model.get_submodule(name).register_forward_pre_hook(tap(name)) for name in inside]
    with torch.no_grad():
        for batch in batches:
            found.append({})
            model(**batch.inputs)
    for handle in handles:
        handle.remove()
    assert list(seen) == list(found[0])
    for name, gram in seen.items():
        if family.stream_of(name.split(".", 2)[2]) == "image":
            rows = torch.cat([inputs[name].flatten(0, -2) for inputs in found]).double()
            torch.testing.assert_close(gram, rows.T @ rows, rtol=1e-4, atol=1e-4)


def test_rounded_models_stay_nearer_than_with_the_nearest(tiny):
    family, model, batches = tiny
    names = [name for name in names_in(model) if not model.get_submodule(name).in_features % 32]

    def velocity(model):
        with torch.no_grad():
            return torch.cat([model(**batch.inputs)[0].flatten() for batch in batches])

    settings = {"scheme": "int4", "group_size": 32, "damping": 1e-3}

    def nearest(layers, moments):
        round_linears(layers, InputMoments(layers[0].in_features), **settings)  # of inputs never seen

    def least_squares(layers, moments):
        round_linears(layers, moments, **settings)

    errors = []
    for fit in (nearest, least_squares):
        rounded = copy.deepcopy(model)
        round_blocks(family, rounded, batches, names, fit)
        errors.append(relative_error(velocity(rounded), velocity(model)).item())
    assert errors[1] < 0.5 * errors[0], errors


@torch.no_grad()
def test_padding_has_no_say(family, make_transformer, make_batch):
    """Of text: each layer that reads text, with its text-pruned forms, is fitted to valid tokens alone."""
    model = make_transformer(3)
    projectors = {f"transformer_blocks.{index}.text": {} for index in (1, 2)}
    blocks = list(model.transformer_blocks)
    layout = Layout(text_output="each")
    pruned = prune_blocks(family, "transformer_blocks", [0, 1, 2], blocks, [1, 2], [2], layout, {**projectors}, {})
    model.transformer_blocks = torch.nn.ModuleList(pruned)

    def moments_with(noise):
        batch, found = make_batch(text_lengths=(5, 9), size=(3, 3)), {}
        text, mask = (batch.inputs[f"encoder_hidden_states{end}"] for end in ("", "_mask"))
        batch.inputs["encoder_hidden_states"] = torch.where(mask[..., None], text, noise)
        modules = {module: name for name, module in model.named_modules()}

        def keep(layers, moments):
            found.update({modules[layer]: moments for layer in layers})

        round_blocks(family, model, [batch], names_in(model), keep)
        return found

    quiet, loud = moments_with(0.0), moments_with(100.0)
    assert any("txt_proj" in name for name in quiet)
    assert any("ehs_proj" in name for name in quiet)
    for name, moments in quiet.items():
        torch.testing.assert_close(moments.gram, loud[name].gram, rtol=1e-4, atol=1e-3)
        modulation = "mod." in name
        text = family.stream_of(name.split(".", 2)[2]) == "text"
        assert moments.count == (2 if modulation else 14 if text else 18), name


@torch.no_grad()
def test_a_layer_that_nothing_calls_is_rounded_all_the_same(family, make_transformer, make_batch):
    """As the text queries of the published layout, on which no output depends."""
    model = make_transformer(2)
    blocks = list(model.transformer_blocks)
    layout = Layout(keep_text_query=True)
    arguments = "transformer_blocks", [0, 1], blocks, [1], [], layout, {"transformer_blocks.1.text": {}}, {}
    model.transformer_blocks = torch.nn.ModuleList(prune_blocks(family, *arguments))
    counts = {}
    modules = {module: name for name, module in model.named_modules()}
    round_blocks(
        family,
        model,
        [make_batch()],
        names_in(model),
        lambda layers, moments: counts.update({modules[layer]: moments.count for layer in layers}),
    )
    assert [name for name, count in counts.items() if not count] == ["transformer_blocks.1.attn.add_q_proj"]
    inside = [name for name in names_in(model) if name.startswith("transformer_blocks.")]
    assert sorted(counts) == sorted(inside)


@torch.no_grad()
def test_inputs_are_those_of_the_call_and_it_ends_there(family, make_transformer, make_batch):
    block, calls, ran = make_transformer(1).transformer_blocks[0], [], []
    transformer = make_transformer(1)
    observe(family, transformer, make_batch().inputs, calls.append)
    block = transformer.transformer_blocks[0]
    block.img_mlp.register_forward_pre_hook(lambda *_: ran.append(1))
    found = inputs_of(block, ["attn.to_k", "attn.to_q", "img_mod.1"], calls[0].kwargs)
    assert list(found) == ["img_mod.1", "attn.to_q", "attn.to_k"]
    assert found["attn.to_q"] is found["attn.to_k"]
    torch.testing.assert_close(found["img_mod.1"], torch.nn.functional.silu(calls[0].kwargs["temb"]))
    assert not ran
    assert not any(module._forward_pre_hooks for name, module in block.named_modules() if name != "img_mlp")


@pytest.mark.parametrize("scheme", ["int4", "int8"])
@torch.no_grad()
def test_the_bias_makes_up_for_the_mean(scheme):
    """Inputs far from zero: the outputs' mean is kept, though the integers cannot keep it."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(8, 6)
    x = torch.randn(100, 8) + 5
    x_rounded = x + 0.1 * torch.randn(100, 8) + 0.5
    moments = InputMoments(8)
    moments.add(x_rounded, x)
    before = linear(x)
    rounded = copy.deepcopy(linear)
    settings = {"scheme": scheme, "group_size": 4 if scheme == "int4" else None, "damping": 1e-6}
    round_linears([rounded], moments, **settings)
    after = rounded(x_rounded)
    torch.testing.assert_close(after.mean(0), before.mean(0), rtol=1e-4, atol=1e-4)
    assert relative_error(after, before) < 0.02
    assert not rounded.weight.requires_grad
    without = torch.nn.Linear(8, 6, bias=False)
    round_linears([without], moments, **settings)
    assert without.bias is None
    others = [copy.deepcopy(linear), torch.nn.Linear(8, 3)]
    expected = others[1](x)
    round_linears(others, moments, **settings)
    torch.testing.assert_close(others[0](x_rounded), after)
    assert relative_error(others[1](x_rounded), expected) < 0.02
