"""The chains of `experiments.recipes`: local training, fine-tuning, or both, within a given time of training."""

from __future__ import annotations

import gc
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from experiments.common import drawing, make_run, score_pipeline
from experiments.recipes.cells import (
    BATCH_SIZE,
    RECIPES,
    TEACHERS,
    Cell,
    Sitting,
    claimed,
    cost_of,
    diverged,
)
from experiments.recipes.table import Table, as_text, select
from ppcl.artifacts.files import read_json, write_json
from ppcl.artifacts.headers import fingerprint
from ppcl.context import Run
from ppcl.errors import UsageError
from ppcl.options import identity
from ppcl.stages import depth, finetune, plan, width
from ppcl.variants.costs import heldout_batches, velocities, velocity_error
from ppcl.variants.plugs import required_plugs
from ppcl.variants.switch import Switch
from ppcl.variants.variants import Variant, planned, tuned

PARTS = ("depth", "width", "finetune")
KEYS = ("group", "entry", "teacher", "digest", "batch_size", "seed", "budget", "prompts")
COLUMNS = (
    *KEYS,
    *("rate", "blocks", "params_ratio", "error_before", "error", "score", "drop_percent", "seconds", "peak_mb"),
    *(f"{part}_{what}" for part in PARTS for what in ("steps", "seconds", "peak_mb")),
    *("minutes", "shared", "date", "commit", "made_from", "remark", "categories"),
)
TRIAL_STEPS = 16  # of which the first is slower

FULL = ("finetune=tiny",)
LORA = ("finetune=tiny", "finetune.optimizer=adamw", "finetune.lora_rank=8")
OUTPUT = ("finetune=tiny", "finetune.feature_weight=0")


@dataclass(frozen=True)
class Entry:
    """How a model is trained.

    `recipe`: a key of `RECIPES`, for all trainings.
    `way`: how the students are trained, as in `Cell`; with `removed` there are none.
    `tuning`: overrides of fine-tuning; empty: no fine-tuning. Chains of the group `half` are all tuned.
    `share`: the part of the time that local training gets.
    `best_rate`: whether it is trained at the rate that the group `rates` has found best, else at the configured one.
    """

    label: str
    recipe: str = "standard"
    way: str = "local"
    tuning: tuple[str, ...] = ()
    share: float = 1.0
    best_rate: bool = False

    @property
    def is_ours(self) -> bool:
        """Whether it is local training by the default recipe, alone or with tuning."""
        return self.recipe == "standard" and self.way == "local"


EQUAL = {
    "local": Entry("ours, local only"),
    "local-tuned": Entry("ours, local + tuning", tuning=FULL, share=0.5),
    "local-lora": Entry("ours, local + LoRA", tuning=LORA, share=0.5),
    "removal-tuned": Entry("removal + tuning", way="removed", tuning=FULL, share=0.0),
    "output": Entry("removal + output distillation", way="removed", tuning=OUTPUT, share=0.0),
    "sequential": Entry("sequential, our recipe", way="sequential"),
    "sequential-paper": Entry("sequential, the paper's recipe", "paper", "sequential"),
    "paper": Entry("the paper's recipe, local only", "paper"),
    "paper-best": Entry("the paper's at its best rate, local only", "paper", best_rate=True),
}
# Of the groups `planned`, and `half`, which has the first two and tunes them.
PLANNED = {
    "ours": Entry("ours"),
    "paper": Entry("the paper's", "paper"),
    "paper-best": Entry("the paper's at its best rate", "paper", best_rate=True),
    "ours-tuned": Entry("ours, then tuning", tuning=FULL),
}


@dataclass(frozen=True)
class Chain(ABC):
    """What all chains have.

    `seed`: `data.train_seed`.
    `minutes`: the time of all its trainings.
    `scale`: multiplies every number of steps that is not a matter of time; below 1 it is a try.
    `rate`: of the students; None is the configured one.
    """

    name: str
    teacher: str
    seed: int
    minutes: float | None
    rate: float | None = None
    scale: float = 1.0

    group = ""

    @property
    @abstractmethod
    def budget(self) -> str:
        """What ends the trainings, as the table has it."""

    @abstractmethod
    def overrides(self, **steps: int) -> list[str]:
        """Return the overrides of the chain's run, with the steps of each part."""

    @cached_property
    def folder_name(self) -> str:
        """The run's name. It has the fingerprint of all settings but the steps that the time allows."""
        named = (self.group, self.name, self.budget.replace(" ", ""), self.seed, self.made_from)
        return f"recipes/{self.teacher}/{'-'.join(map(str, named))}"

    @cached_property
    def made_from(self) -> str:
        """The fingerprint of everything that the row depends on, apart from the prompts and the number of steps."""
        run = make_run(f"recipes/{self.teacher}", *self.overrides())
        config = run.config
        facts: dict[str, Any] = {"model": run.teacher.identity, "sampling": drawing(run)}
        facts |= {"eval_seed": config.data.eval_seed, "data": run.data.identity, "precision": run.precision}
        facts |= {"intervals": run.intervals, "budget": identity(config.budget), "minutes": self.minutes}
        facts |= {part: identity(getattr(config, part)) for part in ("distill", "width", "finetune")}
        if config.width.source == "none":
            facts["width"].pop("relative_update", None)  # no projectors are trained
        return fingerprint(facts)

    def run(self, **steps: int) -> Run:
        """Return the chain's run, with the steps of each part."""
        return make_run(self.folder_name, *self.overrides(**steps))


