"""From a file of prompts alone: the pipeline's own calls are recorded, and every later stage learns from them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import DIE_AT_RENAME, INTERVALS, digests, ppcl, ppcl_process, succeed
from PIL import Image
from safetensors.torch import save_file

from ppcl.command import prepare
from ppcl.context import Run
from ppcl.data.recording.files import read_call, read_entries, read_joining, record_of
from ppcl.data.recording.passes import with_passes
from ppcl.data.recording.renoise import Renoising
from ppcl.data.recording.stream import RecordedStream, RenoisedStream, kept_prompts
from ppcl.data.recording.training import RecordedData
from ppcl.paths import ASSETS

PROMPTS = ["a red circle", "a blue square", "a green triangle", "a red cross", "two red circles", "a red square"]
PROMPTS += ["a blue circle to the left of a red square", "a circle"]
STEPS, RECORDED = 5, 3
GUIDED = "model.sampling.true_cfg_scale=2"


def table(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "prompts.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture(scope="module", params=["tiny_flux", "tiny_qwen_image"])
def command(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Every setting but the stages: a teacher that is shipped, and eight prompts."""
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    return [
        f"model={request.param}",
        f"model.sampling.num_inference_steps={STEPS}",
        GUIDED,
        f"data.path={folder / 'prompts.txt'}",
        f"data.record_steps={RECORDED}",
        "data.renoise=false",
        f"paths.runs_dir={folder}",
        *("name=run", "logger=none", "trainer=cpu", "trainer.num_threads=1", "trainer.progress=false"),
        *("probe.num_batches=2", "probe.num_heldout_batches=1", "probe.batch_size=4", "method.min_cka=0"),
        *("method.num_samples=4", "method.num_timesteps=2", "method.batch_size=4"),
        *("distill=tiny", "distill.steps=4", "distill.batch_size=4"),
    ]


@pytest.fixture(scope="module")
def recording(command: list[str]) -> Run:
    """A run of that command with its prompts recorded."""
    succeed(*command, "stages=[cache]")
    return run_of(*command)


def run_of(*arguments: str) -> Run:
    return prepare(list(arguments))


def data_of(run: Run) -> RecordedData:
    assert isinstance(run.data, RecordedData)
    return run.data


def calls_of(run: Run) -> list[Any]:
    folder = run.data.cache_folder
    entries = read_entries(folder, data_of(run).count, read_joining(folder).axes)
    return [read_call(entry.record, entry.number) for entry in entries]


def stream_of(run: Run, batch_size: int, seed: int = 0) -> RecordedStream:
    stream = run.data.stream(seed, batch_size)
    assert isinstance(stream, RecordedStream)
    return stream


def test_both_passes_of_guidance_are_recorded_at_each_step(recording: Run) -> None:
    record = json.loads(record_of(recording.data.cache_folder, 0).read_text())
    steps = [call["step"] for call in record["calls"]]
    assert len(steps) == 2 * len({*steps}) == 2 * RECORDED
    first, second = (call["arguments"]["dict"] for call in record["calls"][:2])
    assert first["hidden_states"] == second["hidden_states"]  # stored once
    assert first["encoder_hidden_states"] != second["encoder_hidden_states"]
    sigmas = [call["sigma"] for call in record["calls"]]
    assert sigmas == sorted(sigmas, reverse=True)
    assert min(sigmas) > 0
    assert max(sigmas) <= 1


def test_a_recorded_call_gives_the_recorded_output_exactly(recording: Run) -> None:
    transformer = recording.teacher.transformer
    for call in calls_of(recording)[::7]:
        with torch.no_grad():
            assert torch.equal(transformer(**call.arguments)[0], call.output)


def test_a_batch_is_as_its_calls_apart(recording: Run) -> None:
    stream, transformer = stream_of(recording, 16), recording.teacher.transformer
    assert stream.group == (2 if len(stream.buckets) > 1 else 16)
    for batch in stream.divided(0, 1):
        with torch.no_grad():
            output = batch.prediction(transformer(**batch.inputs)[0])
        torch.testing.assert_close(output, batch.target, rtol=1e-4, atol=1e-4)
        assert len(output) == len(batch.sigmas) == stream.group
        assert batch.teacher is batch.target


