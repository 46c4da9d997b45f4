"""A training is measured while it runs, and ends with the same bits as one that is not."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import DIE_AT_RENAME, INTERVALS, PLUG_NAMES, ppcl, ppcl_process, succeed
from safetensors.torch import load_file

from ppcl.artifacts.curves import load_curves
from ppcl.artifacts.samples import load_sample, load_samples
from ppcl.command import prepare
from ppcl.config import WatchConfig
from ppcl.surgery.plugboard import plug
from ppcl.training.drawing import as_picture, denoised
from ppcl.training.watching import measured_steps

WATCHED = ["logger=csv", "watch.share=100", "watch.heldout=3", "watch.batches=16", "watch.prompts=2"]
WIDTH = ["width.source=given", "width.transformer_blocks.ffn=[0]", "width.transformer_blocks.text=[5]", "width.steps=4"]
TUNE = ["finetune=tiny", "finetune.steps=6", "finetune.batch_size=4"]
STAGES = "stages=[depth,width,finetune]"
PROJECTORS = ["transformer_blocks.0.ffn", "transformer_blocks.5.text"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    files = [*(run / "plugs").glob("*.safetensors"), *(run / "finetuned").rglob("*.safetensors")]
    return {f"{path.name}/{key}": value for path in files for key, value in load_file(path).items()}


def logged(run: Path, stage: str) -> dict[str, dict[int, float]]:
    """The values of each key in a stage's log, by step."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted((run / "logs" / stage).glob("*/metrics.csv")):
        for row in csv.DictReader(path.open()):
            for key, value in row.items():
                if value and key not in ("step", "epoch"):
                    found.setdefault(key, {})[int(row["step"])] = float(value)
    return found


@pytest.fixture(scope="module")
def runs(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("watched")
    command = [*settings, INTERVALS, *WIDTH, *TUNE, f"paths.runs_dir={folder}", STAGES]
    succeed(*command, *WATCHED, "name=watched")
    succeed(*command, "watch.heldout=0", "watch.pictures=0", "name=unwatched")
    return folder


def test_it_changes_no_bit(runs: Path) -> None:
    watched, unwatched = weights(runs / "watched"), weights(runs / "unwatched")
    assert watched.keys() == unwatched.keys()
    assert len(watched) > 20
    assert all(torch.equal(value, unwatched[name]) for name, value in watched.items())
    assert {path.name for path in (runs / "watched" / "training").iterdir() if path.is_dir()} == {"curves", "samples"}
    assert not any(path.is_dir() for path in (runs / "unwatched" / "training").iterdir())


def test_every_part_has_a_curve_from_the_start_to_the_end(runs: Path) -> None:
    curves = load_curves(runs / "watched")
    assert {stage: curve.names for stage, (curve,) in curves.items()} == {
        "depth": PLUG_NAMES,
        "width": PROJECTORS,
        "finetune": ["velocity error"],
    }
    assert {stage: curve.steps for stage, (curve,) in curves.items()} == {
        "depth": [0, 2, 4, 6],
        "width": [0, 1, 3, 4],
        "finetune": [0, 2, 4, 6],
    }
    for (curve,) in curves.values():
        for name in curve.names:
            assert all(loss > 0 for loss in curve.of(name))
            assert len(set(curve.of(name))) > 1


def test_every_training_has_pictures_from_the_start_to_the_end(runs: Path) -> None:
    drawn = load_samples(runs / "watched")
    assert {stage: record.parts for stage, ((_, record),) in drawn.items()} == {
        "depth": PLUG_NAMES,
        "width": PROJECTORS,
        "finetune": ["the whole model"],
    }
    for stage, ((folder, record),) in drawn.items():
        assert record.steps == ([0, 2, 4] if stage == "width" else [0, 3, 6])
        assert record.num_steps == record.steps[-1]
        assert record.seeds == [42, 43]
        assert len({*record.prompts}) == 2
        names = [
            f"{moment}-{number}.png" for moment in ("teacher", *(f"{s:06d}" for s in record.steps)) for number in (0, 1)
        ]
        assert {path.name for path in folder.iterdir()} == {*names, "samples.json"}
        pictures = {name: load_sample(folder / name) for name in names}
        assert {picture.size for picture in pictures.values()} == {(32, 32)}
        assert len({picture.tobytes() for picture in pictures.values()}) == len(names)
    folders = [folder for ((folder, _),) in drawn.values()]
    assert len({(folder / "teacher-0.png").read_bytes() for folder in folders}) == 1


def test_a_projected_model_is_drawn_as_the_plugs_on_disk_make_it(runs: Path, settings: list[str]) -> None:
    """The last pictures of depth and width are those of the model that the plugs make."""
    run = prepare([*settings, INTERVALS, *WIDTH, *TUNE, *WATCHED, f"paths.runs_dir={runs}", "name=watched", STAGES])
    board = plug(run.teacher.pipeline, runs / "watched" / "plugs")
    drawn = load_samples(runs / "watched")
    for stage, names in (("depth", PLUG_NAMES), ("width", [*PLUG_NAMES, *PROJECTORS])):
        ((folder, record),) = drawn[stage]
        stream = run.data.stream(run.config.data.calibration_seed, 1)
        latents, size, conditions = stream.samples(0, range(1), [False])
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(record.seeds[0]))
        scheduler = run.teacher.scheduler_config
        model = board(*names).transformer
        with torch.no_grad():
            found = denoised(run.family, scheduler, model, noise, conditions, size, latents.dtype, record.picture_steps)
        pixels = run.family.decode_latents(run.teacher.pipeline, found, size)[0]
        expected = np.asarray(load_sample(folder / f"{record.steps[-1]:06d}-0.png"), dtype=int)
        assert np.abs(np.asarray(as_picture(pixels), dtype=int) - expected).max() <= 1


