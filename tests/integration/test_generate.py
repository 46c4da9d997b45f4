"""`stages=[generate]` as a user keeps it: own prompts, LoRAs, a ControlNet, schedulers; a picture tells its making."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import INTERVALS, digests, ppcl, succeed
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetModel,
    FluxControlNetPipeline,
    QwenImageControlNetModel,
    QwenImageControlNetPipeline,
    QwenImagePipeline,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

import ppcl as package
from ppcl.families.dit.tiny import build_pipeline as build_dit
from ppcl.families.flux.tiny import build_pipeline as build_flux
from ppcl.surgery.remap import map_blocks

PROMPT = "generate.prompt=a red circle"
DRAW = {"height": 32, "width": 32, "num_inference_steps": 2, "true_cfg_scale": 3.0}
NETWORK = ("patch_size", "in_channels", "out_channels", "attention_head_dim", "num_attention_heads")
NETWORK += ("joint_attention_dim", "axes_dims_rope")
DRAW |= {"negative_prompt": [""], "max_sequence_length": 512}


@pytest.fixture(scope="module")
def command(settings: list[str], trained: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Draws a prompt with the plugs of another run."""
    folder = tmp_path_factory.mktemp("generate")
    based = [f"paths.runs_dir={folder}", f"paths.base_run={trained}", INTERVALS, "stages=[generate]", PROMPT]
    return [*settings, *based, "generate.variants=[teacher,ppcl-depth]"]