def test_the_pass_of_guidance_that_prompts_share_is_told_from_the_other(recording: Run) -> None:
    """By what it is given: the text of the second call of each step is the empty prompt's."""
    folder = recording.data.cache_folder
    joining = read_joining(folder)
    entries = with_passes(read_entries(folder, data_of(recording).count, joining.axes), joining)
    assert [entry.unguided for entry in entries] == [False, True] * (RECORDED * len(PROMPTS))
    alone = with_passes(read_entries(folder, 1, joining.axes), joining)  # a prompt alone does not show it
    assert not any(entry.unguided for entry in alone)


@pytest.mark.parametrize(("share", "least", "most"), [(0.0, 0.0, 0.0), (0.25, 0.2, 0.35), (1.0, 1.0, 1.0)])
def test_steps_have_their_share_of_unguided_calls(
    command: list[str], recording: Run, share: float, least: float, most: float
) -> None:
    stream = stream_of(run_of(*command, f"data.caption_dropout={share}"), 8)
    found = [[entry.unguided for entry in stream._of_step(step)] for step in range(24)]
    assert least <= sum(map(sum, found)) / (24 * 8) <= most
    if least < most:
        assert not any(map(all, found)), "a step of one pass of guidance alone"
    assert all(len({entry.name for entry in stream._of_step(step)}) > 4 for step in range(24))


def test_calibration_has_guided_calls_alone(command: list[str], recording: Run) -> None:
    for run in (recording, run_of(*command, "data.renoise=true")):
        stream = stream_of(run, 4)
        empty = [read_call(entry.record, entry.number) for entry in stream.entries if entry.unguided]
        for batch in stream.calibration(6, 4):
            text = batch.inputs["encoder_hidden_states"]
            for call in empty:
                own = call.arguments["encoder_hidden_states"]
                assert own.shape[1:] != text.shape[1:] or not (own == text).flatten(1).all(1).any()


def test_parts_and_ranks_divide_a_step_without_change(recording: Run) -> None:
    whole = stream_of(recording, 4).divided(3, 1)
    parts = stream_of(recording, 4).divided(3, 4)
    assert [len(part.sigmas) for part in parts] == [1] * 4
    assert torch.equal(torch.cat([part.target for part in parts]), torch.cat([batch.target for batch in whole]))
    shared = []
    for rank in range(2):
        stream = stream_of(recording, 4)
        stream.share = rank, 2
        shared += stream.divided(3, 1)
    assert torch.equal(torch.cat([part.target for part in shared]), torch.cat([batch.target for batch in whole]))


def test_held_out_prompts_are_apart_from_training(recording: Run) -> None:
    kept = {*data_of(recording).held_out_prompts()}
    held_out, trained = (stream_of(recording, 2, seed) for seed in (1, 0))
    assert kept == {caption for step in range(20) for caption in held_out.captions(step)}
    assert {*PROMPTS} - kept == {caption for step in range(40) for caption in trained.captions(step)}


def test_calibration_goes_from_high_to_low_noise(recording: Run) -> None:
    sigmas = torch.cat([batch.sigmas for batch in stream_of(recording, 4).calibration(6, 3)])
    assert len(sigmas) == 18
    assert sigmas[:6].mean() > sigmas[-6:].mean()


def test_everything_learns_from_it_without_encoders(command: list[str], recording: Run, tmp_path: Path) -> None:
    """From a folder that has none, and the recording alone."""
    bare = tmp_path / "bare"
    shutil.copytree(ASSETS / recording.config.model.name, bare)
    for part in [*bare.glob("text_encoder*"), *bare.glob("tokenizer*"), bare / "vae"]:
        shutil.rmtree(part)
    own = [a for a in command if not a.startswith(("model=", "data.path", "paths.runs_dir"))]
    sources = ["model=auto", f"model.path={bare}", f"data.cache={recording.data.cache_folder}"]
    outcome = ppcl(*own, *sources, "stages=[probe]")
    assert "was recorded with model.dtype='float32', now 'bfloat16'" in outcome.err
    sources.append("model.dtype=float32")
    short = ["finetune.steps=2", "finetune.batch_size=4", f"paths.runs_dir={tmp_path}"]
    outcome = succeed(*own, *sources, *short, "stages=[probe,detect,depth,finetune]")
    assert "held-out velocity error" in outcome.out
    assert (tmp_path / "run" / "finetuned" / "ppcl.json").exists()


