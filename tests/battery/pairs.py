"""Two commands at once, with one name or with one cache: each ends well or in one sentence, and nothing is lost."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

from tests.battery.chain import STAGES, Chain, differences, results
from tests.forks import run_forked, start_forked, wait_for


def at_once(chain: Chain, stage: str, folder: Path, names: tuple[str, str] = ("run", "run")) -> tuple[int, str]:
    """Run a stage twice at once, then once more with the first name.

    Returns how many of the first two were refused in a sentence, and "" or what is wrong.
    """
    place = folder / "place"
    shutil.copytree(chain.before[stage], place)
    for name in {*names} - {"run"}:
        if (place / "runs" / "run").exists():
            shutil.copytree(place / "runs" / "run", place / "runs" / name)
    commands = [
        [*(s for s in chain.command(stage, place) if not s.startswith("name=")), f"name={name}"] for name in names
    ]
    outputs = [folder / str(number) for number in range(2)]
    children = [start_forked(command, output) for command, output in zip(commands, outputs, strict=True)]
    ended = [wait_for(child, output) for child, output in zip(children, outputs, strict=True)]
    for one in ended:
        if one.code and not one.refused:
            return 0, f"one of two ended with {one.code}: {one.err.strip()[-600:]}"
    if all(one.code for one in ended):
        return 2, f"both were refused: {ended[0].err.strip()}"
    again = run_forked(commands[0], folder)
    if again.code:
        return 0, f"the same command ended with {again.code}: {again.err.strip()[-500:]}"
    for name in {*names} - {"run"}:
        shutil.rmtree(place / "runs" / name)
    following = [*STAGES, "end"][[*STAGES].index(stage) + 1]
    wrong = differences(results(place), results(chain.before.get(following, chain.folder / "before-end")))
    shutil.rmtree(place)
    return sum(one.refused for one in ended), f"{len(wrong)} results differ, such as {wrong[0]}" if wrong else ""


def run(chain: Chain, folder: Path, stages: list[str] | None = None) -> tuple[Counter[str], list[str]]:
    """Return how many pairs ended in which way, and what went wrong. Each stage is run with one name and with two."""
    figures, faults = Counter[str](), list[str]()
    for stage in stages or STAGES:
        for names in (("run", "run"), ("run", "other")):
            trial = folder / f"{stage}-{names[1]}"
            trial.mkdir(parents=True)
            refused, wrong = at_once(chain, stage, trial, names)
            figures["trials"] += 1
            figures["faults" if wrong else "one refused in a sentence" if refused else "both ended well"] += 1
            if wrong:
                faults.append(f"two of {stage} at once, named {' and '.join(names)}: {wrong}")
    return figures, faults
