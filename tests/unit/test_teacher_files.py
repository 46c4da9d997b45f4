"""A teacher's identity is that of the weights that diffusers loads, and files that do not fit together are refused."""

import json
import os
import shutil
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from ppcl.artifacts.headers import Header, is_current
from ppcl.artifacts.model_files import WEIGHTS
from ppcl.config import Config, ModelConfig, PathsConfig
from ppcl.errors import UsageError
from ppcl.families.registry import get_family
from ppcl.paths import ASSETS
from ppcl.teacher_files import TeacherFiles, _former_digest
from ppcl.teacher_model import TeacherModel
from ppcl.validation.model import check_model

SAFE, COMMIT = f"{WEIGHTS}.safetensors", "0123456789abcdef0123456789abcdef01234567"
NAME = "transformer_blocks.0.attn.to_q.weight"


@pytest.fixture(scope="module")
def saved(pipeline, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "pipeline"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "pipeline")


def config_of(path, tmp_path, **model):
    config = Config(stages=["probe"], model=ModelConfig(name="x", family="qwen_image", path=str(path), **model))
    config.paths = PathsConfig(runs_dir=str(tmp_path / "runs"), cache_dir=str(tmp_path / "cache"))
    return config


def files_of(path, tmp_path, results=(), **model):
    config = config_of(path, tmp_path, **model)
    if Path(path).is_dir():
        check_model(config)
    family = get_family("qwen_image", config.model.arch)
    return TeacherFiles(config, family, results, Console(quiet=True))


def edit(path, change):
    state = load_file(path)
    change(state)
    save_file(state, path, {"format": "pt"})


def flip(path):
    """Change one bit in the middle of a file, and nothing of its size."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("kind", ["safetensors", "bin", "sharded"])
def test_one_bit_in_the_middle_is_another_teacher(folder, pipeline, tmp_path, kind):
    weights = folder / "transformer" / SAFE
    if kind == "bin":
        torch.save(load_file(weights), weights.with_suffix(".bin"))
    elif kind == "sharded":
        pipeline.transformer.save_pretrained(folder / "transformer", max_shard_size="100KB")
    if kind != "safetensors":
        weights.unlink(missing_ok=True)
    (changed, *_) = sorted(
        path for path in (folder / "transformer").iterdir() if path.suffix in (".safetensors", ".bin")
    )
    before = files_of(folder, tmp_path).identity
    assert files_of(folder, tmp_path).identity == before
    flip(changed)
    after = files_of(folder, tmp_path).identity
    assert after != before
    assert {**after, "weights": 0} == {**before, "weights": 0}


def test_what_diffusers_would_not_load_is_no_part_of_it(folder, tmp_path):
    before = files_of(folder, tmp_path).identity
    edit_me = folder / "transformer" / f"{WEIGHTS}_backup.safetensors"
    shutil.copy(folder / "transformer" / SAFE, edit_me)
    edit(edit_me, lambda state: state[NAME].zero_())
    (folder / "transformer" / f"{WEIGHTS}.bin").write_bytes(b"cut short")
    (folder / "transformer" / "old.safetensors").write_bytes(b"cut short")
    assert files_of(folder, tmp_path).identity == before


def test_variants_are_teachers_of_their_own(folder, tmp_path):
    weights = folder / "transformer" / SAFE
    other = folder / "transformer" / f"{WEIGHTS}.fp16.safetensors"
    shutil.copy(weights, other)
    edit(other, lambda state: state[NAME].zero_())
    plain, fp16 = (files_of(folder, tmp_path, variant=variant).identity for variant in (None, "fp16"))
    assert plain != fp16
    other.replace(weights)
    assert files_of(folder, tmp_path).identity == fp16  # the same weights under another name


def test_encoders_are_told_apart_by_every_byte_too(folder, tmp_path):
    before = files_of(folder, tmp_path).encoder_identity
    shutil.copy(folder / "text_encoder" / "model.safetensors", folder / "text_encoder" / "old.safetensors")
    assert files_of(folder, tmp_path).encoder_identity == before
    for file in ("text_encoder/model.safetensors", "tokenizer/tokenizer.json", "vae/config.json"):
        flip(folder / file)
        after = files_of(folder, tmp_path).encoder_identity
        assert after != before
        before = after


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A Hub id whose snapshot is in the Hub's cache, without a connection. Returns the snapshot's folder."""
    place = tmp_path / "hub" / "models--owner--name"
    snapshot = shutil.copytree(folder, place / "snapshots" / COMMIT)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return snapshot