def test_a_second_command_records_nothing(command: list[str], recording: Run) -> None:
    before = digests(recording.data.cache_folder)
    outcome = succeed(*command, "stages=[cache]")
    assert "reused" in outcome.out
    assert digests(recording.data.cache_folder) == before


@pytest.mark.parametrize("pattern", ["*/000002.json", "*/joining.json"])
def test_killed_and_resumed_the_files_are_the_same(
    command: list[str], recording: Run, tmp_path: Path, pattern: str
) -> None:
    arguments = [*command, f"paths.runs_dir={tmp_path}", "stages=[cache]"]
    assert ppcl_process(pattern, *arguments, python=DIE_AT_RENAME).returncode == 9
    succeed(*arguments)
    found = run_of(*arguments).data.cache_folder
    assert digests(found) == digests(recording.data.cache_folder)


def test_ranks_share_the_prompts(
    command: list[str], recording: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [*command, f"paths.runs_dir={tmp_path}"]
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        succeed(*arguments, "stages=[cache]")
    assert digests(run_of(*arguments).data.cache_folder) == digests(recording.data.cache_folder)


def test_a_changed_file_of_prompts_records_what_has_changed(command: list[str], recording: Run, tmp_path: Path) -> None:
    changed = [*PROMPTS[:2], "a red triangle", *PROMPTS[3:6]]
    (tmp_path / "prompts.txt").write_text("\n".join(changed))
    own = [*command, f"data.path={tmp_path / 'prompts.txt'}", "stages=[cache]"]
    shutil.copytree(recording.data.cache_folder.parent, tmp_path / "old" / "recordings")
    folders = []
    for cache, said in (("old", "5 prompts taken from earlier recordings"), ("new", "6 prompts recorded")):
        arguments = [*own, f"paths.cache_dir={tmp_path / cache}", f"name={cache}"]
        outcome = succeed(*arguments)
        assert said in outcome.out
        folders.append(run_of(*arguments).data.cache_folder)
    assert digests(folders[0]) == digests(folders[1])
    assert "1 prompt recorded" not in succeed(*own, f"paths.cache_dir={tmp_path / 'old'}", "name=old").out


def test_damaged_prompts_of_an_earlier_recording_are_drawn(command: list[str], recording: Run, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:3]))
    old = tmp_path / "cache" / "recordings" / recording.data.cache_folder.name
    shutil.copytree(recording.data.cache_folder, old)
    (old / "000001.safetensors").write_bytes((old / "000001.safetensors").read_bytes()[:-9])
    (old / "joining.json").write_text("{")
    outcome = succeed(
        *command, f"data.path={tmp_path / 'prompts.txt'}", f"paths.cache_dir={tmp_path / 'cache'}", "stages=[cache]"
    )
    assert "2 prompts taken from earlier recordings" in outcome.out
    assert "joined into batches" in outcome.out


OTHERS = ["seed=7", "model.sampling.num_inference_steps=4", "data.record_steps=2", "model.sampling.guidance_scale=9"]


@pytest.mark.parametrize("other", OTHERS)
def test_another_recording_has_another_fingerprint(command: list[str], recording: Run, other: str) -> None:
    assert run_of(*command, other).data.cache_header.fingerprint != recording.data.cache_header.fingerprint
    outcome = ppcl(*command, other, "name=other", "stages=[probe]")
    assert "run 'stages=[cache]' first" in outcome.err


