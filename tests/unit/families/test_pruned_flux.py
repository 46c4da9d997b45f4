"""The width-pruned FLUX transformer against Eq. 8-9 written out over plain tensors, and its surgery."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from plain import HEAD_DIM, HEADS, WIDTH, PlainDualStream
from torch.nn import functional as F

from ppcl.artifacts.headers import Header
from ppcl.artifacts.plugs import Projector
from ppcl.errors import UsageError
from ppcl.families.flux.transformer_flux_pruned import (
    PrunedFluxSingleTransformerBlock,
    PrunedFluxTransformer2DModel,
    PrunedFluxTransformerBlock,
)
from ppcl.families.registry import get_family
from ppcl.layers import Layout
from ppcl.surgery.count import count_parameters
from ppcl.surgery.plugboard import Plugboard
from ppcl.surgery.width import prune_blocks

DUAL, SINGLE = "transformer_blocks", "single_transformer_blocks"
LAYERS, SINGLE_LAYERS = 5, 3
CHANNELS, POOLED = 48, 32
PROJECTORS = ("txt_proj", "ehs_proj", "img_ffn_proj", "txt_ffn_proj")
# Text, FFN, single FFN: runs of one and of two, in the middle and to the last dual block, whose text the single
# blocks read; FFNs gone in references, in text-pruned and in plain dual blocks, in any single block.
SETS = [
    ([2, 3], [], []),
    ([4], [], [2]),
    ([1, 3, 4], [0, 1, 2, 3], [1]),
    ([], [0, 3, 4], [0, 2]),
    ([1, 2, 3, 4], [0, 2, 4], [0, 1, 2]),
    ([2], [1, 2, 4], [0]),
    ([], [], [1]),
]


def make_teacher(seed=0, num_layers=LAYERS, num_single_layers=SINGLE_LAYERS, guidance_embeds=True):
    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        in_channels=CHANNELS,
        num_layers=num_layers,
        num_single_layers=num_single_layers,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=POOLED,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(8, 12, 12),
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".norm_" in name:  # all ones as made: a norm applied to the wrong stream would not show
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def make_inputs(model, count=3, text_length=5, size=(3, 4)):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    latents, noise = normal(2, count, size[0] * size[1], CHANNELS)
    conditions = {
        "prompt_embeds": normal(count, text_length, WIDTH),
        "pooled_prompt_embeds": normal(count, POOLED),
    }
    sigmas = torch.rand(count, generator=generator)
    inputs = get_family("flux", model.config).training_batch(latents, conditions, noise, sigmas, size).inputs
    # All zeros as made: rotations left out of the text, or taken from the image, would not show.
    inputs["txt_ids"] = torch.randint(9, inputs["txt_ids"].shape, generator=generator).float()
    return inputs


def empty(teacher, **changes):
    """The pruned class with the teacher's config and `changes`."""
    config = {key: value for key, value in teacher.config.items() if not key.startswith("_")}
    return PrunedFluxTransformer2DModel(**config | changes).eval()


def cut(tensor, like):
    return tensor[tuple(map(slice, like.shape))]


