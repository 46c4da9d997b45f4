"""Stage 1.2: find the intervals with the configured method (paper Eq. 3-5).

Writes the plan, the CKA curves behind it, and maps of the similarity between all pairs of blocks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice, pairwise
from typing import Any

from ppcl.artifacts.files import write_json
from ppcl.artifacts.plan import PruningPlan
from ppcl.artifacts.probes import Probes
from ppcl.config import TrainingConfig
from ppcl.context import Run
from ppcl.data.batches import StepLoader, TrainingBatch
from ppcl.methods.base import Curves, Teacher
from ppcl.methods.registry import load_method
from ppcl.methods.similarity import similarity_maps
from ppcl.options import identity
from ppcl.parallel import gathered, of_first, share
from ppcl.report import plots
from ppcl.report.text import show_plan, show_shares
from ppcl.surgery.count import count_parameters
from ppcl.training.loop import discard_checkpoint, fit
from ppcl.validation.pruning import check_intervals
from ppcl.variants.reach import check_reachable


def _deltas(curves: Curves) -> Curves:
    """Return delta(u, k) = cka(u, k - 1) - cka(u, k) (Eq. 4) for every curve, with None where a value is missing."""
    return {
        stack: {
            stream: [[None, *(None if a is None or b is None else a - b for a, b in pairwise(row))] for row in table]
            for stream, table in streams.items()
        }
        for stack, streams in curves.items()
    }


def run(run: Run) -> None:
    """Detect intervals on calibration data and write `plan/plan.json`. A plan made with the same settings is reused.

    Raises `UsageError` if the plan on disk was made with other settings, if an interval does not fit the model, or if
    the budget cannot be reached with the intervals.

    Several ranks divide the calibration batches, if the method can add up what they find, and train together, if it
    trains; everything else rank 0 does. A training that was killed resumes from its last checkpoint.
    """
    method = run.config.method
    detector = load_method(method)
    made_from: dict[str, Any] = {"detection": run.probe_settings, "method": identity(method)}
    if detector.trains:
        made_from |= {"data": run.data.identity, "precision": run.precision}
    plan = PruningPlan(run.config.model.family, run.num_layers, {}, made_from)
    advice = "give this run another name=, or delete that file to detect anew"
    if run.config.paths.base_run is not None:
        advice = "leave out paths.base_run= to detect in this run"
    if of_first(plan.is_current(run.plan_path, advice, "detect")):
        run.say("detect", f"reused {run.plan_path}")
        found_before = PruningPlan.load(run.plan_path)
        show_plan(run, found_before)
        check_reachable(run, found_before.intervals)
        return
    stream = run.data.stream(run.config.data.calibration_seed, method.batch_size)
    number, ranks = share() if detector.divides else (0, 1)
    if not (detector.divides or detector.trains or run.writes):
        return
    used = 0

    def calibration() -> Iterator[TrainingBatch]:
        nonlocal used
        for batch in islice(stream.calibration(method.num_samples, method.num_timesteps), number, None, ranks):
            used += 1
            yield run.data.to_device(batch)

    def progress(items: Iterable[Any], total: int) -> Iterable[Any]:
        return run.track(items, "simulation", -(-total // ranks))

    checkpoints = run.folder / "detect-checkpoint"

    def train(module: Any, steps: int, batch_size: int) -> None:
        batches = run.data.shared_stream(run.config.data.train_seed, batch_size)
        run.say_once("detect", batches.remark)
        settings = TrainingConfig(steps, batch_size, checkpoint_every=max(100, steps // 20))
        blocks = run.family.blocks(module.student).values()
        loader = StepLoader(batches, steps, ahead=run.data.from_disk)
        fit(run, "detect", module, loader, checkpoints, plan.header(), settings, blocks)

    teacher = Teacher(run.family, run.teacher.transformer, calibration, lambda: Probes.load(run.probe_folder), progress)
    teacher.say = partial(run.say, "detect")
    if detector.divides:
        teacher.gathered = gathered
    if detector.trains:
        teacher.train, teacher.precision = train, run.precision
    found = detector.detect(teacher)
    if detector.divides:
        show_shares(run, "detect", used, "calibration batches")
    if not run.writes:
        return
    facts = run.family.facts
    check_intervals(found.intervals, run.num_layers, f"method.rule={method.rule}", facts.first_block, facts.last_blocks)
    middle = list(stream.calibration(min(method.num_samples, method.batch_size), 2))[-1]
    maps = similarity_maps(run.family, run.teacher.transformer, run.data.to_device(middle))
    plan.intervals = found.intervals
    plan.scores = found.scores
    plan.parameters = count_parameters(run.family, run.config.model.arch, found.intervals)
    folder = run.plan_path.parent
    curves = {"method": method.name, "cka": found.curves, "delta": _deltas(found.curves), "similarity": maps}
    write_json(folder / "curves.json", curves)
    for stack, streams in found.curves.items():
        drawn = streams.get(method.stream, streams["mean"])
        plots.interval_curves(folder / f"curves_{stack}.png", drawn, found.intervals[stack])
    plots.similarity_maps(folder / "similarity.png", {f"{name} stream": table for name, table in maps.items()})
    if found.decisions is not None:
        found.decisions.save(folder / "decisions.json")
        plots.decisions(folder / "decisions.png", found.decisions)
    plan.save(run.plan_path)
    if detector.trains:
        discard_checkpoint(run, checkpoints)
    show_plan(run, plan)
    run.say("detect", f"wrote {folder}")
    check_reachable(run, plan.intervals)
