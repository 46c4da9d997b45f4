"""The cells of the comparison: which method prunes which teacher to which size, and how the pruned model is trained."""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ppcl
from experiments.common import drawing, make_run
from experiments.recipes.cells import Sitting, cost_of
from ppcl.artifacts.files import read_json, write_json
from ppcl.artifacts.headers import fingerprint
from ppcl.artifacts.scores import ComparedRow
from ppcl.context import Run
from ppcl.errors import UsageError
from ppcl.options import identity

TEACHERS = ("tiny_qwen_image", "tiny_flux", "tiny_dit", "tiny_qwen_image_edit")
SIZES = (0.71, 0.51)  # of the parameters; whole blocks come near to 70% and 50%
EVERY_SIZE = (0.86, 0.71, 0.61, 0.51)  # what one training is to serve
BATCH_SIZE = 64  # samples of a training step

# What tells rows apart. `samples` says what all entries have in common: the samples of their trainings, or the minutes.
KEYS = ("entry", "teacher", "digest", "size", "seed", "equal", "prompts")
# Seconds are those of one core, whatever else runs; `minutes` are those of the clock. `once_seconds` are the part of
# `training_seconds` that all sizes share.
COLUMNS = (
    *KEYS,
    *("blocks", "params_ratio", "memory_ratio", "latency_ratio", "velocity_error", "score", "drop_percent"),
    *("local_steps", "tuning_steps", "choosing_seconds", "training_seconds", "once_seconds"),
    *("minutes", "shared", "date", "commit", "made_from", "remark", "categories"),
)


@dataclass(frozen=True)
class Entry:
    """A way to prune, and to train what is left.

    `choose`: overrides that choose the blocks.
    `planned`: whether the planner reaches the size, from intervals that the method finds; otherwise the method does.
    `recover`: overrides of the trainings.
    `local`: the share of the steps in which students are trained; all others tune the whole model.
    `once`: whether students and projectors are trained once, in a run that all sizes take them from.
    """

    label: str
    choose: tuple[str, ...]
    planned: bool = False
    recover: tuple[str, ...] = ()
    local: float = 0.0
    once: bool = False


UNTRAINED = {
    "ppcl": Entry("PPCL, planned", ("method=ppcl",), planned=True),
    "ppcl_lp_a": Entry("PPCL, LP-a, planned", ("method=ppcl_lp_a",), planned=True),
    "cka_sensitivity": Entry("CKA sensitivity", ("method=cka_sensitivity", "method.num_remove=null")),
    "cka_normalised": Entry(
        "CKA sensitivity, normalised",
        ("method=cka_sensitivity", "method.num_remove=null", "method.settings.normalise=true"),
    ),
    "tinyfusion": Entry("TinyFusion", ("method=tinyfusion",)),
    "hierarchical_prune": Entry("HierarchicalPrune", ("method=hierarchical_prune",)),
    "shortgpt": Entry("ShortGPT", ("method=shortgpt",)),
    "flux_lite": Entry("FLUX.1 Lite", ("method=flux_lite",)),
    "bk_sdm": Entry("BK-SDM", ("method=bk_sdm",)),
    "amber": Entry("Amber-Image", ("method=amber",)),
    "llm_streamline": Entry("LLM-Streamline", ("method=llm_streamline",)),
    "replace_me": Entry("ReplaceMe", ("method=replace_me",)),
    "uniform": Entry("evenly spaced", ("method=uniform",)),
    "random": Entry("random", ("method=random",)),
    "greedy": Entry("greedy", ("method=greedy",)),
    "greedy_spread": Entry("greedy, spread", ("method=greedy", "method.settings.min_kept_between=1")),
}
_PPCL = {"choose": ("method=ppcl",), "planned": True, "local": 0.5}
TRAINED = {
    "ours": Entry("PPCL, our recipe", **_PPCL),  # type: ignore[arg-type]
    "paper": Entry("PPCL, the paper's recipe", recover=("recipe=paper",), **_PPCL),  # type: ignore[arg-type]
    "tinyfusion": Entry("TinyFusion", ("method=tinyfusion",), recover=("recovery=masked_kd",)),
    "hierarchical_prune": Entry(
        "HierarchicalPrune", ("method=hierarchical_prune",), recover=("recovery=hierarchical",)
    ),
    "amber": Entry(
        "Amber-Image",
        ("method=amber",),
        recover=("distill.init=average", "distill.losses.relative=1", "distill.losses.relative_per_token=0"),
        local=0.5,
    ),
    "flux_lite": Entry("FLUX.1 Lite", ("method=flux_lite",), recover=("recovery=output_kd",)),
    "greedy": Entry("greedy, our tuning", ("method=greedy",), recover=("distill.mode=none",)),
}
ONCE = {
    "once": Entry("PPCL, trained once", once=True, **_PPCL),  # type: ignore[arg-type]
    "once_tuned": Entry("PPCL, trained once, each size tuned", once=True, **_PPCL),  # type: ignore[arg-type]
}


