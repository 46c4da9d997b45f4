"""LoRAs of the full model on a pruned one, in every form they come in."""

import re

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, QwenImagePipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from pruned_models import cut
from torch import nn

from ppcl.errors import UsageError
from ppcl.families.registry import get_family
from ppcl.layers import Layout
from ppcl.surgery.remap import map_blocks, remap_lora

STACK = "transformer_blocks"
INTERVALS = {STACK: [(1, 2), (4, 6)]}
KEPT = [0, 1, 3, 4, 7]
TARGETS = ["to_q", "to_out.0", "add_k_proj", "to_add_out", "img_mlp.net.2", "img_mod.1"]


def with_lora(model, alpha=2, targets=TARGETS):
    """The model with a random LoRA on it, and that LoRA as diffusers saves it."""
    torch.manual_seed(3)
    model.add_adapter(LoraConfig(r=2, lora_alpha=alpha, target_modules=targets, init_lora_weights=False))
    return {f"transformer.{key}": value for key, value in get_peft_model_state_dict(model).items()}


def deltas(state):
    """B A by module."""
    names = {key.split(".lora_")[0] for key in state}
    return {name: state[f"{name}.lora_B.weight"] @ state[f"{name}.lora_A.weight"] for name in names}


def as_comfy(state):
    return {key.replace("transformer.", "diffusion_model.", 1): value for key, value in state.items()}


def as_kohya(state, alpha=1.0):
    """Names with underscores, down and up, and an alpha that halves a rank of two."""
    found = {}
    for key, value in state.items():
        name, side = key.removeprefix("transformer.").split(".lora_")
        flat = "lora_unet_" + name.replace(".", "_")
        found[f"{flat}.lora_{'down' if side[0] == 'A' else 'up'}.weight"] = value
        found[f"{flat}.alpha"] = torch.tensor(alpha)
    return found


@pytest.fixture
def make_flux():
    def make():
        torch.manual_seed(0)
        return FluxTransformer2DModel(
            in_channels=48,
            num_layers=3,
            num_single_layers=5,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=64,
            pooled_projection_dim=32,
            axes_dims_rope=(8, 12, 12),
        )

    return make


@pytest.fixture
def model(make_transformer):
    return make_transformer(8)


@pytest.mark.parametrize(("form", "scale"), [(dict, 1.0), (as_comfy, 1.0), (as_kohya, 0.5)])
@torch.no_grad()
def test_every_kept_block_gets_its_own(family, model, make_transformer, form, scale):
    lora = with_lora(model)
    full = deltas(lora)
    student = cut(family, make_transformer(8), INTERVALS)
    found = remap_lora(QwenImagePipeline.lora_state_dict(form(lora)), student)
    ours = deltas(found.state)
    assert len(ours) == len(full) * len(KEPT) // 8
    for name, value in ours.items():
        block = int(name.split(".")[2])
        original = name.replace(f"{STACK}.{block}.", f"{STACK}.{KEPT[block]}.")
        torch.testing.assert_close(value, scale * full[original], rtol=1e-5, atol=1e-7)
    gone = {int(re.findall(r"\d+", name)[0]) for name in found.dropped}
    assert gone == set(range(8)) - set(KEPT)
    assert len(found.dropped) == len(full) - len(ours)


