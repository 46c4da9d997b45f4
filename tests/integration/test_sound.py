"""A model of video and sound: its sound is recorded, learnt and judged as its video is. LTX-2 at tiny size."""

from __future__ import annotations

import pytest
import torch
from commands import succeed
from safetensors.torch import load_file

from ppcl.command import prepare
from ppcl.context import Run
from ppcl.data.batches import TrainingBatch
from ppcl.data.recording.files import read_call, record_of
from ppcl.variants.costs import velocities, velocity_error
from tests.pipelines_tiny import ltx2
from tests.pipelines_tiny.chain import SHORT

HEADS = ("proj_out", "audio_proj_out")


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Every setting but the stages: a pipeline of LTX-2, and two prompts."""
    folder = tmp_path_factory.mktemp("sound")
    (folder / "prompts.txt").write_text("rain on a roof\na dog barks\n")
    teacher = ltx2.build(folder / "teacher")
    paths = [f"model.path={teacher}", f"data.path={folder / 'prompts.txt'}", f"paths.runs_dir={folder}"]
    return ["model=auto", "name=run", *paths, *SHORT, *ltx2.SETTINGS]


@pytest.fixture(scope="module")
def recording(command: list[str]) -> Run:
    succeed(*command, "stages=[cache]")
    return prepare(command)


@pytest.fixture
def batch(recording: Run) -> TrainingBatch:
    return recording.data.stream(0, 2).divided(0, 1)[0]


def test_a_call_has_its_video_and_its_sound(recording: Run) -> None:
    call = read_call(record_of(recording.data.cache_folder, 0), 0)
    with torch.no_grad():
        wanted = recording.teacher.transformer(**call.arguments)
    assert all(torch.equal(call.output[str(number)], wanted[number]) for number in range(2))
    assert torch.equal(call.first_output, wanted[0])


def test_the_teacher_predicts_its_recorded_targets(recording: Run, batch: TrainingBatch) -> None:
    (found,) = velocities(recording.teacher.transformer, [batch])
    torch.testing.assert_close(found, batch.target, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_an_error_of_the_sound_counts_as_one_of_the_video(
    recording: Run, batch: TrainingBatch, head: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that predicts nothing for one of them has that one's mean square as its error."""
    model = recording.teacher.transformer
    with torch.no_grad():
        squares = {name: output.square().mean() for name, output in zip(HEADS, model(**batch.inputs), strict=True)}
        targets = velocities(model, [batch])
        for parameter in model.get_submodule(head).parameters():
            monkeypatch.setattr(parameter, "data", torch.zeros_like(parameter))
        found = velocity_error(model, [batch], targets)
    assert found == pytest.approx((squares[head] / sum(squares.values())).item(), rel=1e-4)


def test_fine_tuning_learns_the_sound(command: list[str], recording: Run) -> None:
    """The output head of the sound is trained, which only an error of the sound can do."""
    settings = ["intervals.transformer_blocks=[[1,3]]", "finetune.steps=2", "finetune.batch_size=2"]
    settings += ["finetune.feature_weight=0"]
    outcome = succeed(*command, *settings, "stages=[depth,finetune]")
    assert "held-out velocity error" in outcome.out
    tuned = load_file(recording.folder / "finetuned" / "transformer" / "diffusion_pytorch_model.safetensors")
    for head in HEADS:
        own = recording.teacher.transformer.get_submodule(head).weight
        assert not torch.equal(tuned[f"{head}.weight"], own)
