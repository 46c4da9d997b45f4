"""Pictures and captions are encoded once; after that no stage loads what encoded them."""

from __future__ import annotations

import csv
import io
import json
import re
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

from ppcl.artifacts.probes import Probes
from ppcl.artifacts.samples import load_sample, load_samples
from ppcl.command import prepare
from ppcl.config import DataConfig
from ppcl.data.cached import CachedStream, held_out_keys, held_out_share, read_entries
from ppcl.data.sources import Sample, find_units
from ppcl.data.worlds import shapes
from ppcl.errors import UsageError
from ppcl.families.registry import get_family
from ppcl.methods.probes import fit_probes

SHARDS, PER_SHARD = 3, 20
BAD = ("no caption", "no picture", "does not decode", "below data.min_text_accuracy", "its .json does not read as JSON")


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
    outcome = succeed(*command, "name=cached", "stages=[cache]")
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
        latents, size, conditions = stream.samples(step, range(4), [False] * 4)
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
    texts = [first(step).inputs for step in range(40)]
    masks = [each["encoder_hidden_states_mask"] for each in texts]  # None where nothing is padded
    lengths = [
        each["encoder_hidden_states"].new_full((4,), each["encoder_hidden_states"].shape[1]) if m is None else m.sum(1)
        for each, m in zip(texts, masks, strict=True)
    ]
    assert 0.35 < (torch.cat(lengths) == 5).float().mean() < 0.65


@pytest.mark.parametrize(("ratio", "size"), [(1.0, (8, 8)), (1.4, (7, 9)), (16 / 9, (7, 9))])
def test_what_is_timed_has_the_shape_that_is_drawn(cached: Path, ratio: float, size: tuple[int, int]) -> None:
    examples = [stream_of(cached, batch, held_out=True).example(ratio) for batch in (1, 4)]
    assert all(example.inputs["img_shapes"] == [[(1, *size)]] for example in examples)
    assert torch.equal(examples[0].inputs["encoder_hidden_states"], examples[1].inputs["encoder_hidden_states"])
    assert examples[0].inputs["encoder_hidden_states_mask"] is None


def stream_of(cached: Path, batch_size: int, *, held_out: bool, share: float | None = 0.3) -> CachedStream:
    """A stream of the cache of sixty, whose source is said to be PICTURES."""
    config = DataConfig(name="webdataset", path="PICTURES", held_out=share)
    return CachedStream(get_family("qwen_image", {}), cached, config, 5, batch_size, held_out=held_out)


def test_a_batch_larger_than_any_size_has_pictures_several_times(cached: Path, teacher: Path) -> None:
    """Each as often as the others in an epoch, in batches of one size, and each time with noise of its own."""
    pipeline = DiffusionPipeline.from_pretrained(teacher)
    config = DataConfig(name="webdataset", held_out=0.3)
    family = get_family("qwen_image", pipeline.transformer.config)
    stream = CachedStream(family, cached, config, 5, 48, held_out=False)
    samples = [entry for entries in stream.buckets.values() for entry in entries]
    assert len(stream.buckets) == 2
    assert stream.steps_per_epoch == len(samples) < 48
    batches = [stream.entries(step) for step in range(stream.steps_per_epoch)]
    assert all(len(batch) == 48 and len({entry.size for entry in batch}) == 1 for batch in batches)
    drawn = [entry.key for batch in batches for entry in batch]
    assert {key: drawn.count(key) for key in drawn} == dict.fromkeys([entry.key for entry in samples], 48)
    keys = [entry.key for entry in batches[0]]
    first, second = (row for row, key in enumerate(keys) if key == keys[0] and keys[:row].count(key) < 2)
    batch = stream(0)
    assert batch.sigmas[first] != batch.sigmas[second]
    assert not torch.equal(batch.target[first], batch.target[second])
    assert stream.entries(stream.steps_per_epoch) != batches[0]


def test_sizes_that_fill_a_batch_have_no_picture_twice(cached: Path) -> None:
    """What fills none is left out then, as ever: batches of large sets are the same as they always were."""
    stream = stream_of(cached, 20, held_out=False)
    sizes = sorted(len(entries) for entries in stream.buckets.values())
    assert sizes[0] < 20 <= sizes[1]
    assert stream.steps_per_epoch == 1
    assert len({entry.key for entry in stream.entries(0)}) == 20
    assert stream.remark == (
        f"20 of {sum(sizes)} samples fill batches of 20 of one size; {sizes[1] - 20} more wait for another epoch; "
        f"{sizes[0]} are in no batch, as fewer than 20 have their size (fewer data.aspects help)"
    )
    assert not stream_of(cached, 1, held_out=False).remark