@pytest.fixture(scope="module")
def lora(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformer = load(teacher).transformer
    torch.manual_seed(0)
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v"], init_lora_weights=False))
    folder = tmp_path_factory.mktemp("lora")
    metadata = transformer.peft_config["default"].to_dict()
    layers = get_peft_model_state_dict(transformer)
    QwenImagePipeline.save_lora_weights(folder, layers, transformer_lora_adapter_metadata=metadata)
    return folder / "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def controlnet(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    arch = {k: v for k, v in load(teacher).transformer.config.items() if k in NETWORK}
    torch.manual_seed(1)
    model = QwenImageControlNetModel(**arch | {"num_layers": 2})
    for block in model.controlnet_blocks:
        torch.nn.init.normal_(block.weight, std=0.5)
    folder = tmp_path_factory.mktemp("controlnet")
    model.save_pretrained(folder)
    return folder


def load(folder: Path) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def pictures(command: list[str], name: str, variant: str) -> list[np.ndarray]:
    """What a variant has drawn in the run `name`, which holds one set."""
    return [
        np.asarray(Image.open(path)) for path in sorted(folder_of(command, name).glob(f"images/*/{variant}/0*.png"))
    ]


def folder_of(command: list[str], name: str) -> Path:
    runs = next(a for a in command[::-1] if a.startswith("paths.runs_dir=")).partition("=")[2]
    return Path(runs) / name


def drawn(pipeline: DiffusionPipeline, seed: int = 42, **arguments) -> np.ndarray:
    call = DRAW | {"prompt": ["a red circle"], "generator": [torch.Generator().manual_seed(seed)]} | arguments
    return np.asarray(pipeline(**call).images[0])


def plugged(teacher: Path, trained: Path) -> tuple[DiffusionPipeline, package.surgery.plugboard.Plugboard]:
    pipeline = load(teacher)
    return pipeline, package.plug(pipeline, trained / "plugs")


def test_one_prompt_several_times_and_what_a_picture_says_of_itself(command, teacher, trained) -> None:
    succeed(*command, "name=several", "generate.num_images=3", "seed=7", "generate.batch_size=1")
    found = pictures(command, "several", "teacher")
    pipeline = load(teacher)
    for number, image in enumerate(found):
        assert np.array_equal(image, drawn(pipeline, 7 + number))
    pipeline, _ = plugged(teacher, trained)
    assert np.array_equal(pictures(command, "several", "ppcl-depth")[1], drawn(pipeline, 8))
    (folder,) = folder_of(command, "several").glob("images/a-red-circle-??????/ppcl-depth")
    said = json.loads(Image.open(folder / "00002.png").text["ppcl"])
    assert (said["prompt"], said["seed"], said["variant"]) == ("a red circle", 9, "ppcl-depth")
    assert said["sampling"]["num_inference_steps"] == 2
    manifest = json.loads((folder / "manifest.json").read_text())
    assert said["fingerprint"] == manifest["fingerprint"]
    lines = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [7, 8, 9]


def test_a_lora_of_the_full_model_goes_onto_every_variant(command, lora, teacher, trained) -> None:
    succeed(*command, "name=lora", f"generate.loras=[{lora}]", "generate.lora_scale=0.5")
    whole = load(teacher)
    plain = drawn(whole)
    whole.load_lora_weights(lora, adapter_name="it")
    whole.set_adapters("it", 0.5)
    (image,) = pictures(command, "lora", "teacher")
    assert np.array_equal(image, drawn(whole))
    assert not np.array_equal(image, plain)
    pruned, board = plugged(teacher, trained)
    plain = drawn(pruned)
    state = QwenImagePipeline.lora_state_dict(lora)
    mapped = map_blocks(
        state,
        dict(pruned.transformer.named_modules()),
        board.kept,
        board.removed_intervals,
        metadata={"lora_alpha": 8, "r": 4},
    )
    pruned.load_lora_weights(mapped.state, adapter_name="it")
    pruned.set_adapters("it", 0.5)
    (image,) = pictures(command, "lora", "ppcl-depth")
    assert np.array_equal(image, drawn(pruned))
    assert not np.array_equal(image, plain)


def test_two_loras_of_one_file_name_are_both_on(command, lora, teacher, tmp_path) -> None:
    """Both are on the same modules. One pair in the other order, or one of them twice, are other pictures."""
    torch.manual_seed(1)
    other = {name: torch.randn_like(value) * 0.3 for name, value in load_file(lora).items()}
    second = tmp_path / lora.name
    save_file(other, second)
    only = [*command, "name=two", "generate.variants=[teacher]"]
    succeed(*only, f"generate.loras=[{lora},{second}]")
    whole = load(teacher)
    for name, path in (("a", lora), ("b", second)):
        whole.load_lora_weights(path, adapter_name=name)
    whole.set_adapters(["a", "b"], [1.0, 1.0])
    (image,) = pictures(command, "two", "teacher")
    assert np.array_equal(image, drawn(whole))
    for number, loras in enumerate(([second], [second, second], [lora, lora]), 2):
        succeed(*only, f"generate.loras=[{','.join(map(str, loras))}]")
        found = pictures(command, "two", "teacher")
        assert len(found) == number == len({image.tobytes() for image in found})


def test_a_lora_is_off_again_for_the_next_command(command, lora) -> None:
    succeed(*command, "name=without")
    succeed(*command, "name=with", f"generate.loras=[{lora}]", "generate.lora_scale=0")
    for variant in ("teacher", "ppcl-depth"):
        (a,), (b,) = (pictures(command, name, variant) for name in ("without", "with"))
        assert np.array_equal(a, b)
    before = digests(folder_of(command, "without") / "images")
    succeed(*command, "name=without", f"generate.loras=[{lora}]")
    after = digests(folder_of(command, "without") / "images")
    assert before.items() < after.items()  # a set of their own
    assert len(after) == 2 * len(before)


def test_a_controlnet_of_the_full_model_reaches_the_blocks_that_are_in(
    command, controlnet, teacher, trained, tmp_path
) -> None:
    picture = tmp_path / "edges.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation: to be turned by 90 degrees
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(picture, exif=exif)
    control = [f"generate.controlnet={controlnet}", f"generate.control_image={picture}", "generate.control_scale=0.7"]
    succeed(*command, "name=control", *control)
    for variant in ("teacher", "ppcl-depth"):
        pipeline = load(teacher) if variant == "teacher" else plugged(teacher, trained)[0]
        plain = drawn(pipeline)
        model = QwenImageControlNetModel.from_pretrained(controlnet)
        with_control = QwenImageControlNetPipeline(**pipeline.components, controlnet=model)
        with_control.set_progress_bar_config(disable=True)
        image = ImageOps.exif_transpose(Image.open(picture))
        expected = drawn(with_control, control_image=image, controlnet_conditioning_scale=0.7)
        (found,) = pictures(command, "control", variant)
        assert np.array_equal(found, expected)
        assert not np.array_equal(found, plain)


def test_a_controlnet_union_is_told_what_its_picture_is(settings, tmp_path) -> None:
    pipeline = build_flux(0, 2)
    pipeline.save_pretrained(tmp_path / "flux")
    config, network = pipeline.transformer.config, [*NETWORK, "pooled_projection_dim", "guidance_embeds"]
    arch = {key: config[key] for key in network if key != "out_channels"}
    model = FluxControlNetModel(**arch, num_layers=1, num_single_layers=1, num_mode=3)
    for block in model.controlnet_blocks:
        torch.nn.init.normal_(block.weight, std=0.5)
    model.save_pretrained(tmp_path / "union")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    image.save(tmp_path / "edges.png")
    command = [*settings, f"model.path={tmp_path / 'flux'}", f"paths.runs_dir={tmp_path}", "stages=[generate]", PROMPT]
    command += [f"generate.controlnet={tmp_path / 'union'}", f"generate.control_image={tmp_path / 'edges.png'}"]
    command += ["generate.variants=[teacher]", "model.sampling.guidance_scale=3.5", "model.sampling.true_cfg_scale=1"]
    for mode in ("null", "3"):
        outcome = ppcl(*command, "name=refused", f"generate.control_mode={mode}")
        assert outcome.code == 2
        assert "must be a number from 0 to 2, the kind of picture" in outcome.err
    with_control = FluxControlNetPipeline(**load(tmp_path / "flux").components, controlnet=model)
    expected = []
    for mode in (0, 2):
        succeed(*command, f"name=mode{mode}", f"generate.control_mode={mode}")
        call = {"height": 32, "width": 32, "num_inference_steps": 2, "guidance_scale": 3.5, "max_sequence_length": 16}
        call |= {"control_image": image, "control_mode": mode, "generator": [torch.Generator().manual_seed(42)]}
        expected.append(np.asarray(with_control(prompt=["a red circle"], **call).images[0]))
        assert np.array_equal(pictures(command, f"mode{mode}", "teacher")[0], expected[-1])
    assert not np.array_equal(*expected)


def test_a_scheduler_setting_is_the_pipelines(command, teacher) -> None:
    succeed(*command, "name=shifted", "+model.sampling.scheduler.shift=1.5")
    pipeline = load(teacher)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipeline.scheduler.config, shift=1.5)
    (image,) = pictures(command, "shifted", "teacher")
    assert np.array_equal(image, drawn(pipeline))
    outcome = ppcl(*command, "name=unknown", "+model.sampling.scheduler.shft=1.5")
    assert outcome.code == 2
    assert "model.sampling.scheduler.shft is no setting" in outcome.err


