"""The files of a model are those that diffusers loads, whatever else lies beside them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from ppcl.artifacts.model_files import WEIGHTS, component_files, stored_tensors, weight_files
from ppcl.errors import UsageError
from ppcl.streaming import load_streamed, still

NAME = "transformer_blocks.0.attn.to_q.weight"
SAFE, BIN, INDEX = (f"{WEIGHTS}.{end}" for end in ("safetensors", "bin", "safetensors.index.json"))


@pytest.fixture(scope="module")
def model(make_transformer):
    return make_transformer(2)


def write_bin(folder, model, name=BIN):
    model.save_config(folder)
    torch.save(model.state_dict(), folder / name)


def layout(kind, folder, model):
    """Save the model in one of the ways in which models are found; what must not be loaded is zero."""
    zeros = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    folder.mkdir()
    if kind == "bin":
        write_bin(folder, model)
    elif kind == "sharded":
        model.save_pretrained(folder, max_shard_size="100KB")
    elif kind == "sharded variant":
        model.save_pretrained(folder, max_shard_size="100KB", variant="fp16")
    elif kind in ("variant", "variant beside"):
        model.save_pretrained(folder, variant="fp16")
    elif kind == "legacy variant":
        model.save_pretrained(folder, max_shard_size="100KB")
        index = json.loads((folder / INDEX).read_text())
        for name in {*index["weight_map"].values()}:
            (folder / name).rename(folder / name.replace(".safetensors", ".fp16.safetensors"))
        index["weight_map"] = {
            key: name.replace(".safetensors", ".fp16.safetensors") for key, name in index["weight_map"].items()
        }
        (folder / INDEX).unlink()
        (folder / f"{WEIGHTS}.safetensors.index.fp16.json").write_text(json.dumps(index))
    else:
        model.save_pretrained(folder)
    if kind == "backup":
        save_file(zeros, folder / f"{WEIGHTS}_old.safetensors")
        save_file(zeros, folder / "zz.safetensors")
    elif kind == "bin beside":
        torch.save(zeros, folder / BIN)
    elif kind == "variant beside":
        save_file(zeros, folder / SAFE)
    elif kind == "single file beside shards":
        (folder / SAFE).unlink()
        model.save_pretrained(folder, max_shard_size="100KB")
        save_file(zeros, folder / SAFE)
    elif kind == "another variant beside":
        save_file(zeros, folder / f"{WEIGHTS}.fp16.safetensors")
    elif kind == "a tensor in two shards":
        (folder / SAFE).unlink()
        model.save_pretrained(folder, max_shard_size="100KB")
        index = json.loads((folder / INDEX).read_text())
        first = folder / min(index["weight_map"].values())
        last = folder / max(index["weight_map"].values())
        name = next(iter(load_file(last)))
        save_file(load_file(first) | {name: torch.zeros_like(load_file(last)[name])}, first)


KINDS = [
    *("one file", "bin", "sharded", "sharded variant", "variant", "variant beside", "legacy variant", "backup"),
    *("bin beside", "single file beside shards", "another variant beside", "a tensor in two shards"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_those_that_diffusers_loads(kind, family, model, tmp_path):
    folder = tmp_path / "transformer"
    layout(kind, folder, model)
    variant = "fp16" if "variant" in kind and not kind.startswith("another") else None
    expected = type(model).from_pretrained(folder, variant=variant).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())  # of this test
    found = {}
    for path in weight_files(folder, variant):
        found |= load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    if kind == "bin":
        with pytest.raises(
            UsageError, match=rf"{BIN} is no safetensors file, and model\.streaming=true reads no other"
        ):
            load_streamed(family, folder, torch.device("cpu"), torch.float32, variant)
        return
    streamed = load_streamed(family, folder, torch.device("cpu"), torch.float32, variant)
    with still(*streamed.transformer_blocks):
        assert all(torch.equal(value, expected[name]) for name, value in streamed.state_dict().items())


@pytest.mark.parametrize(
    ("files", "fragment"),
    [
        ([], f"holds no {SAFE}: give a folder of the whole pipeline"),
        ([f"{WEIGHTS}.fp16.safetensors"], "only weights of another variant: add model.variant=fp16"),
        ([f"{WEIGHTS}.fp16-00001-of-00002.safetensors"], "add model.variant=fp16"),
        (["model.safetensors"], "diffusers reads no weights of another name"),
        ([f"{WEIGHTS}.bin.index.json"], "does not read .bin files in shards"),
    ],
)
def test_a_folder_without_such_files_is_refused(tmp_path, files, fragment):
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UsageError) as caught:
        weight_files(tmp_path)
    assert fragment in str(caught.value)


@pytest.mark.parametrize("spoilt", ["", "[]", "{}", '{"weight_map": {}, "metadata": {}}', '{"weight_map": {"a": "b"}}'])
def test_a_damaged_index_is_named(tmp_path, spoilt):
    (tmp_path / INDEX).write_text(spoilt)
    with pytest.raises(UsageError, match=INDEX):
        weight_files(tmp_path)


@pytest.mark.parametrize("name", ["gone.safetensors", "../outside.safetensors", "/tmp/outside.safetensors"])
def test_a_shard_that_is_not_in_the_folder_is_named(tmp_path, name):
    (tmp_path / "outside.safetensors").write_bytes(b"")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
    with pytest.raises(UsageError, match=rf"names {name}, which is not in its folder"):
        weight_files(tmp_path / "in")


def test_a_bin_file_that_runs_code_is_refused(tmp_path, model, monkeypatch):
    import pickle

    from ppcl.artifacts.model_files import pickled_tensors

    class Bad:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    (tmp_path / BIN).write_bytes(pickle.dumps({"a": Bad()}))
    with pytest.raises(UsageError, match="is damaged or no file of weights"):
        pickled_tensors(tmp_path / BIN)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [{"a": "text"}, [torch.ones(1)], {"state": {"a": torch.ones(1)}}])
def test_a_bin_file_of_something_else_is_refused(tmp_path, content):
    from ppcl.artifacts.model_files import pickled_tensors

    torch.save(content, tmp_path / BIN)
    with pytest.raises(UsageError, match="holds more than the weights of a model"):
        pickled_tensors(tmp_path / BIN)


def test_a_component_is_its_config_and_what_transformers_loads(tmp_path):
    for name in ("config.json", "generation_config.json", "model.safetensors", "pytorch_model.bin", "old.safetensors"):
        (tmp_path / name).write_bytes(b"")
    names = [path.name for path in component_files(tmp_path)]
    assert names == ["config.json", "model.safetensors"]
    (tmp_path / "model.safetensors").rename(tmp_path / "model.fp16.safetensors")
    assert [path.name for path in component_files(tmp_path, "fp16")][1:] == ["model.fp16.safetensors"]
    assert [path.name for path in component_files(tmp_path)][1:] == ["pytorch_model.bin"]


def test_of_a_component_without_weights_every_file_counts(tmp_path):
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes(b"")
    assert [path.name for path in component_files(tmp_path)] == ["merges.txt", "vocab.json"]


def test_locations_are_those_of_the_last_shard(tmp_path, model):
    layout("a tensor in two shards", tmp_path / "transformer", model)
    found = stored_tensors(tmp_path / "transformer")
    assert found.keys() == model.state_dict().keys()
    shutil.rmtree(tmp_path / "transformer")
