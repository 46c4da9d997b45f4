"""A teacher in a single file, or with a LoRA merged in, is the one that diffusers makes of the same files."""

import shutil
from argparse import Namespace

import pytest
import torch
from diffusers import FluxPipeline, QwenImagePipeline
from rich.console import Console
from safetensors.torch import load_file, save_file

from ppcl.artifacts.model_files import WEIGHTS
from ppcl.config import Config, ModelConfig, PathsConfig
from ppcl.errors import UsageError
from ppcl.export.single_file import write_single_file
from ppcl.families.dit.tiny import build_pipeline as build_dit
from ppcl.families.flux.tiny import build_pipeline as build_flux
from ppcl.families.registry import get_family
from ppcl.teacher_files import TeacherFiles
from ppcl.teacher_model import TeacherModel
from ppcl.validation.model import check_model

METADATA = {"format": "pt"}


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory):
    """A pipeline folder and its transformer as a single file, of each family that has such files."""
    found = {}
    for family, built in (("qwen_image", pipeline), ("flux", build_flux(0, 1))):
        folder = tmp_path_factory.mktemp(family)
        built.save_pretrained(folder / "pipeline")
        write_single_file(folder / "pipeline" / "transformer", folder / "one.safetensors", family, "float32", METADATA)
        found[family] = (folder / "pipeline", folder / "one.safetensors")
    return found


def files_of(tmp_path, **model):
    config = Config(stages=["probe"], model=ModelConfig(name="x", family="auto", **model))
    config.paths = PathsConfig(runs_dir=str(tmp_path / "runs"), cache_dir=str(tmp_path / "cache"))
    check_model(config)
    return TeacherFiles(config, get_family(config.model.family, config.model.arch), (), Console(quiet=True))


def weights_of(files):
    found = {}
    for path in files.transformer.glob("*.safetensors"):
        found |= load_file(path)
    return found


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("family", ["qwen_image", "flux"])
def test_a_single_file_is_the_model_it_was_made_of(saved, tmp_path, family, prefix):
    folder, file = saved[family]
    if prefix:
        state = {prefix + name: value for name, value in load_file(file).items()} | {"vae.weight": torch.ones(3)}
        file = tmp_path / "prefixed.safetensors"
        save_file(state, file)
    files = files_of(tmp_path, path=str(file), base=str(folder))
    files.check()
    assert_equal(weights_of(files), load_file(folder / "transformer" / f"{WEIGHTS}.safetensors"))
    times = {path: path.stat().st_mtime_ns for path in files.transformer.iterdir()}
    again = files_of(tmp_path, path=str(file), base=str(folder))
    assert {path: path.stat().st_mtime_ns for path in again.transformer.iterdir()} == times  # it is made once
    assert again.identity == files.identity


def test_a_file_is_streamed_and_loaded_with_the_parts_of_its_base(saved, tmp_path):
    folder, file = saved["qwen_image"]
    files = files_of(tmp_path, path=str(file), base=str(folder))
    for streaming in (False, True):
        files.config.model.streaming = streaming
        teacher = TeacherModel(files.config, files.family, torch.device("cpu"))
        expected = QwenImagePipeline.from_pretrained(folder).transformer
        assert torch.equal(teacher.pipeline.transformer.img_in.weight, expected.img_in.weight)
        assert teacher.pipeline.vae is not None
    assert teacher.encoder_identity == files_of(tmp_path, path=str(folder)).encoder_identity


