"""What torchrun and SLURM say of a process."""

import os
import subprocess
import sys

import pytest

from ppcl.launch import is_first, launched, local_rank, rank

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4"}
SLURM = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
SBATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}  # a script that does not call srun


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({}, (0, 1)),
        (TORCHRUN, (1, 4)),
        (SLURM, (0, 2)),
        (TORCHRUN | SLURM, (1, 4)),
        ({"RANK": "3"}, (0, 1)),
        (SBATCH, (0, 1)),
    ],
)
def test_rank_and_number_of_ranks(monkeypatch, said, expected):
    for name in TORCHRUN | SLURM | SBATCH:
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert rank() == expected
    assert is_first() == (expected[0] == 0)
    assert launched() == (expected != (0, 1))


def test_a_single_rank_of_a_launcher_is_launched(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launched()


@pytest.mark.parametrize(
    ("said", "expected"),
    [({}, 0), (TORCHRUN | {"LOCAL_RANK": "1"}, 1), (SLURM | {"SLURM_LOCALID": "1"}, 1), (SBATCH, 0)],
)
def test_each_rank_has_the_gpu_of_its_number_on_the_machine(monkeypatch, said, expected):
    for name in [*(TORCHRUN | SLURM | SBATCH), "LOCAL_RANK"]:
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    assert local_rank()[0] == expected


def test_workers_of_a_sweep_take_a_gpu_each(tmp_path):
    """While all live; a third has to share one, and later workers find free those of workers that have ended."""
    code = (
        "import os; from ppcl.launch import take_gpu; take_gpu(JOB); print(os.environ['CUDA_VISIBLE_DEVICES']); input()"
    )
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "5,7", "TMPDIR": str(tmp_path)}

    def worker(job):
        command = [sys.executable, "-c", code.replace("JOB", str(job))]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)
        return process, process.stdout.readline().strip()

    first, second, third = worker(0), worker(2), worker(3)
    assert [gpu for _, gpu in (first, second, third)] == ["5", "7", "7"]
    first[0].communicate("\n")
    fourth = worker(1)
    assert fourth[1] == "5"
    for process, _ in (second, third, fourth):
        process.communicate("\n")