def test_a_hub_id_and_its_snapshot_are_one_teacher(hub, folder, tmp_path):
    local = files_of(hub, tmp_path)
    # What the settings of a model say of its config is not what the model has.
    remote = files_of("owner/name", tmp_path, arch={"num_layers": 2, "patch_size": 3})
    assert remote.folder() == hub
    assert remote.identity == local.identity == files_of(folder, tmp_path).identity
    assert remote.encoder_identity == local.encoder_identity
    remote.check()


def test_a_hub_id_gets_a_new_identity_with_its_files(hub, tmp_path):
    before = files_of("owner/name", tmp_path).identity
    flip(hub / "transformer" / SAFE)
    assert files_of("owner/name", tmp_path).identity != before


def test_a_quantised_model_on_the_hub_is_refused(hub, tmp_path):
    path = hub / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gguf"}}))
    with pytest.raises(UsageError, match=r"model\.path=owner/name has a quantised transformer \(gguf\)"):
        files_of("owner/name", tmp_path, arch={"num_layers": 2}).check()


def test_settings_of_another_number_of_blocks_are_refused(hub, tmp_path):
    with pytest.raises(UsageError, match=r"has num_layers=2, and the settings of model=x say 60: add model\.arch"):
        files_of("owner/name", tmp_path, arch={"num_layers": 60}).check()


# Results of earlier versions, which name weights by parts of their files.


def results_of(tmp_path, identity, name="runs/before"):
    """A result that an earlier version has made of a teacher with this identity, later than the teacher's files."""
    path = tmp_path / name / "plan" / "plan.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"made_from": {"detection": {"model": identity}}}))
    os.utime(path, (time.time() + 10,) * 2)
    return tmp_path / name


def former_identity(folder):
    return {"family": "qwen_image", "weights": _former_digest((folder / "transformer").glob("*.safetensors"))}


def test_results_of_before_are_recognised_as_of_the_first_teacher_alone(folder, tmp_path):
    weights = folder / "transformer" / SAFE
    edit(weights, lambda state: state.__setitem__(NAME, torch.randn(1_000, 1_000)))
    files_of(folder, tmp_path)  # config and weights do not fit, which is no matter here
    former, new = former_identity(folder), files_of(folder, tmp_path).identity
    assert new["weights"] != former["weights"]
    results = results_of(tmp_path, former)
    for spoil in (False, True):
        for record in tmp_path.glob("cache/teachers/former-*.json") if spoil else ():
            record.write_text("{")
        assert files_of(folder, tmp_path, [results]).identity == new | former
    assert files_of(folder, tmp_path).identity == new | former  # it has this name now, so that shared probes are found
    flip(weights)  # the ends are the same
    os.utime(weights, (0, 0))
    assert former_identity(folder) == former
    assert files_of(folder, tmp_path, [results]).identity["weights"] not in (former["weights"], new["weights"])


def test_results_that_are_older_than_the_weights_are_not_recognised(folder, tmp_path):
    results = results_of(tmp_path, former_identity(folder))
    os.utime(folder / "transformer" / SAFE, (time.time() + 20,) * 2)
    assert len(files_of(folder, tmp_path, [results]).identity["weights"]) == 32


def test_what_was_an_identity_of_nothing_is_never_recognised(folder, tmp_path):
    weights = folder / "transformer" / SAFE
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    results = results_of(tmp_path, former_identity(folder))
    assert len(files_of(folder, tmp_path, [results]).identity["weights"]) == 32


def test_results_that_are_not_recognised_are_refused_in_a_sentence_that_says_why(folder, tmp_path):
    identity = files_of(folder, tmp_path).identity
    before = Header("ppcl.plan", {"model": identity | former_identity(folder)})
    (tmp_path / "plan.json").write_text(json.dumps(before.to_json()))
    with pytest.raises(UsageError, match=r"was made with model\.weights='.*', now '.*' \(an earlier version"):
        is_current(tmp_path / "plan.json", Header("ppcl.plan", {"model": identity}))


def test_results_of_a_hub_id_are_recognised(hub, tmp_path):
    former = {"family": "qwen_image", "path": "owner/name", "revision": None}
    results = results_of(tmp_path, former)
    found = files_of("owner/name", tmp_path, [results], arch={"num_layers": 2}).identity
    assert found == former | {"arch": {"num_layers": 2}, "dtype": "float32"}


