"""Every family goes through every stage, as a real pipeline at tiny size with an untrained transformer."""

from __future__ import annotations

import html
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import BATCH, succeed
from diffusers import DiffusionPipeline
from omegaconf import OmegaConf
from PIL import Image

import ppcl
from ppcl.artifacts.samples import load_sample, load_samples
from ppcl.benchmarks.shapes import evaluation_scenes
from ppcl.config import SamplingConfig
from ppcl.families.registry import builders, get_family

NEAREST = Image.Resampling.NEAREST
STAGES = "stages=[probe,detect,depth,width,plan,finetune,export,quantize,generate,evaluate,report]"
VARIANTS = "generate.variants=[teacher,removed,ppcl-depth,ppcl-width,ppcl-planned,ppcl-finetuned,ppcl-quantized]"
INT4 = ["quantize=int4", "quantize.group_size=32", "quantize.rounding=nearest"]
QWEN = [
    "intervals.transformer_blocks=[[1,2]]",
    "width.transformer_blocks.text=[4]",
    "width.transformer_blocks.ffn=[0]",
    "model.sampling.height=1024",
    "model.sampling.width=1024",
]
# By builder: its number of layers, and what is pruned.
FAMILIES = {
    "tiny_flux": (
        3,
        [
            "intervals.transformer_blocks=[[1,2]]",
            "intervals.single_transformer_blocks=[[0,1],[3,5]]",
            "width.transformer_blocks.text=[1]",
            "width.transformer_blocks.ffn=[0]",
            "width.single_transformer_blocks.ffn=[2,3]",
        ],
    ),
    "tiny_dit": (5, ["intervals.transformer_blocks=[[1,2]]", "width.transformer_blocks.ffn=[1,4]"]),
    "tiny_qwen_image": (5, QWEN[:3]),
    "tiny_qwen_image_edit": (5, QWEN),
    "tiny_qwen_image_edit_2509": (5, QWEN),
}
SIX_CATEGORIES = ("tiny_flux", "tiny_qwen_image")  # the others' worlds have fewer
# What each stage leaves behind where it ran.
EVIDENCE = {
    "probe": "cache/probes/*/probes.json",
    "detect": "detected/plan/plan.json",
    "depth": "pruned/plugs/*-*.json",
    "width": "pruned/plugs/*.[ft][fe]*.json",
    "plan": "pruned/plan/choice.json",
    "finetune": "pruned/finetuned/ppcl.json",
    "export": "pruned/export/ppcl.json",
    "quantize": "pruned/quantized/ppcl.json",
    "generate": "pruned/images/shapes/ppcl-finetuned/manifest.json",
    "evaluate": "pruned/scores/ppcl-finetuned.json",
    "report": "pruned/report/report.html",
}
README = Path(__file__).parents[2] / "README.md"
RAN: dict[str, dict[str, bool]] = {}  # by pipeline class


