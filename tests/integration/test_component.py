"""One of the two denoisers of a pipeline is pruned, then the other: Wan 2.2 at tiny size."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import digests, modified, succeed
from commands import ppcl as ppcl_command
from diffusers import DiffusionPipeline, WanPipeline, WanTransformer3DModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file

import ppcl
from ppcl.command import prepare
from ppcl.data.recording.files import Call, read_call, read_entries, read_joining, record_of
from ppcl.errors import UsageError
from ppcl.pictures.drawing import decoded_latents
from ppcl.surgery.plugboard import plug
from tests.pipelines_tiny import wan
from tests.pipelines_tiny.chain import SHORT

CHAIN = "stages=[cache,probe,detect,depth,export,generate]"
STEPS, FRAMES, PROMPTS = 6, 5, 3
SECOND = "model.component=transformer_2"


@dataclass
class Place:
    """The folder of a teacher with two denoisers, prompts, and runs on them."""

    folder: Path

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

    def command(self, name: str, model: Path | None = None) -> list[str]:
        """Return the command of the run `name` without its stages."""
        sampling = [f"model.sampling.num_inference_steps={STEPS}", f"model.sampling.arguments={{num_frames: {FRAMES}}}"]
        return [
            "model=auto",
            f"model.path={model or self.teacher}",
            f"data.path={self.folder / 'prompts.txt'}",
            f"paths.runs_dir={self.folder}",
            f"paths.cache_dir={self.folder / 'cache'}",
            f"name={name}",
            "generate.variants=[teacher,ppcl-depth]",
            *SHORT[:-1],
            *wan.SETTINGS[:-1],
            *sampling,
        ]

    def recordings(self) -> list[Path]:
        return sorted((self.folder / "cache" / "recordings").iterdir(), key=lambda path: path.stat().st_ctime)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run on the second denoiser."""
    found = Place(tmp_path_factory.mktemp("wan_22"))
    wan.build_22(found.teacher)
    (found.folder / "prompts.txt").write_text("a red circle\na blue square\na green cross\n")
    succeed(*found.command("second"), SECOND, CHAIN)
    return found


@pytest.fixture(scope="module")
def export(place: Place) -> Path:
    return place.folder / "second" / "export"


@pytest.fixture(scope="module")
def both(place: Place, export: Path) -> Path:
    """The folder of a run that prunes the first denoiser of the export."""
    succeed(*place.command("both", export), CHAIN)
    return place.folder / "both"


def drawn(run: Path, variant: str, name: str = "captions") -> torch.Tensor:
    """Return the final latents of the video that a run drew."""
    (file,) = (run / "images" / name / variant / "latents").iterdir()
    (latents,) = load_file(file).values()
    return latents.float()


def draw(pipeline: Any, run: Path) -> torch.Tensor:
    """Return the final latents of what a pipeline of stock diffusers draws as the run does."""
    prompts = run / "images" / "captions" / "teacher" / "prompts.jsonl"
    pipeline.set_progress_bar_config(disable=True)
    sizes = {"height": 32, "width": 48, "num_frames": FRAMES, "num_inference_steps": STEPS}
    generator = torch.Generator().manual_seed(42)
    with decoded_latents(pipeline) as found:
        pipeline(json.loads(prompts.read_text())["prompt"], **sizes, generator=generator)
    return found[0][0].float()


@torch.no_grad()
def output(transformer: Any, call: Call) -> torch.Tensor:
    for parameter in transformer.parameters():
        parameter.data = parameter.clone()  # where weights are mapped from files their addresses change the rounding
    found: torch.Tensor = transformer(**call.arguments)[0]
    return found


def test_the_export_is_the_stock_pipeline_with_one_denoiser_pruned(place: Place, export: Path) -> None:
    assert digests(export / "transformer") == digests(place.teacher / "transformer")
    loaded = DiffusionPipeline.from_pretrained(export)
    assert type(loaded) is WanPipeline
    assert type(loaded.transformer_2) is WanTransformer3DModel
    assert loaded.config.boundary_ratio == wan.BOUNDARY
    assert len(loaded.transformer.blocks) == 6
    kept = loaded.transformer_2.config.ppcl["kept_layers"]["blocks"]
    assert len(loaded.transformer_2.blocks) == loaded.transformer_2.config.num_layers == len(kept) < 6
    assert "transformer_2/config.json" in (export / "README.md").read_text()


def test_it_computes_and_draws_as_the_run_does(place: Place, export: Path) -> None:
    loaded = DiffusionPipeline.from_pretrained(export)
    call = read_call(record_of(place.recordings()[0], 0), 0)
    pruned = ppcl.load(export.parent).pipeline("ppcl-depth").transformer_2
    assert torch.equal(output(loaded.transformer_2, call), output(pruned, call))
    ours, teacher = drawn(export.parent, "ppcl-depth"), drawn(export.parent, "teacher")
    torch.testing.assert_close(draw(loaded, export.parent), ours, rtol=0, atol=2e-3)
    assert (ours - teacher).abs().max() > 2e-2


def test_only_steps_below_the_boundary_are_recorded(place: Place, export: Path) -> None:
    calls = read_entries(place.recordings()[0], PROMPTS, None)
    assert {entry.step for entry in calls} <= {2, 3, 4, 5}
    assert all(0 < entry.sigma < wan.BOUNDARY for entry in calls)
    assert "some of the denoising steps" in read_joining(place.recordings()[0]).as_recorded


