"""What torchrun and SLURM say of a process."""

import pytest

from ppcl.launch import is_first, launched, rank

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4"}
SLURM = {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}


@pytest.mark.parametrize(
    ("said", "expected"),
    [({}, (0, 1)), (TORCHRUN, (1, 4)), (SLURM, (0, 2)), (TORCHRUN | SLURM, (1, 4)), ({"RANK": "3"}, (0, 1))],
)
def test_rank_and_number_of_ranks(monkeypatch, said, expected):
    for name in TORCHRUN | SLURM:
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
