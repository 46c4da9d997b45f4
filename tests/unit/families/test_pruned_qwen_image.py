"""The width-pruned Qwen-Image transformer against Eq. 8-9 written out over plain tensors."""

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from peft import LoraConfig
from plain import HEAD_DIM, HEADS, WIDTH, PlainDualStream
from safetensors.torch import load_file
from torch.nn import functional as F

from ppcl.families.qwen_image.transformer_qwen_image_pruned import (
    PrunedQwenImageTransformer2DModel,
    PrunedQwenImageTransformerBlock,
)

LAYERS = 7
# Runs of one and of two, a run at the end, references with and without FFN, FFNs gone in either kind of block.
SETS = [
    ([2, 3, 5], []),
    ([], [0, 3, 6]),
    ([1, 2, 4, 5], [0, 2, 3, 4]),
    ([1, 2, 3, 4, 5, 6], [4, 6]),
    ([6], [5, 6]),
]


def make_teacher(seed=0, num_layers=LAYERS, zero_cond_t=False):
    torch.manual_seed(seed)
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=48,
        out_channels=12,
        num_layers=num_layers,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(8, 12, 12),
        zero_cond_t=zero_cond_t,
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".norm_" in name:  # all ones as made: a norm applied to the wrong stream would not show
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def prune(teacher, text=(), ffn=(), text_output="last", keep_text_query=False, scale=0.1, seed=1):
    """The pruned class with what `teacher` and it have in common, and projectors drawn at random."""
    config = {key: value for key, value in teacher.config.items() if not key.startswith("_")}
    model = PrunedQwenImageTransformer2DModel(
        **config, pruned_text=text, pruned_ffn=ffn, text_output=text_output, keep_text_query=keep_text_query
    ).eval()
    own, generator = teacher.state_dict(), torch.Generator().manual_seed(seed)
    state = {
        key: own[key][: len(value)] if key in own else scale * torch.randn(value.shape, generator=generator)
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model


def projectors_of(model):
    return {key: value for key, value in model.state_dict().items() if "_proj." in key and ".attn." not in key}


class Plain(PlainDualStream):
    """Eq. 8-9 for one sample whose padded tokens are taken out, by loops over the teacher's state dict."""

    names = {"image": ("img_mod.1", "img_mlp"), "text": ("txt_mod.1", "txt_mlp")}

    def sample(self, hidden, embeds, valid, sigma, shapes):
        image_freqs, text_freqs = self.teacher.pos_embed([shapes], max_txt_seq_len=len(embeds), device=hidden.device)
        image = self.linear("img_in", hidden)
        h = self.linear("txt_in", self.rms("txt_norm", embeds[valid]))
        temb = self.teacher.time_text_embed(sigma[None], image)
        temb_image = temb
        if self.teacher.config.zero_cond_t:  # images behind the first are given, without noise
            given = torch.arange(len(image)) >= shapes[0][1] * shapes[0][2]
            temb_image = torch.where(given[:, None], self.teacher.time_text_embed(0 * sigma[None], image), temb)
        for index in range(self.teacher.config.num_layers):
            image, h = self.dual(index, image, h, temb_image, temb, image_freqs, text_freqs[valid])
        scale, shift = self.linear("norm_out.linear", F.silu(temb)).chunk(2, dim=-1)
        return self.linear("proj_out", self.modulated(image, shift, scale))

    @torch.no_grad()
    def __call__(self, inputs):
        mask = inputs["encoder_hidden_states_mask"]
        embeds = inputs["encoder_hidden_states"]
        mask = torch.ones(embeds.shape[:2], dtype=torch.bool) if mask is None else mask
        samples = zip(inputs["hidden_states"], embeds, mask, inputs["timestep"], inputs["img_shapes"], strict=True)
        return torch.stack([self.sample(*sample) for sample in samples])


def assert_plain(teacher, model, inputs):
    config = model.config
    plain = Plain(teacher, projectors_of(model), config.pruned_text, config.pruned_ffn, config.text_output)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs)[0], plain(inputs), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def teacher():
    """Read it, do not write."""
    return make_teacher()


@pytest.fixture
def inputs(make_batch):
    return make_batch(0, (5, 9, 3)).inputs