def prune(teacher, text=(), ffn=(), single_ffn=(), text_output="last", keep_text_query=False, scale=0.1, seed=1):
    """The pruned class with what `teacher` and it have in common, and projectors drawn at random."""
    model = empty(
        teacher,
        pruned_text=text,
        pruned_ffn=ffn,
        pruned_single_ffn=single_ffn,
        text_output=text_output,
        keep_text_query=keep_text_query,
    )
    own, generator = teacher.state_dict(), torch.Generator().manual_seed(seed)
    state = {
        key: cut(own[key], value) if key in own else scale * torch.randn(value.shape, generator=generator)
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model


def projectors_of(model):
    return {key: value for key, value in model.state_dict().items() if key.split(".")[-2] in PROJECTORS}


def projector_keys(*modules):
    return {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}


def pointers(module):
    return {name: parameter.data_ptr() for name, parameter in module.named_parameters()}


class Plain(PlainDualStream):
    """Eq. 8-9 for one sample, by loops over the teacher's state dict."""

    names = {"image": ("norm1.linear", "ff"), "text": ("norm1_context.linear", "ff_context")}

    def __init__(self, teacher, projectors, text, ffn, single_ffn, text_output):
        super().__init__(teacher, projectors, text, ffn, text_output)
        self.single_ffn = single_ffn

    def single(self, index, image, h, temb, image_freqs, text_freqs):
        name = f"{SINGLE}.{index}"
        shift, scale, gate = self.modulation(f"{name}.norm.linear", temb)
        joined, freqs = torch.cat([h, image]), torch.cat([text_freqs, image_freqs])
        normed = self.modulated(joined, shift, scale)
        query = self.heads(f"{name}.attn.to_q", f"{name}.attn.norm_q", normed, freqs)
        key = self.heads(f"{name}.attn.to_k", f"{name}.attn.norm_k", normed, freqs)
        found = self.attend(query, key, self.heads(f"{name}.attn.to_v", None, normed, freqs))
        if index not in self.single_ffn:
            hidden = F.gelu(self.linear(f"{name}.proj_mlp", normed), approximate="tanh")
            joined = joined + gate * self.linear(f"{name}.proj_out", torch.cat([found, hidden], dim=-1))
            return joined[len(h) :], joined[: len(h)]
        of_attention = self.state[f"{name}.proj_out.weight"][:, :WIDTH]
        joined = joined + gate * (found @ of_attention.T + self.state[f"{name}.proj_out.bias"])
        image, h = joined[len(h) :], joined[: len(h)]
        return self.project(f"{name}.img_ffn_proj", image), self.project(f"{name}.txt_ffn_proj", h)

    def sample(self, hidden, embeds, conditions, ids):
        cosine, sine = self.teacher.pos_embed(ids)  # each number twice in a row
        freqs = torch.complex(cosine[:, ::2], sine[:, ::2])
        freqs = freqs[len(embeds) :], freqs[: len(embeds)]
        image, h = self.linear("x_embedder", hidden), self.linear("context_embedder", embeds)
        temb = self.teacher.time_text_embed(*(condition[None] for condition in conditions))
        for index in range(LAYERS):
            image, h = self.dual(index, image, h, temb, temb, *freqs)
        for index in range(SINGLE_LAYERS):
            image, h = self.single(index, image, h, temb, *freqs)
        scale, shift = self.linear("norm_out.linear", F.silu(temb)).split(WIDTH, dim=-1)
        return self.linear("proj_out", self.modulated(image, shift, scale))

    @torch.no_grad()
    def __call__(self, inputs):
        conditions = [inputs["timestep"] * 1000, inputs["pooled_projections"]]
        if "guidance" in inputs:
            conditions.insert(1, inputs["guidance"] * 1000)
        ids = torch.cat([inputs["txt_ids"], inputs["img_ids"]])
        conditions = zip(*conditions, strict=True)
        samples = zip(inputs["hidden_states"], inputs["encoder_hidden_states"], conditions, strict=True)
        return torch.stack([self.sample(*sample, ids) for sample in samples])


def assert_plain(teacher, model, inputs):
    config = model.config
    sets = config.pruned_text, config.pruned_ffn, config.pruned_single_ffn
    plain = Plain(teacher, projectors_of(model), *sets, config.text_output)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], plain(inputs), rtol=1e-4, atol=1e-5)


def silence(linear, *parts):
    """Zero these parts, each as wide as the model, of what a modulation gives."""
    for part in parts:
        linear.weight[part * WIDTH : (part + 1) * WIDTH] = 0
        linear.bias[part * WIDTH : (part + 1) * WIDTH] = 0


def still_text(teacher):
    """Text gates at zero and equal text modulations: h and z are the same in every dual block."""
    for block in teacher.transformer_blocks:
        block.norm1_context.load_state_dict(teacher.transformer_blocks[0].norm1_context.state_dict())
        silence(block.norm1_context.linear, 2, 5)
    return teacher


def without_ffn(teacher, ffn, single_ffn):
    """FFNs that change nothing: gates at zero, columns that read the MLP at zero."""
    for index in ffn:
        silence(teacher.transformer_blocks[index].norm1.linear, 5)
        silence(teacher.transformer_blocks[index].norm1_context.linear, 5)
    for index in single_ffn:
        teacher.single_transformer_blocks[index].proj_out.weight[:, WIDTH:] = 0
    return teacher


@torch.no_grad()
def recorded(model, inputs):
    """What each block is called with, by stack and index."""
    calls, handles = {}, []
    for stack in (DUAL, SINGLE):
        for index, block in enumerate(getattr(model, stack)):

            def note(module, args, kwargs, key=(stack, index)):
                calls[key] = kwargs

            handles.append(block.register_forward_pre_hook(note, with_kwargs=True))
    model(**inputs)
    for handle in handles:
        handle.remove()
    return calls


@pytest.fixture(scope="module")
def teacher():
    """Read it, do not write."""
    return make_teacher()


@pytest.fixture(scope="module")
def flux(teacher):
    return get_family("flux", teacher.config)


@pytest.fixture
def inputs(teacher):
    return make_inputs(teacher)


# The model.


