"""Pipelines that ppcl does not know, at tiny size, go through all stages: of pictures, videos and sounds.

The first runs always, all of them with PPCL_TEST_MODELS=1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import ppcl as command
from commands import succeed
from diffusers import DiffusionPipeline
from PIL import Image
from scipy.io import wavfile

import ppcl
from ppcl.data.batches import every_output
from ppcl.data.recording.files import read_call, record_of
from ppcl.pictures.fidelity import likeness
from ppcl.pictures.images import read_picture, told_by
from ppcl.pictures.videos import cut, lacks_encoder
from tests.pipelines_tiny.chain import CHAIN, SHORT, VARIANTS, only_on_demand

# What each draws: the number of frames, and the shape of its sound.
ARCHITECTURES: dict[str, tuple[int | None, tuple[int, int] | None]] = {
    "stable_diffusion_3": (None, None),
    "wan": (9, None),
    "wan_from_image": (9, None),
    "ltx2": (9, (1982, 2)),
    "stable_audio_3": (None, (4000, 2)),
    "hunyuan_video": (9, None),
}


@dataclass
class Chain:
    """A pipeline of the module `name`, its prompts, and the folder of a run through all stages."""

    name: str
    teacher: Path
    prompts: Path
    run: Path

    @property
    def command(self) -> list[str]:
        """The command without its stages."""
        return [
            "model=auto",
            f"model.path={self.teacher}",
            f"data.path={self.prompts}",
            f"paths.runs_dir={self.run.parent}",
            f"paths.cache_dir={self.run.parent / 'cache'}",
            f"name={self.run.name}",
            f"generate.variants=[{','.join(VARIANTS)}]",
            *SHORT,
            *import_module(f"tests.pipelines_tiny.{self.name}").SETTINGS,
        ]

    @property
    def recording(self) -> Path:
        (folder,) = (self.run.parent / "cache" / "recordings").iterdir()
        return folder

    def drawn(self, variant: str) -> Path:
        (folder,) = (self.run / "images").glob(f"*/{variant}")
        return folder

    def rows(self) -> dict[str, Any]:
        report = json.loads((self.run / "report" / "report.json").read_text())
        return {row["name"]: row for row in report["variants"]}


def _write_prompts(folder: Path) -> Path:
    texts = [f"a {colour} {shape}" for colour in ("red", "green", "blue") for shape in ("circle", "square")]
    (folder / "prompts.txt").write_text("\n".join(texts))
    return folder / "prompts.txt"


@pytest.fixture(scope="module", params=[next(iter(ARCHITECTURES)), *map(only_on_demand, [*ARCHITECTURES][1:])])
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    module = import_module(f"tests.pipelines_tiny.{name}")
    prompts = getattr(module, "write_prompts", _write_prompts)(folder)
    found = Chain(name, module.build(folder / "teacher"), prompts, folder / "runs" / "chain")
    succeed(*found.command, CHAIN)
    return found


def test_the_report_compares_the_variants_with_the_teacher(chain: Chain) -> None:
    rows = chain.rows()
    assert list(rows) == VARIANTS
    for name in VARIANTS[1:]:
        assert 0 < rows[name]["velocity_error"] < 10
        assert rows[name]["latent_distance"] > 0
        assert rows[name]["fidelity"]["noise_levels"]
    assert (chain.run / "report" / "report.html").is_file()
    assert (chain.run / "report" / "samples.png").is_file()


def test_videos_and_sounds_lie_beside_their_pictures(chain: Chain) -> None:
    frames, sound = ARCHITECTURES[chain.name]
    suffixes = {".png"} | ({".wav"} if sound else set()) | ({".mp4"} if frames and lacks_encoder() is None else set())
    for variant in VARIANTS:
        folder = chain.drawn(variant)
        assert {path.suffix for path in folder.glob("00000.*")} == suffixes
        assert told_by(folder / "00000.png").get("frames") == frames
        if sound:
            assert wavfile.read(folder / "00000.wav")[1].shape == sound


def test_likeness_is_the_mean_over_frames(chain: Chain) -> None:
    count = ARCHITECTURES[chain.name][0] or 1
    ours, theirs = (cut(read_picture(chain.drawn(name) / "00000.png"), count) for name in ("removed", "teacher"))
    each = [likeness(*pair) for pair in zip(ours, theirs, strict=True)]
    found = chain.rows()["removed"]["fidelity"]["pictures"][0]
    wanted = [np.mean([one.psnr for one in each]), np.mean([one.ssim for one in each])]
    assert list(found.values()) == pytest.approx(wanted)
    assert 0 < wanted[1] < 1


def test_stock_diffusers_loads_the_export_and_it_computes_the_same(chain: Chain) -> None:
    export = chain.run / "export"
    assert not list(export.rglob("*.py"))
    loaded = DiffusionPipeline.from_pretrained(export)
    index = json.loads((chain.teacher / "model_index.json").read_text())
    assert type(loaded).__name__ == index["_class_name"]
    assert type(loaded.transformer).__module__.startswith("diffusers.models.transformers.")
    pruned = ppcl.load(chain.run).pipeline("ppcl-depth").transformer
    call = read_call(record_of(chain.recording, 0), 0)
    found, wanted = (_outputs(model, call.arguments) for model in (loaded.transformer, pruned))
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    assert not any(torch.equal(*pair) for pair in zip(found, _listed(call.output), strict=True))


def test_the_program_of_the_model_card_draws(chain: Chain) -> None:
    card = (chain.run / "export" / "README.md").read_text(encoding="utf-8")
    frames, sound = ARCHITECTURES[chain.name]
    assert f"pipeline_tag: {'image' if chain.name == 'wan_from_image' else 'text'}-to-" in card
    assert f"-to-{'video' if frames else 'audio' if sound else 'image'}\n" in card
    if chain.name == "wan_from_image" and find_spec("ftfy") is None:
        pytest.skip("its pipeline needs ftfy, which is not installed")
    (program,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    picture = chain.prompts.parent / "given.png"
    Image.new("RGB", (48, 32)).save(picture)
    program = program.replace("PATH_OR_ID", str(chain.run / "export")).replace("PATH_OR_URL", str(picture))
    drawn: dict[str, Any] = {}
    exec(compile(program, "model card", "exec"), drawn)
    if frames:
        assert len(drawn["video"]) == frames
    elif sound:
        assert drawn["sound"].shape[-1] == sound[0]
    else:
        assert isinstance(drawn["image"], Image.Image)


def test_a_video_or_sound_that_is_lost_is_drawn_again(chain: Chain) -> None:
    lost = [path for path in chain.drawn("removed").glob("00000.*") if path.suffix != ".png"]
    if not lost:
        pytest.skip("it draws pictures alone, or no encoder of videos is installed")
    before = lost[0].read_bytes()
    lost[0].unlink()
    out = succeed(*chain.command, "stages=[generate]").out
    assert out.count("pictures drawn, in") == out.count("removed: ") == 1
    assert lost[0].read_bytes() == before


def test_a_package_that_a_pipeline_lacks_is_named(tmp_path: Path) -> None:
    if find_spec("ftfy"):
        pytest.skip("ftfy is installed")
    teacher = import_module("tests.pipelines_tiny.wan_from_image").build(tmp_path / "teacher")
    Image.new("RGB", (48, 32)).save(tmp_path / "a.png")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a red circle", "image": "a.png"}\n' * 2)
    given = ["model=auto", f"model.path={teacher}", f"data.path={tmp_path / 'prompts.jsonl'}", *SHORT]
    outcome = command(
        *given, f"paths.runs_dir={tmp_path}", "model.sampling.arguments={num_frames: 5}", "stages=[cache]"
    )
    assert outcome.code == 2
    assert "WanImageToVideoPipeline needs ftfy, which is not installed: pip install ftfy." in outcome.err


@torch.no_grad()
def _outputs(transformer: Any, arguments: Mapping[str, Any]) -> list[Any]:
    for parameter in transformer.parameters():
        parameter.data = parameter.clone()  # where weights are mapped from files their addresses change the rounding
    return _listed(every_output(transformer(**arguments)))


def _listed(output: Any) -> list[Any]:
    """Return what a call predicts as a list: a model of video and sound predicts both."""
    return [*output.values()] if isinstance(output, dict) else [output]
