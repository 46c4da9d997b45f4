"""What the PPCL authors published, by the command line: their models as folders, their checkpoints as plugs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import INTERVALS, NUM_LAYERS, PLUG_NAMES, Outcome, digests, ppcl, succeed
from diffusers import DiffusionPipeline, QwenImageTransformer2DModel
from safetensors.torch import save_file

import ppcl as package
from ppcl.artifacts.plugs import load_plugs, load_projectors
from ppcl.families.qwen_image.tiny import build_pipeline
from ppcl.families.qwen_image.transformer_qwen_image_pruned import PrunedQwenImageTransformer2DModel

STACK, WIDTH = "transformer_blocks", 64
KEPT = [0, 1, 3, 5]  # what INTERVALS leave
STAGE = "stages=[import_published]"
POSITIONS = {"single_stream_index": [2, 3], "ffn_proj_index": [0, 3], "ehs_proj_index": [3]}
GROUPS = "published.ehs_same=[[0,2],[3,5]]"  # students 1 and 3 in the first and as the start of the second
SETS = ["width.source=given", "width.transformer_blocks.text=[5]", "width.transformer_blocks.ffn=[1,3]"]


def load(folder: Path) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    arguments = {"height": 32, "width": 32, "num_inference_steps": 2, "generator": generator}
    return np.asarray(pipeline(prompt="a red circle", **arguments).images[0]).astype(int)


def random(shape: Any, seed: int) -> torch.Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def assert_one_sentence(outcome: Outcome, *fragments: str) -> None:
    assert outcome.code == 2, outcome.err
    assert outcome.err.startswith("ppcl: ")
    assert len(outcome.err.splitlines()) == 1, outcome.err
    for fragment in fragments:
        assert fragment in outcome.err


# Models.


def ours() -> PrunedQwenImageTransformer2DModel:
    """A pruned transformer for the tiny pipeline, all of it random."""
    arch = {k: v for k, v in build_pipeline(0, 1).transformer.config.items() if not k.startswith("_")}
    sets = {"num_layers": len(KEPT), "pruned_text": [2, 3], "pruned_ffn": [0, 3]}
    torch.manual_seed(1)
    model = PrunedQwenImageTransformer2DModel(**arch | sets).eval()
    for number, (name, value) in enumerate(model.named_parameters()):
        if "_proj." in name and ".attn." not in name:
            value.data = random(value.shape, number)
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder in the 10B model's layout, in two shards, whose index names a module of theirs."""
    folder = tmp_path_factory.mktemp("published") / "Qwen-Image-10B"
    build_pipeline(0, 1).save_pretrained(folder)
    transformer = folder / "transformer"
    (transformer / "diffusion_pytorch_model.safetensors").unlink()
    source = ours()
    state = dict(source.state_dict())
    for index in POSITIONS["single_stream_index"]:  # what no output depends on
        for name in ("to_add_out", "add_q_proj"):
            state[f"{STACK}.{index}.attn.{name}.weight"] = random((WIDTH, WIDTH), index)
            state[f"{STACK}.{index}.attn.{name}.bias"] = random(WIDTH, index)
        state[f"{STACK}.{index}.attn.norm_added_q.weight"] = random(32, index)
    config = json.loads((transformer / "config.json").read_text())
    (transformer / "config.json").write_text(json.dumps(config | POSITIONS | {"num_layers": len(KEPT)}))
    index: dict[str, str] = {}
    for number, keys in enumerate((sorted(state)[::2], sorted(state)[1::2]), start=1):
        name = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({key: state[key] for key in keys}, transformer / name)
        index |= dict.fromkeys(keys, name)
    names = {"metadata": {}, "weight_map": index}
    (transformer / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(names))
    pipeline = json.loads((folder / "model_index.json").read_text())
    pipeline["transformer"] = ["transformer_qwenimage_10B", "QwenImageTransformer2DModel"]
    (folder / "model_index.json").write_text(json.dumps(pipeline))
    (folder / "LICENSE").write_text("terms")
    (folder / "transformer_qwenimage_10B.py").write_text("raise RuntimeError")
    return folder


