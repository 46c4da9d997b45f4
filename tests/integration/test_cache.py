"""Pictures and captions are encoded once; after that no stage loads what encoded them."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset as wds
from commands import DIE_AT_RENAME, INTERVALS, digests, ppcl, ppcl_process, succeed
from diffusers import DiffusionPipeline
from PIL import Image

from ppcl.config import DataConfig
from ppcl.data.cached import CachedStream, read_entries
from ppcl.data.worlds import shapes
from ppcl.families.registry import get_family

SHARDS, PER_SHARD = 3, 20
BAD = ("no caption", "no picture", "does not decode", "below data.min_text_accuracy", "its .json is none")


def scene_of(number: int) -> shapes.Scene:
    return shapes.make_scene(77, number)


def png(scene: shapes.Scene, size: tuple[int, int] = (32, 32)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(shapes.render(scene.objects)).resize(size, Image.Resampling.NEAREST).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In the authors' layout; the second shard has one of every kind of bad sample, a third of pictures is wide."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(SHARDS):
        with wds.TarWriter(str(folder / f"{shard:05d}.tar")) as writer:
            for number in range(shard * PER_SHARD, (shard + 1) * PER_SHARD):
                scene = scene_of(number)
                size = (44, 32) if number % 3 == 0 else (32, 32)
                facts = {"prompt_en": scene.caption, "prompt_zh": "-", "text_accuracy": 0.9}
                writer.write({"__key__": f"{number:06d}", "png": png(scene, size), "json": json.dumps(facts).encode()})
            if shard == 1:
                good = png(scene_of(0))
                writer.write({"__key__": "bad0", "png": good, "json": b'{"prompt_en": " "}'})
                writer.write({"__key__": "bad1", "json": b'{"prompt_en": "a circle"}'})
                writer.write({"__key__": "bad2", "png": good[: len(good) // 2], "json": b'{"prompt_en": "a circle"}'})
                facts = {"prompt_en": "a circle", "text_accuracy": 0.1}
                writer.write({"__key__": "bad3", "png": good, "json": json.dumps(facts).encode()})
                writer.write({"__key__": "bad4", "png": good, "json": b"{"})
    return folder


@pytest.fixture(scope="module")
def command(settings: list[str], shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("cache")
    data = ["data=webdataset", f"data.path={shards}", "data.aspects=['1:1','11:8']", "data.min_text_accuracy=0.5"]
    data += ["data.samples_per_file=8", "data.encode_batch_size=4", "data.held_out=0.3", "data.shift=1.0"]
    return [*settings, *data, f"paths.runs_dir={folder}"]


@pytest.fixture(scope="module")
def cached(command: list[str]) -> Path:
    """The cache's folder."""
    outcome = succeed(*command, "name=cache", "stages=[cache]")
    assert "60 samples of 3 units cached, 5 left out" in outcome.out
    assert "GB are free" in outcome.out
    return cache_of(command)


def cache_of(command: list[str]) -> Path:
    runs = next(a for a in command[::-1] if a.startswith("paths.runs_dir=")).partition("=")[2]
    (folder,) = (Path(runs) / "cache" / "data").iterdir()
    return folder


def skipped(folder: Path) -> list[dict]:
    return [item for path in sorted(folder.glob("*.tar.json")) for item in json.loads(path.read_text())["skipped"]]


def test_every_good_sample_is_there_once_and_every_bad_one_is_listed(cached: Path) -> None:
    keys = [entry.key for entry in read_entries(cached)]
    assert sorted(keys) == [f"{number:06d}" for number in range(SHARDS * PER_SHARD)]
    found = skipped(cached)
    assert sorted(item["key"] for item in found) == [f"bad{number}" for number in range(5)]
    assert all(any(why in item["why"] for item in found) for why in BAD)