@pytest.mark.parametrize("name", sorted(path.parent.name for path in ASSETS.glob("*/model_index.json")))
def test_shipped_teachers_keep_their_identity(name, tmp_path):
    config = config_of(f"embedded:{name}", tmp_path)
    config.model.family = "auto"
    check_model(config)
    files = TeacherFiles(config, get_family(config.model.family, config.model.arch), (), Console(quiet=True))
    weights = _former_digest((ASSETS / name / "transformer").glob("*.safetensors"))
    assert files.identity["weights"] == weights
    assert len(files.encoder_identity["encoders"]) == 16


# Files that do not fit together.


def change_config(folder, **values):
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


MISFITS = {
    "fewer blocks": (
        lambda f: change_config(f, num_layers=1),
        r"num_layers=1, and the weights beside it have 2 blocks",
    ),
    "more blocks": (lambda f: change_config(f, num_layers=3), r"num_layers=3, and the weights beside it have 2 blocks"),
    "a tensor is missing": (
        lambda f: edit(f / "transformer" / SAFE, lambda state: state.pop("img_in.bias")),
        r"lacks img_in\.bias, which its config\.json asks for",
    ),
    "another width": (lambda f: change_config(f, attention_head_dim=64, axes_dims_rope=[16, 24, 24]), r"of shape \["),
    "no number": (lambda f: change_config(f, attention_head_dim="wide"), r"is no config of a QwenImageTransformer2D"),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", MISFITS)
def test_weights_of_another_config_are_refused_in_one_sentence(folder, tmp_path, kind, streaming):
    spoil, expected = MISFITS[kind]
    spoil(folder)
    config = files_of(folder, tmp_path).config
    config.model.streaming = streaming
    teacher = TeacherModel(config, get_family("qwen_image", config.model.arch), torch.device("cpu"))
    with pytest.raises(UsageError, match=expected) as caught:
        _ = teacher.pipeline
    assert "\n" not in str(caught.value)


def test_a_text_encoder_that_lacks_weights_is_refused(folder, tmp_path):
    """transformers would take random numbers for them."""
    edit(folder / "text_encoder" / "model.safetensors", lambda state: state.pop("model.layers.0.mlp.up_proj.weight"))
    config = files_of(folder, tmp_path).config
    teacher = TeacherModel(config, get_family("qwen_image", config.model.arch), torch.device("cpu"))
    with pytest.raises(
        UsageError, match=r"text_encoder lacks model\.\S*up_proj\.weight, which its config\.json asks for"
    ):
        _ = teacher.pipeline


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_weights_that_are_not_finite_are_refused_where_they_enter(folder, tmp_path, suffix):
    weights = folder / "transformer" / SAFE
    edit(weights, lambda state: state[NAME][3].fill_(torch.nan))
    if suffix == "bin":
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()
    with pytest.raises(UsageError, match=rf"has NaN or infinite numbers in {NAME}"):
        _ = files_of(folder, tmp_path).identity


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"num_layers": "six"}, "num_layers=six, which must be the number of blocks"),
        ({"num_layers": None}, "num_layers=None, which must be"),
        ({"num_layers": 0}, "num_layers=0, which must be"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, r"quantised transformer \(bitsandbytes\)"),
        ({"quantization_config": "int8"}, r"quantised transformer \(quantised\)"),
    ],
)
def test_a_config_that_cannot_be_a_teachers_is_refused_before_anything_loads(folder, tmp_path, values, expected):
    change_config(folder, **values)
    with pytest.raises(UsageError, match=expected):
        files_of(folder, tmp_path)


@pytest.mark.parametrize("kind", ["gone", "empty folder", "cut", "no json", "list", "config only"])
@pytest.mark.parametrize("part", ["tokenizer", "scheduler"])
def test_a_broken_tokenizer_is_refused_before_the_work(folder, tmp_path, kind, part):
    place = folder / part
    (file,) = place.glob("tokenizer.json" if part == "tokenizer" else "*.json")
    if kind in ("gone", "empty folder"):
        shutil.rmtree(place)
        if kind == "empty folder":
            place.mkdir()
    elif kind == "config only":
        file.unlink()
    else:
        file.write_text({"cut": file.read_text()[:-100], "no json": "tokens", "list": "[1]"}[kind])
    config = files_of(folder, tmp_path).config
    teacher = TeacherModel(config, get_family("qwen_image", config.model.arch), torch.device("cpu"))
    with pytest.raises(
        UsageError, match=rf"({part} of model\.path=\S+ could not be loaded \(|lacks {part}/, ).*fetch it again"
    ) as caught:
        teacher.check_encoding()
    assert "\n" not in str(caught.value)