@torch.no_grad()
def test_the_reference_is_the_stock_model_where_nothing_is_pruned(teacher, inputs):
    plain = Plain(teacher, {}, [], [], [], "last")(inputs)
    torch.testing.assert_close(plain, teacher(**inputs)[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(prune(teacher)(**inputs)[0], teacher(**inputs)[0])


@pytest.mark.parametrize("keep_text_query", [False, True])
@pytest.mark.parametrize("text_output", ["last", "each"])
@pytest.mark.parametrize(("text", "ffn", "single_ffn"), SETS)
def test_the_forward_equals_a_plain_reference(teacher, inputs, text, ffn, single_ffn, text_output, keep_text_query):
    assert_plain(teacher, prune(teacher, text, ffn, single_ffn, text_output, keep_text_query), inputs)


@torch.no_grad()
def test_the_sets_are_far_apart(teacher, inputs):
    """Else equality with the reference would say little."""
    found = [prune(teacher, *sets, text_output)(**inputs)[0] for sets in SETS for text_output in ("last", "each")]
    found.append(teacher(**inputs)[0])
    same = [(a, b) for a in range(len(found)) for b in range(a) if (found[a] - found[b]).abs().max() < 1e-2]
    # `each` differs from `last` only where a run is longer than one
    assert same == [(2 * n + 1, 2 * n) for n, (text, _, _) in enumerate(SETS) if not {1 + t for t in text} & {*text}]


def test_a_model_that_takes_no_guidance():
    schnell = make_teacher(guidance_embeds=False)
    inputs = make_inputs(schnell)
    assert "guidance" not in inputs
    assert_plain(schnell, prune(schnell, *SETS[2]), inputs)


@torch.no_grad()
def test_every_projector_reaches_the_picture_but_for_text_that_goes_nowhere(teacher, inputs):
    for text_output, expected in (("last", {2, 4}), ("each", {1, 2, 4})):
        model = prune(teacher, [1, 2, 4], [0, 3, 4], [0, 2], text_output)
        before, dead = model(**inputs)[0], {f"{SINGLE}.2.txt_ffn_proj.weight"}
        names = [name for name in projectors_of(model) if name.endswith("weight")]
        assert {int(name.split(".")[1]) for name in names if "ehs_proj" in name} == expected
        for name in names:
            weight = model.get_parameter(name)
            weight.neg_()
            assert torch.equal(model(**inputs)[0], before) == (name in dead), name
            weight.neg_()


@pytest.mark.parametrize("text_output", ["last", "each"])
@torch.no_grad()
def test_identity_projectors_lose_nothing_where_the_text_stands_still(inputs, text_output):
    teacher = still_text(make_teacher())
    for text in ([1, 3], [2, 3], [1, 2, 3, 4]):
        model = prune(teacher, text, text_output=text_output, scale=0.0)
        torch.testing.assert_close(model(**inputs)[0], teacher(**inputs)[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_identity_ffn_projectors_equal_ffns_that_add_nothing(teacher, inputs):
    sets = [0, 2, 4], [0, 2]
    silent = without_ffn(make_teacher(), *sets)
    expected = silent(**inputs)[0]
    assert not torch.allclose(expected, teacher(**inputs)[0], rtol=0, atol=1e-2)
    torch.testing.assert_close(prune(silent, [], *sets, scale=0.0)(**inputs)[0], expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_an_ip_adapter_adds_the_same_to_blocks_with_a_text_stream(inputs):
    teacher = without_ffn(still_text(make_teacher()), [0, 3], [])
    pruned = prune(teacher, [2], [0, 3], scale=0.0)
    torch.manual_seed(3)
    adapter = FluxIPAdapterAttnProcessor(hidden_size=WIDTH, cross_attention_dim=16)
    found, plain = [], teacher(**inputs)[0]
    for model in (teacher, pruned):
        for index in (0, 1, 3):  # two without FFN, one that carries its z
            model.transformer_blocks[index].attn.set_processor(adapter)
        adapted = {"ip_hidden_states": [torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(4))]}
        found.append(model(**inputs, joint_attention_kwargs=adapted)[0])
    assert not torch.allclose(found[0], plain, rtol=0, atol=1e-2)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)


def test_projectors_start_as_the_identity(teacher):
    projectors = projectors_of(empty(teacher, pruned_text=[2, 3], pruned_ffn=[1, 3], pruned_single_ffn=[1]))
    assert {name.rpartition(".")[0] for name in projectors} == {
        *(f"{DUAL}.1.img_ffn_proj", f"{DUAL}.1.txt_ffn_proj"),
        *(f"{DUAL}.2.txt_proj", f"{DUAL}.3.txt_proj", f"{DUAL}.3.ehs_proj", f"{DUAL}.3.img_ffn_proj"),
        *(f"{SINGLE}.1.img_ffn_proj", f"{SINGLE}.1.txt_ffn_proj"),
    }
    assert not any(value.any() for value in projectors.values())


@pytest.mark.parametrize("keep_text_query", [False, True])
def test_dead_parameters_are_gone(teacher, keep_text_query):
    model = prune(teacher, [2, 3], [1, 3], [1], keep_text_query=keep_text_query)
    stock = {stack: getattr(teacher, stack)[0].state_dict() for stack in (DUAL, SINGLE)}

    def keys(stack, *starts):
        return {name for name in stock[stack] if name.startswith(starts)}

    query = keys(DUAL, "attn.add_q_proj", "attn.norm_added_q")
    text = keys(DUAL, "norm1_context", "ff_context", "attn.to_add_out") | (set() if keep_text_query else query)
    ffn = keys(DUAL, "ff.", "ff_context")
    dual, single = set(stock[DUAL]), set(stock[SINGLE])
    expected = {
        (DUAL, 1): dual - ffn | projector_keys("img_ffn_proj", "txt_ffn_proj"),
        (DUAL, 2): dual - text | projector_keys("txt_proj"),
        (DUAL, 3): dual - text - ffn | projector_keys("txt_proj", "ehs_proj", "img_ffn_proj"),
        (SINGLE, 1): single - keys(SINGLE, "proj_mlp") | projector_keys("img_ffn_proj", "txt_ffn_proj"),
    }
    for stack, pruned_class in ((DUAL, PrunedFluxTransformerBlock), (SINGLE, PrunedFluxSingleTransformerBlock)):
        for index, block in enumerate(getattr(model, stack)):
            found = block.state_dict()
            assert set(found) == expected.get((stack, index), set(stock[stack])), (stack, index)
            for name in ("norm1.linear", "norm1_context.linear"):
                outputs = 3 if index in (1, 3) else 6
                assert f"{name}.weight" not in found or found[f"{name}.weight"].shape == (outputs * WIDTH, WIDTH)
                assert f"{name}.bias" not in found or len(found[f"{name}.bias"]) == outputs * WIDTH
            assert isinstance(block, pruned_class) == ((stack, index) in expected)
    assert model.single_transformer_blocks[1].proj_out.weight.shape == (WIDTH, WIDTH)


@pytest.mark.parametrize("keep_text_query", [False, True])
@pytest.mark.parametrize("text_output", ["last", "each"])
def test_parameters_number_what_a_formula_says(teacher, text_output, keep_text_query):
    square, ffn_size = WIDTH**2 + WIDTH, 8 * WIDTH**2 + 5 * WIDTH  # D -> D; D -> 4D -> D

    def size(module):
        return sum(parameter.numel() for parameter in module.parameters())

    assert size(teacher.transformer_blocks[0]) == 20 * square + 2 * ffn_size + 4 * HEAD_DIM
    assert size(teacher.single_transformer_blocks[0]) == 7 * square + 8 * WIDTH**2 + 4 * WIDTH + 2 * HEAD_DIM
    for text, ffn, single_ffn in SETS:
        outputs = [index for index in text if text_output == "each" or index + 1 not in text]
        query = 0 if keep_text_query else square + HEAD_DIM
        lost = len(text) * (6 * square + square + query + ffn_size - square) - len(outputs) * square
        for index in ffn:  # the FFN and its half of the modulation for a projector, in one stream or two
            lost += (1 if index in text else 2) * (ffn_size + 3 * square - square)
        lost += len(single_ffn) * (8 * WIDTH**2 + 4 * WIDTH - 2 * square)
        model = prune(teacher, text, ffn, single_ffn, text_output, keep_text_query)
        assert size(model) == size(teacher) - lost, (text, ffn, single_ffn)


@torch.no_grad()
def test_text_queries_change_no_output(teacher, inputs):
    for text_output in ("last", "each"):
        kept, gone = (prune(teacher, *SETS[2], text_output, keep_text_query=keep) for keep in (True, False))
        assert torch.equal(kept(**inputs)[0], gone(**inputs)[0])
        dead = set(kept.state_dict()) - set(gone.state_dict())
        assert {name.split(".", 2)[2] for name in dead} == {
            *("attn.add_q_proj.weight", "attn.add_q_proj.bias", "attn.norm_added_q.weight")
        }


@pytest.mark.parametrize("text_output", ["last", "each"])
def test_gradient_checkpointing_changes_no_gradient(teacher, inputs, text_output):
    losses, gradients = [], []
    for checkpointing in (False, True):
        model = prune(teacher, *SETS[2], text_output)
        if checkpointing:
            model.enable_gradient_checkpointing()
        loss = model(**inputs)[0].square().mean()
        loss.backward()
        losses.append(loss)
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-7)
    plain, checkpointed = gradients
    assert all(plain[name].any() for name in projectors_of(model))
    for name, value in plain.items():
        assert (value is None) == (checkpointed[name] is None), name
        if value is not None:
            torch.testing.assert_close(checkpointed[name], value, rtol=0, atol=1e-7)


@pytest.mark.parametrize("keep_text_query", [False, True])
@pytest.mark.parametrize("text_output", ["last", "each"])
@torch.no_grad()
def test_saving_and_loading_changes_no_bit(tmp_path, teacher, inputs, text_output, keep_text_query):
    model = prune(teacher, *SETS[2], text_output, keep_text_query)
    model.save_pretrained(tmp_path)
    loaded, report = PrunedFluxTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])
    config = loaded.config
    assert [list(config[f"pruned_{kind}"]) for kind in ("text", "ffn", "single_ffn")] == list(SETS[2])
    assert (config.text_output, config.keep_text_query) == (text_output, keep_text_query)


