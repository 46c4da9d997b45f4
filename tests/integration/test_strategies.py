"""Trainings shared by two processes on gloo end where one process ends, also killed and taken up by another number.

What may differ: a matrix product of half the rows adds up in another order, which changes a gradient by some 1e-7 of
its size. AdamW divides by that size, so that a single weight whose gradient nearly vanishes can be moved by a share of
the learning rate (0.004 of it was seen), which says little; a tensor's root mean square difference says more. It is at
most 1.5e-4 of the learning rate in any tensor; were denominators each rank's own, it would be 0.3 to 0.97.

Muon, of the default recipe, rounds to bfloat16, which turns such a difference into one of a bit. In six steps
its matrices move by 3 to 5% of their root mean square, and two ranks differ from one process by 0.22% at most. In
the `LONG` training they move by 41 to 48%; taken up by another number of ranks it differs by 1.5%.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import INTERVALS, REPOSITORY, assert_same_tensors, launch, plug_tensors, ppcl, start, succeed
from safetensors.torch import load_file

from ppcl.artifacts.files import read_json
from ppcl.artifacts.plugs import load_plugs, load_projectors

LONG = [INTERVALS, "stages=[depth]", "distill.steps=30", "distill.checkpoint_every=5"]
STAGES = "stages=[depth,width,finetune,export]"
LR = 1e-3
TOLERANCE = 1e-3 * LR
NEAR, NEAR_LONG = 0.005, 0.04  # of a tensor's root mean square


def wait_for(folder: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def kill_rank(process: subprocess.Popen[str], number: int) -> None:
    """`kill -9` to one of torchrun's children; the others and torchrun itself have a minute to end."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    wanted = f"RANK={number}".encode()
    (pid,) = (pid for pid in children if wanted in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    os.kill(int(pid), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode > 0


def all_plugs(run: Path) -> dict[str, torch.Tensor]:
    """All tensors of a run's students and projectors."""
    projectors = load_projectors(run / "plugs").items()
    trained = {f"{name}/{key}": value for name, item in projectors for key, value in item.state_dict.items()}
    return plug_tensors(run) | trained


def tensors(run: Path) -> dict[str, dict[str, torch.Tensor]]:
    """All tensors a run has trained, by kind."""
    return {
        "plugs": all_plugs(run),
        "finetuned": load_file(run / "finetuned" / "transformer" / "diffusion_pytorch_model.safetensors"),
    }


def assert_close(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = TOLERANCE
) -> None:
    assert found.keys() == expected.keys()
    distances = {key: size_of(found[key].float() - value.float()) for key, value in expected.items()}
    assert {key: distance for key, distance in distances.items() if not distance <= tolerance} == {}


def assert_near(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """The same relative to the size of each tensor."""
    assert found.keys() == expected.keys()
    ratios = {key: size_of(found[key] - value) / size_of(value) for key, value in expected.items()}
    assert {key: ratio for key, ratio in ratios.items() if not ratio <= tolerance} == {}


def size_of(tensor: torch.Tensor) -> float:
    return float(tensor.square().mean().sqrt())


@pytest.fixture(scope="module")
def options(settings: list[str]) -> list[str]:
    """Three trainings with all that depends on a batch's rows: masks, relative errors, clipping."""
    return [
        *settings,
        INTERVALS,
        "recipe=paper",
        f"distill.lr={LR}",
        "distill.max_grad_norm=0.05",
        "distill.magnitude_weight=0.1",
        "width.source=given",
        "width.transformer_blocks.text=[3,5]",
        "width.transformer_blocks.ffn=[0,5]",
        "width.steps=4",
        f"width.lr={LR}",
        "width.num_batches=2",
        "finetune=tiny",
        "finetune.optimizer=adamw",
        f"finetune.lr={LR}",
        "finetune.steps=4",
        "finetune.batch_size=4",
        "finetune.warmup_steps=1",
        "finetune.flow_weight=0.1",
        "finetune.ema_decay=0.5",
    ]


@pytest.fixture(scope="module")
def single(options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("single")
    succeed(*options, STAGES, f"paths.runs_dir={runs}", "name=all")
    return runs / "all"


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def shared(request: pytest.FixtureRequest, options: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on two processes."""
    runs = tmp_path_factory.mktemp(request.param)
    out = launch(2, *options, STAGES, f"paths.runs_dir={runs}", "name=all", f"strategy={request.param}")
    assert out.count("wrote 2 plugs") == 1  # one of the two speaks
    return runs / "all"


def test_two_ranks_train_what_one_does(single: Path, shared: Path) -> None:
    found, expected = tensors(shared), tensors(single)
    for kind in expected:
        assert_close(found[kind], expected[kind])


def test_two_ranks_measure_what_one_does(single: Path, shared: Path) -> None:
    for load in (load_plugs, load_projectors):
        found, expected = load(shared / "plugs"), load(single / "plugs")
        assert found.keys() == expected.keys()
        for name, item in expected.items():
            assert found[name].losses == pytest.approx(item.losses, rel=1e-4)
            assert found[name].header == item.header  # how many ranks there were is nobody's business


def test_what_is_left_on_disk_is_the_same(single: Path, shared: Path) -> None:
    files = [{str(path.relative_to(run)) for path in run.rglob("*")} for run in (shared, single)]
    assert files[0] == files[1]
    for name in ("plan/width.json", "finetuned/ppcl.json", "finetuned/transformer/config.json"):
        found, expected = (read_json(run / name, "The record") for run in (shared, single))
        if name == "finetuned/ppcl.json":  # measured on all ranks together
            errors = found.pop("velocity_error"), expected.pop("velocity_error")
            assert errors[0] == pytest.approx(errors[1], rel=1e-3)
            assert 0 < errors[0]["after"] != errors[0]["before"]
            assert found.pop("files").keys() == expected.pop("files").keys()  # with checksums of rounded sums
        assert found == expected


def test_what_ranks_have_trained_one_process_reuses(options: list[str], shared: Path) -> None:
    outcome = succeed(*options, "stages=[depth,width,finetune]", f"paths.runs_dir={shared.parent}", "name=all")
    assert outcome.out.count("reused") == 3


@pytest.fixture(scope="module")
def standard(options: list[str]) -> list[str]:
    """Students and projectors by the default recipe."""
    without = ("recipe=", "distill.lr=", "width.lr=", "distill.magnitude_weight=")
    rate = "distill.relative_update=0.05"
    return [*(option for option in options if not option.startswith(without)), rate, "stages=[depth,width]"]


@pytest.fixture(scope="module")
def single_standard(standard: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = tmp_path_factory.mktemp("standard")
    succeed(*standard, f"paths.runs_dir={runs}", "name=all")
    return runs / "all"


def test_two_ranks_train_by_the_default_recipe(standard: list[str], single_standard: Path, tmp_path: Path) -> None:
    sharded = ["strategy=fsdp", "strategy.cpu_offload=true"]
    launch(2, *standard, f"paths.runs_dir={tmp_path}", "name=all", *sharded)
    assert_near(all_plugs(tmp_path / "all"), all_plugs(single_standard), NEAR)


@pytest.mark.parametrize("tuning", ["finetune.ema_decay=0.5", "finetune.lora_rank=2"])
def test_sharded_in_host_memory_beside_a_teacher_in_half_precision(
    options: list[str], tmp_path: Path, tuning: str
) -> None:
    """What learns is float32 in shards too, among bfloat16 that does not.

    Products of half the rows round apart, in what is tuned through all blocks by a fourth of the learning rate.
    """
    # Least squares of so few tokens of text would make much of the last bits that students differ in.
    width = "width.transformer_blocks.text=[]"
    command = [*options, width, "model.dtype=bfloat16", tuning, f"paths.runs_dir={tmp_path}"]
    command.append("stages=[depth,width,finetune]")
    succeed(*command, "name=single")
    launch(2, *command, "name=shared", "strategy=fsdp", "strategy.cpu_offload=true")
    found, expected = tensors(tmp_path / "shared"), tensors(tmp_path / "single")
    for kind in expected:
        assert {value.dtype for value in found[kind].values()} == {torch.bfloat16}
        matrices = [{key: value for key, value in each[kind].items() if value.ndim > 1} for each in (found, expected)]
        assert_close(*matrices, {"plugs": 0.1, "finetuned": 0.5}[kind] * LR)  # a norm's are near 1: coarse in bfloat16


# Interruptions


@pytest.fixture(scope="module")
def long(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A long training in one go, in one process."""
    runs = tmp_path_factory.mktemp("long")
    succeed(*settings, *LONG, f"paths.runs_dir={runs}", "name=long")
    return runs / "long"


@pytest.fixture(scope="module")
def killed(settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on two ranks, of which one is killed after a checkpoint. Copy it, do not write."""
    runs = tmp_path_factory.mktemp("killed")
    process = start(2, [*settings, *LONG, f"paths.runs_dir={runs}", "name=long", "strategy=fsdp"])
    wait_for(runs / "long", "plugs/checkpoint-*/sharded.json", process)
    kill_rank(process, 1)
    assert not list(runs.glob("long/plugs/*.safetensors"))
    return runs / "long"


def test_a_killed_rank_ends_the_run_which_resumes_to_the_same_bits(
    settings: list[str], killed: Path, tmp_path: Path
) -> None:
    shutil.copytree(killed, tmp_path / "killed")
    command = [*settings, *LONG, f"paths.runs_dir={tmp_path}", "strategy=fsdp"]
    assert "resuming from" in launch(2, *command, "name=killed")
    launch(2, *command, "name=whole")
    assert_same_tensors(plug_tensors(tmp_path / "killed"), plug_tensors(tmp_path / "whole"))
    losses = [
        {name: plug.losses for name, plug in load_plugs(tmp_path / run / "plugs").items()}
        for run in ("killed", "whole")
    ]
    assert losses[0] == losses[1]


def test_one_rank_takes_up_what_two_began(settings: list[str], killed: Path, long: Path, tmp_path: Path) -> None:
    shutil.copytree(killed, tmp_path / "long")
    command = [*settings, *LONG, f"paths.runs_dir={tmp_path}", "name=long"]
    refused = ppcl(*command)
    assert refused.code == 2
    assert "holds a checkpoint of strategy=fsdp" in refused.err
    assert "resuming from" in launch(1, *command, "strategy=fsdp")
    assert_near(plug_tensors(tmp_path / "long"), plug_tensors(long), NEAR_LONG)


def test_two_ranks_take_up_what_one_began(settings: list[str], long: Path, tmp_path: Path) -> None:
    command = [*settings, *LONG, f"paths.runs_dir={tmp_path}", "name=long", "strategy=fsdp"]
    process = start(1, command)
    wait_for(tmp_path / "long", "plugs/checkpoint-*/sharded.json", process)
    kill_rank(process, 0)
    assert "resuming from" in launch(2, *command)
    assert_near(plug_tensors(tmp_path / "long"), plug_tensors(long), NEAR_LONG)


def test_one_process_takes_up_a_ddp(settings: list[str], long: Path, tmp_path: Path) -> None:
    command = [*settings, *LONG, f"paths.runs_dir={tmp_path}", "name=long"]
    process = start(2, [*command, "strategy=ddp"])
    wait_for(tmp_path / "long", "plugs/checkpoint-*/last.ckpt", process)
    kill_rank(process, 0)
    assert "resuming from" in succeed(*command).out
    assert_near(plug_tensors(tmp_path / "long"), plug_tensors(long), NEAR_LONG)


# Bad input


def start_ranks(*arguments: str, count: int = 2, here: int = 2) -> list[subprocess.Popen[str]]:
    """Ranks as srun would start them, `here` of them on each machine, to see what each of them leaves."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(here),
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", "ppcl", *arguments],
            cwd=REPOSITORY,
            env=os.environ | where | {"RANK": str(number), "LOCAL_RANK": str(number % here)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]


def test_two_machines_of_two_ranks_train_by_the_default_recipe(
    standard: list[str], single_standard: Path, tmp_path: Path
) -> None:
    """Each machine holds all parameters in two shards, so that only gradients go from one to the other."""
    arguments = [*standard, f"paths.runs_dir={tmp_path}", "name=all", "strategy=fsdp"]
    for process in start_ranks(*arguments, count=4):
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert_near(all_plugs(tmp_path / "all"), all_plugs(single_standard), NEAR)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        # Found by both before anything is loaded; and by the first, for whom the second waits.
        (["stages=[depth]", "distill.batch_size=5"], "distill.batch_size=5 does not divide among 2 ranks: make it 6"),
        (["stages=[report]"], "add evaluate to stages"),
    ],
)
def test_a_mistake_is_said_once_and_ends_all(
    settings: list[str], tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    ranks = start_ranks(*settings, INTERVALS, *arguments, f"paths.runs_dir={tmp_path}", "name=bad", "strategy=ddp")
    ends = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2], ends
    errors = [[line for line in err.splitlines() if line.startswith("ppcl: ")] for _, err in ends]
    assert sentence in errors[0][0]
    assert [len(lines) for lines in errors] == [1, 0]
    assert not any("Traceback" in err for _, err in ends)


def test_one_process_for_many_is_refused(settings: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [*settings, INTERVALS, "stages=[depth]", f"paths.runs_dir={tmp_path}", "name=bad"]
    refused = ppcl(*command, "strategy=fsdp")
    assert refused.code == 2
    assert "torchrun --nproc-per-node 2 -m ppcl ... strategy=fsdp" in refused.err
    monkeypatch.setenv("WORLD_SIZE", "2")
    for number, lines in ((0, 1), (1, 0)):
        monkeypatch.setenv("RANK", str(number))
        refused = ppcl(*command)
        assert refused.code == 2
        assert refused.err.count("add strategy=ddp or strategy=fsdp, or start one") == lines