@pytest.mark.parametrize(
    ("count", "share"), [(1, 0.2), (160, 0.2), (200, 0.16), (1600, 0.02), (1_000_000, 0.02), (0, 0.2)]
)
def test_by_default_32_samples_are_held_out_within_bounds(count: int, share: float) -> None:
    assert held_out_share(DataConfig(held_out=None), count) == share
    assert held_out_share(DataConfig(held_out=0.07), count) == 0.07


def test_one_sample_is_held_out_where_chance_gives_none(cached: Path) -> None:
    kept, rest = (stream_of(cached, 1, held_out=held, share=1e-9) for held in (True, False))
    assert (kept.steps_per_epoch, rest.steps_per_epoch) == (1, 59)
    (entry,) = kept.entries(0)
    # The first one that a larger share would take.
    assert all(entry.key in held_out_keys([e.key for e in read_entries(cached)], share) for share in (0.02, 0.1, 0.5))


def test_one_sample_is_left_for_training_where_chance_leaves_none() -> None:
    keys = [key for key in map(str, range(100)) if key in held_out_keys([*map(str, range(100))], 0.2)]
    assert len(held_out_keys(keys[:2], 0.2)) == len(held_out_keys(keys[:2] * 2, 0.2)) == 1
    assert held_out_keys(keys, 0.2) < set(keys)
    assert held_out_keys(keys[:1], 0.2) == set(keys[:1])  # a single sample is refused, with a remedy
    assert held_out_keys(keys, 0.999999) == set(keys)  # so is what the user asks for


