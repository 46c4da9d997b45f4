"""A sample of `make battery`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.battery import chain, hostile, kills, pairs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> chain.Chain:
    return chain.build(tmp_path_factory.mktemp("chain"))


def test_killed_in_any_stage_it_ends_with_the_same_bits(made: chain.Chain, tmp_path: Path) -> None:
    assert {stage for stage, _ in kills.moments()} == {*chain.STAGES}
    figures, faults = kills.run(made, tmp_path, seed=1, count=4)
    assert faults == []
    assert figures["same bits"] == 4


def test_two_at_once_lose_nothing(made: chain.Chain, tmp_path: Path) -> None:
    figures, faults = pairs.run(made, tmp_path, ["cache", "depth"])
    assert faults == []
    assert figures["trials"] == 4


def test_no_file_runs_code(made: chain.Chain, tmp_path: Path) -> None:
    figures, faults = hostile.run(made, tmp_path, hostile.TRIALS[:7])
    assert faults == []
    assert figures["code executed"] == 0
