"""Pipelines that make both passes of guidance in one call: the rows of a call become calls of their own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import ppcl, succeed
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ppcl.artifacts.files import CHECKSUM
from ppcl.command import prepare
from ppcl.context import Run
from ppcl.data.recording.files import ARGUMENTS, OUTPUT, Call, read_call, read_entries, read_joining
from ppcl.data.recording.nested import NoAxesError, row_of
from ppcl.data.recording.passes import row_of_call, with_passes
from ppcl.data.recording.recorder import rows_of
from ppcl.data.recording.stream import RecordedStream
from tests.pipelines_tiny import stable_diffusion_3
from tests.pipelines_tiny.chain import SHORT

PROMPTS = ["a red circle", "a blue square", "a cat", "a dog", "two dogs"]
PATHS = (ARGUMENTS, OUTPUT)


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Every setting but the stages: a pipeline of Stable Diffusion 3, and five prompts."""
    folder = tmp_path_factory.mktemp("passes")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    teacher = stable_diffusion_3.build(folder / "teacher")
    paths = [f"model.path={teacher}", f"data.path={folder / 'prompts.txt'}", f"paths.runs_dir={folder}"]
    return ["model=auto", "name=run", *paths, *SHORT, *stable_diffusion_3.SETTINGS]


@pytest.fixture(scope="module")
def recording(command: list[str]) -> Run:
    outcome = succeed(*command, "stages=[cache]")
    assert "each call has 2 passes of guidance, which are taken as calls of their own" in outcome.out
    return prepare(command)


def stream_of(run: Run, batch_size: int) -> RecordedStream:
    stream = run.data.stream(0, batch_size)
    assert isinstance(stream, RecordedStream)
    return stream


@torch.no_grad()
def test_a_row_alone_has_the_output_that_it_has_in_its_call(recording: Run) -> None:
    folder = recording.data.cache_folder
    joining, transformer = read_joining(folder), recording.teacher.transformer
    assert joining.rows == 2
    assert joining.axes is not None
    for entry in read_entries(folder, len(PROMPTS), joining.axes)[::3]:
        call = read_call(entry.record, entry.number)
        for row in range(2):
            own = row_of_call(call, joining.axes, 2, row)
            assert [len(own.arguments["hidden_states"]), len(own.output)] == [1, 1]
            torch.testing.assert_close(
                transformer(**own.arguments)[0], call.output[row : row + 1], rtol=1e-4, atol=1e-4
            )


def test_the_first_row_is_seen_to_be_the_one_without_prompt(recording: Run) -> None:
    folder = recording.data.cache_folder
    joining = read_joining(folder)
    entries = with_passes(read_entries(folder, len(PROMPTS), joining.axes), joining)
    assert {(entry.row, entry.unguided) for entry in entries} == {(0, True), (1, False)}
    assert len({entry.name for entry in entries}) == len(entries)
    alone = with_passes(read_entries(folder, 1, joining.axes), joining)
    assert not any(entry.unguided for entry in alone)


@pytest.mark.parametrize("renoise", [False, True])
def test_a_batch_has_as_many_rows_as_it_says_and_few_without_prompt(
    command: list[str], recording: Run, renoise: bool
) -> None:
    stream = stream_of(prepare([*command, f"data.renoise={str(renoise).lower()}"]), 8)
    found = [entry.unguided for step in range(10) for entry in stream._of_step(step)]
    assert 0 < sum(found) <= 0.2 * len(found)
    (batch,) = stream.divided(0, 1)
    assert len(batch.inputs["hidden_states"]) == len(batch.target) == len(batch.sigmas) == 8
    if not renoise:
        with torch.no_grad():
            output = batch.prediction(recording.teacher.transformer(**batch.inputs)[0])
        torch.testing.assert_close(output, batch.target, rtol=1e-4, atol=1e-4)


def test_what_is_timed_is_the_whole_call(recording: Run) -> None:
    assert len(stream_of(recording, 4).example(1.0).inputs["hidden_states"]) == 2