def test_only_an_empty_set_is_refused(cached: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.held_out=0\.999999 keeps all 60 samples of data\.path=PICTURES"):
        stream_of(cached, 4, held_out=False, share=0.999999)
    for name in ("cache.json", "empty.safetensors"):
        shutil.copy(cached / name, tmp_path)
    with pytest.raises(UsageError, match=r"data\.path=PICTURES has no sample that could be used"):
        stream_of(tmp_path, 4, held_out=True)


def test_a_few_pictures_go_through_probes_and_training(command: list[str], tmp_path: Path) -> None:
    """With the default share, which artifacts carry as the number that it comes to."""
    folder = tmp_path / "few"
    folder.mkdir()
    rows = ["image,caption"]
    for number in range(9):
        (folder / f"{number}.png").write_bytes(png(scene_of(number)))
        rows.append(f"{number}.png,{scene_of(number).caption}")
    (folder / "metadata.csv").write_text("\n".join(rows))
    settings = [a for a in command if not a.startswith(("data", "paths.runs_dir"))]
    few = [*settings, "data=folder", f"data.path={folder}", f"paths.runs_dir={tmp_path}", "name=few", INTERVALS]
    large = ["probe.batch_size=32", "distill.batch_size=16", "stages=[cache,probe,depth]"]
    said = succeed(*few, *large).out
    assert "9 samples of 1 unit cached" in said
    record = json.loads((tmp_path / "few" / "plugs" / "transformer_blocks.1-2.json").read_text())
    assert record["made_from"]["data"]["held_out"] == 0.2
    assert succeed(*few, *large, "data.held_out=0.2").out.count("reused") == 3
    outcome = ppcl(*few, *large, "data.held_out=0.02")
    assert outcome.code == 2
    assert "data.held_out=0.2, now 0.02" in outcome.err
    outcome = ppcl(*few, f"paths.cache_dir={tmp_path / 'none'}", "stages=[probe]")
    assert "run 'stages=[cache]' first" in outcome.err


def test_probes_are_fitted_to_samples_of_training_and_judged_on_others(command: list[str]) -> None:
    few = ["probe.num_batches=2", "probe.num_heldout_batches=1", "probe.batch_size=4", "probe.train_steps=0"]
    succeed(*command, *few, "name=fitted", "stages=[cache,probe]")
    run = prepare([*command, *few, "name=fitted"])
    fitted, judged = (run.data.stream(run.config.data.calibration_seed, 4, held_out=which) for which in (False, True))
    assert not fitted.names(range(8)) & judged.names(range(8))
    parts = [fitted(0), fitted(1)], [judged(2)]
    fits = fit_probes(run.family, run.teacher.transformer, *parts, ridge=run.config.probe.ridge, bias=True)
    probes = Probes.load(run.probe_folder)
    for fit in fits:
        assert torch.equal(probes.weights[fit.key], fit.weight)
        assert probes.residuals[fit.key] == fit.residual.value


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
    outcome = succeed(*settings, *sources, "name=trained", *given, stages)
    said = re.findall(r"samples fill batches of (\d+)", outcome.out)
    assert 0 < len(said) == len({*said})  # once for each size of a batch
    assert (tmp_path / "trained" / "finetuned" / "ppcl.json").exists()
    outcome = ppcl(
        *settings, *sources, *small, "name=again", "intervals=detect", "stages=[detect]", "method.batch_size=4"
    )
    assert outcome.code == 0, outcome.err


def test_pictures_are_drawn_while_it_trains_without_text_encoder(
    command: list[str], cached: Path, teacher: Path, tmp_path: Path
) -> None:
    """Of cached captions of several sizes. Of the encoders, only the VAE is loaded."""
    settings = [a for a in command if not a.startswith(("data.path", "model.path", "paths.runs_dir"))]
    drawing = ["watch.share=1000", "watch.pictures=1", "watch.picture_steps=2", INTERVALS, "stages=[depth]"]
    drawing += [f"data.cache={cached}", f"paths.runs_dir={tmp_path}"]
    succeed(*settings, *drawing, f"model.path={teacher}", "name=drawn")
    ((folder, record),) = load_samples(tmp_path / "drawn")["depth"]
    assert record.steps == [0, 6]
    captions = {scene_of(number).caption for number in range(SHARDS * PER_SHARD)}
    assert len(record.prompts) == 4
    assert {*record.prompts} <= captions
    assert {load_sample(path).size for path in folder.glob("*.png")} == {(32, 32), (36, 28)}
    run = prepare([*settings, *drawing, f"model.path={teacher}", "name=loaded"])
    run.teacher.enter("depth")
    assert run.teacher.pipeline.vae is None
    decoder = run.teacher.decoder()
    assert [name for name in ("vae", "text_encoder", "transformer") if getattr(decoder, name) is not None] == ["vae"]
    bare = tmp_path / "bare"
    shutil.copytree(teacher, bare, ignore=shutil.ignore_patterns("text_encoder", "tokenizer", "vae"))
    assert f"{bare} has no VAE" in succeed(*settings, *drawing, f"model.path={bare}", "name=without").out
    assert not load_samples(tmp_path / "without")


def test_a_second_run_encodes_nothing(command: list[str], cached: Path) -> None:
    before = digests(cached)
    assert "reused" in succeed(*command, "name=again", "stages=[cache]").out
    assert digests(cached) == before


def test_an_upgrade_of_the_libraries_does_not_encode_everything_again(
    command: list[str], cached: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusers.__version__", "99.0")
    for stage in ("cache", "probe"):
        outcome = ppcl(*command, "name=upgraded", f"stages=[{stage}]")
        assert outcome.code == 2
        assert re.search(rf"not 99.0 and .*use it by data.cache={cached} data.path=null", outcome.err)
    use = re.search(r"data.cache=\S+ data.path=null data.given=null", outcome.err)[0].split()
    succeed(*command, *use, "name=upgraded", f"paths.cache_dir={tmp_path}", "stages=[probe]")


def test_sides_of_pictures_that_have_the_same_area_share_a_cache(command: list[str], cached: Path) -> None:
    sides = ["model.sampling.height=64", "model.sampling.width=16"]
    assert f"reused {cached}" in succeed(*command, *sides, "name=sides", "stages=[cache]").out


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


@pytest.mark.parametrize("name", ["pipe:touch made; cat shard.tar", "http:.tar", "file:shard.tar", "s3:shard.tar"])
def test_the_name_of_a_shard_is_the_name_of_a_file(
    command: list[str], shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """A shell would run what follows `pipe:`."""
    (first, *_) = sorted(shards.glob("*.tar"))
    for folder in (tmp_path / "plain", tmp_path / "odd"):
        folder.mkdir()
    shutil.copy(first, tmp_path / "plain" / "shard.tar")
    shutil.copy(first, tmp_path / "odd" / (name if name.endswith(".tar") else f"{name}.tar"))
    found = []
    for folder in ("plain", "odd"):
        monkeypatch.chdir(tmp_path / folder)
        units = find_units(DataConfig(name="webdataset", path="."))
        found.append([sample for unit in units for sample in unit.read(DataConfig())])
    assert not (tmp_path / "odd" / "made").exists()
    assert found[0] == found[1]
    assert any(isinstance(sample, Sample) for sample in found[0])


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
        (["data.aspects=['4/3']"], "data.aspects=4/3 is not an aspect ratio"),
        (["data.cache=/no/cache"], "and data.cache=/no/cache are both given: leave one out"),
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