@torch.no_grad()
def test_blocks_compile_one_by_one():
    teacher, sets = make_teacher(num_layers=3, num_single_layers=2), ([2], [1, 2], [0])
    inputs = make_inputs(teacher, count=2, text_length=3, size=(2, 2))
    expected, compiled = prune(teacher, *sets)(**inputs)[0], prune(teacher, *sets)
    compiled.compile_repeated_blocks(backend="eager", fullgraph=True)
    blocks = [*compiled.transformer_blocks, *compiled.single_transformer_blocks]
    assert all(block._compiled_call_impl is not None for block in blocks)
    torch.testing.assert_close(compiled(**inputs)[0], expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_group_offload_changes_no_output(teacher, inputs):
    model = prune(teacher, *SETS[2])
    expected = model(**inputs)[0]
    device = torch.device("cpu")
    model.enable_group_offload(device, device, offload_type="block_level", num_blocks_per_group=1)
    assert all(hasattr(b, "_diffusers_hook") for b in (*model.transformer_blocks, *model.single_transformer_blocks))
    assert torch.equal(model(**inputs)[0], expected)


@torch.no_grad()
def test_half_precision_is_clipped_as_in_stock_blocks(teacher, flux, inputs):
    calls = recorded(teacher, inputs)
    dual, single = (
        {name: calls[stack, 2][name].half() for name in ("hidden_states", "encoder_hidden_states", "temb")}
        | {"image_rotary_emb": calls[stack, 2]["image_rotary_emb"]}
        for stack in (DUAL, SINGLE)
    )
    most, far = torch.finfo(torch.float16).max, torch.full((WIDTH,), 6e4)
    block = make_teacher().half().transformer_blocks[2]
    role = flux.width.roles(DUAL, [2], [], LAYERS, Layout())[2]
    pruned = flux.width.prune(block, role, {"ehs_proj.bias": far})
    z = dual["encoder_hidden_states"]
    text, image = pruned(**flux.width.with_text(dual, z + 3e4, z))
    assert (text == most).all()
    assert image.isfinite().all()
    block = make_teacher().half().single_transformer_blocks[2]
    pruned = flux.width.prune(block, {"project_ffn": True}, {"txt_ffn_proj.bias": far, "img_ffn_proj.bias": -far})
    lifted = {"hidden_states": single["hidden_states"] - 3e4, "encoder_hidden_states": z + 3e4}
    text, image = pruned(**single | lifted)
    assert (text == most).all()
    assert (image == -most).all()


# The family's width methods.


def test_roles_say_what_each_block_becomes(flux):
    assert set(flux.width.projectors.values()) == set(PROJECTORS)
    names = ("project_text", "project_text_output", "project_ffn", "carry", "keep_text_query")
    for text_output, inner in (("last", False), ("each", True)):
        roles = flux.width.roles(DUAL, [2, 3], [1, 3], LAYERS, Layout(text_output, True))
        assert roles == [
            None,
            dict(zip(names, (False, False, True, True, False), strict=True)),
            dict(zip(names, (True, inner, False, True, True), strict=True)),
            dict(zip(names, (True, True, True, False, True), strict=True)),
            None,
        ]
    assert flux.width.roles(DUAL, [], [], LAYERS, Layout()) == [None] * LAYERS
    only = {"project_ffn": True}
    assert flux.width.roles(SINGLE, [], [0, 2], SINGLE_LAYERS, Layout("each", True)) == [only, None, only]


def test_the_pruned_config_names_the_sets_of_both_stacks(teacher, flux):
    places = {DUAL: {"text": [2], "ffn": [0, 2]}, SINGLE: {"text": [], "ffn": [1]}}
    config = flux.width.config(places, Layout("each", True))
    assert config == {
        "pruned_text": [2],
        "pruned_ffn": [0, 2],
        "pruned_single_ffn": [1],
        "text_output": "each",
        "keep_text_query": True,
    }
    model = empty(teacher, **config)
    for stack, sets in places.items():
        roles = flux.width.roles(stack, sets["text"], sets["ffn"], len(getattr(teacher, stack)), Layout("each", True))
        for block, source, role in zip(getattr(model, stack), getattr(teacher, stack), roles, strict=True):
            made = source if role is None else flux.width.prune(source, role, {})
            shapes = [{name: value.shape for name, value in item.state_dict().items()} for item in (block, made)]
            assert shapes[0] == shapes[1]


@torch.no_grad()
def test_a_pruned_block_is_given_the_references_text_and_what_goes_into_its_qkv(teacher, flux, inputs):
    model = prune(teacher, [3, 4])
    calls, block = recorded(model, inputs), teacher.transformer_blocks[2]
    reference, given, last = (calls[DUAL, index] for index in (2, 3, 4))
    z, read = flux.width.text_qkv_input(block, reference), []
    handle = block.attn.add_k_proj.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    text, _ = block(**reference)
    handle.remove()
    assert torch.equal(z, read[0])
    assert torch.equal(flux.width.text_qkv_input(model.transformer_blocks[2], reference), z)
    packed = flux.width.with_text(reference, text, z)
    assert packed.keys() == reference.keys()
    assert all(packed[name] is value for name, value in reference.items() if name != "encoder_hidden_states")
    assert torch.equal(packed["encoder_hidden_states"], given["encoder_hidden_states"])
    assert torch.equal(last["encoder_hidden_states"], given["encoder_hidden_states"])  # through the run unchanged
    assert calls[SINGLE, 0]["encoder_hidden_states"].shape == text.shape


@torch.no_grad()
def test_what_goes_into_the_qkv_is_the_same_without_an_ffn(teacher, flux, inputs):
    reference = recorded(teacher, inputs)[DUAL, 2]
    block = teacher.transformer_blocks[2]
    role = flux.width.roles(DUAL, [], [2], LAYERS, Layout())[2]
    z, expected = (flux.width.text_qkv_input(item, reference) for item in (flux.width.prune(block, role, {}), block))
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-6)


