"""The two recipes: which parameters are whose in every family, and runs from before there was `recipe`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import DIE_AT_RENAME, INTERVALS, PLUG_NAMES, assert_same_tensors, modified, ppcl, ppcl_process, succeed
from foreign import FOREIGN
from omegaconf import OmegaConf
from torch import nn

from ppcl.artifacts.plan import plug_name
from ppcl.artifacts.plugs import load_projectors
from ppcl.command import prepare
from ppcl.config import DataConfig, DistillConfig, FinetuneConfig, SamplingConfig
from ppcl.data.streams import ShapesStream
from ppcl.distill.depth import DepthDistillation
from ppcl.distill.finetune import FineTune
from ppcl.distill.width import WidthDistillation, places
from ppcl.families.registry import FAMILIES, builders, get_family, register
from ppcl.layers import Layout
from ppcl.taps import stack_of

RECIPE: Any = {"optimizer": "muon", "relative_update": 0.1, "lr": None}
SHIPPED = [*FAMILIES]

# Which parameters are whose.


def shipped(name: str) -> tuple[Any, Any, Any]:
    """The family, an untrained model of three blocks a stack or more, and a batch."""
    pipeline = import_module(builders()[f"tiny_{name}"]).build_pipeline(0, num_layers=3)
    family = get_family(name, pipeline.transformer.config, SamplingConfig(height=32, width=32, max_sequence_length=32))
    return family, pipeline.transformer, ShapesStream(family, pipeline, DataConfig(), 3, 2)(0)


def foreign(name: str) -> tuple[Any, Any, Any]:
    """The same of a family that ppcl does not ship."""
    item = FOREIGN[name]
    torch.manual_seed(0)
    model, family = item.transformer_class(**item.arch), get_family(name, item.arch)
    conditions = item.conditions(5)
    conditions = {key: torch.stack([value, value]) for key, value in conditions.items()}
    latents = torch.randn(2, *item.latents)
    return family, model, family.training_batch(latents, conditions, latents, torch.tensor([0.3, 0.6]), (4, 4))


@pytest.fixture(params=[*SHIPPED, *FOREIGN])
def case(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any, Any]]:
    name = request.param
    if name in SHIPPED:
        yield shipped(name)
        return
    register(FOREIGN[name].facts)
    yield foreign(name)
    del FAMILIES[name]


def layers_of_tokens(family: Any, model: nn.Module, batch: Any) -> set[str]:
    """Names of the linear layers in blocks that read `[B, tokens, D]`. A modulation layer reads `[B, D]`."""
    dimensions: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith(tuple(f"{stack}." for stack in family.stacks)):
            module.register_forward_pre_hook(lambda _, args, name=name: dimensions.update({name: args[0].ndim}))
    with torch.no_grad():
        model(**batch.inputs)
    return {name for name, count in dimensions.items() if count > 2}


def of_muon(module: Any, model: nn.Module) -> set[str]:
    """The names in `model` of the parameters that Muon trains; every trainable one is in one group of one optimiser."""
    (first, second), _ = module.configure_optimizers()
    assert [type(first).__name__, type(second).__name__] == ["Muon", "AdamW"]
    trained = [id(p) for optimizer in (first, second) for group in optimizer.param_groups for p in group["params"]]
    trainable = {id(parameter): name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == len({*trained})
    assert {*trained} == trainable.keys()
    return {trainable[id(p)].removesuffix(".weight") for group in first.param_groups for p in group["params"]}


def test_muon_takes_the_matrices_that_read_tokens(case: tuple[Any, Any, Any]) -> None:
    """And so no norm, modulation or embedding: of a model that is tuned, of students, of projectors."""
    family, model, batch = case
    tokens = layers_of_tokens(family, model, batch)
    assert tokens
    settings = {"steps": 1, "gradient_checkpointing": False}

    intervals = {stack: [(0, 1)] for stack in family.stacks if len(stack_of(model, stack)) > 1}
    depth = DepthDistillation(family, model, intervals, DistillConfig(**settings, **RECIPE))
    found = of_muon(depth, depth.parts)
    for stack, (pair,) in intervals.items():
        first, key = f"{stack}.0.", f"{depth.key(plug_name(stack, pair))}."
        mine = {name.removeprefix(key) for name in found if name.startswith(key)}
        assert mine == {name.removeprefix(first) for name in tokens if name.startswith(first)}

    if family.width is not None:
        sets: Any = {stack: {"text": [], "ffn": [0, 1]} for stack in family.stacks}
        for stack in family.facts.text_stacks:
            sets[stack]["text"] = [1]
        kept = places(family, model, {}, {})
        width = WidthDistillation(family, model, kept, sets, Layout("last"), DistillConfig(**settings, **RECIPE))
        projectors = {name for name, module in width.parts.named_modules() if isinstance(module, nn.Linear)}
        assert of_muon(width, width.parts) == projectors != set()

    tuned = FineTune(family, nn.Module(), model.requires_grad_(True), FinetuneConfig(**settings, **RECIPE))
    assert of_muon(tuned, model) == tokens


# Runs that were recorded before there was `recipe`.


@pytest.fixture(scope="module")
def older(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as the commit before wrote it, 1d0d45c: of the paper's recipe, its record without the keys of recipes."""
    runs = tmp_path_factory.mktemp("older")
    sizes = ["distill.steps=2", "width.steps=2", "width.num_batches=1"]
    width = ["width.source=given", "width.transformer_blocks.ffn=[0]"]
    command = [*settings, *sizes, *width, INTERVALS, "recipe=paper", f"paths.runs_dir={runs}", "name=older"]
    succeed(*command, "stages=[depth,width]")
    path = runs / "older" / "config.yaml"
    record = OmegaConf.load(path)
    for key in (
        *("distill.optimizer", "distill.relative_update"),
        *("width.relative_update", "finetune.relative_update"),
    ):
        group, name = key.split(".")
        del record[group][name]
    OmegaConf.save(record, path)
    return runs / "older"


