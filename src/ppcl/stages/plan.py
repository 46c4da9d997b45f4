"""Count the parameters that intervals and width sets leave, which needs no weights.

With a budget, choose which students and projectors to plug in.
"""

from __future__ import annotations

from dataclasses import asdict

from ppcl.artifacts.plan import Choice, PruningPlan
from ppcl.context import Run
from ppcl.disk import in_bytes
from ppcl.errors import UsageError
from ppcl.report import plots
from ppcl.report.text import billions, counted, show_plan
from ppcl.surgery.count import count_parameters
from ppcl.validation.pruning import budget_of, resolve_intervals, resolve_width
from ppcl.variants.choosing import chosen
from ppcl.variants.costs import measure, target_of
from ppcl.variants.planner import total_saving
from ppcl.variants.plugs import required_plugs
from ppcl.variants.variants import check_choice


def run(run: Run) -> None:
    """Choose plugs for the budget; without a budget, count the given intervals and write `plan/plan.json`.

    Without given intervals it only prints the detected ones, if there are any. Raises `UsageError` if the budget cannot
    be reached, or if the plan on disk has other intervals.
    """
    if budget_of(run.config) is not None:
        plan_budget(run)
        return
    intervals = resolve_intervals(run.config)
    if intervals is None:
        # Nothing to count: `stages=[detect]` counts the intervals that it finds.
        if run.plan_path.exists():
            show_plan(run, PruningPlan.load(run.plan_path))
        else:
            run.say("plan", "intervals come from 'stages=[probe,detect]'; give intervals= to count them now")
        return
    model, width = run.config.model, resolve_width(run.config) or {}
    made_from = {"family": model.family, "arch": model.arch, "intervals": intervals}
    if width:
        made_from |= {"width": width, "layout": asdict(run.layout)}
    plan = PruningPlan(model.family, run.num_layers, intervals, made_from, width=width)
    path = run.folder / "plan" / "plan.json"  # `run.plan_path` may be in another run, which is only read
    advice = "leave out intervals= to use these intervals, or give name=OTHER to count others"
    reused = plan.is_current(path, advice, "plan")
    if reused:
        plan = PruningPlan.load(path)
    else:
        plan.parameters = count_parameters(run.family, model.arch, intervals, width, run.layout)
        if run.config.intervals.remark:
            plan.scores = {
                "remark": run.config.intervals.remark,
                "as_printed": run.config.intervals.as_printed,
            }
        plan.save(path)
    show_plan(run, plan)
    run.say("plan", f"{'reused' if reused else 'wrote'} {path}")


def plan_budget(run: Run) -> None:
    """Choose the plugs that meet the budget at the least cost in quality. Write `plan/choice.json` and `frontier.png`.

    Costs and savings of all plugs are measured once and reused. Raises `UsageError` if no choice meets the budget, or
    if `budget.cost` is not known for every plug.
    """
    budget = budget_of(run.config)
    assert budget is not None
    name, value = budget
    cost = run.config.budget.cost
    plugs = required_plugs(run)
    costs = measure(run, plugs)
    units, overlaps, teacher = costs.units, costs.overlaps, costs.teacher
    if cost not in costs.frontier:
        raise UsageError(
            f"budget.cost={cost} is not known of every plug, since not all of them were distilled here: use "
            "budget.cost=velocity."
        )
    saving = target_of(name, value, teacher, units, overlaps)
    known = len(costs.errors)
    plugged, measured = chosen(run, plugs, costs, name, saving)
    if len(costs.errors) > known and run.costs_paths[0].exists():  # those of a base run are only read
        costs.save(run.costs_paths[0])
    if plugged is None:
        raise UsageError(f"budget.{name}={value:g}: no set of plugs saves enough; 'stages=[plan]' lists what is there.")
    params = teacher.params - total_saving(units, overlaps, plugged, "params")
    ratio = params / teacher.params
    latency = 1 - total_saving(units, overlaps, plugged, "latency_ratio")
    memory = teacher.memory_gb - total_saving(units, overlaps, plugged, "memory_gb")
    error = sum(unit.costs[cost] for unit in units if unit.name in plugged)
    if latency <= 0:
        path = next(path for path in run.costs_paths if path.exists())
        run.say(
            "plan",
            "warning: latencies make no sense, since other work disturbed the machine while plugs were timed: delete "
            f"{path}, and plan again when it is idle",
        )
    choice = Choice((name, value, cost), plugged, round(params), ratio, latency, memory, error, measured)
    if "finetune" in run.config.stages:  # which would refuse another choice than that of the tuned model, too late
        check_choice(run, plugs, plugged)
    path, picture = run.choice_path, run.choice_path.with_name("frontier.png")
    reused = path.exists() and picture.exists() and Choice.load(path) == choice
    if not reused:
        choice.save(path)
        allowed = 1 - saving / teacher.params if name == "params" else None
        plots.frontier(picture, costs.frontier, ratio, allowed, cost)
    run.say(
        "plan",
        f"budget.{name}={value:g}: {len(plugged)} of {counted(len(units), 'plug')}, {billions(round(params))} "
        f"parameters ({ratio:.3f} of the teacher's), latency {latency:.3f}, {in_bytes(memory * 1e9)}",
    )
    if measured is not None:
        run.say("plan", f"together they make an error of {measured:.4g}; what each makes alone adds up to {error:.4g}")
    run.say("plan", " ".join(plugged) or "nothing to plug in: the teacher fits the budget")
    run.say("plan", f"{'reused' if reused else 'wrote'} {path} and frontier.png")