def pruned_blocks(flux, transformer, text, ffn, single_ffn, states=None, layout=None):
    """The blocks of both stacks with their sources, by stack and index."""
    found = {}
    for stack, sets in ((DUAL, (text, ffn)), (SINGLE, ([], single_ffn))):
        blocks = list(getattr(transformer, stack))
        made = prune_blocks(flux, stack, range(len(blocks)), blocks, *sets, layout or Layout(), states or {})
        found |= {(stack, index): pair for index, pair in enumerate(zip(made, blocks, strict=True))}
    return found


@pytest.mark.parametrize("keep_text_query", [False, True])
def test_a_pruned_block_shares_what_it_keeps(teacher, flux, keep_text_query):
    pruned = pruned_blocks(flux, teacher, [2, 3], [1, 3], [0, 2], layout=Layout("last", keep_text_query))
    expected = {(DUAL, 1), (DUAL, 2), (DUAL, 3), (SINGLE, 0), (SINGLE, 2)}
    for key, (block, source) in pruned.items():
        if key not in expected:
            assert block is source
            continue
        assert type(block) is (PrunedFluxTransformerBlock if key[0] == DUAL else PrunedFluxSingleTransformerBlock)
        own, found = pointers(source), pointers(block)
        new = {name for name in found if name not in own}
        assert new
        assert all(name.split(".")[0] in PROJECTORS for name in new)
        for name, pointer in found.items():
            if name in own and (key[0], name) != (SINGLE, "proj_out.weight"):
                assert pointer == own[name], name  # the first half, where cut
        if key[0] == SINGLE:  # columns cannot be shared
            assert torch.equal(block.proj_out.weight, source.proj_out.weight[:, :WIDTH])
            assert block.proj_out.weight.is_contiguous()
        else:
            kept = source.norm1.linear.weight[: (3 if key[1] in (1, 3) else 6) * WIDTH]
            assert torch.equal(block.norm1.linear.weight, kept)