def test_plugs_go_into_the_denoiser_that_they_are_of(place: Place, export: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(place.teacher)
    board = plug(pipeline, export.parent / "plugs")
    assert board.transformer is pipeline.transformer_2
    assert len(pipeline.transformer.blocks) == 6 > len(pipeline.transformer_2.blocks)
    with pytest.raises(UsageError, match=r"plugs of transformer_2, which this WanPipeline is without: load it whole"):
        plug(WanPipeline.from_pretrained(place.teacher, transformer_2=None), export.parent / "plugs")


def test_a_stage_that_draws_nothing_leaves_the_other_one_on_disk(place: Place) -> None:
    run = prepare([*place.command("second"), SECOND, "stages=[probe]"])
    run.teacher.enter("probe")
    assert [name for name, part in run.teacher.pipeline.components.items() if part is not None] == [
        "scheduler",
        "transformer_2",
    ]


def test_then_the_first_denoiser_is_pruned_from_recordings_of_its_own(place: Place, export: Path, both: Path) -> None:
    assert digests(both / "export" / "transformer_2") == digests(export / "transformer_2")
    loaded = DiffusionPipeline.from_pretrained(both / "export")
    assert max(len(loaded.transformer.blocks), len(loaded.transformer_2.blocks)) < 6
    first, second = place.recordings()
    sigmas = [{entry.sigma for entry in read_entries(folder, PROMPTS, None)} for folder in (first, second)]
    assert max(sigmas[0]) < wan.BOUNDARY <= min(sigmas[1])
    assert {len(list((place.folder / "cache" / kind).iterdir())) for kind in ("probes", "traces", "images")} == {2}
    torch.testing.assert_close(drawn(both, "teacher"), drawn(export.parent, "ppcl-depth"), rtol=0, atol=2e-3)


def test_another_pass_reuses_everything(place: Place, export: Path) -> None:
    before = modified(place.folder / "second" / "plugs", place.folder / "cache" / "recordings", export)
    out = succeed(*place.command("second"), SECOND, CHAIN).out
    assert modified(place.folder / "second" / "plugs", place.folder / "cache" / "recordings", export) == before
    assert "export  reused" in out


def test_a_lora_goes_onto_the_denoiser_that_is_pruned(place: Place, export: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(place.teacher)
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    pipeline.transformer_2.add_adapter(config)
    layers = get_peft_model_state_dict(pipeline.transformer_2)
    WanPipeline.save_lora_weights(place.folder, layers)
    lora = place.folder / "pytorch_lora_weights.safetensors"
    given = [*place.command("second"), SECOND]
    succeed(*given, "stages=[generate]", f"generate.loras=[{lora}]", "generate.name=styled")
    merged = prepare([*place.command("merged"), SECOND, "stages=[probe]", f"model.lora={lora}"]).teacher.transformer
    pipeline.transformer_2.fuse_lora()
    wanted = pipeline.transformer_2.blocks[5].attn1.to_q.base_layer.weight
    torch.testing.assert_close(merged.blocks[5].attn1.to_q.weight, wanted, rtol=0, atol=1e-6)
    out = succeed(*given, "stages=[remap_lora]", f"lora.path={lora}").out
    assert "pipeline.load_lora_weights takes it with load_into_transformer_2=True" in " ".join(out.split())
    loaded = DiffusionPipeline.from_pretrained(export)
    loaded.load_lora_weights(export.parent / "lora" / lora.name, load_into_transformer_2=True)
    found = draw(loaded, export.parent)
    torch.testing.assert_close(found, drawn(export.parent, "ppcl-depth", "styled"), rtol=0, atol=2e-3)
    assert (found - drawn(export.parent, "ppcl-depth")).abs().max() > 2e-2


@pytest.mark.parametrize(
    ("component", "said"),
    [
        ("vae", "model.component=vae is no transformer of the WanPipeline in model.path="),
        ("transformer_3", "set it to transformer or transformer_2."),
    ],
)
def test_what_is_no_denoiser_is_refused(place: Place, component: str, said: str) -> None:
    outcome = ppcl_command(*place.command("refused"), f"model.component={component}", CHAIN)
    assert outcome.code == 2
    assert said in outcome.err
    assert not (place.folder / "refused").exists()


def test_a_denoiser_that_is_never_called_is_refused(place: Place, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    shutil.copytree(place.teacher, alone)
    index = json.loads((alone / "model_index.json").read_text())
    (alone / "model_index.json").write_text(json.dumps(index | {"boundary_ratio": None}))
    outcome = ppcl_command(*place.command("refused", alone), SECOND, CHAIN)
    assert outcome.code == 2
    assert "model.component=transformer_2 is never called, since boundary_ratio is null in" in outcome.err
    outcome = ppcl_command(*place.command("refused"), SECOND, CHAIN, "model.sampling.num_inference_steps=1")
    assert outcome.code == 2
    assert "none of the 1 sampling steps is below the pipeline's boundary_ratio=0.8" in outcome.err


def test_families_with_one_denoiser_refuse_another() -> None:
    for model in ("tiny_flux", "qwen_image"):
        outcome = ppcl_command(f"model={model}", SECOND, "intervals.transformer_blocks=[[1,2]]", "stages=[plan]")
        assert outcome.code == 2
        assert "model.component=transformer_2 is no transformer of" in outcome.err
