"""FLUX.1 traced and pruned in width: its export draws the same with ppcl, and with its own code alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import ppcl, succeed
from test_export_width import AGAIN, REFUSED, draw, load

from ppcl.artifacts.plugs import load_plugs, load_projectors
from ppcl.artifacts.tensors import read_tensors
from ppcl.families.traced.family import Traced, facts_of
from ppcl.families.traced.known import read_trace
from ppcl.paths import ASSETS
from ppcl.surgery.plugboard import Plugboard, load_student
from tests.pipelines_tiny.chain import SHORT
from tests.pipelines_tiny.sana import build as build_sana

STACK, FFN = "transformer_blocks", [1, 4]  # block 1 is a student
SETS = [f"width.names=[{','.join(f'{STACK}.{index}.ffn' for index in FFN)}]"]
CLASS = "PrunedTracedFluxTransformer2DModel"


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("traced")
    (folder / "prompts.txt").write_text("a red circle\ntwo squares\na green triangle\n")
    return [
        "model=tiny_flux",
        "model.trace=true",
        "model.sampling.num_inference_steps=2",
        f"data.path={folder / 'prompts.txt'}",
        f"paths.runs_dir={folder}",
        f"paths.cache_dir={folder / 'cache'}",
        "name=width",
        f"intervals.{STACK}=[[1,2]]",
        "distill=tiny",
        "distill.steps=2",
        "distill.batch_size=4",
        "width.source=given",
        "width.steps=2",
        "width.num_batches=2",
        "trainer=cpu",
        "trainer.num_threads=1",
        "trainer.progress=false",
        "logger=none",
    ]


@pytest.fixture(scope="module")
def pruned(command: list[str]) -> Path:
    """The folder of the run. Read it, do not write."""
    succeed(*command, *SETS, "stages=[cache,depth,width,export]")
    return Path(next(a for a in command if a.startswith("paths.runs_dir=")).partition("=")[2]) / "width"


@pytest.fixture(scope="module")
def plugged(pruned: Path) -> np.ndarray:
    """Pictures of the teacher with every plug of the run in it."""
    from diffusers import DiffusionPipeline

    pipeline: Any = DiffusionPipeline.from_pretrained(ASSETS / "tiny_flux")
    trace = read_trace(next((pruned.parent / "cache" / "traces").glob("*.json")))
    assert trace is not None
    family = Traced(facts_of(trace), dict(pipeline.transformer.config))
    family.adopt(trace)
    plugs, projectors = load_plugs(pruned / "plugs"), load_projectors(pruned / "plugs")
    students = {name: load_student(family, pipeline.transformer, plug) for name, plug in plugs.items()}
    Plugboard(family, pipeline.transformer, {STACK: [(1, 2)]}, students, projectors).all()
    return draw(pipeline)


def test_with_ppcl_no_flag_is_needed_and_it_can_be_saved_again(
    pruned: Path, plugged: np.ndarray, tmp_path: Path
) -> None:
    facts, images = load(pruned / "export", tmp_path, {}, prepare="import ppcl", again=AGAIN)
    assert np.array_equal(images, plugged)
    assert np.array_equal(np.load(tmp_path / "images.npy.again.npy"), plugged)
    assert facts["class"] == CLASS
    assert facts["params"] == json.loads((pruned / "plan" / "width.json").read_text())["parameters"]["student"]
    kept = facts["config"]["ppcl"]["kept_layers"][STACK]
    places = {f"{STACK}.{kept.index(index)}.{name}": 64 for index in FFN for name in ("ff", "ff_context")}
    assert facts["config"]["pruned_feed_forwards"] == places


def test_without_ppcl_its_own_code_draws_the_same_and_only_with_the_flag(
    pruned: Path, plugged: np.ndarray, tmp_path: Path
) -> None:
    prepare, flag = "sys.modules['ppcl'] = None", {"trust_remote_code": True}
    facts, images = load(pruned / "export", tmp_path, flag, prepare=prepare, refused=REFUSED)
    assert np.array_equal(images, plugged)
    assert facts["module"].startswith("diffusers_modules.")
    assert "trust_remote_code" in facts["refusal"]


def test_projectors_of_a_block_are_linear_maps_of_all_its_networks(pruned: Path) -> None:
    for index in FFN:
        tensors, _ = read_tensors(pruned / "plugs" / f"{STACK}.{index}.ffn.safetensors")
        shapes = {"weight": (64, 64), "bias": (64,)}
        wanted = {f"{name}.{key}": shape for name in ("ff", "ff_context") for key, shape in shapes.items()}
        assert {name: tuple(value.shape) for name, value in tensors.items()} == wanted


def test_stages_run_in_commands_of_their_own(command: list[str], pruned: Path) -> None:
    for stage, words in (("width", "reused"), ("export", "reused"), ("plan", "ffn")):
        assert words in succeed(*command, *SETS, f"stages=[{stage}]").out


def test_it_is_not_pruned_again_and_the_sentence_says_what_is(command: list[str], pruned: Path) -> None:
    ours = ("model", "width", "name=", "intervals")
    again = [*(item for item in command if not item.startswith(ours)), "model=auto", f"model.path={pruned / 'export'}"]
    outcome = ppcl(*again, "name=again", "stages=[depth]", f"intervals.{STACK}=[[1,2]]")
    assert outcome.code == 2
    assert f"whose transformer is pruned in width ({CLASS})" in outcome.err.replace("\n", " ")
    small = ["model.sampling.num_inference_steps=1", "model.sampling.height=32", "model.sampling.width=32"]
    succeed(*again, "name=again", *small, "generate.variants=[teacher]", "stages=[cache,generate]")


def test_a_stack_without_networks_is_refused(command: list[str], pruned: Path) -> None:
    outcome = ppcl(*command, "width.names=[single_transformer_blocks.3.ffn]", "stages=[width]")
    assert outcome.code == 2
    assert "width.single_transformer_blocks.ffn: block 3 has no feed-forward network" in outcome.err.replace("\n", " ")


def sana(folder: Path) -> list[str]:
    """Save a tiny Sana and a file of prompts, and return the settings of a short run of them that draws 64x64."""
    build_sana(folder / "teacher")
    (folder / "prompts.txt").write_text("a red circle\na blue square\n", encoding="utf-8")
    given = ["experiment=prune", f"model.path={folder / 'teacher'}", f"data.path={folder / 'prompts.txt'}", *SHORT]
    given += [f"paths.runs_dir={folder}", f"paths.cache_dir={folder / 'cache'}", "name=sana", "distill.batch_size=2"]
    return [*given, "model.sampling.height=64", "model.sampling.width=64", "budget.num_batches=1", "method.min_cka=0"]


def test_a_model_without_such_networks_goes_through_the_stages(tmp_path: Path) -> None:
    exact = "model.sampling.arguments.use_resolution_binning=false"
    outcome = succeed(*sana(tmp_path), exact, "stages=[cache,probe,detect,depth,width,plan]")
    assert "but the pipeline draws" not in outcome.out
    assert "nothing is pruned in width: SanaTransformer2DModel has no feed-forward network" in outcome.out
    assert (tmp_path / "sana" / "plan" / "choice.json").is_file()


def test_a_pipeline_that_draws_another_size_than_was_asked_for_is_told(tmp_path: Path) -> None:
    outcome = succeed(*sana(tmp_path), "stages=[cache]", "model.sampling.num_inference_steps=2")
    assert "model.sampling asks for 64x64, but the pipeline draws 1024x1024" in " ".join(outcome.out.split())
    assert "add model.sampling.arguments.use_resolution_binning=false" in " ".join(outcome.out.split())