def lora_of(folder, path, names=("attn.to_q", "attn.to_k"), rank=2, prefix="transformer.", alpha=None):
    config = load_file(folder / "transformer" / f"{WEIGHTS}.safetensors")
    state = {}
    for name in names:
        weight = config[f"transformer_blocks.0.{name}.weight"]
        key = f"{prefix}transformer_blocks.0.{name}"
        state[f"{key}.lora_A.weight"] = torch.randn(rank, weight.shape[1])
        state[f"{key}.lora_B.weight"] = torch.randn(weight.shape[0], rank)
        if alpha is not None:
            state[f"{key}.alpha"] = torch.tensor(float(alpha))
    save_file(state, path)
    return path


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize(("family", "kind"), [("qwen_image", QwenImagePipeline), ("flux", FluxPipeline)])
def test_a_lora_is_merged_as_diffusers_does(saved, tmp_path, family, kind, single):
    folder, file = saved[family]
    lora = lora_of(folder, tmp_path / "style.safetensors")
    place = {"path": str(file), "base": str(folder)} if single else {"path": str(folder)}
    files = files_of(tmp_path, lora=str(lora), **place)
    files.check()
    expected = kind.from_pretrained(folder)
    before = expected.transformer.transformer_blocks[0].attn.to_q.weight.clone()
    expected.load_lora_weights(str(lora))
    expected.fuse_lora()
    expected.unload_lora_weights()
    assert not torch.equal(expected.transformer.transformer_blocks[0].attn.to_q.weight, before)
    assert_equal(weights_of(files), expected.transformer.state_dict())
    plain = files_of(tmp_path, **place).identity
    assert files.identity["weights"] == plain["weights"]
    assert files.identity != plain
    lora_of(folder, lora)
    assert files_of(tmp_path, lora=str(lora), **place).identity not in (plain, files.identity)


def test_a_lora_in_pefts_own_names_is_merged_alike(saved, tmp_path):
    folder, _ = saved["qwen_image"]
    lora = lora_of(folder, tmp_path / "style.safetensors")
    merged = weights_of(files_of(tmp_path, path=str(folder), lora=str(lora)))
    own = {f"base_model.model.{name.removeprefix('transformer.')}": value for name, value in load_file(lora).items()}
    save_file(own, tmp_path / "own.safetensors")
    assert_equal(weights_of(files_of(tmp_path, path=str(folder), lora=str(tmp_path / "own.safetensors"))), merged)


def changed(source, target, change):
    state = load_file(source)
    change(state)
    save_file(state, target)
    return target


BAD_FILES = {
    "fewer tensors": (lambda state: state.pop("img_in.bias"), r"lacks img_in\.bias, by"),
    "more tensors": (lambda state: state.__setitem__("more", torch.ones(1)), "also has more, by"),
    "another name": (lambda state: state.__setitem__("x", state.pop("img_in.bias")), r"lacks img_in\.bias, by"),
    "another width": (lambda state: state.__setitem__("img_in.bias", torch.ones(3)), r"img_in\.bias of shape \[3\]"),
    "scaled": (lambda state: state.__setitem__("img_in.scale_weight", torch.ones(1)), "scaled 8-bit numbers"),
    "whole numbers": (lambda state: state.update({"img_in.bias": state["img_in.bias"].to(torch.int8)}), "holds I8 in"),
    "not finite": (lambda state: state["img_in.bias"].fill_(torch.inf), "NaN or infinite numbers in img_in.bias"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_file_of_another_model_is_refused(saved, tmp_path, kind):
    folder, file = saved["qwen_image"]
    change, message = BAD_FILES[kind]
    bad = changed(file, tmp_path / "bad.safetensors", change)
    with pytest.raises(UsageError, match=message):
        files_of(tmp_path, path=str(bad), base=str(folder)).check()
    assert not [*tmp_path.glob("cache/teachers/*/*")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "{file}"}, r"is a file with a transformer alone: add model\.base=FOLDER"),
        ({"path": "{folder}", "base": "{folder}"}, r"model\.base=\S+ goes only with a model\.path that is"),
        ({"path": "gone.safetensors", "base": "{folder}"}, r"model\.path: gone\.safetensors does not exist"),
        ({"path": "{file}", "base": "/none"}, "is not a pipeline folder"),
        ({"path": "{folder}", "lora": "gone.safetensors"}, r"model\.lora: gone\.safetensors does not exist"),
        ({"path": "{folder}", "lora": "style.bin"}, r"model\.lora=style\.bin must be a \.safetensors file"),
        ({"path": "{file}", "base": "embedded:tiny_dit"}, r"no single files of model\.family=dit"),
        ({"lora": "{file}"}, r"needs model\.path"),
        ({"path": "embedded:tiny_dit", "lora": "{file}"}, r"the pipeline of model\.family=dit cannot load LoRAs"),
    ],
)
def test_parts_that_do_not_go_together_are_refused_before_anything_loads(saved, tmp_path, settings, message):
    folder, file = saved["qwen_image"]
    with pytest.raises(UsageError, match=message):
        files_of(tmp_path, **{key: value.format(file=file, folder=folder) for key, value in settings.items()})