@torch.no_grad()
def test_the_reference_is_the_stock_model_where_nothing_is_pruned(teacher, inputs):
    plain = Plain(teacher, {}, [], [], "last")(inputs)
    torch.testing.assert_close(plain, teacher(**inputs)[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(prune(teacher)(**inputs)[0], teacher(**inputs)[0])


@pytest.mark.parametrize("keep_text_query", [False, True])
@pytest.mark.parametrize("text_output", ["last", "each"])
@pytest.mark.parametrize(("text", "ffn"), SETS)
def test_the_forward_equals_a_plain_reference(teacher, inputs, text, ffn, text_output, keep_text_query):
    assert_plain(teacher, prune(teacher, text, ffn, text_output, keep_text_query), inputs)


@pytest.mark.parametrize("mask", ["none", "with holes"])
@pytest.mark.parametrize("text_output", ["last", "each"])
def test_masks_of_any_pattern(teacher, inputs, mask, text_output):
    if mask == "none":
        inputs["encoder_hidden_states_mask"] = None
    else:
        inputs["encoder_hidden_states_mask"] = torch.tensor([[1, 0, 1] * 3, [1] * 9, [0, 1] + [0] * 7]) > 0
    assert_plain(teacher, prune(teacher, *SETS[2], text_output), inputs)


@pytest.mark.parametrize("text_output", ["last", "each"])
def test_given_images_without_noise(inputs, text_output):
    """`zero_cond_t`, the edit models' layout: two modulations of the image stream, one of the text."""
    edit = make_teacher(zero_cond_t=True)
    inputs["img_shapes"] = [[(1, 2, 4), (1, 4, 2)]] * 3
    for sets in SETS[2:4]:
        assert_plain(edit, prune(edit, *sets, text_output), inputs)


@torch.no_grad()
def test_every_projector_reaches_the_picture_but_for_text_that_goes_nowhere(teacher, inputs):
    for text_output, expected in (("last", {3, 5}), ("each", {2, 3, 5})):
        model = prune(teacher, [2, 3, 5], [0, 2, 6], text_output)
        before, dead = model(**inputs)[0], {"transformer_blocks.6.txt_ffn_proj.weight"}
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
    """Text gates at zero and equal text modulations: h and z are the same in every block."""
    teacher = make_teacher()
    for block in teacher.transformer_blocks:
        block.txt_mod.load_state_dict(teacher.transformer_blocks[0].txt_mod.state_dict())
        for part in (2, 5):
            block.txt_mod[1].weight[part * WIDTH : (part + 1) * WIDTH] = 0
            block.txt_mod[1].bias[part * WIDTH : (part + 1) * WIDTH] = 0
    for text in ([2, 3, 5], [1, 2, 3, 4, 5, 6]):
        model = prune(teacher, text, [], text_output, scale=0.0)
        torch.testing.assert_close(model(**inputs)[0], teacher(**inputs)[0], rtol=0, atol=1e-5)


@torch.no_grad()
def test_identity_ffn_projectors_equal_ffns_with_a_gate_of_zero(inputs):
    teacher, ffn = make_teacher(), [0, 2, 6]
    whole = teacher(**inputs)[0]
    for index in ffn:
        block = teacher.transformer_blocks[index]
        for modulation in (block.img_mod[1], block.txt_mod[1]):
            modulation.weight[5 * WIDTH :] = 0
            modulation.bias[5 * WIDTH :] = 0
    expected = teacher(**inputs)[0]
    assert not torch.allclose(expected, whole, rtol=0, atol=1e-4)
    torch.testing.assert_close(prune(teacher, [], ffn, scale=0.0)(**inputs)[0], expected, rtol=0, atol=1e-5)


def test_projectors_start_as_the_identity(teacher):
    config = {key: value for key, value in teacher.config.items() if not key.startswith("_")}
    model = PrunedQwenImageTransformer2DModel(**config, pruned_text=[3, 4], pruned_ffn=[2, 4])
    projectors = projectors_of(model)
    assert {name.rpartition(".")[0].removeprefix("transformer_blocks.") for name in projectors} == {
        *("2.img_ffn_proj", "2.txt_ffn_proj"),
        *("3.txt_proj", "4.txt_proj", "4.ehs_proj", "4.img_ffn_proj"),
    }
    assert not any(value.any() for value in projectors.values())


@pytest.mark.parametrize("keep_text_query", [False, True])
def test_dead_parameters_are_gone(teacher, keep_text_query):
    model = prune(teacher, [3, 4], [2, 4], keep_text_query=keep_text_query)
    names = {f"transformer_blocks.{i}": block.state_dict() for i, block in enumerate(teacher.transformer_blocks)}
    stock = set(names["transformer_blocks.0"])

    def keys(*starts):
        return {name for name in stock if name.startswith(starts)}

    def projector(*modules):
        return {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}

    query = keys("attn.add_q_proj", "attn.norm_added_q")
    text = keys("txt_", "attn.to_add_out") | (set() if keep_text_query else query)
    ffn = keys("img_mlp", "txt_mlp")
    expected = {
        2: stock - ffn | projector("img_ffn_proj", "txt_ffn_proj"),
        3: stock - text | projector("txt_proj"),
        4: stock - text - ffn | projector("txt_proj", "ehs_proj", "img_ffn_proj"),
    }
    for index, block in enumerate(model.transformer_blocks):
        found = block.state_dict()
        assert set(found) == expected.get(index, stock), index
        outputs = 3 if index in (2, 4) else 6
        for name in ("img_mod.1.weight", "img_mod.1.bias", "txt_mod.1.weight", "txt_mod.1.bias"):
            assert name not in found or len(found[name]) == outputs * WIDTH
        assert isinstance(block, PrunedQwenImageTransformerBlock) == (index in (2, 3, 4))


@torch.no_grad()
def test_text_queries_change_no_output(teacher, inputs):
    for text_output in ("last", "each"):
        kept, gone = (prune(teacher, *SETS[2], text_output, keep_text_query=keep) for keep in (True, False))
        assert torch.equal(kept(**inputs)[0], gone(**inputs)[0])
        dead = set(kept.state_dict()) - set(gone.state_dict())
        assert {name.split(".", 2)[2] for name in dead} == {
            *("attn.add_q_proj.weight", "attn.add_q_proj.bias", "attn.norm_added_q.weight")
        }


@torch.no_grad()
def test_padded_text_reaches_nothing(teacher, inputs):
    model = prune(teacher, *SETS[2])
    before = model(**inputs)[0]
    inputs["encoder_hidden_states"][~inputs["encoder_hidden_states_mask"]] *= -30
    torch.testing.assert_close(model(**inputs)[0], before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("text_output", ["last", "each"])
def test_gradient_checkpointing_changes_no_gradient(teacher, inputs, text_output):
    gradients = []
    for checkpointing in (False, True):
        model = prune(teacher, *SETS[2], text_output)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**inputs)[0].square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
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
    loaded, report = PrunedQwenImageTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    assert torch.equal(loaded(**inputs)[0], model(**inputs)[0])
    assert list(loaded.config.pruned_text) == SETS[2][0]
    assert list(loaded.config.pruned_ffn) == SETS[2][1]
    assert (loaded.config.text_output, loaded.config.keep_text_query) == (text_output, keep_text_query)


@torch.no_grad()
def test_blocks_compile_one_by_one(make_batch):
    teacher, inputs = make_teacher(num_layers=3), make_batch(0, (3, 5), size=(2, 2)).inputs
    expected, compiled = prune(teacher, [2], [2])(**inputs)[0], prune(teacher, [2], [2])
    compiled.compile_repeated_blocks(backend="eager", fullgraph=True)
    assert all(block._compiled_call_impl is not None for block in compiled.transformer_blocks)
    torch.testing.assert_close(compiled(**inputs)[0], expected, rtol=0, atol=1e-6)


@torch.no_grad()
def test_group_offload_changes_no_output(teacher, inputs):
    model = prune(teacher, *SETS[2])
    expected = model(**inputs)[0]
    device = torch.device("cpu")
    model.enable_group_offload(device, device, offload_type="block_level", num_blocks_per_group=1)
    assert all(hasattr(block, "_diffusers_hook") for block in model.transformer_blocks)
    assert torch.equal(model(**inputs)[0], expected)


@torch.no_grad()
def test_loras_find_their_targets_and_come_off_again(tmp_path, teacher, inputs):
    """The names of a stock block's modules, those that a block has lost among them."""
    model = prune(teacher, *SETS[2])
    expected = model(**inputs)[0]
    targets = [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
        "img_mlp.net.2",
        "img_mod.1",
    ]
    model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets, init_lora_weights=False))
    adapted = model(**inputs)[0]
    hit = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    kept = {name for name, module in teacher.named_modules() if name.endswith(tuple(f".{t}" for t in targets))}
    lost = {f"transformer_blocks.{index}.attn.to_add_out" for index in SETS[2][0]}
    lost |= {f"transformer_blocks.{index}.img_mlp.net.2" for index in SETS[2][1]}
    assert hit == kept - lost
    assert not torch.allclose(adapted, expected, rtol=0, atol=1e-3)
    model.save_lora_adapter(tmp_path)
    other = prune(teacher, *SETS[2])
    saved = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    other.load_lora_adapter(saved, prefix=None)
    torch.testing.assert_close(other(**inputs)[0], adapted, rtol=0, atol=1e-6)
    model.delete_adapters("default")
    assert torch.equal(model(**inputs)[0], expected)