@torch.no_grad()
def test_merging_then_pruning_equals_pruning_then_mapping(family, make_transformer, make_batch):
    """Bit for bit in every kept weight but for the order of float additions."""
    lora = with_lora(make_transformer(8))
    merged, plain = make_transformer(8), make_transformer(8)
    merged.load_lora_adapter(lora)
    merged.fuse_lora()
    merged.unload_lora()
    student = cut(family, plain, INTERVALS)
    student.load_lora_adapter(remap_lora(lora, student).state)
    inputs = make_batch(0).inputs
    torch.testing.assert_close(student(**inputs)[0], cut(family, merged, INTERVALS)(**inputs)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("source", ["mean", "sum"])
@torch.no_grad()
def test_students_take_all_blocks_they_stand_for(family, model, make_transformer, source):
    lora = with_lora(model)
    full, student = deltas(lora), cut(family, make_transformer(8), INTERVALS)
    found = remap_lora(lora, student, source=source)
    assert not found.dropped
    for name, value in deltas(found.state).items():
        place = int(name.split(".")[2])
        u = KEPT[place]
        blocks = range(u, dict(INTERVALS[STACK]).get(u, u) + 1)
        parts = torch.stack([full[name.replace(f"{STACK}.{place}.", f"{STACK}.{index}.")] for index in blocks])
        torch.testing.assert_close(value, getattr(parts, source)(dim=0), rtol=1e-5, atol=1e-7)
    student.load_lora_adapter(found.state)


@torch.no_grad()
def test_what_a_width_pruned_block_lost_is_dropped_and_what_it_kept_is_cut(family, make_transformer):
    lora = with_lora(make_transformer(8))
    model = make_transformer(8)
    student = cut(family, model, {})
    blocks = list(student.transformer_blocks)
    role = family.width.roles(STACK, [], [5], 8, Layout())[5]
    blocks[5] = family.width.prune(blocks[5], role, {})
    student.transformer_blocks = nn.ModuleList(blocks)
    found = remap_lora(lora, student)
    assert found.dropped == [f"{STACK}.5.img_mlp.net.2"]
    width = student.inner_dim
    name = f"transformer.{STACK}.5.img_mod.1"
    torch.testing.assert_close(deltas(found.state)[name], deltas(lora)[name][: 3 * width])


@torch.no_grad()
def test_alphas_of_peft_metadata_are_folded_in(family, make_transformer):
    lora, student = with_lora(make_transformer(8), alpha=6), cut(family, make_transformer(8), INTERVALS)
    metadata = {"transformer.r": 2, "transformer.lora_alpha": 6, "transformer.alpha_pattern": {"to_q": 1}}
    plain, folded = deltas(remap_lora(lora, student).state), deltas(remap_lora(lora, student, metadata=metadata).state)
    for name, value in plain.items():
        torch.testing.assert_close(folded[name], (0.5 if name.endswith("to_q") else 3.0) * value)


@torch.no_grad()
def test_flux_maps_both_stacks(make_flux):
    lora = with_lora(make_flux(), targets=["to_q", "proj_out", "proj_mlp", "ff.net.2"])
    model = make_flux()
    family = get_family("flux", model.config)
    student = cut(family, model, {"transformer_blocks": [(0, 1)], "single_transformer_blocks": [(1, 3)]})
    found = remap_lora(FluxPipeline.lora_state_dict(lora), student)
    full, ours = deltas(lora), deltas(found.state)
    for name, value in ours.items():
        parts = name.split(".")
        if parts[1].endswith("_blocks"):
            kept = {"transformer_blocks": [0, 2], "single_transformer_blocks": [0, 1, 4]}[parts[1]]
            name = ".".join([*parts[:2], str(kept[int(parts[2])]), *parts[3:]])
        torch.testing.assert_close(value, full[name])
    assert "transformer.proj_out" in ours  # outside the blocks: as it was
    student.load_lora_adapter(found.state)


@torch.no_grad()
def test_a_lora_of_another_architecture_or_size_is_refused(family, make_transformer, make_flux):
    student = cut(family, make_transformer(8), INTERVALS)
    with pytest.raises(UsageError, match="another architecture"):
        remap_lora(with_lora(make_flux(), targets=["proj_mlp"]), student)
    large = {f"transformer.{STACK}.0.attn.to_q.lora_{side}.weight": torch.zeros(shape)
             for side, shape in (("A", (2, 3072)), ("B", (3072, 2)))}  # fmt: skip
    with pytest.raises(UsageError, match="another size"):
        remap_lora(large, student)
    with pytest.raises(UsageError, match="only one of A and B"):
        remap_lora({key: value for key, value in large.items() if "lora_A" in key}, student)
    with pytest.raises(UsageError, match="no LoRA key"):
        remap_lora({f"transformer.{STACK}.0.attn.to_q.lokr_w1": torch.zeros(2)}, student)
    with pytest.raises(UsageError, match="no ppcl key"):
        remap_lora({}, make_transformer(2))


def test_blocks_are_found_by_their_stack_whatever_its_name():
    """A stack within a module, one within a numbered module, and one whose name ends another's."""
    stacks = ("blocks", "encoder.blocks", "stages.0.blocks")
    modules = {f"{stack}.{n}.ff": nn.Linear(4, 4) for stack in stacks for n in range(2)}
    modules |= {name.rpartition(".")[0].rpartition(".")[0]: nn.Module() for name in list(modules)}
    modules |= {"stages": nn.Module(), "head.0.ff": nn.Linear(4, 4), "head": nn.Module()}
    names = [*(f"{stack}.{n}.ff" for stack in stacks for n in range(3)), "head.0.ff"]
    state = {
        f"transformer.{name}.lora_{side}.weight": torch.full(shape, float(number))
        for number, name in enumerate(names)
        for side, shape in (("A", (2, 4)), ("B", (4, 2)))
    }
    kept = {"blocks": [0, 2], "encoder.blocks": [0, 1], "stages.0.blocks": [1, 2]}
    found = map_blocks(state, modules, kept, {}).state
    numbers = {key.removesuffix(".lora_A.weight"): value[0, 0].item() for key, value in found.items() if "_A." in key}
    expected = {f"{stack}.{place}.ff": 3 * row + index for row, (stack, indices) in enumerate(kept.items())
                for place, index in enumerate(indices)} | {"head.0.ff": 9}  # fmt: skip
    assert numbers == {f"transformer.{name}": number for name, number in expected.items()}