@pytest.mark.parametrize(
    "kind", ["another model's", "partly", "twice", "DoRA", "a text encoder's", "not finite", "no LoRA"]
)
def test_a_lora_that_does_not_fit_is_refused(saved, tmp_path, kind):
    folder, file = saved["qwen_image"]
    lora = lora_of(folder, tmp_path / "bad.safetensors")
    state = load_file(lora)
    if kind == "another model's":
        state = {name.replace("transformer_blocks", "blocks"): value for name, value in state.items()}
    elif kind == "partly":
        state |= {name.replace("blocks.0", "blocks.9"): value.clone() for name, value in state.items()}
    elif kind == "twice":
        state |= {name.removeprefix("transformer."): value.clone() for name, value in state.items()}
    elif kind == "DoRA":
        state["transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector"] = torch.ones(2)
    elif kind == "a text encoder's":
        state["text_encoder.layers.0.lora_A.weight"] = torch.ones(2, 2)
    elif kind == "not finite":
        next(iter(state.values()))[0] = torch.nan
    else:
        state = load_file(file)
    save_file(state, lora)
    with pytest.raises(UsageError, match=r"model\.lora|NaN") as caught:
        files_of(tmp_path, path=str(folder), lora=str(lora)).check()
    assert "\n" not in str(caught.value)
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)


# The names of facebookresearch/DiT, and what holds the same numbers in diffusers.
OF_DIT = {
    "x_embedder.proj": ["pos_embed.proj"],
    "t_embedder.mlp.0": ["transformer_blocks.0.norm1.emb.timestep_embedder.linear_1"],
    "t_embedder.mlp.2": ["transformer_blocks.0.norm1.emb.timestep_embedder.linear_2"],
    "y_embedder.embedding_table": ["transformer_blocks.0.norm1.emb.class_embedder.embedding_table"],
    "final_layer.linear": ["proj_out_2"],
    "final_layer.adaLN_modulation.1": ["proj_out_1"],
}
OF_DIT_BLOCK = {
    "attn.qkv": ["attn1.to_q", "attn1.to_k", "attn1.to_v"],
    "attn.proj": ["attn1.to_out.0"],
    "mlp.fc1": ["ff.net.0.proj"],
    "mlp.fc2": ["ff.net.2"],
    "adaLN_modulation.1": ["norm1.linear"],
}


def original_of(transformer):
    """The state dict of a DiT, of which all blocks have one embedding, as its authors write it."""
    state, names = transformer.state_dict(), dict(OF_DIT)
    for index in range(len(transformer.transformer_blocks)):
        for name, sources in OF_DIT_BLOCK.items():
            names[f"blocks.{index}.{name}"] = [f"transformer_blocks.{index}.{source}" for source in sources]
    found = {
        f"{name}.{kind}": torch.cat([state[f"{source}.{kind}"] for source in sources])
        for name, sources in names.items()
        for kind in ("weight", "bias")
        if f"{sources[0]}.{kind}" in state
    }
    return found | {"pos_embed": transformer.pos_embed.pos_embed.clone()}


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    """A DiT pipeline whose blocks share their embeddings, and its folder."""
    pipeline, folder = build_dit(0, 3), tmp_path_factory.mktemp("dit") / "pipeline"
    torch.manual_seed(1)
    for parameter in pipeline.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    shared = pipeline.transformer.transformer_blocks[0].norm1.emb.state_dict()
    for block in pipeline.transformer.transformer_blocks:
        block.norm1.emb.load_state_dict(shared)
    pipeline.save_pretrained(folder)
    return pipeline, folder