def test_what_is_cached_is_what_the_pipeline_encodes(cached: Path, teacher: Path) -> None:
    """A batch of the stream equals its samples encoded directly, padding and all."""
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    family = get_family("qwen_image", pipeline.transformer.config)
    config = DataConfig(name="webdataset", held_out=0.3, caption_dropout=0.0)
    stream = CachedStream(family, cached, config, 5, 4, held_out=False)
    seen = set()
    for step in range(stream.steps_per_epoch):
        latents, size, conditions = stream.samples(step, [False] * 4)
        scenes = [scene_of(int(entry.key)) for entry in stream.entries(step)]
        seen |= {entry.key for entry in stream.entries(step)}
        if size == (8, 8):
            expected, _ = family.encode_images(pipeline, shapes.pictures(scenes))
            torch.testing.assert_close(latents, expected, rtol=0, atol=1e-6)
        else:
            assert size == (7, 9)
        prompts = [scene.caption for scene in scenes]
        expected = family.encode_prompts(pipeline, prompts)(prompts)
        length = int(expected["prompt_embeds_mask"].sum(dim=1).max())
        mask = conditions["prompt_embeds_mask"]
        assert torch.equal(mask, expected["prompt_embeds_mask"][:, :length])
        embeddings = expected["prompt_embeds"][:, :length] * mask[..., None]
        torch.testing.assert_close(conditions["prompt_embeds"], embeddings, rtol=0, atol=1e-5)
    assert len(seen) == 4 * stream.steps_per_epoch
    held = CachedStream(family, cached, config, 1, 4, held_out=True)
    kept = {entry.key for step in range(held.steps_per_epoch) for entry in held.entries(step)}
    assert kept
    assert not kept & seen


def test_a_stream_is_its_seed_and_step_and_epochs_differ(cached: Path, teacher: Path) -> None:
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    family = get_family("qwen_image", pipeline.transformer.config)
    config = DataConfig(name="webdataset", held_out=0.3, caption_dropout=0.5)
    first, second = (CachedStream(family, cached, config, 5, 4, held_out=False) for _ in range(2))
    steps = first.steps_per_epoch
    late = second(steps + 1)
    for name, value in first(steps + 1).inputs.items():
        assert torch.equal(value, late.inputs[name]) if torch.is_tensor(value) else value == late.inputs[name]
    one, two = ([first.entries(step) for step in range(start, start + steps)] for start in (0, steps))
    assert one != two
    other = CachedStream(family, cached, config, 6, 4, held_out=False)
    assert [other.entries(step) for step in range(steps)] != one
    empty = torch.cat([first(step).inputs["encoder_hidden_states_mask"].sum(dim=1) == 5 for step in range(40)])
    assert 0.35 < empty.float().mean() < 0.65


def test_every_training_runs_without_encoders(command: list[str], cached: Path, teacher: Path, tmp_path: Path) -> None:
    """From a folder that has none of them any more, and the cache alone."""
    bare = tmp_path / "bare"
    shutil.copytree(teacher, bare)
    for name in ("text_encoder", "tokenizer", "vae"):
        shutil.rmtree(bare / name)
    small = ["probe.batch_size=4", "width.num_batches=1", "width.steps=2", "finetune.steps=2", "finetune.batch_size=4"]
    given = ["width.source=given", "width.transformer_blocks.ffn=[0]", "budget.params=0.8", *small, INTERVALS]
    stages = "stages=[probe,depth,width,plan,finetune]"
    settings = [a for a in command if not a.startswith(("data.path", "model.path", "paths.runs_dir"))]
    sources = [f"data.cache={cached}", f"model.path={bare}", f"paths.runs_dir={tmp_path}"]
    succeed(*settings, *sources, "name=trained", *given, stages)
    assert (tmp_path / "trained" / "finetuned" / "ppcl.json").exists()
    outcome = ppcl(
        *settings, *sources, *small, "name=again", "intervals=detect", "stages=[detect]", "method.batch_size=4"
    )
    assert outcome.code == 0, outcome.err


def test_a_second_run_encodes_nothing(command: list[str], cached: Path) -> None:
    before = digests(cached)
    assert "reused" in succeed(*command, "name=again", "stages=[cache]").out
    assert digests(cached) == before


@pytest.mark.parametrize("pattern", ["*/00001.tar-001.json", "*/00001.tar-002.safetensors", "*/00002.tar.json"])
def test_killed_and_resumed_nothing_is_lost_or_repeated(
    command: list[str], cached: Path, tmp_path: Path, pattern: str
) -> None:
    arguments = [*command, f"paths.runs_dir={tmp_path}", "name=killed", "stages=[cache]"]
    assert ppcl_process(pattern, *arguments, python=DIE_AT_RENAME).returncode == 9
    succeed(*arguments)
    assert digests(cache_of(arguments)) == digests(cached)


