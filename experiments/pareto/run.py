"""Score models of all sizes without fine-tuning, as the planner chooses them by either of its two costs."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib.pyplot as plt

from experiments.common import SEEDS, make_run, mean_and_spread, read_csv, score_pipeline, write_csv
from ppcl.report import plots
from ppcl.variants.costs import compare_costs, measure
from ppcl.variants.plugs import required_plugs
from ppcl.variants.switch import Switch

HERE = Path(__file__).parent

PER_CATEGORY = 20
LABELS = {"velocity": "planned by velocity error", "loss": "planned by distillation loss"}


def points_of(seed: int) -> list[dict]:
    """Score every second size that the planner offers by each cost, with the plugs of half_size for this seed."""
    base = f"paths.base_run=runs/half_size/{seed}"
    run = make_run(f"pareto/{seed}", "experiment=half_size", f"data.train_seed={seed}", base)
    plugs = required_plugs(run)
    costs = measure(run, plugs)
    print(f"seed {seed}: error of plans by velocity {compare_costs(costs.frontier):.3f}x that of plans by loss")
    switch = Switch(run, plugs)
    teacher = score_pipeline(run, PER_CATEGORY)["overall"]
    rows = []
    for cost, points in costs.frontier.items():
        for point in points[::2]:
            switch.board(*point.plugged)
            scores = score_pipeline(run, PER_CATEGORY)
            keys = ("num_layers", "params_ratio", "latency_ratio", "predicted", "velocity_error")
            row = {"seed": seed, "cost": cost, "plugs": len(point.plugged)} | {key: getattr(point, key) for key in keys}
            rows.append(row | scores | {"drop_percent": 100 * (1 - scores["overall"] / teacher)})
            print({key: rows[-1][key] for key in ("cost", "params_ratio", "velocity_error", "overall")}, flush=True)
    switch.restore()
    return rows


def main() -> None:
    rows = [row for seed in SEEDS for row in points_of(seed)]
    write_csv(HERE / "results.csv", rows)


def plot() -> None:
    rows = read_csv(HERE / "results.csv")
    figure, axis = plt.subplots(figsize=(6.4, 3.8))
    for number, (cost, label) in enumerate(LABELS.items()):
        line = [row for row in rows if row["cost"] == cost]
        steps: dict[int, list[dict]] = {}
        for seed in SEEDS:  # the k-th point of each seed saves the same share of what can be saved
            for k, row in enumerate(row for row in line if row["seed"] == str(seed)):
                steps.setdefault(k, []).append(row)
        x = [mean_and_spread(100 * float(row["params_ratio"]) for row in found)[0] for found in steps.values()]
        y = [mean_and_spread(float(row["overall"]) for row in found) for found in steps.values()]
        axis.errorbar(
            x, [m for m, _ in y], [s for _, s in y], fmt="o-", color=plots.PALETTE[number], label=label, capsize=3
        )
    axis.set(xlabel="parameters, % of the teacher", ylabel="overall score", ylim=(-0.05, 1.05))
    axis.legend(loc="lower right")
    plots.save_figure(figure, HERE / "pareto.png")


if __name__ == "__main__":
    if sys.argv[1:] != ["--plot"]:
        main()
    plot()
