"""Losses, weights and statistics that turn NaN are refused where they appear, and nothing is written."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import INTERVALS, PLUG_NAMES, ppcl
from test_bad_input import assert_one_sentence

from ppcl.distill.finetune import FineTune
from ppcl.distill.local import LocalDistillation
from ppcl.distill.objective import ManualOptimization

WIDTH = ["width.source=given", "width.transformer_blocks.ffn=[0,5]", "width.steps=2", "width.num_batches=1"]
TUNE = ["finetune=tiny", "finetune.steps=2", "finetune.batch_size=2"]
DEPTH = ["distill.steps=2", "distill.checkpoint_every=1"]


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A run that has the students of both intervals."""
    folder = tmp_path / "runs" / "bad"
    shutil.copytree(trained / "plugs", folder / "plugs")
    return folder


@pytest.fixture
def command(settings: list[str], run: Path) -> list[str]:
    return [*settings, INTERVALS, f"paths.runs_dir={run.parent}", "name=bad"]


def spoil(monkeypatch: pytest.MonkeyPatch, spoilt: Callable[[int], bool]) -> None:
    """Make the gradients NaN at those calls of `prepare_gradients`, one for each part and step."""
    calls = count()

    def prepare(parameters: Any, max_grad_norm: float | None) -> None:
        if spoilt(next(calls)):
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.fill_(math.nan)

    monkeypatch.setattr(ManualOptimization, "prepare_gradients", staticmethod(prepare))


def files(folder: Path) -> set[str]:
    return {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("stage", "changes", "calls", "rate"),
    [
        ("depth", DEPTH, 4, "distill.relative_update=0.1"),
        ("width", WIDTH, 4, "width.relative_update=0.025"),
        ("finetune", TUNE, 2, "finetune."),
    ],
)
def test_a_last_step_that_makes_nan_writes_nothing(
    command: list[str],
    run: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    changes: list[str],
    calls: int,
    rate: str,
) -> None:
    """The loss of the last step is a number: only the weights after it are not."""
    if stage == "depth":
        shutil.rmtree(run / "plugs")
    before = files(run)
    spoil(monkeypatch, lambda call: call == calls - 1)
    outcome = ppcl(*command, *changes, f"stages=[{stage}]")
    assert_one_sentence(outcome, rate, "made weights infinite or NaN at step 2", "The last checkpoint is intact")
    new = files(run) - before
    assert not [name for name in new if name.endswith((".safetensors", "ppcl.json", f"training/{stage}.json"))], new
    assert not [name for name in new if Path(name).stem in PLUG_NAMES]
    for saved in run.rglob("last.ckpt"):
        state = torch.load(saved, weights_only=True)["state_dict"]
        assert all(value.isfinite().all() for value in state.values())


def test_a_loss_names_the_intervals_that_it_is_of(
    command: list[str], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(run / "plugs")
    spoil(monkeypatch, lambda call: call == 0)
    outcome = ppcl(*command, *DEPTH, "distill.checkpoint_every=100", "stages=[depth]")
    assert_one_sentence(outcome, "distill.relative_update=0.1 made the loss of", "nan at step 1")
    assert sum(name in outcome.err for name in PLUG_NAMES) == 1


@pytest.mark.parametrize(
    ("stage", "changes", "part"), [("depth", DEPTH, PLUG_NAMES[1]), ("width", WIDTH, "transformer_blocks.5.ffn")]
)
def test_a_held_out_loss_that_is_no_number_is_refused_before_the_training(
    command: list[str], run: Path, monkeypatch: pytest.MonkeyPatch, stage: str, changes: list[str], part: str
) -> None:
    if stage == "depth":
        shutil.rmtree(run / "plugs")
    before, measure = files(run), LocalDistillation.heldout

    def spoilt(self: Any, batches: Any) -> Any:
        found = measure(self, batches)
        found[-1]["loss"] = math.nan
        return found

    def no_training(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(LocalDistillation, "heldout", spoilt)
    monkeypatch.setattr(LocalDistillation, "training_step", no_training)
    outcome = ppcl(*command, *changes, f"stages=[{stage}]")
    assert_one_sentence(outcome, f"plug {part} is not written", "loss is nan")
    assert not [name for name in files(run) - before if name.endswith(".safetensors")]


def test_a_velocity_error_that_is_no_number_is_refused(
    command: list[str], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors = iter((0.5, math.nan))
    monkeypatch.setattr(FineTune, "velocity_error", lambda self, batches: next(errors))
    outcome = ppcl(*command, *TUNE, "stages=[finetune]")
    assert_one_sentence(outcome, "nothing is written", "the held-out velocity error after tuning is nan")
    assert not (run / "finetuned").exists()


def test_probes_that_are_no_numbers_are_not_recorded(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = [*command, "probe.ridge=1e-5", "probe.train_steps=1", "stages=[probe]"]
    given = [argument for argument in probe if not argument.startswith("intervals")]
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: self.param_groups[0]["params"][0].data.fill_(math.nan))
    assert_one_sentence(ppcl(*given), "the probe transformer_blocks.0.", "lower probe.lr=0.0001")
    assert not [*tmp_path.rglob("probes.json")]


def test_json_has_no_nan(run: Path) -> None:
    """Neither is it written, nor read."""
    from ppcl.artifacts.files import read_json, write_json
    from ppcl.errors import UsageError

    path = run / "facts.json"
    with pytest.raises(UsageError, match=r"facts\.json is not written: units\[1\]\.cost is nan"):
        write_json(path, {"units": [{"cost": 1.0}, {"cost": math.nan}]})
    assert not path.exists()
    path.write_text(json.dumps({"cost": math.inf}))
    with pytest.raises(UsageError, match="holds Infinity, which is no number"):
        read_json(path, "The costs")
