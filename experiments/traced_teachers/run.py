"""Prune shipped teachers from prompts alone, traced, and as the families that they are: is the result the same?

    python -m experiments.traced_teachers.run --minutes 55

Every training is a row of results.csv beside this file. Those that the table has are not measured again, so the command
can be stopped at any time and given again. It begins no further row after `--minutes`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Sequence
from itertools import combinations, product
from pathlib import Path
from typing import Any

import torch

import ppcl
from experiments.common import SEEDS, make_run, score_pipeline
from experiments.recipes.cells import TEACHERS, Sitting
from experiments.recipes.report import fill, spread, table
from experiments.recipes.table import Row, Table, select
from ppcl.artifacts.headers import fingerprint
from ppcl.artifacts.plan import PruningPlan, plug_name
from ppcl.context import Run
from ppcl.data.worlds.shapes import CATEGORIES, make_scene
from ppcl.options import identity
from ppcl.surgery.plugboard import plug
from ppcl.variants.costs import heldout_batches, velocities, velocity_error

HERE = Path(__file__).parent
MODELS = ("tiny_qwen_image", "tiny_flux")
KNOWN, TRACED = "known", "traced"
PROMPTS = 256  # in the file that a traced teacher is given
FIRST_SEED = 1000  # of the prompts' scenes, so that they differ from those of trainings and of evaluation

KEYS = ("teacher", "way", "seed", "digest", "steps", "prompts")
COLUMNS = (
    *KEYS,
    *("detected", "params_ratio", "error", "score", "drop_percent"),
    *("minutes", "shared", "date", "commit", "made_from", "categories"),
)


def overrides(teacher: str, way: str, seed: int, steps: int, folder: Path) -> list[str]:
    """Return the overrides of all commands of a way. `folder`: where its file of prompts is put."""
    found = [f"model={teacher}", "logger=none", "trainer=cpu", "trainer.num_threads=1", "trainer.progress=false"]
    found += ["watch.heldout=0", "watch.pictures=0", "distill=tiny", f"distill.steps={steps}", "distill.batch_size=64"]
    found += ["method.min_cka=0.9945", f"data.train_seed={seed}", f"data.calibration_seed={100 + seed}"]
    if way == KNOWN:
        return [*found, "data=shapes"]
    found += ["model.trace=true", "data=prompts", f"data.path={prompts_file(folder, seed)}", f"seed={seed}"]
    return [*found, "data.shift=4"]  # of the noise levels, as data=shapes has it


def prompts_file(folder: Path, seed: int) -> Path:
    """Return the file of a seed's prompts, which is written anew."""
    path = folder / f"prompts-{seed}.txt"
    folder.mkdir(parents=True, exist_ok=True)
    kinds = [CATEGORIES[number % len(CATEGORIES)] for number in range(PROMPTS)]
    scenes = [make_scene(FIRST_SEED + seed, number, kind) for number, kind in enumerate(kinds)]
    path.write_text("".join(f"{scene.caption}\n" for scene in scenes), encoding="utf-8")
    return path


def measured_row(sitting: Sitting, teacher: str, way: str, seed: int, steps: int) -> dict[str, str] | None:
    """Return the row of a training, which is measured now if the table does not have it.

    None is returned while another process measures it.
    """
    base = make_run("traced_teachers", f"model={teacher}", "data=shapes", "trainer=cpu", "trainer.num_threads=1")
    given = overrides(teacher, way, seed, steps, base.folder)
    config = make_run("traced_teachers", *given).config
    facts = {part: identity(getattr(config, part)) for part in ("probe", "method", "distill")}
    data = config.data
    recorded = [PROMPTS, FIRST_SEED, data.record_steps, data.shift, data.caption_dropout] if way == TRACED else []
    made_from = fingerprint(facts | {"data": recorded, "intervals": TEACHERS[teacher].intervals})
    run = Run(config, base.folder / f"{teacher}-{way}-{seed}-{steps}-{made_from}")
    made = (teacher, way, seed, base.teacher.identity["weights"], steps, sitting.prompts)
    keys = dict(zip(KEYS, made, strict=True))
    found = sitting.table.find(**keys, made_from=made_from)
    if found is not None:
        return found
    return sitting.claim(
        sitting.table,
        keys,
        made_from,
        run.folder,
        lambda: _figures(base, run, given, TEACHERS[teacher].intervals, sitting.prompts),
    )


