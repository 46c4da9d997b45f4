"""Every form of a LoRA: what is added to a kept layer equals what diffusers adds on the full model."""

import copy
import inspect
import json

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, QwenImagePipeline, QwenImageTransformer2DModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from ppcl.errors import UsageError
from ppcl.surgery.lora_marks import mark_of, marked_metadata
from ppcl.surgery.provenance import exported_blocks
from ppcl.surgery.remap import remap_lora

KEPT = {"transformer_blocks": [0, 2], "single_transformer_blocks": [0, 1, 3]}
REMOVED = {"transformer_blocks": [[0, 1]], "single_transformer_blocks": [[1, 2]]}
COUNTS = {"transformer_blocks": 3, "single_transformer_blocks": 4}


class Kind:
    """A family at little width. FLUX has its true width, which its converters know, but no weights in memory."""

    def __init__(self, pipeline, model, arch, stacks):
        self.pipeline, self.model, self.arch, self.stacks = pipeline, model, arch, stacks

    def build(self, counts):
        with torch.device("meta"):
            return self.model(**self.arch, **{key: counts[stack] for stack, key in self.stacks.items()})

    def teacher(self):
        """A pipeline of the full model alone, whose memory is never touched."""
        model = self.build(COUNTS).to_empty(device="cpu")
        parts = dict.fromkeys(inspect.signature(self.pipeline.__init__).parameters)
        parts.pop("self")
        return self.pipeline(**parts | {"transformer": model})

    def pruned(self):
        model = self.build({stack: len(kept) for stack, kept in KEPT.items()})
        entry = {name: {s: found[s] for s in self.stacks} for name, found in
                 (("kept_layers", KEPT), ("removed_intervals", REMOVED))}  # fmt: skip
        model.register_to_config(ppcl=entry)
        return model


QWEN = Kind(
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    {"attention_head_dim": 32, "num_attention_heads": 2, "joint_attention_dim": 64, "axes_dims_rope": (8, 12, 12)},
    {"transformer_blocks": "num_layers"},
)
FLUX = Kind(
    FluxPipeline,
    FluxTransformer2DModel,
    {"joint_attention_dim": 64, "pooled_projection_dim": 32, "guidance_embeds": True},
    {"transformer_blocks": "num_layers", "single_transformer_blocks": "num_single_layers"},
)
D = 3072
# Layers of each family in diffusers' names, and of FLUX in Black Forest Labs', as (inputs, outputs).
QWEN_LAYERS = {"attn.to_q": (64, 64), "attn.to_add_out": (64, 64), "img_mlp.net.2": (256, 64), "img_mod.1": (64, 384)}
FLUX_LAYERS = {
    "transformer_blocks": {"attn.to_q": (D, D), "attn.add_k_proj": (D, D), "ff.net.2": (4 * D, D)},
    "single_transformer_blocks": {"attn.to_v": (D, D), "norm.linear": (D, 3 * D), "proj_out": (5 * D, D)},
}
BFL_LAYERS = {
    "double_blocks": {"img_attn.qkv": (D, 3 * D), "txt_attn.proj": (D, D), "img_mlp.0": (D, 4 * D)},
    "single_blocks": {"linear1": (D, 7 * D), "linear2": (5 * D, D), "modulation.lin": (D, 3 * D)},
}
XLABS_LAYERS = {
    "double_blocks": {"processor.qkv_lora1": (D, 3 * D), "processor.proj_lora2": (D, D)},
    "single_blocks": {"processor.qkv_lora": (D, 3 * D), "processor.proj_lora": (5 * D, D)},
}
OF_BLOCKS = {"double_blocks": 3, "single_blocks": 4, **COUNTS}


def sizes(kind):
    """Names and sizes of layers: in every block, and one outside."""
    stacks = {"transformer_blocks": QWEN_LAYERS} if kind is QWEN else FLUX_LAYERS
    outside = {"img_in": (64, 64)} if kind is QWEN else {"x_embedder": (64, D)}
    return numbered(stacks) | outside


def numbered(stacks):
    return {
        f"{s}.{n}.{x}": size for s, found in stacks.items() for n in range(OF_BLOCKS[s]) for x, size in found.items()
    }