@dataclass(frozen=True)
class Cell:
    """One measurement.

    `size`: the share of the teacher's parameters that may be left.
    `steps`: training steps of students and of the whole model; both 0 for a model that is not trained.
    `equal`: what this cell has in common with those it is compared with, such as `500 steps`.
    """

    name: str
    entry: Entry
    teacher: str
    size: float
    seed: int | None = None
    steps: tuple[int, int] = (0, 0)
    equal: str = "untrained"

    @property
    def variant(self) -> str:
        """The variant of the product that is scored."""
        tuned = self.steps[1] > 0 or (any(self.steps) and not self.entry.once)
        return "ppcl-finetuned" if tuned else "ppcl-planned" if self.entry.planned else "removed"

    def overrides(self, prompts: int, stages: str) -> list[str]:
        """Return the overrides of the product's command. `prompts`: per category. `stages`: those to run."""
        local, tuning = self.steps
        found = [f"model={self.teacher}", "data=shapes", f"stages=[{stages}]", "logger=none"]
        found += ["trainer=cpu", "trainer.num_threads=1", "trainer.progress=false", "watch.heldout=0"]
        found += ["watch.pictures=0", f"benchmark.prompts_per_category={prompts}", "distill=tiny", "finetune=tiny"]
        found += [*self.entry.choose, f"generate.variants=[teacher,{self.variant}]"]
        found.append(f"{'budget' if self.entry.planned else 'method'}.params={self.size}")
        found += ["width=tiny"] if self.entry.once else []
        if not any(self.steps):
            return [*found, "distill.mode=none"]
        found += [*self.entry.recover, f"data.train_seed={self.seed}"]
        found += [f"{part}.batch_size={BATCH_SIZE}" for part in ("distill", "finetune")]
        return [*found, f"distill.steps={max(1, local)}", f"finetune.steps={max(1, tuning)}"]

    def run(self, prompts: int, stages: str = "detect") -> Run:
        """Return the product's run. Its folder's name has the fingerprint of all settings, and those are its own."""
        run = make_run(f"table1/{self.teacher}", *self.overrides(prompts, stages))
        named = (self.name, self.size, self.equal.replace(" ", ""), self.seed, self.made_from(run))
        return Run(run.config, run.folder / "-".join(str(part) for part in named if part is not None))

    def first(self, prompts: int) -> Run:
        """Return the run that trains the parts of all sizes, and measures what each costs."""
        return replace(self, name="shared", entry=ONCE["once"], size=SIZES[0], steps=(self.steps[0], 0)).run(prompts)

    def made_from(self, run: Run) -> str:
        """Return the fingerprint of everything that the row depends on, apart from the number of prompts."""
        config = run.config
        facts: dict[str, Any] = {"model": run.teacher.identity, "data": run.data.identity, "precision": run.precision}
        facts |= {"sampling": drawing(run), "eval_seed": config.data.eval_seed}
        parts = ("probe", "method", "distill", "finetune", *(("width",) if self.entry.once else ()))
        facts |= {part: identity(getattr(config, part)) for part in parts}
        return fingerprint(facts | {"budget": asdict(config.budget)})


def measured_row(sitting: Sitting, cell: Cell) -> dict[str, str] | None:
    """Return the row of a cell, which is measured now if the table does not have it.

    None is returned while another process measures it.
    """
    run = cell.run(sitting.prompts)
    made_from = cell.made_from(run)
    made = (cell.name, cell.teacher, run.teacher.identity["weights"], cell.size, cell.seed, cell.equal)
    keys = dict(zip(KEYS, (*made, sitting.prompts), strict=True))
    found = sitting.table.find(**keys, made_from=made_from)
    if found is not None:
        return found

    def figures() -> dict[str, Any]:
        try:
            return _figures(cell, run, sitting.prompts)
        except UsageError as error:  # such as a size that the method cannot reach
            return {"remark": str(error)}

    return sitting.claim(sitting.table, keys, made_from, run.folder, figures)