@dataclass(frozen=True)
class Equal(Chain):
    """A chain of the group `equal`: students of all intervals, removals, or either and then fine-tuning."""

    group = "equal"

    @property
    def entry(self) -> Entry:
        """How it is trained."""
        return EQUAL[self.name]

    @property
    def budget(self) -> str:
        return f"{self.minutes:g} min"

    def cell(self, steps: int) -> Cell:
        """Return the cell of the local training. Its run is also that of the group `local` with as many steps."""
        recipe, rate = (self.entry.recipe, self.rate) if self.entry.share else ("", None)
        return Cell(self.teacher, self.entry.way, recipe, rate, steps, self.seed)

    def overrides(self, **steps: int) -> list[str]:
        found = self.cell(steps.get("depth") or 1).overrides()
        if not self.entry.share:
            found += ["distill.mode=none", f"data.train_seed={self.seed}", f"recipe={self.entry.recipe}"]
        return [*found, *self.entry.tuning, f"finetune.steps={steps.get('finetune') or 1}"]


@dataclass(frozen=True)
class Planned(Chain):
    """Students and projectors, the plan of both for a number of parameters, and perhaps fine-tuning of that model.

    `params`: `budget.params`.
    `steps`: of the students; None is the demo's. Projectors are trained as in the demo.
    `is_tuned`: whether the planned model is fine-tuned: by the demo's settings, or with `minutes` as long as is left.
    """

    params: float = 0.5
    steps: int | None = None
    is_tuned: bool = True

    @property
    def group(self) -> str:  # type: ignore[override]
        return "half" if self.params == 0.5 else "planned"

    @property
    def budget(self) -> str:
        if not self.is_tuned:
            whole = f"{self.steps} steps"
        else:
            whole = "demo" if self.minutes is None else f"{self.minutes:g} min"
        return whole if self.scale == 1 else f"{whole} scaled"

    @property
    def recipe(self) -> str:
        """The key of `RECIPES`."""
        return PLANNED[self.name].recipe

    def cell(self, steps: int) -> Cell:
        """Return the cell with the same students, if its settings are these."""
        return Cell(self.teacher, "local", self.recipe, self.rate, steps, self.seed)

    def overrides(self, **steps: int) -> list[str]:
        stages = "depth,width,plan,finetune" if self.is_tuned else "depth,width,plan"
        found = ["experiment=demo", f"stages=[{stages}]", f"model={self.teacher}", "data=shapes"]
        found += ["logger=none", "trainer.num_threads=1", "trainer.progress=false"]
        found += [f"recipe={self.recipe}", f"data.train_seed={self.seed}", f"budget.params={self.params}"]
        found.append(f"intervals.names=[{','.join(TEACHERS[self.teacher].intervals)}]")
        found.append("budget.rescored=0")  # as when the first rows were measured
        if self.rate is not None:
            found.append(f"{RECIPES[self.recipe].rate}={self.rate!r}")
        if self.steps is not None:
            found += [f"distill.steps={self._scaled(self.steps)}", f"distill.batch_size={BATCH_SIZE}"]
        if self.minutes is not None and self.is_tuned:
            found.append(f"finetune.steps={steps.get('finetune', 1)}")
        if self.scale != 1:
            demo = make_run(f"recipes/{self.teacher}", "experiment=demo").config
            found.append(f"width.steps={self._scaled(demo.width.steps)}")
            if self.steps is None:
                found.append(f"distill.steps={self._scaled(demo.distill.steps)}")
            if self.minutes is None:
                found.append(f"finetune.steps={self._scaled(demo.finetune.steps)}")
        return found

    def _scaled(self, steps: int) -> int:
        return max(1, round(steps * self.scale))


