"""Counts what a set of intervals leaves of a model, without weights, and writes it down as a plan."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from ppcl.artifacts.files import write_json
from ppcl.artifacts.headers import is_current
from ppcl.artifacts.plan import PruningPlan
from ppcl.context import Run
from ppcl.errors import UsageError
from ppcl.report import plots
from ppcl.report.text import billions, show_frontier, show_plan
from ppcl.surgery.count import count_parameters
from ppcl.validation.pruning import budget_of, resolve_intervals, resolve_width
from ppcl.variants.costs import compare_costs, measure, target_of
from ppcl.variants.planner import Overlap, Unit, choose, total_saving
from ppcl.variants.plugs import required_plugs


def run(run: Run) -> None:
    if budget_of(run.config) is not None:
        from ppcl.stages.plan import plan_budget  # loads the teacher, which counting does without

        plan_budget(run)
        return
    intervals = resolve_intervals(run.config)
    if intervals is None:
        # Detection follows in this run or happened in it before; there is nothing to count yet.
        if run.plan_path.exists():
            show_plan(run, PruningPlan.load(run.plan_path))
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
    show_plan(run, plan)
    run.say("plan", f"wrote {run.plan_path}")


def plan_budget(run: Run) -> None:
    budget = budget_of(run.config)
    assert budget is not None
    name, value = budget
    cost = run.config.budget.cost
    plugs = required_plugs(run)
    costs = measure(run, plugs)
    units = [Unit(**unit) for unit in costs["units"]]
    overlaps = [Overlap(tuple(pair["names"]), pair["savings"]) for pair in costs["overlaps"]]
    points = costs["frontier"][cost]
    show_frontier(run, points)
    run.say(
        "plan",
        f"by measured velocity error the plans' error is {compare_costs(costs['frontier']):.2f}x that of plans by "
        "distillation loss (mean over the frontier)",
    )
    saving = target_of(name, value, costs["teacher"], units, overlaps)
    choice = choose(units, name, saving, cost, overlaps)
    if choice is None:
        raise UsageError(f"budget.{name}={value:g}: no set of plugs saves enough; `stages=[plan]` lists what is there.")
    chosen = [unit for unit in units if unit.name in choice]
    params = costs["teacher"]["params"] - total_saving(units, overlaps, choice, "params")
    body = {
        "format": "ppcl.choice",
        "budget": [name, value, cost],
        "plugged": choice,
        "params": round(params),
        "params_ratio": params / costs["teacher"]["params"],
        "latency_ratio": 1 - total_saving(units, overlaps, choice, "latency_ratio"),
        "memory_gb": costs["teacher"]["memory_gb"] - total_saving(units, overlaps, choice, "memory_gb"),
        "predicted_error": sum(unit.costs[cost] for unit in chosen),
    }
    write_json(run.choice_path, body)
    folder = run.choice_path.parent
    plots.frontier(folder / "frontier.png", costs["frontier"], body["params_ratio"])
    run.say(
        "plan",
        f"budget.{name}={value:g}: {len(choice)} of {len(units)} plugs, {billions(round(params))} "
        f"({body['params_ratio']:.3f}), latency {body['latency_ratio']:.3f}, {body['memory_gb']:.3g} GB",
    )
    run.say("plan", " ".join(choice) or "nothing to plug in: the teacher fits the budget")
    run.say("plan", f"wrote {run.choice_path} and {Path('frontier.png')}")
