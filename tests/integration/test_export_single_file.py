"""What goes with an export: a single file, shards, the card's scores and licence, and the way to the Hub."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import INTERVALS, PLUG_NAMES, digests, modified, ppcl, ppcl_process, succeed
from diffusers import DiffusionPipeline, FluxTransformer2DModel, QwenImageTransformer2DModel
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from ppcl.export.single_file import read_metadata
from ppcl.families.registry import builders

SINGLE = "export.single_file=true"
TEXT, FFN = "transformer_blocks.3.text", "transformer_blocks.1.ffn"
WIDTH = ["width.source=given", "width.transformer_blocks.text=[3]", "width.transformer_blocks.ffn=[1]"]
SHORT = ["width.steps=0", "width.num_batches=1"]


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading the teacher fails the test."""

    def load(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", load)


@pytest.fixture
def again(chain_command: list[str], chain: Path, tmp_path: Path) -> list[str]:
    """The command that exports, in a copy of a run that went through every stage."""
    shutil.copytree(chain, tmp_path / "chain")
    return [*chain_command, f"paths.runs_dir={tmp_path}", "stages=[export]"]


def refused(*arguments: str) -> str:
    outcome = ppcl(*arguments)
    assert outcome.code == 2, outcome.err
    assert "Traceback" not in outcome.err
    assert len(outcome.err.splitlines()) == 1, outcome.err
    return outcome.err


def run_code(card: str, folder: Path) -> Any:
    """The picture that a card's code draws, with the folder in its place."""
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("PATH_OR_ID", str(folder)), names)
    return names["image"]


def test_a_single_file_is_made_of_the_export_that_is_there(again: list[str], tmp_path: Path, no_model: None) -> None:
    run = tmp_path / "chain"
    before = digests(run / "export" / "transformer")
    outcome = succeed(*again, SINGLE)
    assert "reused" in outcome.out
    assert digests(run / "export" / "transformer") == before
    exported = QwenImageTransformer2DModel.from_pretrained(run / "export" / "transformer", dtype=torch.bfloat16)
    read = QwenImageTransformer2DModel.from_single_file(
        str(run / "export.safetensors"), config=str(run / "export" / "transformer"), dtype=torch.bfloat16
    )
    expected, found = exported.state_dict(), read.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    metadata = read_metadata(run / "export.safetensors")
    assert metadata["modelspec.resolution"] == "32x32"
    assert metadata["modelspec.license"] == "apache-2.0"
    assert metadata["modelspec.title"] == "pipeline pruned by PPCL"  # as the teacher's folder is called
    assert json.loads(metadata["ppcl.kept_layers"]) == exported.config.ppcl["kept_layers"]
    assert json.loads(metadata["ppcl.removed_intervals"]) == exported.config.ppcl["removed_intervals"]

    written = modified(run)
    assert succeed(*again, SINGLE).out.count("reused") == 2
    kept = {name: time for name, time in written.items() if "config.yaml" not in name and "versions" not in name}
    assert kept.items() <= modified(run).items()
    error = refused(*again, SINGLE, "export.single_file_dtype=float32")
    assert "export.safetensors" in error
    assert "export.single_file_dtype" in error


def test_the_card_has_the_scores_once_they_are_there(again: list[str], chain: Path, tmp_path: Path) -> None:
    run = tmp_path / "chain"
    assert "| `teacher` |" not in (chain / "export" / "README.md").read_text()  # it was exported before it was scored
    succeed(*again, SINGLE)
    card = (run / "export" / "README.md").read_text()
    for name in ("teacher", "ppcl-depth"):
        record = json.loads((run / "scores" / f"{name}.json").read_text())
        row = next(line for line in card.splitlines() if line.startswith(f"| `{name}` |"))
        titles = next(line for line in card.splitlines() if line.startswith("| variant |")).split(" | ")
        assert row.split(" | ")[titles.index("overall")].startswith(f"{record['scores']['overall']:.3f}")
        assert len(row.split(" | ")) == len(titles)
        assert {name.replace("_", " ") for name in record["scores"]} <= {*titles}
    assert "models/diffusion_models" in card
    assert ModelCard(card).data.license == "apache-2.0"
    assert run_code(card, run / "export").size == (32, 32)
    # Scores of other pictures than are configured do not go in, and it is said.
    stale = card.replace("| `teacher` | ", "| `teacher` | 9.")
    (run / "export" / "README.md").write_text(stale)
    assert "do not go into the model card" in succeed(*again, SINGLE, "seed=7").out
    assert (run / "export" / "README.md").read_text() == stale
    succeed(*again)
    assert (run / "export" / "README.md").read_text() == card