def test_pruning_leaves_the_source_untouched(teacher, flux):
    transformer = make_teacher()
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    names = [list(block.state_dict()) for block in blocks]
    processors = [type(block.attn.processor) for block in blocks]
    for _, (block, source) in pruned_blocks(flux, transformer, *SETS[4]).items():
        if block is not source:
            with torch.no_grad():
                for name, parameter in block.named_parameters():
                    if name == "proj_out.weight" or name.split(".")[0] in PROJECTORS:
                        parameter.zero_()  # its own
    assert [*transformer.transformer_blocks, *transformer.single_transformer_blocks] == blocks
    assert [list(block.state_dict()) for block in blocks] == names
    assert [type(block.attn.processor) for block in blocks] == processors
    state = teacher.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in transformer.state_dict().items())
    assert all(parameter.requires_grad for parameter in transformer.parameters())


@pytest.mark.parametrize("learns", [True, False])
def test_what_is_kept_learns_if_the_source_does_and_projectors_do_not(flux, projectors, learns):
    transformer = make_teacher().requires_grad_(learns)
    states = {name: item.state_dict for name, item in projectors.items()}
    pruned = pruned_blocks(flux, transformer, [3, 4], [0, 1, 4], [0, 2], states)
    assert all(parameter.requires_grad == learns for parameter in transformer.parameters())
    for block, _ in pruned.values():
        for name, parameter in block.named_parameters():
            new = name.split(".")[0] in PROJECTORS
            assert parameter.requires_grad == (learns and not new), name