def test_students_learn_from_rows(command: list[str], recording: Run) -> None:
    outcome = succeed(*command, "method.min_cka=0", "stages=[probe,detect,depth]")
    assert "held-out loss" in outcome.out


def test_a_pass_that_skips_blocks_is_left_out(command: list[str], tmp_path: Path) -> None:
    """Guidance by skipped layers, as Stable Diffusion 3.5 has it: a third call of each step."""
    skipped = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    rows = [{"prompt": prompt} | skipped for prompt in PROMPTS]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    own = [*command, f"data.path={tmp_path / 'rows.jsonl'}", f"paths.runs_dir={tmp_path}", "method.min_cka=0"]
    outcome = succeed(*own, "stages=[cache,probe,detect,depth]")
    assert "a pass of guidance that leaves blocks out is not recorded" in outcome.out
    run = prepare(own)
    entries = read_entries(run.data.cache_folder, len(PROMPTS), None)
    assert len(entries) == 3 * len(PROMPTS)  # both passes of a step in one call


def test_predictions_that_are_not_finite_are_refused(command: list[str], tmp_path: Path) -> None:
    teacher = tmp_path / "teacher"
    shutil.copytree(next(a for a in command if a.startswith("model.path=")).partition("=")[2], teacher)
    file = teacher / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["proj_out.weight"] *= 1e38
    save_file(weights, file, {"format": "pt"})
    outcome = ppcl(*command, f"model.path={teacher}", f"paths.runs_dir={tmp_path}", "stages=[cache]")
    assert outcome.code == 2
    assert "line 1: what the transformer predicts is not finite" in outcome.err
    assert not list((tmp_path / "cache" / "recordings").glob("*/0*"))


# Rules


def test_what_has_one_row_for_all_is_taken_whole() -> None:
    axes = {"x.text": 0, "x.time": 0, "x.parts": 0, "x.flat": 1}
    value = {"text": torch.arange(4).reshape(2, 2), "time": torch.ones(1), "parts": ["a", "b"], "scale": 3.5}
    value["flat"] = torch.arange(4).reshape(1, 4)
    second = row_of(value, axes, "x", 2, 1)
    assert second["text"].tolist() == [[2, 3]]
    assert second["time"].tolist() == [1]
    assert second["parts"] == ["b"]
    assert second["flat"].tolist() == [[2, 3]]
    assert second["scale"] == 3.5
    with pytest.raises(NoAxesError, match="x cannot be divided into 2 rows"):
        row_of(torch.ones(3, 2), {"x": 0}, "x", 2, 0)


class Mixer(nn.Module):
    """Returns what `rule` makes of all rows together."""

    def __init__(self, rule: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rule, self.weight = rule, nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.weight * self.rule(x),)


def needs_two(x: Tensor) -> Tensor:
    first, second = x.chunk(2)
    return torch.cat([second, first])


@pytest.mark.parametrize(
    ("rule", "rows"), [(torch.tanh, 2), (lambda x: x - x.mean(0), 1), (needs_two, 1)], ids=["apart", "mean", "swap"]
)
def test_rows_that_depend_on_each_other_stay_together(rule: Callable[[Tensor], Tensor], rows: int) -> None:
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    module = Mixer(rule)
    call = Call(0, 1.0, 1.0, {"x": x}, module(x)[0].detach())
    assert rows_of(module, call, {f"{ARGUMENTS}.x": 0, OUTPUT: 0}, PATHS) == rows


def test_a_folder_that_was_recorded_before_rows_were_taken_apart_stays_usable(recording: Run, tmp_path: Path) -> None:
    folder = tmp_path / "recording"
    shutil.copytree(recording.data.cache_folder, folder)
    content = json.loads((folder / "joining.json").read_text())
    del content["rows"], content[CHECKSUM]
    (folder / "joining.json").write_text(json.dumps(content))
    joining = read_joining(folder)
    entries = with_passes(read_entries(folder, len(PROMPTS), joining.axes), joining)
    assert {(entry.row, entry.unguided) for entry in entries} == {(None, False)}
