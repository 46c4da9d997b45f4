"""Every command that the README suggests for a real model fits on the card that it is for, by the memory plan."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from PIL import Image
from test_readme import commands

from ppcl.command import prepare
from ppcl.config import Config
from ppcl.memory.checks import estimated
from ppcl.memory.need import Need, fits
from ppcl.memory.plan import STAGES, Plan

MODELS = {"qwen_image": "Qwen/Qwen-Image", "flux_dev": "black-forest-labs/FLUX.1-dev"}
SMALL, LARGE, HOST = 24, 80, 128  # GB of a card that the teacher may not fit on, of another one, and of host memory
# The groups of settings that a stage's needs depend on, beside the model, intervals and width sets.
GROUPS = {"cache": "data", "detect": "method", "boundaries": "distill", "depth": "distill", "plan": "distill"}
GROUPS |= {"evaluate": "generate"}
# What the README tells to add for a large model on one card.
ADDED = {
    r"stages=\[plan,finetune|budget.params=0.6 name=mine": ["finetune.lora_rank=16"],
    r"generate\.teacher_above": ["generate.variants=[teacher,ppcl-planned]"],
}


def of_real_models() -> list[str]:
    """The README's commands that run a model which is not shipped, in their order."""
    unlike = r"experiment=try|runs/try|explain=true|published\.path|lora\.path|DiT-XL|WAN22|runs/dit|ppcl npz"
    found = [command for command in commands() if re.search(r"\bppcl ", command) and not re.search(unlike, command)]
    return [command for command in found if "stages=[plan]" not in command or "budget" in command]


def settings_of(command: str, model: str) -> tuple[list[str], int]:
    """The overrides of a command, with DIR replaced by a model that has no weights here, and its number of ranks."""
    words = shlex.split(command, comments=True)
    ranks = int(words[words.index("--nproc-per-node") + 1]) if words[0] == "torchrun" else 1
    settings = [word for word in words[words.index("ppcl") + 1 :] if word not in ("--multirun", "model=auto")]
    settings = [
        word.partition("],[")[0] + "]" if "],[" in word else word for word in settings
    ]  # of a sweep's first job
    settings = [word for word in settings if not word.startswith("generate.loras")]  # 1% of the model
    if "model.path=DIR" in settings:
        settings[settings.index("model.path=DIR")] = f"model.path={MODELS[model]}"
        settings.append(f"model={model}")
    return [
        *settings,
        *(word for pattern, words in ADDED.items() if re.search(pattern, command) for word in words),
    ], ranks


def card_of(command: str) -> int:
    if "accelerator=cpu" in command:
        return HOST
    return SMALL if re.search("runs/small|name=small|paper24", command) else LARGE


@pytest.mark.parametrize("model", MODELS)
def test_no_command_of_the_readme_needs_more_than_its_card(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    for name in ("PICTURES", "SHARDS"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
        (tmp_path / name / "metadata.csv").write_text("file_name,text\n0.png,a cat\n")
    found: dict[str, tuple[Need, str]] = {}
    for command in of_real_models():
        settings, ranks = settings_of(command, model)
        (other,) = {word for word in settings if word.startswith("model=")} or {f"model={model}"}
        given = [Path(word.removeprefix("run=")) for word in settings if word.startswith("run=")]
        if other != f"model={model}" or not all(folder.exists() for folder in given):
            continue  # it is for another model
        with monkeypatch.context() as patch:
            if ranks > 1:  # as torchrun says it
                patch.setenv("RANK", "0")
                patch.setenv("WORLD_SIZE", str(ranks))
                patch.setenv("LOCAL_RANK", "0")
            run = prepare([*settings, f"trainer.memory_gb={card_of(command)}"])
        if not (run.folder / "config.yaml").exists():  # as a command that runs leaves it
            run.folder.mkdir(parents=True)
            record: Config = OmegaConf.structured(run.config)
            (run.folder / "config.yaml").write_text(OmegaConf.to_yaml(record))
        config, plan = run.config, Plan(run, ranks=ranks)
        for stage in estimated(run):
            parts = (config.model, config.intervals, config.width, config.strategy, config.trainer)
            key = repr((stage, *parts, getattr(config, GROUPS.get(stage, stage))))
            if key not in found:
                found[key] = STAGES[stage](plan), command
                needed = found[key][0].total
                assert fits(needed, 1e9 * card_of(command)), (command, stage, needed, found[key][0].device)
    assert {need.stage for need, _ in found.values()} == {*STAGES} - {"quantize"}