@pytest.mark.parametrize("training", [True, False])
def test_pruned_blocks_take_values_dtype_and_mode(flux, projectors, training):
    transformer = make_teacher().to(torch.bfloat16).train(training)
    absent = f"{SINGLE}.2.ffn"
    states = {name: item.state_dict for name, item in projectors.items() if name != absent}
    pruned = pruned_blocks(flux, transformer, [3, 4], [0, 1, 4], [0, 2], states)
    assert {block.training for block, _ in pruned.values()} == {training}
    assert {parameter.dtype for block, _ in pruned.values() for parameter in block.parameters()} == {torch.bfloat16}
    for name, state in states.items():
        stack, index, _ = name.split(".")
        found = pruned[stack, int(index)][0].state_dict()
        carried = {key: value for key, value in state.items() if key in found}
        gone = {key.split(".")[0] for key in state.keys() - carried.keys()}
        # in the middle of a run, and where the text stream is gone
        assert gone == {f"{DUAL}.3.text": {"ehs_proj"}, f"{DUAL}.4.ffn": {"txt_ffn_proj"}}.get(name, set())
        assert all(torch.equal(found[key], value.bfloat16()) for key, value in carried.items())
    for key in projector_keys("img_ffn_proj", "txt_ffn_proj"):
        assert not pruned[SINGLE, 2][0].get_parameter(key).any()


@pytest.mark.parametrize(("stack", "kind", "key"), [(DUAL, "text", "txt_proj"), (SINGLE, "ffn", "img_ffn_proj")])
def test_a_projector_of_another_width_is_refused(teacher, flux, stack, kind, key):
    states = {f"{stack}.1.{kind}": make_projector(stack, 1, kind, width=32).state_dict}
    with pytest.raises(UsageError, match=rf"does not fit this model: {key}\.weight is \[32, 32\], .*is \[64, 64\]"):
        pruned_blocks(flux, teacher, [1] if kind == "text" else [], [], [1] if kind == "ffn" else [], states)


# The plugboard.

INTERVALS = {DUAL: [(1, 2)], SINGLE: [(0, 1)]}
FIRST, SECOND = f"{DUAL}.1-2", f"{SINGLE}.0-1"
KEPT = {DUAL: [0, 1, 3, 4], SINGLE: [0, 2]}
# 3 and 4 read the student in 1, which has no FFN itself; no single block has one.
WIDTHS = {DUAL: {"text": [3, 4], "ffn": [0, 1, 4]}, SINGLE: {"text": [], "ffn": [0, 2]}}
PLACES = {"pruned_text": [2, 3], "pruned_ffn": [0, 1, 3], "pruned_single_ffn": [0, 1]}


def make_projector(stack, index, kind, width=WIDTH):
    generator = torch.Generator().manual_seed(10 * index + len(kind) + 100 * len(stack))
    modules = ("txt_proj", "ehs_proj") if kind == "text" else ("img_ffn_proj", "txt_ffn_proj")
    state = {}
    for module in modules:
        state[f"{module}.weight"] = 0.1 * torch.randn(width, width, generator=generator)
        state[f"{module}.bias"] = 0.1 * torch.randn(width, generator=generator)
    header = Header("ppcl.projector", {"index": index, "kind": kind, "text_output": "last"})
    base = {(DUAL, 1): FIRST, (SINGLE, 0): SECOND}.get((stack, index))
    return Projector(header, stack, state, {}, index, kind, base, 1 if kind == "text" else None)


@pytest.fixture
def projectors():
    """Fitted where both students and every projector are plugged in."""
    made = [make_projector(stack, i, kind) for stack, sets in WIDTHS.items() for kind in sets for i in sets[kind]]
    return {item.name: item for item in made}


@pytest.fixture
def parts(flux, projectors):
    """A transformer, students with weights of their own, and `board(layout)` of both."""
    transformer, other = make_teacher(), make_teacher(seed=9)
    students = {FIRST: other.transformer_blocks[0], SECOND: other.single_transformer_blocks[0]}

    def board(layout=None):
        return Plugboard(flux, transformer, INTERVALS, students, projectors, layout)

    return SimpleNamespace(transformer=transformer, students=students, projectors=projectors, board=board)