def test_offloading_draws_the_same(command) -> None:
    succeed(*command, "name=plain")
    succeed(*command, "name=offloaded", "generate.offload=group", "generate.variants=[ppcl-depth]")
    (a,), (b,) = pictures(command, "plain", "ppcl-depth"), pictures(command, "offloaded", "ppcl-depth")
    assert np.array_equal(a, b)


@pytest.mark.parametrize(
    ("network", "said"),
    [
        ({"num_attention_heads": 4}, "is of another width than model=auto"),
        (None, "could not be loaded as QwenImageControlNetModel"),
    ],
)
def test_a_controlnet_that_does_not_fit_draws_nothing(command, teacher, tmp_path, network, said) -> None:
    picture = tmp_path / "edges.png"
    Image.new("RGB", (32, 32)).save(picture)
    if network:
        arch = {k: v for k, v in load(teacher).transformer.config.items() if k in NETWORK}
        QwenImageControlNetModel(**arch | {"num_layers": 1} | network).save_pretrained(tmp_path / "controlnet")
    arguments = [f"generate.controlnet={tmp_path / 'controlnet'}", f"generate.control_image={picture}"]
    outcome = ppcl(*command, f"name={tmp_path.name}", *arguments)
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert said in outcome.err
    assert pictures(command, tmp_path.name, "teacher") == []