def test_a_damaged_file_is_refused_and_made_again(command: list[str], recording: Run, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(Path(recording.config.paths.cache_dir) / "recordings", cache / "recordings")
    arguments = [*command, f"paths.cache_dir={cache}", "name=damaged"]
    for path in (cache / "recordings").glob("*/*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    outcome = ppcl(*arguments, "stages=[probe]")
    assert outcome.code == 2
    assert re.search(r"has changed since it was written: delete it and run 'stages=\[cache\]' again", outcome.err)
    for path in (cache / "recordings").glob("*/*.safetensors"):
        path.unlink()
    succeed(*arguments, "stages=[cache]")
    assert digests(cache / "recordings") == digests(recording.data.cache_folder.parent)


# Fresh noise


def test_recorded_noise_makes_the_recorded_first_step_anew(recording: Run) -> None:
    """At sigma 1 a call with its own noise is the recorded one. At another level it has that level's timestep."""
    joining = read_joining(recording.data.cache_folder)
    assert joining.renoising is not None
    renoising = Renoising(**joining.renoising)
    first = next(call for call in calls_of(recording) if call.sigma == 1)
    noise = first.arguments["hidden_states"]
    made = renoising.arguments(first, noise, 1.0)
    for name, value in first.arguments.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(made[name], value)
    assert renoising.arguments(first, noise, 0.25)["timestep"].tolist() == pytest.approx([0.25])


def test_calls_with_fresh_noise_are_what_the_model_knows(command: list[str], recording: Run) -> None:
    """Its velocity is near n - x_0, and a part of a batch has the noise that it has in the whole."""
    run = run_of(*command, "data.renoise=null")
    stream = run.data.stream(0, 4)
    assert isinstance(stream, RenoisedStream)
    parts = stream.divided(2, 4)
    for batch in parts:
        assert batch.teacher is None
        with torch.no_grad():
            output = batch.prediction(run.teacher.transformer(**batch.inputs)[0])
        assert torch.cosine_similarity(output.flatten(), batch.target.flatten(), dim=0) > 0.5
        assert batch.inputs["timestep"].tolist() == pytest.approx(batch.sigmas.tolist(), abs=1e-5)
    whole = torch.cat([batch.target for batch in stream.divided(2, 1)])
    assert torch.equal(whole, torch.cat([part.target for part in parts]))
    levels = [batch.sigmas.max().item() for batch in stream.calibration(2, 3)]
    assert levels == sorted(levels, reverse=True)
    assert run.data.identity["renoise"] is True
    assert "renoise" not in recording.data.identity


def test_fresh_noise_is_refused_where_the_recording_shows_none(few: list[str], tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("a red circle\na blue square\n3\n")
    source = [f"data.path={tmp_path / 'classes.txt'}", f"paths.runs_dir={tmp_path}", "name=ddpm"]
    outcome = succeed("model=tiny_dit", *few, *source, "stages=[cache]")
    assert "recorded noise levels alone: its scheduler is not of flow matching" in outcome.out
    outcome = ppcl("model=tiny_dit", *few, *source, "data.renoise=true", "stages=[probe]")
    assert "data.renoise=true does not go with this model" in outcome.err


# Tables


@pytest.fixture
def few() -> list[str]:
    return [f"model.sampling.num_inference_steps={STEPS}", "logger=none", "trainer=cpu", "trainer.num_threads=1"]


def test_a_table_gives_pictures_to_an_edit_model(few: list[str], tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    rows = [{"prompt": f"make it {colour}", "image": "red.png"} for colour in ("blue", "green", "red")]
    source = [f"data.path={table(tmp_path, *rows)}", f"paths.runs_dir={tmp_path}", "name=edit"]
    small = ["probe.num_batches=1", "probe.num_heldout_batches=1", "probe.batch_size=2"]
    succeed("model=tiny_qwen_image_edit", *few, *source, *small, "stages=[cache,probe]")
    run = run_of("model=tiny_qwen_image_edit", *few, *source)
    (batch,) = stream_of(run, 2).divided(0, 2)[:1]
    given, predicted = batch.inputs["hidden_states"], batch.target
    assert given.shape[1] == 2 * predicted.shape[1]  # tokens of the given picture are no part of the target


def test_a_table_gives_embeddings_without_a_text_encoder(settings: list[str], teacher: Path, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(teacher)
    rows = []
    for number, prompt in enumerate(PROMPTS[:3]):
        embeddings, _ = pipeline.encode_prompt([prompt])
        save_file({"prompt_embeds": embeddings.contiguous()}, tmp_path / f"{number}.safetensors")
        rows.append({"prompt_embeds": f"{number}.safetensors"})
    source = [f"data.path={table(tmp_path, *rows)}", f"paths.runs_dir={tmp_path}", "model.sampling.true_cfg_scale=1"]
    succeed(*settings, *source, "name=embedded", "stages=[cache]")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS[:3]))
    succeed(*settings, *source, f"data.path={tmp_path / 'prompts.txt'}", "name=text", "stages=[cache]")
    by_table, by_text = sorted((tmp_path / "cache" / "recordings").glob("*/000001.safetensors"))
    assert by_table.stat().st_size == by_text.stat().st_size


def test_a_model_of_classes_takes_their_names(few: list[str], tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("a red circle\na blue square\n3\n")
    source = [f"data.path={tmp_path / 'classes.txt'}", f"paths.runs_dir={tmp_path}", "name=classes"]
    succeed("model=tiny_dit", *few, *source, "stages=[cache]")
    run = run_of("model=tiny_dit", *few, *source)
    transformer = run.teacher.transformer
    for batch in stream_of(run, 2).divided(0, 1):
        with torch.no_grad():
            output = batch.prediction(transformer(**batch.inputs)[0])
        torch.testing.assert_close(output, batch.target, rtol=1e-4, atol=1e-4)
    (tmp_path / "classes.txt").write_text("a red circle\na purple elephant\n")
    outcome = ppcl("model=tiny_dit", *few, *source, "stages=[cache]")
    assert "line 2: 'a purple elephant' is no class" in outcome.err


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.txt", "\n", "holds no prompt; write one a line"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": }', "line 2 is no JSON object"),
        ("p.jsonl", '{"promt": "a circle"}', "line 1: promt is no argument of the pipeline"),
        ("p.jsonl", '{"prompt": "a", "height": "64"}', "line 1: height is the text '64': write a number, without"),
        ("p.jsonl", '{"prompt": "a", "num_inference_steps": 0}', "line 1: num_inference_steps is 0: raise it to 1"),
        ("p.jsonl", '{"prompt": "a", "guidance_scale": NaN}', "line 1: guidance_scale is nan: write a finite number."),
        ("p.jsonl", '{"prompt": "a", "callback_on_step_end": "f"}', "line 1: callback_on_step_end is a function"),
        ("p.txt", "a circle\n\n", "holds one prompt, and one is kept from training: give two or more"),
        ("p.txt", "caf\u00e9", "is not UTF-8"),
    ],
)
def test_bad_prompts_are_refused_before_weights_are_loaded(
    few: list[str], tmp_path: Path, name: str, content: str, said: str
) -> None:
    (tmp_path / name).write_text(content, encoding="latin-1")
    source = [f"data.path={tmp_path / name}", f"paths.runs_dir={tmp_path}", "name=bad"]
    outcome = ppcl("model=tiny_flux", *few, *source, "stages=[cache,probe]")
    assert outcome.code == 2
    assert said in outcome.err
    assert "Traceback" not in outcome.err


def test_what_the_pipeline_itself_refuses_is_told_with_its_line(few: list[str], tmp_path: Path) -> None:
    rows = [{"prompt": "a circle"}, {"prompt": "a circle", "prompt_embeds": 3}]
    source = [f"data.path={table(tmp_path, *rows)}", f"paths.runs_dir={tmp_path}", "name=bad"]
    outcome = ppcl("model=tiny_flux", *few, *source, "stages=[cache]")
    assert outcome.code == 2
    assert "line 2: the pipeline refuses its arguments" in outcome.err


def test_prompts_of_one_text_are_kept_from_training_one_by_one() -> None:
    """As with an instruction for many pictures. Where there are enough texts they stay together."""
    for captions in (["make it red"] * 40, ["make it red", "make it blue"] * 20):
        assert 0 < len(kept_prompts(captions, 0.2)) < 20
    captions = [f"a number {number % 20}" for number in range(100)]
    kept = kept_prompts(captions, 0.2)
    assert 0 < len(kept) < 50
    assert kept == {number for number in range(100) if number % 20 in {other % 20 for other in kept}}
    assert len(kept_prompts(["a", "b"], 0.2)) == 1


def test_joined_batches_train_as_divided_ones(command: list[str], recording: Run) -> None:
    losses = []
    for accumulate in (1, 4):
        name = f"accumulate{accumulate}"
        succeed(*command, f"name={name}", INTERVALS, f"distill.accumulate={accumulate}", "stages=[depth]")
        plug = json.loads((recording.folder.parent / name / "plugs" / "transformer_blocks.1-2.json").read_text())
        losses.append(plug["losses"]["heldout_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
