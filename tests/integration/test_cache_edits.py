"""Edits are cached with their given pictures: what a model then reads is what its pipeline would give it."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset as wds
from commands import INTERVALS, ppcl, succeed
from diffusers import DiffusionPipeline
from PIL import Image

from ppcl.config import DataConfig, SamplingConfig
from ppcl.data.cached import CachedStream, emptied, read_entries
from ppcl.data.worlds import edits, shapes
from ppcl.families.qwen_image_edit import tiny as one_picture
from ppcl.families.qwen_image_edit import tiny_2509 as two_pictures
from ppcl.families.registry import FAMILIES, get_family

BUILDERS = {"qwen_image_edit": one_picture, "qwen_image_edit_2509": two_pictures}
SIDE, SAMPLES = 1024, 24


def picture(pixels: Any, size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    return Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def scene_of(family: str, number: int) -> edits.Edit:
    return edits.make_scene(7, number, categories=FAMILIES[family].categories)


def given_of(family: str, number: int) -> list[Image.Image]:
    """The first of every third sample is half as large; the pipelines bring it to the same."""
    size = SIDE // 2 if number % 3 == 0 else SIDE
    first, *others = scene_of(family, number).references
    return [picture(first, (size, size)), *map(picture, others)]


@pytest.fixture(scope="module", params=BUILDERS)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def command(family: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of a shard whose last samples are bad, and of a table with the same."""
    folder = tmp_path_factory.mktemp(family)
    BUILDERS[family].build_pipeline(1, 3).save_pretrained(folder / "model")
    (folder / "table").mkdir()
    rows = []
    with wds.TarWriter(str(folder / "00000.tar")) as writer:
        for number in range(SAMPLES):
            scene = scene_of(family, number)
            given = {f"given{n}": png(image) for n, image in enumerate(given_of(family, number))}
            outcome = png(picture(shapes.render(scene.objects)))
            sample = {"png": outcome, "json": json.dumps({"prompt_en": scene.caption}).encode()}
            writer.write({"__key__": f"{number:03d}", **sample, **{f"{n}.png": file for n, file in given.items()}})
            for name, content in {"image": outcome, **given}.items():
                (folder / "table" / f"{number}-{name}.png").write_bytes(content)
            named = [f"{number}-{name}.png" for name in given]
            rows.append({"image": f"{number}-image.png", "prompt": scene.caption, "edit_image": named})
        writer.write({"__key__": "no-given", "png": outcome, "txt": b"remove the circle"})
        writer.write({"__key__": "broken", "png": outcome, "txt": b"remove the circle", "given0.png": outcome[:900]})
    rows.append({"image": "0-image.png", "prompt": "remove the circle", "edit_image": named * 2})
    (folder / "table" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    model = ["model=auto", f"model.path={folder / 'model'}", "model.dtype=float32"]
    data = ["data=webdataset", f"data.path={folder}", "data.given=[given0,given1]", "data.aspects=['1:1']"]
    small = ["trainer=cpu", "data.samples_per_file=4", "data.held_out=0.3", "data.shift=1.0", "logger=none"]
    size = [f"model.sampling.height={SIDE}", f"model.sampling.width={SIDE}"]
    return [*model, *data, *small, *size, f"paths.runs_dir={folder / 'runs'}"]


@pytest.fixture(scope="module")
def cached(command: list[str]) -> Path:
    outcome = succeed(*command, "name=cached", "stages=[cache]")
    assert f"{SAMPLES} samples of 1 unit cached, 2 left out" in outcome.out
    assert "no-given: no given picture: none of given0, given1" in outcome.out
    assert "broken: its picture does not decode" in outcome.out
    (folder,) = Path(command[-1].partition("=")[2]).glob("cache/data/*")
    return folder


def stream_of(family: str, cached: Path, dropout: float = 0.0) -> CachedStream:
    config = DataConfig(name="webdataset", held_out=0.01, caption_dropout=dropout, shift=1.0)
    sampling = SamplingConfig(height=SIDE, width=SIDE)
    return CachedStream(get_family(family, {}, sampling), cached, config, 5, 1, held_out=False)


def test_a_forward_reads_what_the_pipeline_gives_it(family: str, command: list[str], cached: Path) -> None:
    """Text with the pictures in it, with an instruction and without; and the given pictures' latents."""
    pipeline = DiffusionPipeline.from_pretrained(next(a for a in command if "model.path" in a).partition("=")[2])
    pipeline.set_progress_bar_config(disable=True)
    calls: list[dict[str, Any]] = []
    pipeline.transformer.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    stream, compared = stream_of(family, cached), get_family(family, {})
    for step in range(4):
        number = int(stream.entries(step)[0].key)
        calls.clear()
        given = given_of(family, number)
        arguments = compared.prompt_arguments(pipeline, [scene_of(family, number).caption], [given])
        options: dict[str, Any] = {"negative_prompt": [""], "true_cfg_scale": 2.0, "num_inference_steps": 1}
        pipeline(**arguments, **options, height=SIDE, width=SIDE, output_type="latent")
        for dropped, theirs in zip((False, True), calls[:2], strict=True):
            latents, size, conditions = stream.samples(step, range(1), [dropped])
            ours = stream.family.forward_inputs(latents, conditions, torch.ones(1), size)
            torch.testing.assert_close(ours["encoder_hidden_states"], theirs["encoder_hidden_states"])
            behind = latents.shape[1]
            torch.testing.assert_close(ours["hidden_states"][:, behind:], theirs["hidden_states"][:, behind:])
            assert ours["img_shapes"] == [[tuple(shape) for shape in theirs["img_shapes"][0]]]


def test_an_empty_prompt_shares_what_it_can_and_is_whole_again() -> None:
    from ppcl.data.cached import difference

    prompt = {"prompt_embeds": torch.randn(9, 4), "prompt_embeds_mask": torch.ones(9, dtype=torch.bool)}
    empty = {name: value[:7].clone() for name, value in prompt.items()}
    empty["prompt_embeds"][5:] += 1
    stored = difference(empty, prompt)
    assert len(stored["empty.prompt_embeds"]) == 2
    pictures = torch.randn(30, 4)
    again = emptied(prompt | {"image_latents": pictures} | stored)
    assert torch.equal(again["prompt_embeds"], empty["prompt_embeds"])
    assert torch.equal(again["prompt_embeds_mask"], empty["prompt_embeds_mask"])
    assert torch.equal(again["image_latents"], pictures)
    other = {"prompt_embeds": torch.randn(7, 4), "prompt_embeds_mask": torch.ones(7, dtype=torch.bool)}
    assert torch.equal(emptied(prompt | difference(other, prompt))["prompt_embeds"], other["prompt_embeds"])


def test_batches_are_of_one_shape_and_dropped_captions_keep_their_pictures(family: str, cached: Path) -> None:
    config = DataConfig(name="webdataset", held_out=0.01, caption_dropout=0.5)
    stream = CachedStream(get_family(family, {}), cached, config, 5, 3, held_out=False)
    (bucket,) = stream.buckets
    assert bucket[1:] == ((8, 8),) * FAMILIES[family].num_references
    lengths = [stream(step).inputs["encoder_hidden_states_mask"].sum(dim=1) for step in range(4)]
    assert torch.cat(lengths).unique().numel() > 1
    for step in range(4):
        assert stream(step).inputs["hidden_states"].shape[1] == 64 * (1 + FAMILIES[family].num_references)


def test_a_table_does_as_well(family: str, command: list[str], cached: Path) -> None:
    table = Path(next(a for a in command if a.startswith("data.path")).partition("=")[2]) / "table"
    arguments = [a for a in command if a != "data=webdataset"]
    arguments += ["data=folder", f"data.path={table}", "data.given=[edit_image]", f"paths.runs_dir={table / 'runs'}"]
    outcome = succeed(*arguments, "name=table", "stages=[cache]")
    assert f"{SAMPLES} samples of 1 unit cached, 1 left out" in outcome.out
    assert "given pictures; the model takes" in outcome.out
    (folder,) = (table / "runs" / "cache" / "data").iterdir()
    assert [entry.given for entry in read_entries(folder)] == [entry.given for entry in read_entries(cached)]


def test_stages_run_from_it(command: list[str], cached: Path) -> None:
    small = ["probe.batch_size=2", "probe.num_batches=1", "probe.num_heldout_batches=1", "distill.steps=2"]
    intervals = "intervals.transformer_blocks=[[1,2]]"
    given = [a for a in command if not a.startswith(("data.path", "data.given"))]
    held = ["data.held_out=0.8", "distill.batch_size=1", f"data.cache={cached}"]
    succeed(*given, *held, *small, "name=trained", intervals, "stages=[probe,depth]")


def test_a_cache_of_another_family_is_refused(cached: Path, teacher: Path, settings: list[str], tmp_path: Path) -> None:
    """Even by a folder without encoders, which could not tell by those."""
    bare = tmp_path / "bare"
    shutil.copytree(teacher, bare)
    for name in ("text_encoder", "tokenizer", "vae"):
        shutil.rmtree(bare / name)
    arguments = [a for a in settings if not a.startswith("model.path")]
    arguments += [f"model.path={bare}", "data=webdataset", f"data.cache={cached}", "name=other", INTERVALS]
    outcome = ppcl(*arguments, "stages=[depth]")
    assert outcome.code == 2
    assert "was made by other encoders" in outcome.err


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.given=null"], "data.given=None names no given pictures"),
        (["data.given=[]"], "data.given=[] names no given pictures"),
    ],
)
def test_given_pictures_must_be_named(command: list[str], tmp_path: Path, overrides: list[str], said: str) -> None:
    outcome = ppcl(*command, *overrides, f"paths.runs_dir={tmp_path}", "name=bad", "stages=[cache]")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert said in outcome.err
    assert not (tmp_path / "cache").exists()


def test_a_model_that_is_given_none_refuses_them(settings: list[str], tmp_path: Path) -> None:
    arguments = ["data=webdataset", f"data.path={tmp_path}", "data.given=[edit_image]", "stages=[cache]"]
    outcome = ppcl(*settings, *arguments, "name=bad")
    assert outcome.code == 2
    assert "data.given=['edit_image']: model.family=qwen_image is given no pictures" in outcome.err