def test_the_model_as_it_is_needs_no_intervals(settings, tmp_path) -> None:
    command = [*settings, f"paths.runs_dir={tmp_path}", "stages=[generate]", PROMPT]
    succeed(*command, "name=alone", "generate.variants=[teacher]")
    assert len(pictures(command, "alone", "teacher")) == 1
    outcome = ppcl(*command, "name=pruned", "generate.variants=[teacher,removed]")
    assert outcome.code == 2
    assert "needs intervals" in outcome.err


def test_a_class_that_there_is_not_is_named_before_anything_is_written(settings, tmp_path) -> None:
    build_dit(0, 3).save_pretrained(tmp_path / "dit")
    command = [*settings, f"model.path={tmp_path / 'dit'}", f"paths.runs_dir={tmp_path}", "stages=[generate]"]
    command += ["generate.variants=[teacher]"]
    outcome = ppcl(*command, "name=dragon", "generate.prompt=a dragon")
    assert outcome.code == 2
    assert "'a dragon' is no class of this model" in outcome.err
    assert not (tmp_path / "dragon" / "images").exists()
    succeed(*command, "name=circle", PROMPT)
    assert len(pictures(command, "circle", "teacher")) == 1


def test_above_a_noise_level_the_teacher_draws(command, teacher, trained) -> None:
    """Its pictures are a set of their own, and equal those of a pipeline whose blocks change places in between."""
    steps = [*command, "name=levels", "model.sampling.num_inference_steps=4", "benchmark.latency_repeats=1"]
    succeed(*steps)
    outcome = succeed(*steps, "stages=[generate,evaluate,report]", "generate.teacher_above=0.7")
    assert "ppcl-depth: 1 of 1 pictures drawn, " in outcome.out
    images = folder_of(command, "levels") / "images"
    (plain,) = images.glob("a-red-circle-??????")
    (mixed,) = images.glob("a-red-circle-above-0.7-??????")
    assert digests(mixed / "teacher")["00000.png"] == digests(plain / "teacher")["00000.png"]  # not drawn again
    said = json.loads((mixed / "ppcl-depth" / "manifest.json").read_text())["made_from"]
    other = json.loads((plain / "ppcl-depth" / "manifest.json").read_text())["made_from"]
    assert said == other | {"teacher_above": 0.7}

    pipeline, board = plugged(teacher, trained)
    board()

    def change(pipeline, step, timestep, tensors):
        if pipeline.scheduler.sigmas[step + 1] <= 0.7:
            board.all()
        return tensors

    expected = drawn(pipeline, num_inference_steps=4, callback_on_step_end=change)
    share = (pipeline.scheduler.sigmas[:-1] > 0.7).float().mean().item()
    assert 0 < share < 1
    assert f"{100 * share:.0f}% of the steps by the teacher" in outcome.out
    assert f"{100 * share:.0f}% of the steps, those at most noise, are the teacher's" in outcome.out
    found = np.asarray(Image.open(mixed / "ppcl-depth" / "00000.png"))
    assert np.array_equal(found, expected)
    assert not np.array_equal(found, np.asarray(Image.open(plain / "ppcl-depth" / "00000.png")))

    rows = {path.stem: json.loads(path.read_text()) for path in folder_of(command, "levels").glob("scores/*/*.json")}
    row, whole = rows["ppcl-depth"], rows["teacher"]
    students = sum(parameter.numel() for student in board.students.values() for parameter in student.parameters())
    assert row["teacher_share"] == share
    assert "teacher_share" not in whole
    assert row["params"] == whole["params"] + students
    assert row["peak_memory_mb"] > whole["peak_memory_mb"]
    assert 0 < row["velocity_error"] < 1
    assert row["num_layers"] < whole["num_layers"]
