"""The cells of `experiments.recipes`: which teacher is pruned, how its students are trained, and the row it gives."""

from __future__ import annotations

import fcntl
import gc
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from experiments.common import SEEDS, drawing, make_run, score_pipeline
from experiments.recipes.table import Table, as_text
from ppcl.artifacts.files import read_json
from ppcl.artifacts.headers import fingerprint
from ppcl.context import Run
from ppcl.errors import UsageError
from ppcl.options import identity
from ppcl.stages import depth
from ppcl.variants.costs import heldout_batches, velocities, velocity_error
from ppcl.variants.plugs import Plugs, required_plugs
from ppcl.variants.switch import Switch

HERE = Path(__file__).parent

# Everything that tells rows apart. `budget` says what ended the training: its `steps`, or a limit such as `5 min`.
KEYS = ("way", "teacher", "digest", "recipe", "rate", "steps", "batch_size", "seed", "budget", "prompts")
BATCH_SIZE = 64
BY_STEPS = "steps"
_DIVERGED = re.compile("made the loss (nan|-?inf)|not finite")  # of the messages that end such a training


@dataclass(frozen=True)
class Teacher:
    """Which intervals of an embedded teacher become students, and the seeds of the training data."""

    intervals: tuple[str, ...]
    seeds: tuple[int, ...] = SEEDS[:1]


def _named(stack: str, pairs: str) -> tuple[str, ...]:
    return tuple(f"{stack}.{pair}" for pair in pairs.split())


# The demo's intervals: 65% of the parameters are left.
_DEMO = _named("transformer_blocks", "0-1 3-5 6-7 11-12 13-14 15-16")
TEACHERS = {
    "tiny_qwen_image": Teacher(_DEMO, SEEDS),
    "tiny_qwen_image_v2": Teacher(_DEMO, SEEDS),
    # 69%.
    "tiny_flux": Teacher(
        _named("transformer_blocks", "2-3 4-5") + _named("single_transformer_blocks", "0-1 2-5 6-7 8-9 10-12 16-17")
    ),
    # 65%; ppcl model=tiny_dit data=shapes 'stages=[probe,detect]' method.min_cka=0.991
    "tiny_dit": Teacher(_named("transformer_blocks", "4-5 6-7 8-9 10-11 13-14 15-16 17-18")),
}


@dataclass(frozen=True)
class Recipe:
    """A way to train students. `rate` is the key of its rate, `rates` the values that it is tried at."""

    label: str
    overrides: tuple[str, ...]
    rate: str
    rates: tuple[float, ...]


_UPDATES = ("distill.relative_update", (0.0125, 0.025, 0.05, 0.1, 0.2))
_ADAMW = ("distill.lr", (1e-3, 3e-3, 1e-2, 2e-2, 4e-2, 8e-2))
_PER_TOKEN = ("distill.losses.direction=0", "distill.losses.relative_per_token=1")
RECIPES = {
    "standard": Recipe("standard: error per token, Muon", ("recipe=standard",), *_UPDATES),
    "paper": Recipe("paper: direction, AdamW", ("recipe=paper",), *_ADAMW),
    "direction-muon": Recipe("direction, Muon", ("recipe=paper", "distill.optimizer=muon"), *_UPDATES),
    "per-token-adamw": Recipe("error per token, AdamW", ("recipe=paper", *_PER_TOKEN), *_ADAMW),
}