def random(layers, *, begin="transformer.", halves=(".lora_A.weight", ".lora_B.weight"), alpha=None, flat=False,
           dtype=torch.float32, ranks=(4,)):  # fmt: skip
    """Random tensors for `layers`. `alpha` is that of every second layer, the others have twice of it."""
    generator, state = torch.Generator().manual_seed(0), {}
    for number, (name, (inputs, outputs)) in enumerate(layers.items()):
        rank = ranks[number % len(ranks)]
        key = begin + (name.replace(".", "_") if flat else name)
        state[key + halves[0]] = torch.randn(rank, inputs, generator=generator).to(dtype)
        state[key + halves[1]] = torch.randn(outputs, rank, generator=generator).to(dtype)
        if alpha is not None:
            state[key + ".alpha"] = torch.tensor(alpha * (1 + number % 2)).to(torch.float32)
    return state


DOWN = (".lora_down.weight", ".lora_up.weight")
BARE = (".down.weight", ".up.weight")
DEFAULT = (".lora_A.default.weight", ".lora_B.default.weight")
KOHYA = {"begin": "lora_unet_", "halves": DOWN, "flat": True}
ONETRAINER = {"begin": "lora_transformer_", "halves": DOWN, "flat": True}
MIXED = {"ranks": (4, 4, 2, 8)}
BF16, FP8 = {"dtype": torch.bfloat16}, {"dtype": torch.float8_e4m3fn}
ATTENTION = {name: size for name, size in numbered(FLUX_LAYERS).items() if ".attn." in name}
READ = {
    "qwen peft": (QWEN, {}),
    "qwen peft mixed": (QWEN, MIXED),
    "qwen peft bf16": (QWEN, BF16 | MIXED),
    "qwen peft fp8": (QWEN, FP8 | MIXED),
    "qwen default": (QWEN, {"begin": "", "halves": DEFAULT, "alpha": 1.5}),
    "qwen comfy": (QWEN, {"begin": "diffusion_model."}),
    "qwen comfy alphas": (QWEN, {"begin": "diffusion_model.", "alpha": 3.0} | MIXED),
    "qwen comfy down": (QWEN, {"begin": "diffusion_model.", "halves": DOWN, "alpha": 0.5} | BF16),
    "qwen kohya": (QWEN, {"alpha": 1.0} | KOHYA | MIXED),
    "qwen kohya bf16": (QWEN, {"alpha": 3.0} | KOHYA | BF16),
    "flux peft": (FLUX, {}),
    "flux peft mixed": (FLUX, MIXED),
    "flux peft fp8": (FLUX, FP8),
    "flux peft alphas": (FLUX, {"alpha": 1.0}),
    "flux peft alphas mixed": (FLUX, {"alpha": 1.5} | MIXED | BF16),
    "flux civitai": (FLUX, {"halves": DOWN}),
    "flux civitai alphas": (FLUX, {"halves": DOWN, "alpha": 1.0}),
    "flux kohya": (FLUX, {"layers": BFL_LAYERS, "alpha": 1.0} | KOHYA | MIXED),
    "flux kohya plain": (FLUX, {"layers": BFL_LAYERS} | KOHYA | BF16),
    "flux comfy": (FLUX, {"layers": BFL_LAYERS, "begin": "diffusion_model.", "halves": DOWN, "alpha": 8.0} | BF16),
    "flux xlabs": (FLUX, {"layers": XLABS_LAYERS, "begin": "", "halves": BARE} | MIXED),
    "flux xlabs comfy": (FLUX, {"layers": XLABS_LAYERS, "begin": "diffusion_model.", "halves": BARE} | BF16),
    "flux mixture": (FLUX, {"layers": ATTENTION, "alpha": 2.0} | ONETRAINER),
}  # fmt: skip


def made(kind, settings):
    settings = dict(settings)
    layers = settings.pop("layers", None)
    if layers is not None and "double_blocks" in layers:
        layers = numbered(layers)
    return random(layers or sizes(kind), **settings)


