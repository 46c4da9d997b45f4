"""Edits of pictures that are not square: cached, drawn and compared in the sizes that the stock pipelines take."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import succeed
from PIL import Image

from ppcl.benchmarks.base import Prompt
from ppcl.command import prepare
from ppcl.context import Run
from ppcl.data.cached import LATENTS, SIZES, emptied
from ppcl.data.encoding import Encoder, encode_samples, source_header
from ppcl.data.sources import Sample
from ppcl.families.qwen_image.tiny import build_vae
from ppcl.families.qwen_image_edit import tiny as one_picture
from ppcl.families.qwen_image_edit import tiny_2509 as two_pictures
from ppcl.pictures.drawing import draw, given_pictures
from ppcl.pictures.latents import latent_distance, save_latents
from ppcl.report.plots import image_grid

BUILDERS = {"qwen_image_edit": one_picture, "qwen_image_edit_2509": two_pictures}
ASPECTS = {"1:1": (300, 300), "4:3": (400, 300), "3:4": (300, 400), "3:2": (450, 300), "2:3": (300, 450)}
ASPECTS |= {"16:9": (480, 270), "9:16": (270, 480)}
TOKEN = 32  # pixels a side: the stock pipelines round sides to multiples of it, so that no picture has part of a token
NEGATIVE = "a red circle"


@pytest.fixture(scope="module", params=BUILDERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a pipeline whose VAE takes pictures of any size that the stock pipelines resize to."""
    pipeline = BUILDERS[request.param].build_pipeline(1, 2)
    folder: Path = tmp_path_factory.mktemp(request.param)
    type(pipeline)(**pipeline.components | {"vae": build_vae(TOKEN // 4)}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    """Of the real edit models' settings of sizes and guidance."""
    asked = [f"model.sampling.{side}=null" for side in ("height", "width")]
    asked += [f"model.sampling.negative_prompt={NEGATIVE}", "model.sampling.num_inference_steps=1", "trainer=cpu"]
    asked += [f"data.path={folder}", "data=webdataset", "data.given=[given]", "stages=[cache]"]
    return prepare(["model=auto", f"model.path={folder}", f"paths.runs_dir={folder}", *asked])


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def png(image: Image.Image, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", **settings)
    return buffer.getvalue()


def encoded(run: Run, *pictures: Image.Image) -> dict[str, torch.Tensor]:
    """Return what a cache stores of an edit: its result, then the given pictures."""
    result, *given = map(png, pictures)
    encoder = Encoder(run.config, run.family, run.teacher.pipeline)
    (tensors, records), bad = encode_samples(encoder, [Sample("0", "remove the circle", result, given)])
    assert not bad
    assert records[0]["given"] == tensors[f"000.{SIZES}"].tolist()
    assert tensors[f"000.{LATENTS}"].shape[0] == np.prod(records[0]["size"])
    found = {name.removeprefix("000."): value for name, value in tensors.items()}
    return found | {"size": torch.tensor(records[0]["size"])}


def given_to(run: Run, last: Image.Image) -> list[Image.Image]:
    """The pictures of an edit whose last one is given, with a wide one before it if the model takes several."""
    return [picture((480, 270), 7), last][-run.family.num_references :]


def calls_of(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    forward = pipeline.transformer.forward
    monkeypatch.setattr(
        pipeline.transformer, "forward", lambda *args, **kwargs: calls.append(kwargs) or forward(*args, **kwargs)
    )
    return calls


@pytest.mark.parametrize("aspect", ASPECTS)
def test_cached_pictures_have_the_sizes_of_stock_inference(
    run: Run, aspect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And so do drawn ones: the result and the last given picture have one grid. Both passes read what is cached."""
    pipeline, last = run.teacher.pipeline, picture(ASPECTS[aspect])
    given, calls = given_to(run, last), calls_of(pipeline, monkeypatch)
    drawn = draw(run, pipeline, ["remove the circle"], [0], [given])[0].picture
    cached = encoded(run, picture(ASPECTS[aspect], 3), *given)
    sizes = [tuple(cached["size"].tolist()), *map(tuple, cached[SIZES].tolist())]
    assert len(calls) == 2
    assert sizes[0] == sizes[-1] == (drawn.height // TOKEN, drawn.width // TOKEN)
    conditions = {name: value for name, value in cached.items() if not name.startswith("empty.")}
    for call, expected in zip(calls, (conditions, emptied(cached)), strict=True):
        assert [tuple(shape) for shape in call["img_shapes"][0]] == [(1, *size) for size in sizes]
        behind = call["hidden_states"][0, len(cached[LATENTS]) :]
        torch.testing.assert_close(cached["image_latents"], behind)
        torch.testing.assert_close(expected["prompt_embeds"], call["encoder_hidden_states"][0])


def test_free_aspects_come_in_as_many_sizes_as_there_are_aspects(run: Run) -> None:
    free = [(width, 300) for width in (290, 330, 380, 420, 470, 560)]
    every = [encoded(run, picture(size), *given_to(run, picture(size))) for size in [*free, *ASPECTS.values()]]
    assert len({tuple(map(tuple, [cached["size"].tolist(), *cached[SIZES].tolist()])) for cached in every}) == 7


@pytest.mark.parametrize("size", [(1040, 640), (300, 333), (900, 300)])
def test_nothing_moves_between_a_given_picture_and_the_result(run: Run, size: tuple[int, int]) -> None:
    """Not where both are cut, nor where the result was drawn in the size that the stock pipeline rounds to."""
    height, width = run.family.picture_size(run.teacher.pipeline, size[0] / size[1], 1024**2)
    for result in (picture(size), picture(size).resize((width, height), Image.Resampling.LANCZOS)):
        cached = encoded(run, result, *given_to(run, picture(size)))
        target = cached[LATENTS]
        moved = (target - cached["image_latents"][-len(target) :]).abs().mean()
        assert moved < 0.01 * target.std()


def test_a_dropped_caption_is_the_prompt_of_guidance(run: Run) -> None:
    """The fingerprint knows it, except for the empty one that was always taken."""
    encoder = Encoder(run.config, run.family, run.teacher.pipeline)
    expected = run.family.encode_prompts(run.teacher.pipeline, [NEGATIVE])([NEGATIVE])
    torch.testing.assert_close(encoder.empty_prompt()["prompt_embeds"], expected["prompt_embeds"][0])
    assert source_header(run.config, [], {}).made_from["negative_prompt"] == NEGATIVE
    plain = prepare(["model=tiny_qwen_image", "data=webdataset", "data.path=.", "stages=[cache]"]).config
    assert not {"negative_prompt", "cut"} & source_header(plain, [], {}).made_from.keys()


def test_pictures_drawn_together_equal_those_drawn_alone(run: Run, tmp_path: Path) -> None:
    """Also if the given ones have several sizes; and what follows takes pictures of several sizes."""
    sizes = [(300, 200), (300, 200), (200, 300), (300, 200)]
    given = [given_to(run, picture(size, seed)) for seed, size in enumerate(sizes)]
    prompts, numbers = ["remove the circle"] * 4, [3, 4, 5, 6]

    def latents_of(images: Sequence[Image.Image]) -> list[torch.Tensor]:
        return [torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() for image in images]

    pipeline = run.teacher.pipeline
    together = [drawn.picture for drawn in draw(run, pipeline, prompts, numbers, given)]
    alone = [draw(run, pipeline, [p], [n], [g])[0].picture for p, n, g in zip(prompts, numbers, given, strict=True)]
    assert [image.size for image in together] == [(1248, 832), (1248, 832), (832, 1248), (1248, 832)]
    for found, expected in zip(together, alone, strict=True):
        np.testing.assert_allclose(np.asarray(found, float), np.asarray(expected, float), atol=1)
    for name, images in {"together": together, "alone": alone}.items():
        save_latents(tmp_path / name, numbers, latents_of(images))
    assert latent_distance(tmp_path / "together", tmp_path / "alone", 4) == pytest.approx(0, abs=1e-4)
    image_grid(tmp_path / "grid.png", together)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (10 * (256 + 4) + 4, 256 + 8)
        top = 4 + (256 - 171) // 2  # in the middle of a cell that portraits fill
        inside = np.asarray(grid)[top : top + 171, 4 : 4 + 256].astype(float)
        np.testing.assert_allclose(inside, np.asarray(together[0].resize((256, 171)), float), atol=1)


def test_a_size_that_the_user_gives_is_drawn(folder: Path, run: Run, tmp_path: Path) -> None:
    """The pictures of a command are upright whatever their files say, and an array is given as a square."""
    path = tmp_path / "given.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation: to be turned by 90 degrees
    path.write_bytes(png(picture((400, 300)), exif=exif))
    asked = [f"model.path={folder}", f"paths.runs_dir={tmp_path}", "generate.prompt=remove the circle", "trainer=cpu"]
    asked += [f"generate.images=[{path}]", "generate.variants=[teacher]", "model.sampling.num_inference_steps=1"]
    for name, given, size in (
        ("taken", ["model.sampling.height=null", "model.sampling.width=null"], (896, 1184)),
        ("given", ["model.sampling.height=256", "model.sampling.width=512"], (512, 256)),
    ):
        succeed("model=auto", *asked, *given, f"name={name}", "stages=[generate]")
        (found,) = (tmp_path / name).glob("images/*/teacher/00000.png")
        assert Image.open(found).size == size
    upright, other = Sample("0", "", path.read_bytes(), [png(picture((400, 300)))]).open()
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(other), 3))
    (array,) = given_pictures(run, Prompt("", references=[np.zeros((32, 32, 3), np.uint8)]))
    assert array.size == (1024, 1024)