@dataclass(frozen=True)
class Cell:
    """One measurement.

    `way`: `teacher` is the teacher itself, `removed` cuts each interval to its first block, `local` trains students,
        each on its own, and `sequential` trains them in a chain.
    `recipe`: a key of `RECIPES`; empty where nothing is trained.
    `rate`: None is the rate that `conf/` gives this recipe.
    `seed`: `data.train_seed`.
    """

    teacher: str
    way: str = "local"
    recipe: str = ""
    rate: float | None = None
    steps: int = 0
    seed: int | None = None

    def overrides(self) -> list[str]:
        """Return the overrides of the run that this cell measures."""
        found = ["data=shapes", "distill=tiny", "trainer=cpu", "trainer.num_threads=1", "trainer.progress=false"]
        found += [f"model={self.teacher}", "logger=none", f"distill.batch_size={BATCH_SIZE}"]
        found.append(f"intervals.names=[{','.join(TEACHERS[self.teacher].intervals)}]")
        if self.recipe:
            recipe = RECIPES[self.recipe]
            found += [*recipe.overrides, f"distill.steps={self.steps}", f"data.train_seed={self.seed}"]
            found += [] if self.rate is None else [f"{recipe.rate}={self.rate!r}"]
            found += ["distill.mode=sequential"] if self.way == "sequential" else []
        return found

    def made_from(self, run: Run) -> str:
        """Return the fingerprint of everything that the cell's row depends on, apart from the number of prompts."""
        config = run.config
        facts: dict[str, Any] = {"model": run.teacher.identity, "sampling": drawing(run)}
        facts["eval_seed"] = config.data.eval_seed
        if self.way != "teacher":
            facts["intervals"] = run.intervals
        if self.recipe:
            facts |= {"distill": identity(config.distill), "data": run.data.identity, "precision": run.precision}
        return fingerprint(facts)

    def run(self) -> Run:
        """Return the cell's run. Its folder's name has the fingerprint, so that no two trainings share a folder."""
        run = make_run(f"recipes/{self.teacher}", *self.overrides())
        named = (self.way, self.recipe, self.steps or "", self.seed or "", self.made_from(run))
        folder = run.folder / "-".join(str(part) for part in named if part)
        return Run(run.config, folder)

    def rate_of(self, run: Run) -> float | None:
        """Return the rate of the cell's training, configured or given."""
        return getattr(run.config.distill, RECIPES[self.recipe].rate.partition(".")[2]) if self.recipe else None

    def switch(self, run: Run) -> Switch:
        """Return the switch of the cell's models, after training the students if the run does not have them yet."""
        if self.recipe:
            depth.run(run)
        return Switch(run, required_plugs(run) if self.recipe else Plugs())


@dataclass(frozen=True)
class Sitting:
    """What all cells of one command share.

    `prompts`: prompts per category that a model is scored on. `shared`: whether other work shares the machine.
    """

    table: Table
    prompts: int
    shared: bool

    def row(self, cell: Cell, minutes: float | None = None) -> dict[str, str] | None:
        """Return the row of a cell, which is measured now if the table does not have it.

        `minutes`: a limit to the training. One that would take longer gets as many steps as fit, see `steps_within`.
        None is returned while another process measures this cell.
        """
        run = cell.run()
        whole = self._found(cell, run, BY_STEPS)
        if minutes is None:
            return whole or self._measure(cell, run, BY_STEPS)
        limit = f"{minutes:g} min"
        wanted = self.keys(cell, run, limit)
        shorter = self.table.find(**{key: value for key, value in wanted.items() if key != "steps"})
        if shorter is not None:
            cut = replace(cell, steps=int(shorter["steps"]))
            if self._found(cut, cut.run(), limit):
                return shorter
        if whole is None and self._fitting(cell, run, minutes) == cell.steps:
            whole = self._measure(cell, run, BY_STEPS)
            if whole is None:
                return None
        steps = self._fitting(cell, run, minutes)
        if whole is not None and steps == cell.steps:
            return whole
        cut = replace(cell, steps=steps)
        return self._measure(cut, cut.run(), limit)

    def _fitting(self, cell: Cell, run: Run, minutes: float) -> int:
        return steps_within(minutes, self.keys(cell, run, BY_STEPS), self.table.rows)

    def keys(self, cell: Cell, run: Run, budget: str) -> dict[str, Any]:
        """Return what the row of a cell is found by."""
        made = (cell.way, cell.teacher, run.teacher.identity["weights"], cell.recipe, cell.rate_of(run), cell.steps)
        return dict(zip(KEYS, (*made, BATCH_SIZE, cell.seed, budget, self.prompts), strict=True))

    def _found(self, cell: Cell, run: Run, budget: str) -> dict[str, str] | None:
        """Return the cell's row, unless the settings of its recipe have changed since."""
        return self.table.find(**self.keys(cell, run, budget), made_from=cell.made_from(run))

    def _measure(self, cell: Cell, run: Run, budget: str) -> dict[str, str] | None:
        """Measure a cell and write its row. Returns None if another process is at it."""
        teacher = None if cell.way == "teacher" else self.row(Cell(cell.teacher, "teacher"))
        keys, made_from = self.keys(cell, run, budget), cell.made_from(run)
        return self.add(self.table, keys, made_from, run.folder, lambda: self._figures(cell, run), teacher)

    def add(
        self,
        table: Table,
        keys: Mapping[str, Any],
        made_from: str,
        folder: Path,
        figures: Callable[[], dict[str, Any]],
        teacher: Mapping[str, str] | None,
    ) -> dict[str, str] | None:
        """Return the row of `table` with these `keys`, which is written now if the table does not have it.

        `made_from`: a row with another fingerprint is written anew.
        `folder`: what this process has to hold for that. None is returned while another process does.
        `figures`: measures the row.
        `teacher`: the row to compare the score with; None is that of a teacher.
        """

        def compared() -> dict[str, Any]:
            row = figures()
            if teacher is not None and row.get("score") is not None:
                row["drop_percent"] = 100 * (1 - row["score"] / float(teacher["score"]))
            return row

        return self.claim(table, keys, made_from, folder, compared, wait=teacher is None)

    def claim(
        self,
        table: Table,
        keys: Mapping[str, Any],
        made_from: str,
        folder: Path,
        figures: Callable[[], dict[str, Any]],
        wait: bool = False,
    ) -> dict[str, str] | None:
        """Do as `add`, for figures that are complete. `wait`: until another process has left `folder`."""
        with claimed(folder, wait=wait) as free:
            if not free:
                return None
            found = table.find(**keys, made_from=made_from)  # it may have ended a moment ago
            if found is not None:
                return found
            start = time.monotonic()
            row = {**keys, **figures()}
            row |= {"minutes": (time.monotonic() - start) / 60, "shared": "yes" if self.shared else "no"}
            return table.add(row | {"date": date.today().isoformat(), "commit": commit(), "made_from": made_from})

    def _figures(self, cell: Cell, run: Run) -> dict[str, Any]:
        """Return what is measured on a cell's model, and what its training cost."""
        gc.collect()  # models of earlier cells
        figures: dict[str, Any] = {}
        try:
            switch = cell.switch(run)
        except UsageError as error:
            return diverged(error)
        if cell.recipe:
            figures["seconds"], figures["peak_mb"] = cost_of(run.folder, "depth", cell.steps)
        measure = meter(run, switch)
        if cell.way == "removed":
            switch.board.remove()
        elif cell.way != "teacher":
            switch.board.all()
        figures["blocks"] = sum(map(len, switch.board.kept.values()))
        figures["params_ratio"] = sum(p.numel() for p in switch.teacher.parameters()) / switch.teacher_size
        if cell.way != "teacher":
            figures["error"] = measure()
        scores = score_pipeline(run, self.prompts)
        figures["score"] = scores.pop("overall")
        figures["categories"] = " ".join(f"{name}={value:.3f}" for name, value in scores.items())
        return figures