def test_ranks_share_the_shards(
    command: list[str], cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*command, f"paths.runs_dir={tmp_path}", "name=ranks"]
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        succeed(*arguments, "stages=[cache]")
        if not rank:
            with monkeypatch.context() as alone:
                alone.delenv("WORLD_SIZE")
                outcome = ppcl(*arguments, "stages=[depth]", INTERVALS)
            assert outcome.code == 2
            assert "run 'stages=[cache]' first, to its end" in outcome.err
    assert digests(cache_of(arguments)) == digests(cached)


def test_a_shard_that_is_cut_short_ends_nothing(command: list[str], shards: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(shards, cut)
    whole = (cut / "00000.tar").read_bytes()
    with tarfile.open(cut / "00000.tar") as archive:
        member = archive.getmember("000012.png")
    (cut / "00000.tar").write_bytes(whole[: member.offset_data + 10])
    arguments = [*command, f'data.path="{cut}/{{00000..00002}}.tar"', f"paths.runs_dir={tmp_path}", "name=cut"]
    outcome = succeed(*arguments, "stages=[cache]")
    assert "00000.tar: left out" in outcome.out
    keys = {entry.key for entry in read_entries(cache_of(arguments))}
    assert {f"{number:06d}" for number in range(12)} <= keys
    assert len(keys) in (52, 53)
    assert any("cut short" in item["why"] for item in skipped(cache_of(arguments)))


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_table_does_as_well(command: list[str], tmp_path: Path, kind: str) -> None:
    rows = [{"image": f"pictures/{n}.png", "caption": scene_of(n).caption} for n in range(6)]
    (tmp_path / "pictures").mkdir()
    for number, row in enumerate(rows[:5]):
        (tmp_path / row["image"]).write_bytes(png(scene_of(number)))
    if kind == "csv":
        with (tmp_path / "metadata.csv").open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    arguments = [a for a in command if a != "data=webdataset"]
    arguments += ["data=folder", f"data.path={tmp_path}", f"paths.runs_dir={tmp_path / 'runs'}", "name=table"]
    outcome = succeed(*arguments, "stages=[cache]")
    assert "5 samples of 1 unit cached, 1 left out" in outcome.out
    assert "pictures/5.png: its file cannot be read" in outcome.out
    captions = [
        item["caption"]
        for path in cache_of(arguments).glob("*-000.json")
        for item in json.loads(path.read_text())["samples"]
    ]
    assert captions == [row["caption"] for row in rows[:5]]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.path=/no/shards"], "data.path=/no/shards names no shard"),
        (["data.aspects=['4/3']"], "data.aspects=4/3 is no aspect"),
        (["data.cache=/no/cache"], "data.path, pictures to encode, or data.cache"),
        (["data.samples_per_file=2000"], "data.samples_per_file=2000"),
        (["data=shapes"], "'stages=[cache]' has nothing to encode"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(
    command: list[str], tmp_path: Path, overrides: list[str], said: str
) -> None:
    outcome = ppcl(*command, *overrides, f"paths.runs_dir={tmp_path}", "name=bad", "stages=[cache]")
    assert outcome.code == 2
    assert outcome.err.count("\n") == 1
    assert said in outcome.err
    assert not list(tmp_path.glob("cache/data/*/*"))


def test_a_cache_of_other_encoders_is_refused(command: list[str], cached: Path, tmp_path: Path) -> None:
    from ppcl.families.qwen_image.tiny import build_pipeline

    build_pipeline(5, 6).save_pretrained(tmp_path / "other")
    settings = [a for a in command if not a.startswith(("data.path", "model.path"))]
    sources = [f"data.cache={cached}", f"model.path={tmp_path / 'other'}"]
    outcome = ppcl(*settings, *sources, "name=other", INTERVALS, "stages=[depth]")
    assert outcome.code == 2
    assert "was made by other encoders" in outcome.err


def test_a_full_disk_is_seen_before_anything_is_encoded(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    arguments = [*command, f"paths.runs_dir={tmp_path}", "name=full", "stages=[cache]"]
    outcome = ppcl(*arguments)
    assert outcome.code == 2
    assert "KB free" in outcome.err
    assert read_entries(cache_of(arguments)) == []


def test_numpy_seeds_do_not_matter(cached: Path, teacher: Path) -> None:
    family = get_family("qwen_image")
    config = DataConfig(name="webdataset", held_out=0.3)
    np.random.seed(0)
    one = CachedStream(family, cached, config, 5, 4, held_out=False).entries(1)
    np.random.seed(1)
    assert CachedStream(family, cached, config, 5, 4, held_out=False).entries(1) == one
