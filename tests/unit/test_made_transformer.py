"""A teacher in a single file, or with a LoRA merged in, is the one that diffusers makes of the same files."""

import shutil

import pytest
import torch
from diffusers import FluxPipeline, QwenImagePipeline
from rich.console import Console
from safetensors.torch import load_file, save_file

from ppcl.artifacts.model_files import WEIGHTS
from ppcl.config import Config, ModelConfig, PathsConfig
from ppcl.errors import UsageError
from ppcl.export.single_file import write_single_file
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
        ({"path": "embedded:tiny_dit", "lora": "{file}"}, r"pipelines of model\.family=dit load no LoRAs"),
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