@dataclass(frozen=True)
class Chains:
    """Measures chains, and writes their rows to `table`."""

    sitting: Sitting
    table: Table
    trial_steps: int = TRIAL_STEPS

    def row(self, chain: Equal | Planned) -> dict[str, str] | None:
        """Return the row of a chain, which is measured now if the table does not have it.

        None is returned while another process measures it.
        """
        teacher = self.sitting.row(Cell(chain.teacher, "teacher"))
        assert teacher is not None
        made = (chain.group, chain.name, chain.teacher, teacher["digest"], BATCH_SIZE)
        keys = dict(zip(KEYS, (*made, chain.seed, chain.budget, self.sitting.prompts), strict=True))
        found = self.table.find(**keys, made_from=chain.made_from)
        if found is not None:
            return found
        measure = self._equal if isinstance(chain, Equal) else self._planned

        def figures() -> dict[str, Any]:
            gc.collect()  # models of earlier chains
            rate = {"rate": chain.cell(1).rate_of(chain.run())}
            try:
                return rate | measure(chain)  # type: ignore[arg-type]
            except UsageError as error:
                return rate | diverged(error)

        folder = chain.run().folder
        return self.sitting.add(self.table, keys, chain.made_from, folder, figures, teacher)

    # The group `equal`

    def _equal(self, chain: Equal) -> dict[str, Any]:
        steps = self._steps(chain)
        costs, base = {}, []
        if steps["depth"]:
            cell = chain.cell(steps["depth"])
            costs["depth"] = train_students(cell)
            base = [f"paths.base_run={cell.run().folder}"]
        run = make_run(chain.folder_name, *chain.overrides(**steps), *base)
        if steps["finetune"]:
            finetune.run(run)
            costs["finetune"] = cost_of(run.folder, "finetune", steps["finetune"])
        return costs_of(costs, steps) | self._figures(run, bool(steps["finetune"]))

    def _steps(self, chain: Equal) -> dict[str, int]:
        """Return the steps of each part that fill its share of the time.

        They are decided once and kept in the run's folder, so that a training which was stopped goes on with them.
        """
        path = chain.run().folder / "steps.json"
        if not path.exists():
            shares = {"depth": chain.entry.share, "finetune": 1 - chain.entry.share}
            seconds = {part: 60 * (chain.minutes or 0) * share for part, share in shares.items()}
            found = {
                part: max(1, int(seconds[part] / self.seconds_a_step(chain, part))) if share else 0
                for part, share in shares.items()
            }
            write_json(path, found)
        return read_json(path, "The steps of the chain")

    def seconds_a_step(self, chain: Equal, part: str) -> float:
        """Return the seconds of a step: the least of a few steps now and of all such trainings that have a row.

        What else runs on the machine only adds to the time.
        """
        digest = chain.run().teacher.identity["weights"]
        known = known_seconds(self.sitting.table.rows, self.table.rows, chain, digest, part)
        return min([*known, self._try(chain, part)])

    def _try(self, chain: Equal, part: str) -> float:
        """Return the seconds of a step in a training of a few steps, whose results are not kept."""
        overrides = chain.overrides(**{part: self.trial_steps})
        if part == "finetune":  # a step takes as long with the block that an interval is cut to as with its student
            overrides.append("distill.mode=none")
        return _tried(make_run(f"{chain.folder_name}/trial-{part}", *overrides), part)

    # The groups `half` and `planned`

    def _planned(self, chain: Planned) -> dict[str, Any]:
        run = chain.run()
        config = run.config
        steps = {"depth": config.distill.steps, "width": config.width.steps}
        cell = chain.cell(steps["depth"])
        theirs = cell.run()
        if identity(theirs.config.distill) == identity(config.distill) and theirs.intervals == run.intervals:
            train_students(cell)
            for name in ("plugs", "training"):
                shutil.copytree(theirs.folder / name, run.folder / name, dirs_exist_ok=True)
        for stage in (depth, width, plan):
            stage.run(run)
        costs = {part: cost_of(run.folder, part, number) for part, number in steps.items()}
        if not chain.is_tuned:
            return costs_of(costs, steps) | self._figures(run, False)
        steps["finetune"] = config.finetune.steps
        if chain.minutes is not None:
            left = 60 * chain.minutes - sum(seconds or 0.0 for seconds, _ in costs.values())
            steps["finetune"] = self._steps_left(chain, left)
        if steps["finetune"]:
            run = chain.run(finetune=steps["finetune"])
            finetune.run(run)
            costs["finetune"] = cost_of(run.folder, "finetune", steps["finetune"])
        remark = {} if steps["finetune"] else {"remark": "no time left for tuning"}
        return costs_of(costs, steps) | remark | self._figures(run, bool(steps["finetune"]))

    def _steps_left(self, chain: Planned, seconds: float) -> int:
        """Return the steps of fine-tuning that fit into `seconds`, decided once as by `_steps`."""
        path = chain.run().folder / "steps.json"
        if not path.exists():
            run = chain.run(finetune=self.trial_steps)
            overrides = [*chain.overrides(finetune=self.trial_steps), f"paths.base_run={run.folder}"]
            each = _tried(make_run(f"{chain.folder_name}/trial-finetune", *overrides), "finetune")
            known = known_seconds((), self.table.rows, chain, run.teacher.identity["weights"], "finetune")
            write_json(path, {"finetune": max(0, int(seconds / min([*known, each])))})
        return read_json(path, "The steps of the chain")["finetune"]

    # Both

    def _figures(self, run: Run, is_tuned: bool) -> dict[str, Any]:
        """Return errors and scores of the model that `run` has made, before and after tuning."""
        plugs = required_plugs(run)
        switch = Switch(run, plugs)
        batches = heldout_batches(run)
        targets = velocities(switch(Variant("teacher")), batches)
        variant = planned(run, plugs)
        figures: dict[str, Any] = {}
        if is_tuned:
            figures["error_before"] = velocity_error(switch(variant), batches, targets)
            variant = tuned(run, plugs)
        model = switch(variant)
        figures["error"] = velocity_error(model, batches, targets)
        figures["blocks"] = sum(map(len, switch.board.kept.values()))
        figures["params_ratio"] = sum(parameter.numel() for parameter in model.parameters()) / switch.teacher_size
        scores = score_pipeline(run, self.sitting.prompts)
        figures["score"] = scores.pop("overall")
        figures["categories"] = " ".join(f"{name}={value:.3f}" for name, value in scores.items())
        return figures