def probe(a, b, scale=1.0):
    """(scale B A) x for a fixed random x, which says as much as B A and is small."""
    x = torch.randn(a.shape[1], 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return float(scale) * (b.detach().double() @ (a.detach().double() @ x))


def on_the_teacher(kind, lora):
    """What diffusers adds to each layer of the full model, by the file or the tensors of a LoRA."""
    pipeline = kind.teacher()
    pipeline.load_lora_weights(lora, adapter_name="it")
    return added(pipeline.transformer)


def added(model):
    layers = {n: m for n, m in model.named_modules() if "it" in getattr(m, "lora_A", {})}
    return {n: probe(m.lora_A["it"].weight, m.lora_B["it"].weight, m.scaling["it"]) for n, m in layers.items()}


def on_the_pruned(found):
    names = {key.removeprefix("transformer.").split(".lora_")[0] for key in found.state}
    pairs = {n: [found.state[f"transformer.{n}.lora_{side}.weight"] for side in "AB"] for n in names}
    return {original(name): probe(*pair) for name, pair in pairs.items()}


def original(name):
    """The full model's name of a kept layer."""
    stack, *rest = name.split(".")
    return ".".join([stack, str(KEPT[stack][int(rest[0])]), *rest[1:]]) if stack in KEPT else name


def assert_equal(ours, theirs):
    kept = {name: value for name, value in theirs.items() if name in map_of_kept(theirs)}
    assert ours.keys() == kept.keys()
    assert len(ours) > 5
    for name, value in ours.items():
        torch.testing.assert_close(value, kept[name], rtol=1e-5, atol=1e-5 * kept[name].abs().max().item())


def map_of_kept(names):
    def is_kept(name):
        stack, number = name.split(".")[:2] if "_blocks." in name else ("", "")
        return not stack or int(number) in KEPT[stack]

    return {name for name in names if is_kept(name)}


@pytest.mark.parametrize("form", READ)
@torch.no_grad()
def test_a_form_that_diffusers_reads_adds_the_same_to_every_kept_layer(form):
    kind, settings = READ[form]
    state = made(kind, settings)
    assert_equal(on_the_pruned(remap_lora(state, kind.pruned())), on_the_teacher(kind, state))


@pytest.mark.parametrize("kind", [QWEN, FLUX], ids=["qwen", "flux"])
@pytest.mark.parametrize("settings", [
    {"r": 4, "lora_alpha": 8},
    {"r": 4, "lora_alpha": 8, "use_rslora": True},
    {"r": 4, "lora_alpha": 8, "rank_pattern": {"attn.to_q": 2},
     "alpha_pattern": {"^transformer_blocks.0.attn.to_q": 3, "attn.to_q": 6}},
], ids=["alpha", "rslora", "patterns"])  # fmt: skip
@torch.no_grad()
def test_scales_in_the_metadata_are_those_of_peft(kind, settings, tmp_path):
    pattern = settings.get("rank_pattern", {})
    state = {}
    for name, size in sizes(kind).items():
        rank = next((rank for key, rank in pattern.items() if name.endswith(key)), 4)
        state |= random({name: size}, ranks=(rank,))
    targets = sorted(sizes(kind))
    metadata = {f"transformer.{key}": value for key, value in (settings | {"target_modules": targets}).items()}
    path = tmp_path / "lora.safetensors"
    save_file(state, path, {"lora_adapter_metadata": json.dumps(metadata), "format": "pt"})
    assert_equal(on_the_pruned(remap_lora(path, kind.pruned())), on_the_teacher(kind, str(path)))


# Forms whose names diffusers does not read, each with one of the same tensors that it reads.
RENAMED = {
    "qwen peft's own": (QWEN, {"begin": "base_model.model."}, {}),
    "qwen peft's own, with transformer": (QWEN, {"begin": "base_model.model.transformer."}, {}),
    "qwen prefix and default": (QWEN, {"halves": DEFAULT}, {}),
    "qwen prefix and alphas": (QWEN, {"alpha": 1.0}, {"begin": "diffusion_model.", "alpha": 1.0}),
    "qwen onetrainer": (QWEN, {"halves": DOWN, "alpha": 1.0}, {"begin": "diffusion_model.", "alpha": 1.0}),
    "qwen kohya fp8": (QWEN, KOHYA | FP8, FP8),
    "flux peft's own": (FLUX, {"begin": "base_model.model."}, {}),
    "flux no prefix": (FLUX, {"begin": ""}, {}),
    "flux default": (FLUX, {"halves": DEFAULT}, {}),
    "flux comfy": (FLUX, {"begin": "diffusion_model.", "alpha": 1.0}, {"alpha": 1.0}),
    "flux onetrainer": (FLUX, {"alpha": 1.0} | ONETRAINER, {"alpha": 1.0}),
    "flux bfl names in halves of peft": (
        FLUX,
        {"layers": BFL_LAYERS, "begin": "diffusion_model.", "alpha": 1.0},
        {"layers": BFL_LAYERS, "begin": "diffusion_model.", "halves": DOWN, "alpha": 1.0},
    ),
    "flux bfl names of peft's own": (
        FLUX,
        {"layers": BFL_LAYERS, "begin": "base_model.model."},
        {"layers": BFL_LAYERS, "begin": "diffusion_model.", "halves": DOWN},
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", RENAMED)
@torch.no_grad()
def test_a_form_that_diffusers_does_not_read_equals_the_renamed_file(form):
    kind, settings, renamed = RENAMED[form]
    found = remap_lora(made(kind, settings), kind.pruned())
    assert not found.left_out
    assert_equal(on_the_pruned(found), on_the_teacher(kind, made(kind, renamed)))


Q = "transformer.transformer_blocks.0.attn.to_q"


def pair(name, size=(64, 64), rank=4, halves=(".lora_A.weight", ".lora_B.weight")):
    return random({name: size}, begin="", halves=halves, ranks=(rank,))


def refused(state, kind=QWEN):
    with pytest.raises(UsageError) as error:
        remap_lora(state, kind.pruned())
    text = str(error.value)
    assert "\n" not in text
    assert "Error" not in text
    return text


OTHERS = {
    "a misspelt layer": (pair(Q) | pair("transformer.transformer_blocks.0.attn.to_qq"), "to_qq"),
    "a misspelt prefix": (pair("lora_unit_transformer_blocks_0_attn_to_q", halves=DOWN), "lora_unit_"),
    "a block too many": (pair(Q) | pair("transformer.transformer_blocks.3.attn.to_q"), "transformer_blocks.3."),
    "of Wan": (pair("diffusion_model.blocks.0.self_attn.q"), "blocks.0.self_attn.q"),
    "of Wan, kohya": (pair("lora_unet_blocks_0_self_attn_q", halves=DOWN), "lora_unet_blocks_0"),
    "of FLUX": (pair("lora_unet_double_blocks_0_img_attn_qkv", (D, 3 * D), halves=DOWN), "lora_unet_double_blocks_0"),
    "of another width": (pair(Q, (128, 64)), "another size"),
    "kohya DoRA": (pair(Q) | {f"{Q}.dora_scale": torch.ones(64, 1)}, f"{Q}.dora_scale"),
    "PEFT's DoRA": (pair(Q) | {f"{Q}.lora_magnitude_vector": torch.ones(64)}, "lora_magnitude_vector"),
    "LoKr": ({f"{Q}.lokr_w1": torch.ones(8, 8), f"{Q}.lokr_w2": torch.ones(8, 8)}, "LoKr"),
    "LoHa": ({f"{Q}.hada_w1_a": torch.ones(8, 8)}, "LoHa"),
    "a tuned bias": (pair(Q) | {f"{Q}.diff_b": torch.ones(64)}, "diff_b"),
    "a bias of the LoRA": (pair(Q) | {f"{Q}.lora_B.bias": torch.ones(64)}, "lora_B.bias"),
    "no A": ({key: value for key, value in pair(Q).items() if "lora_B" in key}, "only one of A and B"),
    "no B": (pair(f"{Q[:-1]}k") | {key: value for key, value in pair(Q).items() if "lora_A" in key}, f"{Q} "),
    "an alpha alone": (pair(Q) | {f"{Q[:-1]}k.alpha": torch.tensor(1.0)}, "to_k has an alpha"),
    "two ranks": (pair(Q) | {f"{Q}.lora_A.weight": torch.ones(2, 64)}, "cannot be multiplied"),
    "twice": (pair(Q) | pair(Q.removeprefix("transformer.")) | pair(f"base_model.model.{Q}"), "twice"),
    "integers": ({key: value.to(torch.int8) for key, value in pair(Q).items()}, "int8"),
    "a NaN": (pair(Q) | {f"{Q}.lora_B.weight": torch.full((64, 4), torch.nan)}, "finite"),
    "an infinite fp8": (
        pair(Q) | {f"{Q}.lora_A.weight": torch.full((4, 64), torch.inf).to(torch.float8_e5m2)},
        "finite",
    ),
    "a NaN alpha": (pair(Q) | {f"{Q}.alpha": torch.tensor(torch.nan)}, "finite"),
    "an alpha below 0": (pair(Q) | {f"{Q}.alpha": torch.tensor(-1.0)}, "alpha is -1.0"),
    "an alpha of two numbers": (pair(Q) | {f"{Q}.alpha": torch.ones(2)}, "alpha is 2 numbers"),
    "an alpha of no number": (pair(Q) | {f"{Q}.alpha": torch.ones(0)}, "alpha is 0 numbers"),
    "rank 0": ({f"{Q}.lora_A.weight": torch.ones(0, 64), f"{Q}.lora_B.weight": torch.ones(64, 0)}, "multiplied"),
    "nothing": ({"step": torch.ones(1)}, "step"),
    "only removed blocks": (pair("transformer.transformer_blocks.1.attn.to_q"), "nothing of this LoRA is left"),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_no_plain_lora_of_the_model_gets_one_sentence(what):
    state, part = OTHERS[what]
    text = refused(state)
    assert part in text
    if what not in ("a NaN", "an infinite fp8", "a NaN alpha", "integers", "two ranks", "twice", "only removed blocks"):
        assert "transformer_blocks.0." in text  # what the model's names are like


TEXT = "lora_te1_text_model_encoder_layers_{}_{}"
OF_TEXT = [*((f"self_attn_{x}_proj", (32, 32)) for x in ("q", "k", "v", "out")), ("mlp_fc1", (32, 64))]


@pytest.fixture
def encoder():
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=100, bos_token_id=0, eos_token_id=1))


@torch.no_grad()
def test_a_text_encoders_part_stays_as_diffusers_reads_it_and_what_diffusers_leaves_out_is_said(encoder, tmp_path):
    """kohya's parts: of CLIP with alphas, of T5, and of a layer outside of the blocks."""
    state = made(FLUX, READ["flux kohya"][1]) | random({"img_in": (64, D)}, **KOHYA)
    state |= random({"encoder_block_0_q": (32, 32)}, begin="lora_te3_", halves=DOWN)
    layers = {TEXT.format(n, name): size for n in range(2) for name, size in OF_TEXT}
    state |= random(layers, begin="", halves=DOWN, alpha=1.0, ranks=(2, 4))
    path = tmp_path / "lora.safetensors"
    save_file(state, path)
    whole, pruned = FLUX.teacher(), FLUX.pruned().to_empty(device="cpu")
    whole.text_encoder = copy.deepcopy(encoder)
    whole.load_lora_weights(str(path), adapter_name="it")
    found = remap_lora(path, pruned)
    assert found.left_out == ["lora_te3_encoder_block_0_q", "lora_unet_img_in"]
    written = tmp_path / "mapped.safetensors"
    metadata = marked_metadata(found.state, mark_of(exported_blocks(pruned).kept))
    save_file(found.state, written, {"lora_adapter_metadata": json.dumps(metadata), "format": "pt"})
    smaller = FLUX.teacher()
    smaller.transformer, smaller.text_encoder = pruned, encoder
    smaller.load_lora_weights(str(written), adapter_name="it")
    theirs, ours = (added(pipeline.text_encoder) for pipeline in (whole, smaller))
    assert ours.keys() == theirs.keys()
    assert len(ours) == len(layers)
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name])


