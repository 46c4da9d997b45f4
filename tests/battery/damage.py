"""Damages every file of a finished run, one at a time, and runs the command again.

A trial is one file and one kind of damage. It ends well if the command makes the undisturbed results, or refuses in one
sentence whose remedy, followed word by word, leads to them. It takes about ten minutes; the suite runs a sample of it.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))

from commands import Outcome, ppcl

from tests.battery.chain import Chain

STAGES = ["probe", "detect", "depth", "finetune", "export", "generate", "evaluate", "report"]
DAMAGES = ["cut", "emptied", "flipped", "of another seed", "deleted"]
VARIANTS = "generate.variants=[teacher,ppcl-depth,ppcl-finetuned]"
SETTINGS = ["finetune=tiny", "finetune.steps=4", "finetune.batch_size=4", "benchmark.prompts_per_category=1"]
SETTINGS += ["generate.batch_size=3", "method.num_samples=2"]
NAME = "run"
SEED = ["data.train_seed=77", "data.calibration_seed=78", "seed=79", "data.eval_seed=80"]

# What each stage leaves, in the folder that holds the run and its cache.
LEAVES = {
    "probe": ["cache/probes"],
    "detect": [f"{NAME}/plan"],
    "depth": [f"{NAME}/plugs"],
    "finetune": [f"{NAME}/finetuned"],
    "export": [f"{NAME}/export"],
    "generate": [f"{NAME}/images", "cache/images"],
    "evaluate": [f"{NAME}/scores"],
    "report": [f"{NAME}/report"],
}
BAD = ("traceback", "silently used", "no way out")  # endings
UNREAD = (f"{NAME}/report/", f"{NAME}/plan/curves.json")  # nothing reads them; figures are shown as they are
# The results that are made anew in a trial, since they are made from what a stage leaves.
MADE_FROM = {
    "probe": [f"{NAME}/plan"],
    "detect": [f"{NAME}/export"],
    "depth": [f"{NAME}/finetuned", f"{NAME}/images/shapes/ppcl-depth"],
    "finetune": [f"{NAME}/export", f"{NAME}/images/shapes/ppcl-finetuned"],
    "generate": [f"{NAME}/scores"],
}
VARYING = re.compile(r"latency|seconds|peak_memory|^date$|^crc32$|^files$|^trainings$|^commands$|^path$|_name_or_path")


@dataclass(frozen=True)
class Finished:
    """A finished run `run` in the folder `root`, with its cache, and one of another seed in the folder `other`."""

    settings: list[str]
    root: Path
    other: Path

    def command(self, root: Path, *stages: str, name: str = NAME) -> list[str]:
        """Return the command that made the run, in a copy at `root`; with `stages` these alone."""
        asked = f"stages=[{','.join(stages or STAGES)}]"
        return [*self.settings, *SETTINGS, f"paths.runs_dir={root}", f"name={name}", asked, VARIANTS]


@dataclass(frozen=True)
class Trial:
    """One file, relative to the root, one kind of damage, and whether the results made from it are kept."""

    file: str
    damage: str
    kept: bool

    def __str__(self) -> str:
        return f"{self.file} {self.damage}{', results kept' if self.kept else ''}"


@dataclass(frozen=True)
class Ending:
    """How a trial has ended: `remade`, `sentence`, `traceback`, `silently used` or `no way out`; and what was said."""

    kind: str
    said: list[str]


def make(settings: list[str], folder: Path) -> Finished:
    """Make a finished run in `folder`, and one of another seed."""
    finished = Finished(settings, folder / "root", folder / "other")
    for root, more in ((finished.root, []), (finished.other, SEED)):
        outcome = ppcl(*finished.command(root), *more)
        assert outcome.code == 0, outcome.err
    return finished


def trials(finished: Finished) -> list[Trial]:
    """Return all trials: of files that differ in a number or the variant alone, the first.

    Left out is what users may do: edit a model card, or put another configuration into a run.
    """
    alike: dict[str, list[str]] = {}
    for path in sorted(finished.root.rglob("*")):
        name = path.relative_to(finished.root).as_posix()
        if (
            path.is_file()
            and not name.startswith(UNREAD)
            and not (maker_of(name) == "detect" and path.suffix == ".png")
        ):
            kind = re.sub(r"\d+", "#", re.sub(r"images/shapes/(removed|ppcl-\w+)", "images/shapes/pruned", name))
            alike.setdefault(kind, []).append(name)
    files = [names[0] for names in alike.values()]
    found = [Trial(file, damage, False) for file in files for damage in DAMAGES]
    users = {f"{NAME}/export/README.md": ("cut", "flipped", "of another seed"), f"{NAME}/config.yaml": DAMAGES[3:4]}
    found = [trial for trial in found if trial.damage not in users.get(trial.file, ())]
    return found + [
        Trial(file, damage, True) for file in files for damage in ("flipped", "deleted") if maker_of(file) in MADE_FROM
    ]


def maker_of(file: str) -> str:
    """Return the stage that leaves `file`, or nothing for what belongs to none."""
    return next((stage for stage, places in LEAVES.items() if file.startswith(tuple(places))), "")


def harm(finished: Finished, root: Path, trial: Trial) -> bool:
    """Do the damage in the copy `root`; return False if it is none: the other run has the same file, or no such."""
    path = root / trial.file
    before = path.read_bytes()
    if trial.damage == "deleted":
        path.unlink()
        return True
    if trial.damage == "cut":
        after = before[: len(before) // 2]
    elif trial.damage == "emptied":
        after = b""
    elif trial.damage == "flipped":
        middle = len(before) // 2
        after = before[:middle] + bytes([before[middle] ^ 1]) + before[middle + 1 :] if before else before
    else:
        found = _other_file(finished, trial.file)
        after = found.read_bytes() if found else before
    path.write_bytes(after)
    return after != before


def _other_file(finished: Finished, file: str) -> Path | None:
    """Return the file of the other run that corresponds to `file`, whose folders may be named by fingerprints."""
    pattern = re.sub(r"/[0-9a-f]{16}/", "/*/", file)
    return next(iter(sorted(finished.other.glob(pattern))), None)


def results(root: Path) -> dict[str, str]:
    """Return a digest of every result, without times and what else differs from run to run."""
    found = {}
    for path in sorted((root / NAME).rglob("*")):
        name = path.relative_to(root / NAME).as_posix()
        if not path.is_file() or name in ("config.yaml", "versions.json", "export/README.md"):
            continue
        if name.startswith(("training/", "plan/curves", "report/")) and name != "report/report.json":
            continue  # times, and what is drawn from what is compared
        # What was drawn again lies in a folder beside the other one, of the set or of the variant.
        name = re.sub(r"-[0-9a-f]{6}\b", "", name).replace("scores/shapes/", "scores/")
        content = path.read_bytes()
        if path.suffix == ".json":
            content = json.dumps(_steady(json.loads(content)), sort_keys=True).encode()
        found[name] = hashlib.sha256(content).hexdigest()
    return found


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _steady(item) for key, item in value.items() if not VARYING.search(key)}
    return [_steady(item) for item in value] if isinstance(value, list) else value


def run_trial(finished: Finished, trial: Trial, wanted: dict[str, str], root: Path) -> Ending | None:
    """Return how a trial ends in the new folder `root`; None if the damage is none."""
    shutil.copytree(finished.root, root)
    if not harm(finished, root, trial):
        return None
    if not trial.kept:
        for place in MADE_FROM.get(maker_of(trial.file), []):
            shutil.rmtree(root / place)
        if trial.file.startswith("cache/images"):
            shutil.rmtree(root / NAME / "images")
    command = finished.command(root)
    if trial.file.endswith("config.yaml"):
        command = [f"run={root / NAME}", f"stages=[{','.join(STAGES)}]", VARIANTS]
    said: list[str] = []
    for _ in range(6):
        outcome = ppcl(*command)
        if outcome.code == 0:
            found = results(root)
            different = {name for name, digest in wanted.items() if found.get(name) != digest}
            if different:
                return Ending("silently used", [*said, f"different: {', '.join(sorted(different)[:4])}"])
            return Ending("sentence" if said else "remade", said)
        sentence = _sentence(outcome)
        if sentence is None:
            return Ending("traceback", [*said, outcome.err[-400:]])
        said.append(sentence)
        followed = _follow(finished, sentence, root)
        if followed is None:
            return Ending("no way out", said)
        for other in followed:
            outcome = ppcl(*other)
            if _sentence(outcome) is None and outcome.code:
                return Ending("traceback", [*said, outcome.err[-400:]])
    return Ending("no way out", said)


def _sentence(outcome: Outcome) -> str | None:
    lines = outcome.err.strip().splitlines()
    ours = [line for line in lines if line.startswith("ppcl: ")]
    return ours[0] if outcome.code == 2 and len(ours) == 1 and "Traceback" not in outcome.err else None


def _follow(finished: Finished, sentence: str, root: Path) -> list[list[str]] | None:
    """Delete what a sentence says, and return the commands that it says to run; None if it names no remedy."""
    paths = [Path(found) for found in re.findall(rf"{re.escape(str(root))}/[^\s:;,'()]+", sentence)]
    paths = [Path(str(path).rstrip(".")) for path in paths]
    remedy = re.search(r"(?:move or |and )?delete (both|it|that file|/[^\s:;,]+)", sentence)
    stages = re.search(r"run '?stages=\[([\w,]+)\]'? again", sentence)
    if "run the command that made" in sentence:
        return [finished.command(root)]
    if remedy is None and stages is None:
        return None
    if remedy is not None:
        for path in _named(remedy[1], paths):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return [finished.command(root, *stages[1].split(","))] if stages else []


def _named(words: str, paths: list[Path]) -> Iterator[Path]:
    """Yield the files and folders that a sentence says to delete: by `words`, or the first of the `paths` in it."""
    if words == "both":
        yield from (paths[0], paths[0].with_suffix(".safetensors"))
    elif words in ("it", "that file"):
        yield paths[0]
    else:
        path = Path(words.rstrip("."))
        yield from path.parent.glob(path.name)


def run_all(finished: Finished, chosen: list[Trial], folder: Path) -> dict[Trial, Ending]:
    """Run trials, and return how each has ended; those whose damage is none are left out."""
    undisturbed = folder / "undisturbed"
    shutil.copytree(finished.root, undisturbed)
    assert ppcl(*finished.command(undisturbed)).code == 0
    wanted, endings = results(undisturbed), {}
    for number, trial in enumerate(chosen):
        root = folder / f"trial-{number}"
        ending = run_trial(finished, trial, wanted, root)
        shutil.rmtree(root)
        if ending is not None:
            endings[trial] = ending
    return endings


def sample(finished: Finished, count: int, seed: int) -> list[Trial]:
    """Return a random sample of the trials."""
    return random.Random(seed).sample(trials(finished), count)


def run(_chain: Chain, folder: Path) -> tuple[Counter[str], list[str]]:
    """Return how many trials ended in which way, and what went wrong."""
    from conftest import build_teacher, settings_of

    folder.mkdir(parents=True)
    finished = make(settings_of(build_teacher(folder / "teacher")), folder)
    endings = run_all(finished, trials(finished), folder)
    figures = Counter({"trials": len(endings), "sentence": 0, "remade": 0} | dict.fromkeys(BAD, 0))
    figures.update(ending.kind for ending in endings.values())
    wrong = {trial: ending for trial, ending in endings.items() if ending.kind in BAD}
    return figures, [f"{trial}: {ending.kind}: {' | '.join(ending.said)}" for trial, ending in wrong.items()]
