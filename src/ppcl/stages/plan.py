"""Counts what a set of intervals leaves of a model, without weights, and writes it down as a plan."""

from __future__ import annotations

from dataclasses import asdict

from ppcl.artifacts import PruningPlan, is_current
from ppcl.stages.run import Run
from ppcl.surgery.count import count_parameters
from ppcl.validation.pruning import budget_of, resolve_intervals, resolve_width


def billions(count: int) -> str:
    """20430401088 -> `20.430B`; 3029488 -> `3.029M`."""
    return f"{count / 1e9:.3f}B" if count >= 1e8 else f"{count / 1e6:.3f}M"


def show(run: Run, plan: PruningPlan) -> None:
    """Print a plan: its intervals, and what is left of blocks and parameters."""
    counts = plan.parameters
    for stack, pairs in plan.intervals.items():
        run.say("plan", f"{stack}: {' '.join(f'[{u},{v}]' for u, v in pairs)}")
    for stack, sets in plan.width.items():
        for kind, indices in sets.items():
            if indices:
                run.say("plan", f"{stack} without {kind}: {' '.join(map(str, indices))}")
    layers = counts["teacher_layers"], counts["student_layers"]
    run.say("plan", f"blocks      {layers[0]} -> {layers[1]} ({layers[1] / layers[0]:.3f})")
    before = counts["teacher"]
    for step in ("depth", "text", "ffn") if "depth" in counts else ("student",):
        after, name = counts[step], "parameters" if step == "student" else step
        run.say("plan", f"{name:<11} {billions(before)} -> {billions(after)} ({after / counts['teacher']:.3f})")
        before = after


def run(run: Run) -> None:
    if budget_of(run.config) is not None:
        from ppcl.stages.budget import plan_budget  # loads the teacher, which counting does without

        plan_budget(run)
        return
    intervals = resolve_intervals(run.config)
    if intervals is None:
        # Detection follows in this run or happened in it before; there is nothing to count yet.
        if run.plan_path.exists():
            show(run, PruningPlan.load(run.plan_path))
        else:
            run.say("plan", "intervals come from stages=[probe,detect]; give intervals= to count them now")
        return
    model, width = run.config.model, resolve_width(run.config) or {}
    made_from = {"family": model.family, "arch": model.arch, "intervals": intervals}
    if width:
        made_from |= {"width": width, "layout": asdict(run.layout)}
    plan = PruningPlan(model.family, run.num_layers, intervals, made_from, width=width)
    if is_current(run.plan_path, plan.header()):
        plan = PruningPlan.load(run.plan_path)
    else:
        plan.parameters = count_parameters(run.family, model.arch, intervals, width, run.layout)
        if run.config.intervals.remark:
            plan.scores = {
                "remark": run.config.intervals.remark,
                "as_printed": run.config.intervals.as_printed,
            }
        plan.save(run.plan_path)
    show(run, plan)
    run.say("plan", f"wrote {run.plan_path}")