@pytest.mark.parametrize("more", [[], ["recipe=paper"], ["distill=tiny", "distill.steps=2", "distill.batch_size=4"]])
def test_an_older_run_goes_on_with_its_students(older: Path, tmp_path: Path, more: list[str]) -> None:
    run = shutil.copytree(older, tmp_path / "older")
    before = modified(run / "plugs")
    outcome = succeed(f"run={run}", "stages=[depth,width]", "distill.checkpoint_every=100", *more)
    assert outcome.out.count("reused") == 2
    assert modified(run / "plugs") == before


def test_another_run_plans_with_an_older_ones_students(older: Path, tmp_path: Path, settings: list[str]) -> None:
    other = [f"paths.base_run={older}", f"paths.runs_dir={tmp_path}", "name=other", INTERVALS]
    succeed(*settings, *other, "budget.params=0.8", "budget.num_batches=1", "stages=[plan]")


def test_an_older_run_refuses_to_be_trained_by_another_recipe(older: Path, tmp_path: Path) -> None:
    run = shutil.copytree(older, tmp_path / "older")
    outcome = ppcl(f"run={run}", "recipe=standard", "stages=[depth]")
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    assert f"{PLUG_NAMES[0]}.json was made with distill." in outcome.err
    assert str(run / "plugs") in outcome.err  # what to delete
    shutil.rmtree(run / "plugs")
    assert "wrote 2 plugs" in succeed(f"run={run}", "recipe=standard", "stages=[depth]").out


@pytest.mark.parametrize(
    ("given", "rates"),  # of students and projectors, and relative
    [
        ([], (1e-3, 1e-3, None)),
        (["recipe=standard"], (None, None, 0.1)),
        (["recipe=standard", "distill.relative_update=0.02"], (None, None, 0.02)),
        (["recipe=paper", "width.lr=0.1"], (1e-3, 0.1, None)),
        (["distill=paper"], (1e-5, 1e-3, None)),
        (["recipe=standard", "distill=paper"], (None, None, 0.1)),
    ],
)
def test_a_recipe_brings_its_rates_into_a_recorded_run(older: Path, given: list[str], rates: tuple) -> None:
    config = prepare([f"run={older}", *given]).config
    assert (config.distill.lr, config.width.lr, config.distill.relative_update) == rates
    losses = {"direction": 1.0} if rates[2] is None else {"relative_per_token": 1.0}
    assert (config.distill.losses, config.distill.optimizer) == (losses, "muon" if rates[2] else "adamw")


def test_a_run_of_the_default_recipe_takes_the_papers(trained: Path) -> None:
    config = prepare([f"run={trained}", "recipe=paper"]).config
    assert (config.distill.lr, config.width.lr, config.distill.relative_update) == (1e-3, 1e-3, None)
    assert config.distill.losses == {"direction": 1.0}
    assert (config.finetune.lr, config.finetune.muon_lr, config.finetune.relative_update) == (2e-3, 0.01, None)


def test_a_run_of_the_default_recipe_goes_on_with_its_students(trained: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained, tmp_path / "trained")
    assert "reused" in succeed(f"run={run}", "stages=[depth]").out


# Killed trainings.


def test_killed_projectors_resume_to_the_same_bits(settings: list[str], tmp_path: Path, trained: Path) -> None:
    """Two optimisers are taken up, with rates relative to the sizes that parameters had at the start."""
    sizes = ["width.steps=7", "width.num_batches=1", "distill.checkpoint_every=3", "distill.warmup_steps=2"]
    sets = ["width.source=given", "width.transformer_blocks.ffn=[0,1]", "width.transformer_blocks.text=[5]"]
    command = [*settings, INTERVALS, *sizes, *sets, f"paths.base_run={trained}", f"paths.runs_dir={tmp_path}"]
    command.append("stages=[width]")
    died = ppcl_process("*.ffn.safetensors", *command, "name=killed", python=DIE_AT_RENAME)
    assert died.returncode == 9, died.stderr
    assert "resuming from" in succeed(*command, "name=killed").out
    succeed(*command, "name=whole")
    killed, whole = (load_projectors(tmp_path / name / "plugs") for name in ("killed", "whole"))
    assert killed.keys() == whole.keys()
    for name, projector in whole.items():
        assert_same_tensors(killed[name].state_dict, projector.state_dict)
        assert killed[name].losses["heldout_loss"] < projector.losses["heldout_before"]