@pytest.mark.parametrize("kind", ["weights", "ema", "model", "legacy"])
def test_an_original_checkpoint_of_dit_is_the_model_that_it_was_made_of(dit, tmp_path, kind):
    pipeline, _ = dit
    state = original_of(pipeline.transformer)
    training = {"model": state, "opt": {"step": 3}, "args": Namespace(epochs=1)}
    if kind == "ema":
        training |= {"ema": state, "model": {name: 0 * value for name, value in state.items()}}
    content = training if kind in ("ema", "model") else state
    path = tmp_path / "DiT-XL-2-256x256.pt"
    torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
    # A base with other weights: all of them must come from the file.
    build_dit(2, 3).save_pretrained(tmp_path / "base")
    files = files_of(tmp_path, path=str(path), base=str(tmp_path / "base"))
    files.check()
    assert_equal(weights_of(files), pipeline.transformer.state_dict())
    teacher = TeacherModel(files.config, files.family, torch.device("cpu"))
    inputs = {
        "hidden_states": torch.randn(2, 12, 16, 16),
        "timestep": torch.tensor([3, 700]),
        "class_labels": torch.tensor([5, 1000]),
    }
    with torch.no_grad():
        found, expected = teacher.pipeline.transformer(**inputs).sample, pipeline.transformer(**inputs).sample
    assert expected.std() > 0
    assert torch.equal(found, expected)


BAD_CHECKPOINTS = {
    "another width": (
        lambda state: state.update({"blocks.1.attn.qkv.weight": torch.ones(3, 64)}),
        r"of shape \[3, 64\]",
    ),
    "another size": (
        lambda state: state.update(pos_embed=torch.ones(1, 256, 64)),
        r"pos_embed of shape \[1, 256, 64\]",
    ),
    "fewer blocks": (lambda state: [state.pop(name) for name in [*state] if "blocks.2." in name], r"lacks blocks\.2\."),
    "more blocks": (lambda state: state.update({"blocks.3.mlp.fc1.bias": torch.ones(1)}), r"also has blocks\.3\.mlp"),
    "not finite": (
        lambda state: state["blocks.0.mlp.fc1.bias"].fill_(torch.nan),
        "NaN or infinite numbers in blocks.0",
    ),
}


@pytest.mark.parametrize("kind", BAD_CHECKPOINTS)
def test_a_checkpoint_of_another_model_is_refused(dit, tmp_path, kind):
    pipeline, folder = dit
    state = {name: value.clone() for name, value in original_of(pipeline.transformer).items()}
    change, message = BAD_CHECKPOINTS[kind]
    change(state)
    torch.save(state, tmp_path / "bad.pt")
    with pytest.raises(UsageError, match=message):
        files_of(tmp_path, path=str(tmp_path / "bad.pt"), base=str(folder)).check()


def test_a_checkpoint_that_holds_code_is_refused_without_running_it(dit, tmp_path):
    torch.save({"model": torch.nn.Linear(1, 1)}, tmp_path / "bad.pt")
    with pytest.raises(UsageError, match="damaged or no file of weights"):
        files_of(tmp_path, path=str(tmp_path / "bad.pt"), base=str(dit[1])).check()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": "{checkpoint}"}, r"is a file with a transformer alone: add model\.base=FOLDER"),
        ({"path": "gone.pt", "base": "embedded:tiny_dit"}, r"model\.path=gone\.pt does not exist"),
        (
            {"path": "{checkpoint}", "base": "embedded:tiny_flux"},
            r"no original checkpoints \(\.pt\) of model\.family=flux",
        ),
    ],
)
def test_checkpoints_need_their_base(tmp_path, settings, message):
    torch.save({}, tmp_path / "some.pt")
    with pytest.raises(UsageError, match=message):
        files_of(tmp_path, **{key: value.format(checkpoint=tmp_path / "some.pt") for key, value in settings.items()})