def test_shards(settings: list[str], trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained, tmp_path / "trained")
    command = [*settings, f"paths.runs_dir={tmp_path}", "name=trained", INTERVALS, "stages=[export]"]
    succeed(*command, "export.max_shard_size=500KB")
    folder = tmp_path / "trained" / "export" / "transformer"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1
    assert all((folder / shard).stat().st_size < 600_000 for shard in shards)
    DiffusionPipeline.from_pretrained(tmp_path / "trained" / "export")
    assert "max_shard_size='500KB', now '1GB'" in refused(*command, "export.max_shard_size=1GB")


@pytest.fixture(scope="module", params=["tiny_flux", "tiny_dit"])
def other(request: pytest.FixtureRequest, settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The export command of a run with plugs of another family."""
    builder: str = request.param
    folder = tmp_path_factory.mktemp(builder)
    import_module(builders()[builder]).build_pipeline(0, 3).save_pretrained(folder / "teacher")
    intervals = ["intervals.transformer_blocks=[[1,2]]"]
    if builder == "tiny_flux":
        intervals.append("intervals.single_transformer_blocks=[[0,1],[3,4]]")
    command = [*settings, f"model.path={folder / 'teacher'}", f"paths.runs_dir={folder}", "name=run", *intervals]
    command += ["distill.steps=1", "model.sampling.max_sequence_length=16"]
    succeed(*command, "stages=[depth]")
    return command


def test_other_families(other: list[str]) -> None:
    run = Path(next(a for a in other if a.startswith("paths.runs_dir=")).partition("=")[2]) / "run"
    if "tiny_dit" in str(run):
        error = refused(*other, "stages=[export]", SINGLE)
        assert "dit" in error
        assert "export.single_file=false" in error
        succeed(*other, "stages=[export]")
        licence = "cc-by-nc-4.0"
    else:
        succeed(*other, "stages=[export]", SINGLE, "export.single_file_dtype=float32")
        model = FluxTransformer2DModel.from_pretrained(run / "export" / "transformer").state_dict()
        file = load_file(run / "export.safetensors")
        assert {key.split(".")[1] for key in file if key.startswith("double_blocks.")} == {"0", "1"}
        assert {key.split(".")[1] for key in file if key.startswith("single_blocks.")} == {"0", "1", "2", "3"}
        parts = [model[f"transformer_blocks.1.attn.{name}.weight"] for name in ("to_q", "to_k", "to_v")]
        assert torch.equal(file["double_blocks.1.img_attn.qkv.weight"], torch.cat(parts))
        assert sum(value.numel() for value in file.values()) == sum(value.numel() for value in model.values())
        licence = "other"
    card = (run / "export" / "README.md").read_text()
    assert ModelCard(card).data.license == licence
    assert run_code(card, run / "export").size == (32, 32)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ([SINGLE, *WIDTH], ["export.single_file=true", "width.source=given", "export.variant=ppcl-depth"]),
        ([SINGLE, *WIDTH, "stages=[depth,width,export]"], ["export.single_file=true", "ComfyUI"]),
        ([SINGLE, "width=auto"], ["export.single_file=true", "width.source=auto"]),
        ([SINGLE, *WIDTH, "export.variant=ppcl-width"], ["export.single_file=true"]),
        (["export.single_file_dtype=float32"], ["export.single_file_dtype=float32", "export.single_file=true"]),
        ([SINGLE, "export.single_file_dtype=int8"], ["export.single_file_dtype=int8", "bfloat16"]),
        (["export.max_shard_size=5"], ["export.max_shard_size=5", "5GB"]),
        (["export.max_shard_size=0GB"], ["export.max_shard_size=0GB"]),
        (["export.push_to_hub=a/b/c"], ["export.push_to_hub=a/b/c", "owner/name"]),
        (["export.push_to_hub='own er/name'"], ["own er/name", "owner/name"]),
        (["export.private=true"], ["export.private=True", "export.push_to_hub"]),
        (["export.commit_message=x"], ["export.commit_message=x", "export.push_to_hub"]),
    ],
)
def test_wrong_settings_are_refused_first(
    settings: list[str], tmp_path: Path, arguments: list[str], fragments: list[str]
) -> None:
    error = refused(*settings, f"paths.runs_dir={tmp_path}", "name=bad", INTERVALS, "stages=[export]", *arguments)
    for fragment in fragments:
        assert fragment in error
    assert not (tmp_path / "bad").exists() or not any((tmp_path / "bad").iterdir())


def test_what_a_budget_plugs_in_decides(
    settings: list[str], trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    command = [*settings, f"paths.runs_dir={tmp_path}", "name=run", INTERVALS, *WIDTH, *SHORT]
    succeed(*command, "stages=[width]")
    export = [*command, "stages=[export]", "budget.params=0.6", SINGLE]
    choice = {"budget": ["params", 0.6, "velocity"], "plugged": [*PLUG_NAMES, TEXT, FFN]}
    (tmp_path / "run" / "plan" / "choice.json").write_text(json.dumps(choice))
    with monkeypatch.context() as patch:
        patch.setattr(DiffusionPipeline, "from_pretrained", None)
        assert TEXT in refused(*export)
    assert not (tmp_path / "run" / "export").exists()
    succeed(*(argument for argument in export if argument != SINGLE))
    card = (tmp_path / "run" / "export" / "README.md").read_text()
    assert "COMFYUI CANNOT LOAD THIS MODEL" in card
    assert run_code(card, tmp_path / "run" / "export").size == (32, 32)
    shutil.rmtree(tmp_path / "run" / "export")
    (tmp_path / "run" / "plan" / "choice.json").write_text(json.dumps(choice | {"plugged": PLUG_NAMES}))
    succeed(*export)
    assert (tmp_path / "run" / "export.safetensors").exists()


@pytest.fixture
def hub() -> Iterator[Any]:
    """The unit tests' server."""
    path = Path(__file__).parents[1] / "unit" / "export" / "hub_server.py"
    spec = spec_from_file_location("hub_server", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.Hub() as server:
        server.token = module.TOKEN
        yield server


def test_an_export_goes_to_the_hub_or_waits_on_disk(
    again: list[str], hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In processes of their own, since huggingface_hub reads its address when it is imported."""
    run = tmp_path / "chain"
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    command = [*again, SINGLE, "export.push_to_hub=owner/small", "export.private=true"]
    outcome = ppcl_process(*command)
    assert outcome.returncode == 2, outcome.stderr
    assert "Traceback" not in outcome.stderr
    error = next(line for line in outcome.stderr.splitlines() if line.startswith("ppcl: "))
    assert f"hf upload owner/small {run / 'export'} . --private" in error
    assert (run / "export" / "ppcl.json").exists()
    assert (run / "export.safetensors").exists()

    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    outcome = ppcl_process(*command, "export.commit_message=Prune it")
    assert outcome.returncode == 0, outcome.stderr
    assert "reused" in outcome.stdout
    repo = hub.repos["owner/small"]
    assert repo["private"]
    assert set(repo["commits"]) == {"Prune it"}
    files = {name: content for name, content in repo["files"].items() if name != "small.safetensors"}
    on_disk = {
        p.relative_to(run / "export").as_posix(): p.read_bytes() for p in (run / "export").rglob("*") if p.is_file()
    }
    assert files == on_disk
    assert repo["files"]["small.safetensors"] == (run / "export.safetensors").read_bytes()