def built_by_hand(parts, layout):
    """The pruned class with the weights of teacher and students, cut to size, and the projectors'."""
    transformer = parts.transformer
    state = {key: value for key, value in transformer.state_dict().items() if f"{DUAL}." not in key}
    for stack, kept in KEPT.items():
        blocks = dict(enumerate(getattr(transformer, stack)))
        blocks |= {1: parts.students[FIRST]} if stack == DUAL else {0: parts.students[SECOND]}
        for place, index in enumerate(kept):
            state |= {f"{stack}.{place}.{key}": value for key, value in blocks[index].state_dict().items()}
    for item in parts.projectors.values():
        place = KEPT[item.stack].index(item.index)
        state |= {f"{item.stack}.{place}.{key}": value for key, value in item.state_dict.items()}
    counts = {"num_layers": 4, "num_single_layers": 2}
    model = empty(transformer, **counts, **PLACES, text_output=layout.text_output)
    model.load_state_dict({key: cut(state[key], value) for key, value in model.state_dict().items()})
    return model


@pytest.mark.parametrize("text_output", ["last", "each"])
@pytest.mark.parametrize("keep_text_query", [False, True])
@torch.no_grad()
def test_a_standalone_model_equals_the_board_and_one_built_by_hand(
    flux, inputs, tmp_path, parts, text_output, keep_text_query
):
    layout = Layout(text_output, keep_text_query)
    by_hand = built_by_hand(parts, layout)(**inputs)[0]
    board = parts.board(layout).all()
    assert board.kept == KEPT
    assert board.width == WIDTHS
    assert board.plugged == [FIRST, SECOND]
    expected, shared = parts.transformer(**inputs)[0], pointers(parts.transformer)
    assert torch.equal(expected, by_hand)
    model = board.standalone()
    assert type(model) is PrunedFluxTransformer2DModel
    assert not model.training
    assert torch.equal(model(**inputs)[0], expected)
    assert pointers(model) == shared
    config = model.config
    assert {name: list(config[name]) for name in PLACES} == PLACES
    assert (config.num_layers, config.num_single_layers) == (4, 2)
    assert (config.text_output, config.keep_text_query) == (text_output, keep_text_query)
    board()  # the board goes on; the model stays what it is
    assert torch.equal(model(**inputs)[0], expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(PrunedFluxTransformer2DModel.from_pretrained(tmp_path)(**inputs)[0], expected)
    counts = count_parameters(flux, dict(parts.transformer.config), INTERVALS, WIDTHS, layout)
    assert counts["student"] == sum(parameter.numel() for parameter in model.parameters())
    assert (counts["teacher_layers"], counts["student_layers"]) == (8, 6)


@torch.no_grad()
def test_switching_back_gives_the_teacher_bit_for_bit(inputs, parts):
    transformer = parts.transformer
    stacks = {stack: list(getattr(transformer, stack)) for stack in (DUAL, SINGLE)}
    teacher, board = transformer(**inputs)[0], parts.board()
    state = {name: value.clone() for name, value in transformer.state_dict().items()}
    arrangements = {
        "all": [*board.names, *board.projectors],
        "students": [FIRST, SECOND],
        "dual": [FIRST, f"{DUAL}.1.ffn", f"{DUAL}.3.text"],
        "single": [SECOND, f"{SINGLE}.0.ffn"],
        "ffn": [f"{DUAL}.0.ffn", f"{SINGLE}.2.ffn"],
    }
    outputs = {name: board(*names).transformer(**inputs)[0] for name, names in arrangements.items()}
    outputs["removed"] = board.remove().transformer(**inputs)[0]
    found = [teacher, *outputs.values()]
    assert not any(torch.allclose(a, b, rtol=0, atol=1e-3) for n, a in enumerate(found) for b in found[:n])
    board()
    assert {stack: list(getattr(transformer, stack)) for stack in stacks} == stacks
    assert (board.width, board.plugged) == ({}, [])
    assert (transformer.config.num_layers, transformer.config.num_single_layers) == (LAYERS, SINGLE_LAYERS)
    assert all(torch.equal(value, state[name]) for name, value in transformer.state_dict().items())
    assert torch.equal(transformer(**inputs)[0], teacher)
    assert type(board.standalone()) is FluxTransformer2DModel
    assert torch.equal(board.all().transformer(**inputs)[0], outputs["all"])


@torch.no_grad()
def test_projectors_of_one_stack_leave_the_other_stock(inputs, parts):
    board = parts.board()
    for names, places in (
        ([FIRST, f"{DUAL}.3.text", f"{DUAL}.1.ffn"], {"pruned_text": [2], "pruned_ffn": [1], "pruned_single_ffn": []}),
        ([f"{SINGLE}.2.ffn"], {"pruned_text": [], "pruned_ffn": [], "pruned_single_ffn": [2]}),
    ):
        expected, model = board(*names).transformer(**inputs)[0], board.standalone()
        assert {name: list(model.config[name]) for name in places} == places
        assert torch.equal(model(**inputs)[0], expected)


def test_a_standalone_model_of_a_frozen_one_is_frozen(parts):
    for module in (parts.transformer, *parts.students.values()):
        module.requires_grad_(False)
    model = parts.board().all().standalone()
    assert not any(parameter.requires_grad for parameter in (*parts.transformer.parameters(), *model.parameters()))