@pytest.fixture(scope="module")
def command(settings: list[str], model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    runs = tmp_path_factory.mktemp("runs")
    return [*settings, f"paths.runs_dir={runs}", "name=model", STAGE, f"published.path={model}", INTERVALS]


def folder_of(command: list[str], name: str) -> Path:
    runs = next(a for a in command if a.startswith("paths.runs_dir=")).partition("=")[2]
    return Path(runs) / name


@pytest.fixture(scope="module")
def imported(command: list[str]) -> Path:
    outcome = succeed(*command)
    assert "4 blocks, 2 without a text stream, 2 without FFN" in outcome.out
    assert "read as residual maps" in outcome.out
    return folder_of(command, "model") / "imported"


def test_a_published_model_draws_as_it_did(model: Path, imported: Path) -> None:
    pipeline = load(imported)
    assert type(pipeline.transformer) is PrunedQwenImageTransformer2DModel
    expected = build_pipeline(0, 1)
    expected.transformer = ours()
    expected.set_progress_bar_config(disable=True)
    assert np.array_equal(draw(pipeline), draw(expected))
    assert (imported / "LICENSE").read_text() == "terms"
    assert not (imported / "transformer_qwenimage_10B.py").exists()
    state = package.import_published(model).state_dict()
    assert all(torch.equal(state[key], value) for key, value in pipeline.transformer.state_dict().items())


def test_it_carries_its_code_and_says_which_blocks_it_has(imported: Path) -> None:
    config = json.loads((imported / "transformer" / "config.json").read_text())
    assert (imported / "transformer" / "transformer_qwen_image_pruned.py").is_file()
    assert config["ppcl"]["kept_layers"] == {STACK: KEPT}
    assert config["ppcl"]["width"] == {STACK: {"text": [3, 5], "ffn": [0, 5]}}
    assert not POSITIONS.keys() & config.keys()
    package.place_residuals(load(imported).transformer)


def test_it_is_not_imported_twice_and_not_over_another(command: list[str], imported: Path) -> None:
    before = digests(imported)
    assert "reused" in succeed(*command).out
    assert_one_sentence(ppcl(*command, "width.keep_text_query=true"), "keep_text_query", "name=")
    assert digests(imported) == before


def test_a_transformer_alone_and_without_intervals(command: list[str], model: Path, imported: Path) -> None:
    arguments = [a for a in command if not a.startswith(("intervals", "published.path"))]
    assert "from_pretrained" in succeed(*arguments, "name=alone", f"published.path={model / 'transformer'}").out
    folder = folder_of(command, "alone") / "imported"
    assert {path.name for path in folder.iterdir()} == {"ppcl.json", "transformer"}
    found = PrunedQwenImageTransformer2DModel.from_pretrained(folder / "transformer")
    assert "ppcl" not in found.config
    expected = load(imported).transformer.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in found.state_dict().items())


def test_text_projectors_are_read_as_is_said(command: list[str], imported: Path) -> None:
    """As of the 12B model, whose txt_proj is the whole map."""
    outcome = succeed(*command, "name=plain", "published.residual=false")
    assert "read as plain maps" in outcome.out
    assert "rounds off at most" in outcome.out
    whole = load(folder_of(command, "plain") / "imported").transformer.state_dict()
    for key, value in load(imported).transformer.state_dict().items():
        difference = torch.eye(WIDTH) if key.endswith(".txt_proj.weight") else torch.zeros(())
        assert torch.allclose(value - whole[key], difference, rtol=0, atol=1e-6), key