def _figures(cell: Cell, run: Run, prompts: int) -> dict[str, Any]:
    """Run the stages of a cell, and return what its row says."""
    gc.collect()  # models of earlier cells
    local, tuning = cell.steps
    probed = "probe,detect" if cell.entry.planned else "detect"
    shared = {"choosing_seconds": 0.0, "once_seconds": 0.0}
    base: tuple[str, ...] = ()
    if cell.entry.once:
        first = cell.first(prompts)
        shared = _trained_once(cell, first, prompts, probed)
        base = (f"paths.base_run={first.folder}",)
    start = time.process_time()
    if not cell.entry.once:
        run_stages(cell, run, prompts, probed)
    chosen = time.process_time() - start
    spent = trained_for(cell, run, prompts, "depth", local, *base) if local and not cell.entry.once else 0.0
    if cell.entry.planned:
        run_stages(cell, run, prompts, "plan", *base)
    spent += trained_for(cell, run, prompts, "finetune", tuning, *base) if tuning else 0.0
    run_stages(cell, run, prompts, "generate,evaluate", *base)
    scores = ppcl.load(run.folder).scores
    teacher, row = scores["teacher"], scores[cell.variant]
    compared = ComparedRow.beside(teacher, row)
    assert compared.scores is not None
    categories = compared.scores.to_json()
    figures = {
        "blocks": row.num_layers,
        "params_ratio": compared.params_ratio,
        "memory_ratio": row.peak_memory_mb / teacher.peak_memory_mb,
        "latency_ratio": row.latency_ms / teacher.latency_ms,
        "velocity_error": row.velocity_error,
        "score": categories.pop("overall"),
        "drop_percent": compared.drop_percent,
        "local_steps": local,
        "tuning_steps": tuning,
        "choosing_seconds": shared["choosing_seconds"] + chosen,
        "training_seconds": shared["once_seconds"] + spent,
        "once_seconds": shared["once_seconds"],
        "categories": " ".join(f"{name}={value:.3f}" for name, value in categories.items()),
    }
    shutil.rmtree(run.folder / "images", ignore_errors=True)  # hundreds of pictures that nothing needs any more
    return figures


def _trained_once(cell: Cell, first: Run, prompts: int, probed: str) -> dict[str, float]:
    """Train the parts that all sizes share in the run `first`, unless it has them; return the seconds of one core."""
    record = first.folder / "once.json"
    if not record.exists():
        start = time.process_time()
        run_stages(cell, first, prompts, probed)
        chosen = time.process_time() - start
        steps = {"depth": cell.steps[0], "width": first.config.width.steps}
        seconds = sum(trained_for(cell, first, prompts, *part) for part in steps.items())
        run_stages(cell, first, prompts, "plan")  # measures what each part costs, for all sizes
        write_json(record, {"choosing_seconds": chosen, "once_seconds": seconds})
    return {key: read_json(record, "The cost")[key] for key in ("choosing_seconds", "once_seconds")}


def trained_for(cell: Cell, run: Run, prompts: int, stage: str, steps: int, *overrides: str) -> float:
    """Run a stage that trains for `steps`, and return the seconds that its training takes of a core of its own.

    The product records seconds of the clock. They are multiplied by the share of a core that this process was given.
    """
    start, began = time.process_time(), time.monotonic()
    run_stages(cell, run, prompts, stage, *overrides)
    share = min(1.0, (time.process_time() - start) / (time.monotonic() - began))
    return share * (cost_of(run.folder, stage, steps)[0] or 0.0)


def run_stages(cell: Cell, run: Run, prompts: int, stages: str, *overrides: str) -> None:
    """Run stages of the product in the folder of `run`. What is there already is reused."""
    name = str(run.folder.relative_to(Path(run.config.paths.runs_dir).resolve()))
    ppcl.run([f"name={name}", *cell.overrides(prompts, stages), *overrides])


def halves(entry: Entry, steps: int) -> tuple[int, int]:
    """Return the steps that train students, and those that tune the whole model."""
    local = round(steps * entry.local)
    return local, steps - local


def equal_time(entry: Entry, row: Mapping[str, str], seconds: float) -> tuple[int, int]:
    """Return the steps that take `seconds` in all, by the speed of the trainings in `row`."""
    steps = int(row["local_steps"]) + int(row["tuning_steps"])
    return halves(entry, max(2, round(steps * seconds / float(row["training_seconds"]))))


def once(name: str, teacher: str, size: float, seed: int, steps: int) -> Cell:
    """Return the cell of a size whose parts come from one training; `once_tuned` is then tuned for half as long."""
    tuning = steps // 2 if name == "once_tuned" else 0
    return Cell(name, ONCE[name], teacher, size, seed, (steps, tuning), f"{steps} steps")


def trained(name: str, teacher: str, size: float, seed: int, steps: int) -> Cell:
    """Return the cell of an entry that is trained for so many steps in all."""
    entry = TRAINED[name]
    return Cell(name, entry, teacher, size, seed, halves(entry, steps), f"{steps} steps")


def within(cell: Cell, row: Mapping[str, str], seconds: float) -> Cell:
    """Return the cell of the same entry that is trained for so many seconds."""
    return replace(cell, steps=equal_time(cell.entry, row, seconds), equal=f"{seconds / 60:.3g} min")