def test_it_begins_and_ends_with_what_the_record_says(runs: Path) -> None:
    """All held-out batches are asked for."""
    (curve,) = load_curves(runs / "watched")["depth"]
    for name in PLUG_NAMES:
        losses = json.loads((runs / "watched" / "plugs" / f"{name}.json").read_text())["losses"]
        assert curve.of(name)[0] == pytest.approx(losses["heldout_before"], rel=1e-5)
        assert curve.of(name)[-1] == pytest.approx(losses["heldout_loss"], rel=1e-5)


def test_the_log_has_what_one_watches(runs: Path) -> None:
    for stage, rate in (("depth", "relative_update"), ("width", "relative_update"), ("finetune", "lr")):
        found = logged(runs / "watched", stage)
        own = [f"{stage}/{key}" for key in ("gradient_norm", "samples_per_second", "memory_gb", "loss")]
        assert all(value > 0 for key in own for value in found[key].values())
        assert any(key in found for key in (f"{stage}/{rate}", f"{stage}/relative_update"))
        (curve,) = load_curves(runs / "watched")[stage]
        means = [sum(losses.values()) / len(losses) for losses in curve.losses]
        assert found[f"{stage}/heldout"] == pytest.approx(dict(zip(curve.steps, means, strict=True)))
    assert f"depth/{PLUG_NAMES[0]}/heldout" in logged(runs / "watched", "depth")


def test_a_resumed_training_continues_its_curve(settings: list[str], runs: Path, tmp_path: Path) -> None:
    command = [*settings, INTERVALS, f"paths.runs_dir={tmp_path}", "name=killed", "stages=[depth]", *WATCHED]
    command.append("distill.checkpoint_every=4")
    died = ppcl_process("*.1-2.safetensors", *command, python=DIE_AT_RENAME)
    assert died.returncode == 9, died.stderr
    (path,) = (tmp_path / "killed" / "training" / "curves").glob("depth-*.json")
    path.write_bytes(next((runs / "watched" / "training" / "curves").glob("depth-*.json")).read_bytes())
    ((folder, _),) = load_samples(tmp_path / "killed")["depth"]
    for late in folder.glob("000006-*.png"):
        late.unlink()
    first = {late: late.stat().st_mtime_ns for late in folder.glob("*.png")}
    assert "resuming from" in succeed(*command).out
    (curve,) = load_curves(tmp_path / "killed")["depth"]
    (whole,) = load_curves(runs / "watched")["depth"]
    assert curve == whole
    ((complete, record),) = load_samples(runs / "watched")["depth"]
    assert load_samples(tmp_path / "killed")["depth"] == [(folder, record)]
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == {
        path.name: path.read_bytes() for path in complete.glob("*.png")
    }
    assert {path: path.stat().st_mtime_ns for path in first} == first  # those before the checkpoint are not drawn again


def test_parts_that_are_trained_anew_have_one_curve(settings: list[str], tmp_path: Path) -> None:
    command = [*settings, INTERVALS, f"paths.runs_dir={tmp_path}", "name=anew", "stages=[depth]", *WATCHED]
    succeed(*command)
    for path in (tmp_path / "anew" / "plugs").iterdir():
        path.unlink()
    succeed(*command, "data.train_seed=99")
    assert [curve.names for curve in load_curves(tmp_path / "anew")["depth"]] == [PLUG_NAMES]
    assert len(load_samples(tmp_path / "anew")["depth"]) == 1


def test_a_held_out_loss_that_is_no_number_ends_the_training(
    settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ppcl.training.watching as watching

    monkeypatch.setattr(watching, "isfinite", lambda value: False)
    command = [*settings, INTERVALS, f"paths.runs_dir={tmp_path}", "name=nan", "stages=[depth]", *WATCHED]
    outcome = ppcl(*command)
    assert outcome.code == 2
    assert f"depth: the held-out loss of {PLUG_NAMES[0]} is" in outcome.err
    assert "lower distill.relative_update" in outcome.err


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (6000, [0, 750, 1500, 2250, 3000, 3750, 4500, 5250, 6000]),
        (250, [0, 125, 250]),
        (130, [0, 130]),
        (49, []),
        (1, []),
    ],
)
def test_short_trainings_are_measured_less_often(steps: int, expected: list[int]) -> None:
    assert measured_steps(WatchConfig(), steps) == expected


def test_none_is_asked_for() -> None:
    assert measured_steps(WatchConfig(heldout=0), 6000) == []
    assert measured_steps(WatchConfig(heldout=9, share=10), 3) == [0, 1, 2, 3]