def test_the_stock_class_is_reported_or_told_its_blocks(settings: list[str], teacher: Path, tmp_path: Path) -> None:
    """A model pruned in depth alone needs no conversion; with intervals it takes the full model's LoRAs."""
    base = load(teacher)
    torch.manual_seed(2)
    config = {key: value for key, value in base.transformer.config.items() if not key.startswith("_")}
    base.transformer = QwenImageTransformer2DModel(**config | {"num_layers": len(KEPT)})
    base.save_pretrained(tmp_path / "depth")
    arguments = [*settings, f"paths.runs_dir={tmp_path}", "name=stock", STAGE, f"published.path={tmp_path / 'depth'}"]
    assert "stock class with 4 blocks" in succeed(*arguments).out
    assert not (tmp_path / "stock" / "imported").exists()
    succeed(*arguments, INTERVALS)
    pipeline = load(tmp_path / "stock" / "imported")
    assert type(pipeline.transformer) is QwenImageTransformer2DModel
    assert pipeline.transformer.config["ppcl"]["kept_layers"] == {STACK: KEPT}
    assert np.array_equal(draw(pipeline), draw(base))


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["published.path=nowhere"], ["published.path=nowhere"]),
        (["intervals.transformer_blocks=[[1,2]]"], ["4 blocks", "leaves 5"]),
        (["published.ehs_same=[[0,2]]"], ["published.ehs_same", "is a folder"]),
        (["width.source=given", "width.transformer_blocks.ffn=[0]"], ["leave out width="]),
        (["model=flux_dev", "model.path=null", "intervals=detect"], ["model=flux_dev", "choose model=qwen_image"]),
    ],
)
def test_settings_that_do_not_fit_a_model(command: list[str], arguments: list[str], fragments: list[str]) -> None:
    kept = command[:-1] if arguments[0].startswith(("intervals", "model")) else command
    if arguments[0].startswith("model"):
        kept = [a for a in kept if not a.startswith("model")]
    assert_one_sentence(ppcl(*kept, "name=bad", *arguments), *fragments)
    assert not (folder_of(command, "bad") / "imported").exists()


def test_a_path_is_needed(settings: list[str], tmp_path: Path) -> None:
    assert_one_sentence(ppcl(*settings, f"paths.runs_dir={tmp_path}", STAGE), "needs published.path")


# Training checkpoints.


