"""Kills at random moments, at least one in every stage: the same command then ends with the same bits."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

from tests.battery.chain import STAGES, Chain, differences, results
from tests.forks import run_forked

SEED, KILLS = 0, 20


def moments(seed: int = SEED, count: int = KILLS) -> list[tuple[str, float]]:
    """Return `count` stages, each at least once, with the part of its duration after which it is killed."""
    draw = random.Random(seed)
    stages = [*STAGES, *draw.choices(list(STAGES), k=max(0, count - len(STAGES)))][:count]
    return [(stage, draw.uniform(0.05, 0.95)) for stage in stages]


def killed(chain: Chain, stage: str, part: float, folder: Path) -> str:
    """Kill a stage and give its command again; return "" if that leads to what was not killed, else what is wrong."""
    place = folder / "place"
    shutil.copytree(chain.before[stage], place)
    command = chain.command(stage, place)
    run_forked(command, folder, kill_after=part * chain.seconds[stage])
    again = run_forked(command, folder)
    if again.code:
        return f"the same command ended with {again.code}: {again.err.strip()[-500:]}"
    following = [*STAGES, "end"][[*STAGES].index(stage) + 1]
    expected = results(chain.before.get(following, chain.folder / "before-end"))
    wrong = differences(results(place), expected)
    shutil.rmtree(place)
    return f"{len(wrong)} results differ, such as {wrong[0]}" if wrong else ""


def run(chain: Chain, folder: Path, seed: int = SEED, count: int = KILLS) -> tuple[Counter[str], list[str]]:
    """Return how many kills ended in which way, and what went wrong."""
    figures, faults = Counter[str](), list[str]()
    for number, (stage, part) in enumerate(moments(seed, count)):
        trial = folder / f"kill-{number}"
        trial.mkdir(parents=True)
        wrong = killed(chain, stage, part, trial)
        figures["trials"] += 1
        figures["same bits" if not wrong else "faults"] += 1
        if wrong:
            faults.append(f"{stage} killed after {part:.2f} of its duration: {wrong}")
    return figures, faults