@pytest.fixture(scope="module", params=FAMILIES)
def chain(request: pytest.FixtureRequest, settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run through every stage; detection in a run of its own, since the intervals are given."""
    builder: str = request.param
    layers, pruned = FAMILIES[builder]
    folder = tmp_path_factory.mktemp(builder)
    import_module(builders()[builder]).build_pipeline(0, layers).save_pretrained(folder / "teacher")
    common = [*settings, f"model.path={folder / 'teacher'}", f"paths.runs_dir={folder}"]
    common += ["model.sampling.max_sequence_length=16", "benchmark.latency_repeats=1"]
    if builder in SIX_CATEGORIES:
        common.append("benchmark.prompts_per_category=1")  # BATCH pictures, as many as are compared
    common += [override for override in pruned if override.startswith("model.")]
    succeed(*common, "name=detected", "stages=[probe,detect]")
    selected = ["width=auto", "width.num_ffn=2", "width.text_threshold=0.1", "width.steps=0", "distill.steps=1"]
    intervals = [override for override in pruned if override.startswith("intervals.")]
    succeed(*common, "name=selected", *intervals, *selected, "stages=[depth,width]")
    drawn = ["watch.share=1000", "watch.pictures=1", "watch.prompts=2", "watch.picture_steps=2"]
    tuned = ["finetune=tiny", "finetune.steps=2", "finetune.batch_size=4", "width.steps=2", "width.num_batches=2"]
    given = [*pruned, "width.source=given", "budget.params=0.8", *tuned, *drawn, *INT4, VARIANTS]
    succeed(*common, "name=pruned", *given, STAGES.replace("probe,detect,", ""))
    pipeline_class = json.loads((folder / "teacher" / "model_index.json").read_text())["_class_name"]
    RAN[pipeline_class] = {stage: any(folder.glob(pattern)) for stage, pattern in EVIDENCE.items()}
    return folder


def test_detection_covers_every_stack(chain: Path) -> None:
    plan = json.loads((chain / "detected" / "plan" / "plan.json").read_text())
    assert plan["intervals"].keys() == plan["num_layers"].keys()
    for stack in plan["num_layers"]:
        assert (chain / "detected" / "plan" / f"curves_{stack}.png").exists()


def test_pictures_are_drawn_while_it_trains_and_shown(chain: Path) -> None:
    drawn = load_samples(chain / "pruned")
    assert {stage: record.steps for stage, ((_, record),) in drawn.items()} == {
        "depth": [0, 6],
        "width": [0, 2],
        "finetune": [0, 2],
    }
    pictures = [path for ((folder, _),) in drawn.values() for path in folder.glob("*.png")]
    assert len(pictures) == 3 * 3 * 2
    size = load_sample(next((chain / "pruned" / "images").rglob("00000.png"))).size
    assert {load_sample(path).size for path in pictures} == {size}
    page = (chain / "pruned" / "report" / "report.html").read_text(encoding="utf-8")
    section = page.partition("While it trained")[2].partition("How it was made")[0]
    assert section.count("<img") == len(pictures)
    for ((_, record),) in drawn.values():
        assert all(f">{html.escape(prompt)}</span>" in section for prompt in record.prompts)


def test_what_loses_its_text_has_one_and_ffns_are_chosen_from_all_blocks(chain: Path) -> None:
    width = json.loads((chain / "selected" / "plan" / "width.json").read_text())
    chosen = width["width"]
    family = get_family(width["family"])
    assert sum(len(sets["ffn"]) for sets in chosen.values()) == 2
    assert {stack for stack, sets in chosen.items() if sets["text"]} == set(family.facts.text_stacks)
    errors = {(s, i): e for s, found in width["scores"].items() for i, e in found["ffn_error"].items()}
    least = sorted(errors, key=lambda key: errors[key])[:2]
    assert {(stack, str(index)) for stack, sets in chosen.items() for index in sets["ffn"]} == set(least)


def drawn(run: Path, pipeline: DiffusionPipeline, count: int = BATCH) -> list[np.ndarray]:
    """Draw the run's first pictures with a pipeline, in one batch or as few as it takes."""
    config = OmegaConf.load(run / "config.yaml")
    pipeline.set_progress_bar_config(disable=True)
    lines = [json.loads(line) for line in (run / "images/shapes/teacher/prompts.jsonl").read_text().splitlines()]
    lines = lines[:count]
    sampling = SamplingConfig(**config.model.sampling)
    family = get_family(config.model.family)
    scenes = evaluation_scenes(config.data.eval_seed, config.benchmark.prompts_per_category, family)[:count]
    size = sampling.width, sampling.height
    images: list[Image.Image] = []
    for start in range(0, len(lines), family.prompts_per_call or BATCH):
        part = slice(start, start + (family.prompts_per_call or BATCH))
        given = [[Image.fromarray(p).resize(size, NEAREST) for p in scene.references] for scene in scenes[part]]
        generators = [torch.Generator().manual_seed(line["seed"]) for line in lines[part]]
        arguments = family.sampling_arguments(sampling, len(generators))
        arguments |= family.prompt_arguments(pipeline, [line["prompt"] for line in lines[part]], given)
        images += pipeline(generator=generators, **arguments).images
    return [np.asarray(image) for image in images]


def stored(run: Path, variant: str) -> list[np.ndarray]:
    """Return the first pictures that the run itself has drawn with a variant."""
    paths = sorted((run / "images" / "shapes" / variant).glob("0*.png"))[:BATCH]
    return [np.asarray(Image.open(path).convert("RGB")) for path in paths]


@pytest.mark.parametrize(("name", "variant"), [("export", "ppcl-finetuned"), ("quantized", "ppcl-quantized")])
def test_the_folder_draws_what_the_run_drew(chain: Path, name: str, variant: str) -> None:
    run = chain / "pruned"
    pipeline = DiffusionPipeline.from_pretrained(run / name, dtype=torch.float32)
    rows = {row["name"]: row for row in json.loads((run / "report" / "report.json").read_text())["variants"]}
    assert rows[variant]["params"] == sum(p.numel() for p in pipeline.transformer.parameters())
    assert rows["teacher"]["params"] > rows["ppcl-depth"]["params"] > rows["ppcl-width"]["params"]
    np.testing.assert_array_equal(drawn(run, pipeline), stored(run, variant))


@pytest.mark.parametrize("variant", ["ppcl-width", "ppcl-finetuned", "ppcl-quantized"])
def test_the_teacher_draws_above_a_noise_level(chain: Path, variant: str) -> None:
    """At 0 it draws everything, at 1 nothing, and in between the steps whose noise level in the scheduler is above."""
    run = chain / "pruned"
    results = ppcl.load(run)
    middle = 0.5
    for above, whose in ((0.0, "teacher"), (1.0, variant), (None, None)):
        above = middle if above is None else above
        pipeline = results.pipeline(variant, teacher_above=above)
        model, forwards = pipeline.transformer, {"teacher": 0, "pruned": 0}

        def count(module: torch.nn.Module, *_: object, model=model, forwards=forwards) -> None:
            forwards["teacher" if module is model.teacher else "pruned"] += 1

        for module in model.models:
            module.register_forward_hook(count)
        images = drawn(run, pipeline, BATCH if whose else 1)
        if whose:
            np.testing.assert_array_equal(images, stored(run, whose))
        steps = pipeline.scheduler.timesteps / pipeline.scheduler.config.num_train_timesteps
        middle = steps.mean().item()  # between the first and the last step of this family's scheduler
        passes = sum(forwards.values()) / len(steps)
        expected = len(steps) if above == 0 else int((steps > above).sum())
        assert forwards == model.calls == {"teacher": expected * passes, "pruned": (len(steps) - expected) * passes}
    assert 0 < forwards["teacher"] < sum(forwards.values())


WITHOUT_PPCL = """
import sys
sys.modules["ppcl"] = None
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(pipeline.transformer).__module__, sum(p.numel() for p in pipeline.transformer.parameters()))
"""


def test_the_export_loads_where_ppcl_is_not_installed(chain: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", WITHOUT_PPCL, str(chain / "pruned" / "export")]
    own = os.environ | {"HF_MODULES_CACHE": str(tmp_path)}  # no code that another process kept, or writes now
    found = subprocess.run(command, env=own, capture_output=True, text=True, check=True).stdout.split()
    scores = json.loads((chain / "pruned" / "scores" / "ppcl-finetuned.json").read_text())
    assert found[0].startswith("diffusers_modules.local.transformer_")
    assert int(found[1]) == scores["params"]


def test_plugs_go_into_the_pipeline_and_out_again(chain: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(chain / "teacher")
    before = [p.data_ptr() for p in pipeline.transformer.parameters()]
    board = ppcl.plug(pipeline, chain / "pruned" / "plugs")
    pruned = sum(p.numel() for p in pipeline.transformer.parameters())
    board()
    assert [p.data_ptr() for p in pipeline.transformer.parameters()] == before
    assert pruned < sum(p.numel() for p in pipeline.transformer.parameters())
    assert not any(torch.isnan(p).any() for p in pipeline.transformer.parameters())


def test_the_readmes_table_is_what_ran() -> None:
    """Last in this file. `PPCL_WRITE_README=1` writes the table anew."""
    if len(RAN) < len(FAMILIES):
        pytest.skip("only some of the families ran")
    lines = [f"| pipeline | {' | '.join(EVIDENCE)} |", "| --- |" + " :-: |" * len(EVIDENCE)]
    lines += [
        f"| `{name}` | {' | '.join('yes' if did else 'no' for did in ran.values())} |"
        for name, ran in sorted(RAN.items())
    ]
    text = README.read_text(encoding="utf-8")
    start, end = "<!-- families -->\n", "<!-- end of families -->"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    expected = before + start + "\n".join(lines) + "\n" + end + after
    if os.environ.get("PPCL_WRITE_README"):
        README.write_text(expected, encoding="utf-8")
        text = expected
    assert all(all(ran.values()) for ran in RAN.values()), RAN
    assert text == expected
