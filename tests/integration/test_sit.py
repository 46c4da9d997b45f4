"""A DiT that was trained by flow matching (SiT): its scheduler says so, and every stage follows."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import ppcl, succeed
from diffusers import DDIMScheduler, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from PIL import Image
from test_class_folders import QUICK, class_folders

from ppcl.artifacts.files import read_json, write_json
from ppcl.families.dit.tiny import build_pipeline
from ppcl.families.registry import get_family

SIZES = [
    *("probe.num_batches=2", "probe.num_heldout_batches=1", "probe.batch_size=4", "method.num_samples=4"),
    *("method.num_timesteps=2", "method.batch_size=4", "distill=tiny", "distill.steps=2", "distill.batch_size=4"),
    *("finetune=tiny", "finetune.steps=2", "finetune.batch_size=4", "watch.heldout=0", "watch.pictures=0"),
    *("model.sampling.num_inference_steps=2", "model.sampling.guidance_scale=1.5", "model.sampling.height=32"),
    *("model.sampling.width=32", "data.held_out=0.5"),
]
STAGES = "stages=[cache,probe,detect,depth,finetune,export,generate,evaluate]"


def sit() -> Any:
    pipeline = build_pipeline(0, 6)
    pipeline.register_modules(scheduler=FlowMatchEulerDiscreteScheduler())
    return pipeline


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sit")
    sit().save_pretrained(folder / "teacher")
    return folder / "teacher"


def test_a_batch_lies_on_the_straight_path_to_noise() -> None:
    pipeline = sit()
    family = get_family("dit", dict(pipeline.transformer.config))
    family.complete(pipeline)
    latents, noise = torch.randn(2, 3, 12, 4, 4).unbind()
    sigmas = torch.tensor([0.25, 0.5, 0.9995])
    batch = family.training_batch(latents, {"class_labels": torch.zeros(3, dtype=torch.long)}, noise, sigmas, (4, 4))
    level = sigmas[:, None, None, None]
    torch.testing.assert_close(batch.inputs["hidden_states"], (1 - level) * latents + level * noise)
    torch.testing.assert_close(batch.target, noise - latents)
    torch.testing.assert_close(batch.inputs["timestep"], 1000 * sigmas)
    torch.testing.assert_close(family.noise_levels(batch.inputs), sigmas)


def test_the_pipeline_draws_what_steps_of_the_family_draw() -> None:
    pipeline = sit()
    pipeline.set_progress_bar_config(disable=True)
    family = get_family("dit", dict(pipeline.transformer.config))
    family.complete(pipeline)
    drawn = pipeline(
        [3, 5], guidance_scale=1.0, generator=torch.manual_seed(1), num_inference_steps=4, output_type="pt"
    )
    side = pipeline.transformer.config.sample_size
    latents = torch.randn(2, 12, side, side, generator=torch.manual_seed(1))
    levels = pipeline.scheduler.sigmas.tolist()
    labels = {"class_labels": torch.tensor([3, 5])}
    with torch.no_grad():
        for sigma, following in pairwise(levels):
            inputs = family.forward_inputs(latents, labels, torch.full((2,), sigma), (side, side))
            latents = family.denoise(latents, pipeline.transformer(**inputs)[0][:, :12], sigma, following)
        pictures = family.decode_latents(pipeline, latents, (side, side))
    torch.testing.assert_close(drawn.images, (pictures / 2 + 0.5).clamp(0, 1))


def test_a_ddpm_after_it_is_one_again() -> None:
    family = get_family("dit")
    family.complete(sit())
    assert family.flows
    pipeline = build_pipeline(0, 2)
    pipeline.register_modules(scheduler=DDIMScheduler(prediction_type="epsilon"))
    family.complete(pipeline)
    assert not family.flows
    assert family.preparation == ""


def test_every_stage_takes_it(teacher: Path, tmp_path: Path) -> None:
    data = class_folders(tmp_path / "data", ["a red circle", "a cross"], 8)
    command = ["model=auto", f"model.path={teacher}", f"data.path={data}", f"paths.runs_dir={tmp_path}", "name=sit"]
    said = succeed(*command, *QUICK, *SIZES, STAGES, "generate.prompt=a cross", "generate.num_images=2").out
    assert "held-out velocity error" in said
    run = tmp_path / "sit"
    drawn = {path.parent.name for path in run.glob("images/*/*/00000.png")}
    assert {"teacher", "removed", "ppcl-finetuned"} <= drawn
    card = (run / "export" / "README.md").read_text()
    (code,) = (part for part in card.split("```") if part.startswith("python"))
    assert "pipeline.scheduler.scale_model_input" in code
    told: dict[str, Any] = {}
    exec(code.removeprefix("python").replace("PATH_OR_ID", str(run / "export")), told)
    assert isinstance(told["image"], Image.Image)
    assert type(DiffusionPipeline.from_pretrained(run / "export").scheduler) is FlowMatchEulerDiscreteScheduler


def test_noise_levels_that_rise_are_refused(teacher: Path, tmp_path: Path) -> None:
    other = shutil.copytree(teacher, tmp_path / "rising")
    config = other / "scheduler" / "scheduler_config.json"
    write_json(config, read_json(config, "The scheduler") | {"invert_sigmas": True})
    drawing = ["model=auto", f"model.path={other}", *QUICK, "stages=[generate]", "generate.variants=[teacher]"]
    outcome = ppcl(*drawing, f"paths.runs_dir={tmp_path}", "name=rising", "generate.prompt=3")
    assert outcome.code == 2
    assert "invert_sigmas=true" in outcome.err