def diverged(error: UsageError) -> dict[str, Any]:
    """Return the figures of a training that diverged; raises any other `error`."""
    if not _DIVERGED.search(str(error)):
        raise error
    return {"error": float("nan"), "remark": "diverged"}


def cost_of(folder: Path, stage: str, steps: int) -> tuple[float | None, float | None]:
    """Return the seconds of a training of `steps`, and the peak of a step in MB, as the product has recorded them.

    A resumed training has counted its own steps alone, and may have had too few for some of this: that is None.
    """
    cost = read_json(folder / "training" / f"{stage}.json", "The cost of the training")
    return cost["seconds_per_step"] * steps or None, cost["peak_memory_mb"] or None


@contextmanager
def claimed(folder: Path, wait: bool = False) -> Iterator[bool]:
    """Hold `folder` for this process, and yield whether it does. `wait`: until another process has left it."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            held = False
            print(f"{folder.name}: another process is measuring this cell", flush=True)
        yield held
    finally:
        os.close(handle)


def meter(run: Run, switch: Switch) -> Callable[[], float]:
    """Return a function that measures the held-out velocity error of the model as it is arranged then.

    This arranges the teacher, whose velocities are the targets.
    """
    batches = heldout_batches(run)
    targets = velocities(switch.board().transformer, batches)
    return lambda: velocity_error(switch.board.transformer, batches, targets)


def steps_within(minutes: float, keys: Mapping[str, Any], rows: Iterable[Mapping[str, str]]) -> int:
    """Return how many of the steps in `keys` fit into `minutes`.

    It goes by the fastest step that the same recipe has shown on this teacher, at any rate: what else runs on the
    machine only adds to the time. Without such a row it is all steps.
    """
    same = {key: as_text(keys[key]) for key in ("way", "teacher", "digest", "recipe", "batch_size")}
    known = [
        float(row["seconds"]) / int(row["steps"]) for row in rows if row["seconds"] and same.items() <= row.items()
    ]
    return min(int(keys["steps"]), int(60 * minutes / min(known))) if known else int(keys["steps"])


@cache
def configured_rate(teacher: str, recipe: str) -> float:
    """Return the rate that `conf/` gives a recipe."""
    cell = Cell(teacher, "local", recipe, None, 1, SEEDS[0])
    rate = cell.rate_of(cell.run())
    assert rate is not None
    return rate


@cache
def commit() -> str:
    """Return the commit that is measured, with `-dirty` if `src` or `conf` differ from it; empty outside of a clone."""
    asked = ("rev-parse", "--short=7", "HEAD"), ("status", "--porcelain", "--", ":/src", ":/conf")
    found, changes = (
        subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True, check=False).stdout.strip()
        for words in asked
    )
    return found + ("-dirty" if changes else "")