def test_zeros_that_change_nothing_are_no_reason_to_refuse():
    state = made(QWEN, {})
    assert remap_lora(state | {f"{Q}.diff_b": torch.zeros(64)}, QWEN.pruned()).layers


def test_peft_keeps_the_scale_of_its_own_files_beside_them(tmp_path):
    """As its `save_pretrained` does."""
    model = QWEN.build(COUNTS).to_empty(device="cpu")
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_k"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    scaled = on_the_pruned(remap_lora(path, QWEN.pruned()))
    (tmp_path / "adapter_config.json").unlink()
    plain = on_the_pruned(remap_lora(path, QWEN.pruned()))
    assert len(plain) == 2 * len(KEPT["transformer_blocks"])
    for name, value in plain.items():
        torch.testing.assert_close(scaled[name], 2 * value)


@pytest.mark.parametrize(
    "stored",
    [
        *("{", "[]", '{"transformer.r": 3}', '{"transformer.r": 4, "transformer.use_dora": true}'),
        *('{"transformer.a": 4}', '{"transformer.r": 4, "transformer.lora_alpha": null}'),
        '{"transformer.r": 4, "transformer.rank_pattern": [1]}',
        '{"transformer.r": 4, "transformer.alpha_pattern": {"(": 1}}',
    ],
)
def test_metadata_that_do_not_fit_are_refused(stored, tmp_path):
    save_file(made(QWEN, {}), tmp_path / "lora.safetensors", {"lora_adapter_metadata": stored})
    with pytest.raises(UsageError, match="lora_adapter_metadata"):
        remap_lora(tmp_path / "lora.safetensors", QWEN.pruned())


@pytest.mark.parametrize("alpha", ["NaN", "Infinity", "1e39"])
def test_scales_that_make_no_finite_values_are_refused(alpha, tmp_path):
    stored = f'{{"transformer.r": 4, "transformer.lora_alpha": {alpha}}}'
    save_file(made(QWEN, {}), tmp_path / "lora.safetensors", {"lora_adapter_metadata": stored})
    with pytest.raises(UsageError, match="no finite numbers"):
        remap_lora(tmp_path / "lora.safetensors", QWEN.pruned())
