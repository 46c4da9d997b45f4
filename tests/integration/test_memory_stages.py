"""The memory plan against the live bytes of the stages that train nothing, and of tuning on recorded velocities."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import INTERVALS, succeed
from diffusers import AutoencoderKLQwenImage
from PIL import Image

import ppcl.stages.finetune as finetune
from ppcl.command import prepare
from ppcl.context import Run
from ppcl.efficiency import LiveBytes
from ppcl.families.qwen_image.tiny import build_pipeline
from ppcl.memory.need import Need
from ppcl.memory.plan import STAGES, Plan

CAPTION, TOKENS = "a photo of a red circle", 11
SIZES = {"small": (64, 4), "large": (128, 8)}  # pixels of a side, samples of a batch


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of diffusers' own parts, VAE included."""
    folder = tmp_path_factory.mktemp("real")
    pipeline = build_pipeline(0, 6)
    arch = {key: value for key, value in pipeline.transformer.config.items() if not key.startswith("_")}
    pipeline.transformer = type(pipeline.transformer).from_config(arch | {"in_channels": 64, "out_channels": 16})
    pipeline.vae = AutoencoderKLQwenImage(base_dim=8)
    pipeline.save_pretrained(folder / "pipeline")
    for number in range(32):
        Image.effect_noise((128, 128), 50).convert("RGB").save(folder / f"{number}.png")
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *((f"{number}.png", CAPTION) for number in range(32))])
    return folder


@pytest.fixture(scope="module", params=SIZES)
def command(request: pytest.FixtureRequest, real: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What all commands of one size have in common; its pictures are cached and its students trained."""
    side, batch = SIZES[request.param]
    shared = [f"model.path={real / 'pipeline'}", f"data.path={real}", 'data.aspects=["1:1"]', "model=auto"]
    shared += [f"paths.runs_dir={tmp_path_factory.mktemp(request.param)}", "name=fit", "logger=none", "trainer=cpu"]
    shared += [f"model.sampling.{key}={side}" for key in ("height", "width")] + ["trainer.progress=false"]
    shared += [f"model.sampling.max_sequence_length={TOKENS}", "model.sampling.num_inference_steps=2"]
    shared += [f"data.{key}={batch}" for key in ("encode_batch_size", "samples_per_file")]
    shared += [f"{group}.batch_size={batch}" for group in ("probe", "method", "distill", "finetune", "generate")]
    shared += ["probe.num_batches=4", "probe.num_heldout_batches=2", "method.num_timesteps=4", "method.min_cka=0"]
    shared += [f"method.num_samples={batch}", "distill.steps=4", "finetune.steps=4", "finetune.feature_weight=0"]
    shared += ["generate.prompt=x", f"generate.num_images={batch}", "generate.variants=[teacher]"]
    return shared


def held_by(modules: Iterable[Any]) -> int:
    return sum(
        tensor.nbytes
        for module in modules
        if isinstance(module, torch.nn.Module)
        for tensor in (*module.parameters(), *module.buffers())
    )


def weights_of(run: Run) -> int:
    return held_by(run.teacher.pipeline.components.values())


def planned(need: Need) -> float:
    """All bytes of a need: without a GPU host memory is the device."""
    return need.total + sum(need.host.values())


def test_a_stage_holds_as_much_as_is_planned(command: list[str]) -> None:
    found = {}
    for stage in ("cache", "probe", "detect", "boundaries", "generate", "depth", "export"):
        given = [] if stage in ("cache", "probe", "detect") else [INTERVALS]
        run = prepare([*command, *given, f"stages=[{stage}]"])
        run.teacher.enter(stage)
        weights = weights_of(run)
        with LiveBytes() as recorded:
            import_module(f"ppcl.stages.{stage}").run(run)
        found[stage] = planned(STAGES[stage](Plan(run))) / (weights + recorded.peak)
    del found["depth"]  # trains what is exported; test_memory.py compares its steps
    assert all(0.85 < ratio < 1.15 for ratio in found.values()), found


def test_tuning_on_recorded_velocities_holds_as_much_as_is_planned(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = [*command, INTERVALS, "name=tuned", "finetune.recorded=true", "finetune.optimizer=adamw"]
    succeed(*asked, "stages=[cache,depth]")
    peaks, record = [], finetune._record

    def recording(run: Run, *streams: Any) -> Any:
        weights = weights_of(run)
        with LiveBytes() as recorded:
            made = record(run, *streams)
        peaks.append(weights + recorded.peak)
        return made

    monkeypatch.setattr(finetune, "_record", recording)
    base = next(each for each in asked if each.startswith("paths.runs_dir=")).partition("=")[2]
    for changes in ([], ["finetune.lora_rank=4", "name=lora", f"paths.base_run={base}/tuned"]):
        run = prepare([*asked, *changes, "stages=[finetune]"])
        run.teacher.enter("finetune")
        finetune.run(run)
        tuned = 1e6 * json.loads((run.folder / "training" / "finetune.json").read_text())["peak_memory_mb"]
        assert planned(Plan(run).finetune()) == pytest.approx(tuned, rel=0.15)
    assert planned(Plan(run).recording()) == pytest.approx(peaks[0], rel=0.15)  # the second one finds them on disk