def linears(count: int, seed: int) -> dict[str, torch.Tensor]:
    shapes = {"weight": (WIDTH, WIDTH), "bias": (WIDTH,)}
    return {
        f"{number}.{name}": random(shape, seed + number) for number in range(count) for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(3)
    students = build_pipeline(3, 2).transformer.transformer_blocks
    path = tmp_path_factory.mktemp("training") / "diffusion_pytorch_model.bin"
    lists = {
        "attn_proj_list": linears(2, 100),
        "ehs_proj_list": linears(2, 200),
        "ffn_proj_list": linears(2 * len(KEPT), 300),
        "block_proj_list": linears(4, 400),
        "transformer_distill_blocks": students.state_dict(),
    }
    torch.save(lists, path)
    return path


@pytest.fixture(scope="module")
def training(settings: list[str], checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    runs = tmp_path_factory.mktemp("trained_elsewhere")
    return [*settings, f"paths.runs_dir={runs}", "name=plugs", STAGE, f"published.path={checkpoint}", INTERVALS]


@pytest.fixture(scope="module")
def plugs(training: list[str]) -> Path:
    outcome = succeed(*training, *SETS, GROUPS)
    assert "wrote 2 students, 3 projectors" in outcome.out
    return folder_of(training, "plugs")


def test_a_checkpoint_becomes_plugs(plugs: Path, checkpoint: Path) -> None:
    lists = torch.load(checkpoint, weights_only=True)
    students, projectors = load_plugs(plugs / "plugs"), load_projectors(plugs / "plugs")
    assert list(students) == PLUG_NAMES
    for number, plug in enumerate(students.values()):
        for key, value in plug.state_dict.items():
            assert torch.equal(value, lists["transformer_distill_blocks"][f"{number}.{key}"])
    entries = {
        f"{STACK}.5.text": {"txt_proj": ("attn_proj_list", 1), "ehs_proj": ("ehs_proj_list", 1)},
        f"{STACK}.1.ffn": {"txt_ffn_proj": ("ffn_proj_list", 2), "img_ffn_proj": ("ffn_proj_list", 3)},
        f"{STACK}.3.ffn": {"txt_ffn_proj": ("ffn_proj_list", 4), "img_ffn_proj": ("ffn_proj_list", 5)},
    }
    assert projectors.keys() == entries.keys()
    for name, modules in entries.items():
        expected = {
            f"{target}.{key}": lists[source][f"{number}.{key}"]
            for target, (source, number) in modules.items()
            for key in ("weight", "bias")
        }
        assert projectors[name].state_dict.keys() == expected.keys()
        assert all(torch.equal(projectors[name].state_dict[key], value) for key, value in expected.items())
    bases = {name: (item.base, item.reference) for name, item in projectors.items()}
    assert bases == {
        f"{STACK}.5.text": (None, 3),
        f"{STACK}.1.ffn": (PLUG_NAMES[0], None),
        f"{STACK}.3.ffn": (PLUG_NAMES[1], None),
    }


def test_the_plugs_are_plugged_and_exported_like_our_own(training: list[str], plugs: Path, teacher: Path) -> None:
    pipeline = load(teacher)
    board = package.plug(pipeline, plugs / "plugs")
    expected = draw(pipeline)
    assert "reused" in succeed(*training, *SETS, GROUPS, "stages=[import_published,export]").out
    exported = load(plugs / "export")
    assert np.array_equal(draw(exported), expected)
    assert list(exported.transformer.config.pruned_text) == [3]
    board()
    assert not np.array_equal(draw(pipeline), expected)


def test_students_alone_need_no_sets_and_projectors_may_follow(training: list[str], plugs: Path) -> None:
    succeed(*training, "name=students")
    folder = folder_of(training, "students") / "plugs"
    assert list(load_plugs(folder)) == PLUG_NAMES
    assert not load_projectors(folder)
    before = digests(folder)
    succeed(*training, "name=students", *SETS, GROUPS)
    assert before.items() < digests(folder).items()
    ours, theirs = load_plugs(folder), load_plugs(plugs / "plugs")
    assert all(torch.equal(v, theirs[n].state_dict[k]) for n in PLUG_NAMES for k, v in ours[n].state_dict.items())


class Code:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return Path.touch, (self.target,)


@pytest.mark.parametrize("kind", ["code", "pickle", "cut"])
def test_a_file_that_may_hold_code_is_not_read(
    training: list[str], checkpoint: Path, tmp_path: Path, kind: str
) -> None:
    path, touched = tmp_path / "diffusion_pytorch_model.bin", tmp_path / "touched"
    if kind == "code":
        torch.save({"transformer_distill_blocks": {"0.a": torch.zeros(1)}, "run": Code(touched)}, path)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Code(touched)))
    else:
        path.write_bytes(checkpoint.read_bytes()[:1000])
    outcome = ppcl(*training, f"name={kind}", f"published.path={path}")
    assert_one_sentence(outcome, str(path), "cut short" if kind != "code" else "could run code")
    assert not touched.exists()
    assert not folder_of(training, kind).exists()


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["intervals.transformer_blocks=[[1,2]]"], ["holds 2 modules", "layer_indexs"]),
        (SETS, ["text streams [5]", "published.ehs_same"]),
        ([*SETS, "published.ehs_same=[[0,2],[3,9]]"], ["[3, 9] is out of range", f"0 to {NUM_LAYERS - 1}"]),
        ([*SETS, GROUPS, "width.text_output=each"], ["width.text_output=each"]),
        (["width=auto"], ["width=auto"]),
        (["published.residual=false"], ["published.residual=False"]),
        (["intervals.transformer_blocks=null"], ["give the intervals it was trained with"]),
        (["model=qwen_image", "model.path=null"], ["set model.path"]),
        (["model=qwen_image", "model.path=Qwen/Qwen-Image"], ["0.img_mod.1.weight is [384, 64]", "[18432, 3072]"]),
    ],
)
def test_settings_that_do_not_fit_a_checkpoint(training: list[str], arguments: list[str], fragments: list[str]) -> None:
    assert_one_sentence(ppcl(*training, "name=bad", *arguments), *fragments)
    assert not (folder_of(training, "bad") / "plugs").exists()
