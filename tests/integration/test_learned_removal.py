"""`method=tinyfusion` from the command line, in every family."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import kill, ppcl, start_until, succeed, two_ranks

from ppcl.command import prepare

FEW = ["method=tinyfusion", "stages=[detect]", "method.settings.batch_size=4", "method.settings.steps=3"]
SAMPLES = ["method.num_samples=4", "method.num_timesteps=2", "method.batch_size=4", "logger=csv"]


@pytest.mark.parametrize("name", ["tiny_qwen_image", "tiny_qwen_image_edit", "tiny_flux", "tiny_dit"])
def test_every_family_learns(name: str, tmp_path: Path) -> None:
    command = [
        f"model={name}",
        f"model.path=embedded:{name}",
        *FEW,
        *SAMPLES,
        "trainer=cpu",
        "method.params=null",
        "method.num_remove=7",
    ]
    command += [f"paths.runs_dir={tmp_path}", f"paths.cache_dir={tmp_path / 'cache'}", "name=run"]
    succeed(*command)
    folder = tmp_path / "run" / "plan"
    plan, learned = (json.loads((folder / name).read_text()) for name in ("plan.json", "decisions.json"))
    removed = [
        (stack, block) for stack, pairs in plan["intervals"].items() for u, v in pairs for block in range(u + 1, v + 1)
    ]
    assert len(removed) == 7
    assert learned["steps"] == [0, 1, 2, 3]
    for group in learned["groups"].values():
        gone = [block for block in group["blocks"] if (group["stack"], block) in removed]
        assert len(gone) == len(group["blocks"]) - group["keep"]
    assert (folder / "decisions.png").stat().st_size > 10_000
    assert not (tmp_path / "run" / "detect-checkpoint").exists()
    logged = (tmp_path / "run" / "logs" / "detect" / "version_0" / "metrics.csv").read_text().partition("\n")[0]
    assert {"detect/loss", "detect/tau", "detect/confidence"} <= {*logged.split(",")}
    assert "reused" in succeed(*command).out


def test_a_killed_training_decides_the_same(settings: list[str], tmp_path: Path) -> None:
    command = [
        *settings,
        "method=tinyfusion",
        "stages=[detect]",
        "method.settings.steps=130",
        "method.params=null",
        "method.num_remove=2",
    ]
    command += ["method.settings.batch_size=2", f"paths.runs_dir={tmp_path}"]
    succeed(*command, "name=whole")
    kill(start_until(tmp_path / "killed", "detect-checkpoint/last.ckpt", [*command, "name=killed"]))
    outcome = succeed(*command, "name=killed")
    assert "resuming from" in outcome.out
    whole, killed = (
        json.loads((tmp_path / name / "plan" / "decisions.json").read_text()) for name in ("whole", "killed")
    )
    assert killed == whole


def test_two_ranks_learn_what_one_learns(settings: list[str], tmp_path: Path) -> None:
    command = [
        *settings,
        "method=tinyfusion",
        "stages=[detect]",
        "method.settings.steps=6",
        "method.params=null",
        "method.num_remove=2",
    ]
    command += ["method.settings.batch_size=4", f"paths.runs_dir={tmp_path}"]
    succeed(*command, "name=one")
    outcome = two_ranks(*command, "name=two", "strategy=ddp")
    assert outcome.returncode == 0, outcome.stderr
    one, two = (json.loads((tmp_path / name / "plan" / "decisions.json").read_text()) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, group in one["groups"].items():
        for ours, theirs in zip(two["groups"][name]["probabilities"], group["probabilities"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-3)
    refused = two_ranks(*command, "name=odd", "strategy=ddp", "method.settings.batch_size=3")
    assert "method.settings.batch_size=3 does not divide among 2 ranks: make it 4" in refused.stderr


def test_groups_need_no_size_beside_them(settings: list[str]) -> None:
    """The choice `tinyfusion` has a size, which groups stand in for; plans that were made so stay valid."""
    detect = [*settings, "method=tinyfusion", "stages=[detect]"]
    assert prepare([*detect, "method.settings.groups=[[2,3],[3,3]]"]).config.method.params == 0.7


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("method.settings.groups=2:4 method.num_remove=null", "makes groups of 4 blocks together, and the model has 6"),
        ("method.settings.groups=[[4,3],[3,3]] method.num_remove=null", "keeps 4 of 3 blocks"),
        ("method.settings.groups=[[2,3],[3,3]]", "method.num_remove=2 has no effect with method.settings.groups"),
        ("method.settings.groups=[[2,3],[3,3]] method.num_remove=null method.params=0.5", "method.params=0.5 has no"),
        ("method.num_remove=null", "method.num_remove"),
        ("method.settings.lora_rank=0", "method.settings.lora_rank=0 must be at least 1"),
        ("model.streaming=true", "model.streaming=true does not hold"),
    ],
)
def test_what_cannot_be_learned_is_refused_at_the_start(
    settings: list[str], tmp_path: Path, given: str, said: str
) -> None:
    command = [
        *settings,
        "method=tinyfusion",
        "stages=[detect]",
        "method.params=null",
        "method.num_remove=2",
        f"paths.runs_dir={tmp_path}",
    ]
    outcome = ppcl(*command, *given.split())
    assert outcome.code == 2
    assert said in outcome.err
    assert not (tmp_path / "auto" / "plan").exists()