def _tried(run: Run, part: str) -> float:
    """Return the seconds of a step of a training that is only begun to measure that; its folder is deleted."""
    (depth if part == "depth" else finetune).run(run)
    seconds, _ = cost_of(run.folder, part, 1)
    assert seconds is not None
    shutil.rmtree(run.folder)
    return seconds


def train_students(cell: Cell) -> tuple[float | None, float | None]:
    """Train the students of a cell, unless its run has them, and return what that cost (see `cost_of`)."""
    run = cell.run()
    with claimed(run.folder, wait=True):  # another process may be measuring it
        depth.run(run)
    return cost_of(run.folder, "depth", cell.steps)


def costs_of(costs: Mapping[str, tuple[float | None, float | None]], steps: Mapping[str, int]) -> dict[str, Any]:
    """Return the columns of a row that say what the trainings cost, by part and in all."""
    found: dict[str, Any] = {}
    for part, (seconds, peak_mb) in costs.items():
        found |= {f"{part}_steps": steps[part], f"{part}_seconds": seconds, f"{part}_peak_mb": peak_mb}
    seconds = [value for value, _ in costs.values()]
    peaks = [peak for _, peak in costs.values() if peak is not None]
    found["seconds"] = None if None in seconds else sum(value or 0.0 for value in seconds)
    return found | {"peak_mb": max(peaks) if len(peaks) == len(costs) else None}


def known_seconds(
    cells: Iterable[Mapping[str, str]],
    chains: Iterable[Mapping[str, str]],
    chain: Equal | Planned,
    digest: str,
    part: str,
) -> list[float]:
    """Return the seconds of a step in all rows whose training of `part` has the same steps as that of `chain`.

    `cells`, `chains`: rows of results.csv and chains.csv. `digest`: of the teacher's weights.
    """
    facts = {"teacher": chain.teacher, "digest": digest, "batch_size": as_text(BATCH_SIZE)}
    found = [(row, f"{part}_seconds", f"{part}_steps") for row in select(chains, **facts, group=chain.group)
             if row["entry"] in _alike(chain, part)]  # fmt: skip
    if isinstance(chain, Equal) and part == "depth":
        same = select(cells, **facts, way=chain.entry.way, recipe=chain.entry.recipe)
        found += [(row, "seconds", "steps") for row in same]
    return [float(row[seconds]) / int(row[steps]) for row, seconds, steps in found if row[seconds]]


def _alike(chain: Equal | Planned, part: str) -> set[str]:
    """Return the names of the chains whose training of `part` has the same steps."""
    if isinstance(chain, Planned):
        return {chain.name}
    mine = chain.entry
    if part == "depth":
        return {name for name, one in EQUAL.items() if one.share and (one.way, one.recipe) == (mine.way, mine.recipe)}
    return {name for name, one in EQUAL.items() if one.tuning == mine.tuning}
