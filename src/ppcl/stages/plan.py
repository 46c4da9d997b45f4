"""Counts what a set of intervals leaves of a model, without weights, and writes it down as a plan."""

from __future__ import annotations

from ppcl.artifacts import PruningPlan, is_current
from ppcl.stages.run import Run
from ppcl.surgery.count import count_parameters
from ppcl.validation import resolve_intervals


def billions(count: int) -> str:
    """20430401088 -> `20.430B`; 3029488 -> `3.029M`."""
    return f"{count / 1e9:.3f}B" if count >= 1e8 else f"{count / 1e6:.3f}M"


def show(run: Run, plan: PruningPlan) -> None:
    """Print a plan: its intervals, and what is left of blocks and parameters."""
    counts = plan.parameters
    for stack, pairs in plan.intervals.items():
        run.say("plan", f"{stack}: {' '.join(f'[{u},{v}]' for u, v in pairs)}")
    layers = counts["teacher_layers"], counts["student_layers"]
    sizes = counts["teacher"], counts["student"]
    run.say("plan", f"blocks      {layers[0]} -> {layers[1]} ({layers[1] / layers[0]:.3f})")
    run.say("plan", f"parameters  {billions(sizes[0])} -> {billions(sizes[1])} ({sizes[1] / sizes[0]:.3f})")


def run(run: Run) -> None:
    intervals = resolve_intervals(run.config)
    if intervals is None:
        # Detection follows in this run or happened in it before; there is nothing to count yet.
        if run.plan_path.exists():
            show(run, PruningPlan.load(run.plan_path))
        else:
            run.say("plan", "intervals come from stages=[probe,detect]; give intervals= to count them now")
        return
    model = run.config.model
    made_from = {"family": model.family, "arch": model.arch, "intervals": intervals}
    plan = PruningPlan(family=model.family, num_layers=run.num_layers, intervals=intervals, made_from=made_from)
    if is_current(run.plan_path, plan.header()):
        plan = PruningPlan.load(run.plan_path)
    else:
        plan.parameters = count_parameters(run.family, model.arch, intervals)
        if run.config.intervals.remark:
            plan.scores = {
                "remark": run.config.intervals.remark,
                "as_printed": run.config.intervals.as_printed,
            }
        plan.save(run.plan_path)
    show(run, plan)
    run.say("plan", f"wrote {run.plan_path}")