def _figures(base: Run, run: Run, given: Sequence[str], intervals: Sequence[str], prompts: int) -> dict[str, Any]:
    """Detect intervals, train students of the fixed `intervals`, and score these.

    `base`: the run of the known family, whose pipeline draws and whose data the velocity error is measured on.
    """
    name = str(run.folder.relative_to(Path(run.config.paths.runs_dir).resolve()))
    plan, first = detect(name, given, run.folder), _recorded(given)
    fixed = f"intervals.names=[{','.join(intervals)}]"
    ppcl.run([f"name={name}/students", *given, fixed, f"stages=[{first}depth]"])
    pipeline, batches = base.teacher.pipeline, heldout_batches(base)
    teacher = score_pipeline(base, prompts)["overall"]
    targets = velocities(pipeline.transformer, batches)
    board = plug(pipeline, run.folder / "students" / "plugs")
    error, scores = velocity_error(pipeline.transformer, batches, targets), score_pipeline(base, prompts)
    board()  # the teacher again
    score = scores.pop("overall")
    return {
        "detected": intervals_of(plan),
        "params_ratio": plan.parameters["student"] / plan.parameters["teacher"],
        "error": error,
        "score": score,
        "drop_percent": 100 * (1 - score / teacher),
        "categories": " ".join(f"{category}={value:.3f}" for category, value in scores.items()),
    }


def detect(name: str, given: Sequence[str], folder: Path) -> PruningPlan:
    """Detect intervals in the run `name`, whose folder is `folder`, with the overrides `given`; return its plan."""
    ppcl.run([f"name={name}", *given, f"stages=[{_recorded(given)}probe,detect]"])
    return PruningPlan.load(folder / "plan" / "plan.json")


def _recorded(given: Sequence[str]) -> str:
    """Return the stage that records prompts, with a comma, if a run with these overrides needs it."""
    return "cache," if "model.trace=true" in given else ""


def intervals_of(plan: PruningPlan) -> str:
    """Return a plan's intervals as names separated by spaces."""
    return " ".join(plug_name(stack, pair) for stack, pairs in plan.intervals.items() for pair in pairs)


def removed(detected: str) -> set[str]:
    """Return the blocks that intervals, as names separated by spaces, leave out: all but the first of each."""
    found = set()
    for name in detected.split():
        stack, _, ends = name.rpartition(".")
        first, last = map(int, ends.split("-"))
        found |= {f"{stack}.{block}" for block in range(first + 1, last + 1)}
    return found


def differences(rows: Iterable[Row], others: Iterable[Row] | None = None) -> list[int]:
    """Return how many blocks only one of two detections removes, for all pairs; `others`: pairs of both."""
    pairs = combinations(rows, 2) if others is None else product(rows, others)
    return [len(removed(a["detected"]) ^ removed(b["detected"])) for a, b in pairs]


def result_table(rows: Sequence[Row]) -> str:
    """Return a row for each teacher and way: what its detections and its trained students are like."""
    header = ["teacher", "way", "seeds", "parameters left", "blocks that differ", "score", "drop, %", "velocity error"]
    lines = []
    for teacher in dict.fromkeys(row["teacher"] for row in rows):
        own = {way: select(rows, teacher=teacher, way=way) for way in (KNOWN, TRACED)}
        for way, found in own.items():
            if not found:
                continue
            apart = differences(found) if way == KNOWN else differences(found, own[KNOWN])
            written = f"{min(apart)} to {max(apart)}" if apart else "-"
            figures = [spread(found, *what) for what in (("score", 3), ("drop_percent", 1), ("error", None))]
            lines.append([f"`{teacher}`", way, str(len(found)), spread(found, "params_ratio", 3), written, *figures])
    return table(header, lines)


def detections_table(rows: Sequence[Row]) -> str:
    """Return the intervals that each detection has found."""
    lines = [[f"`{row['teacher']}`", row["way"], row["seed"], row["detected"]] for row in rows]
    return table(["teacher", "way", "seed", "intervals"], lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=250, help="of the students' training")
    parser.add_argument("--prompts", type=int, default=30, help="of each category, that a model is scored on")
    parser.add_argument("--minutes", type=float, default=55.0, help="after which no further row is begun")
    parser.add_argument("--alone", action="store_true", help="rows say that nothing else ran on the machine")
    parser.add_argument("--table", action="store_true", help="measure nothing")
    parser.add_argument("--output", type=Path, default=HERE, help="the folder of results.csv and of the tables")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    sitting = Sitting(Table(given.output / "results.csv", COLUMNS, KEYS), given.prompts, not given.alone)
    end = time.monotonic() + 60 * given.minutes
    wanted = product(given.teacher, given.seeds, (KNOWN, TRACED))
    for teacher, seed, way in () if given.table else wanted:
        if time.monotonic() > end:
            print("time is up: give the command again to go on", flush=True)
            break
        print(measured_row(sitting, teacher, way, seed, given.steps), flush=True)
    rows = sorted(sitting.table.rows, key=lambda row: [row[key] for key in ("teacher", "way", "seed")])
    if rows:
        fill(given.output / "README.md", {"result": result_table(rows), "detections": detections_table(rows)})
        print(result_table(rows), flush=True)


if __name__ == "__main__":
    main()
