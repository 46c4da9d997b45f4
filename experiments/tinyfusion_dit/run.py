"""TinyFusion's chain on the shipped DiT: from class folders to FID, pruned to half of the blocks.

    python -m experiments.tinyfusion_dit.run --seeds 10 11 12

Renders pictures in class folders, encodes them, learns which 10 of 20 blocks stay (2 of every 4), tunes what is left by
masked distillation and by the data alone, draws pictures, and measures FID with the shipped features. Writes
results.csv and fid.png beside this file.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from PIL import Image

import ppcl
from experiments.common import SEEDS, mean_and_spread, read_csv, write_csv
from experiments.recipes.report import fill, spread, table
from experiments.recipes.table import select
from ppcl.artifacts.files import read_json
from ppcl.data.worlds.shapes import make_scene, render
from ppcl.report import plots

HERE = Path(__file__).parent
PICTURES = 2000  # of the class folders
CATEGORIES = ("single_object", "colors")  # those of the teacher
PICTURES_SEED = 2000  # of no other data
RECOVERIES = {"masked_kd": "masked distillation", "output_kd": "output distillation", "flow_matching": "plain tuning"}


def render_classes(folder: Path, count: int) -> None:
    """Write `count` pictures of the toy world to `folder`/CLASS, unless they are there."""
    for number in range(count):
        scene = make_scene(PICTURES_SEED, number, categories=CATEGORIES)
        path = folder / scene.caption / f"{number:05}.png"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(render(scene.objects)).save(path)


def overrides(seed: int, pictures: Path, steps: int, images: int) -> list[str]:
    """Return what all commands of a seed have in common."""
    found = ["model=tiny_dit", f"data.path={pictures}", f"data.train_seed={seed}", "method=tinyfusion"]
    found += ["method.settings.groups=2:4", f"method.settings.seed={seed}", "distill=none", "finetune=tiny"]
    found += ["benchmark=fid", f"benchmark.settings.num_images={images}", "benchmark.latency_repeats=10"]
    found += [f"finetune.steps={steps}", "logger=none", "trainer=cpu", "trainer.progress=false", "watch.pictures=0"]
    return found


def rows(seeds: Sequence[int], steps: int, images: int) -> Iterator[dict[str, Any]]:
    """Run the chain for each seed and recovery, and yield a row for each model."""
    pictures = Path("runs/tinyfusion_dit/pictures")
    render_classes(pictures, PICTURES)
    for seed in seeds:
        common = overrides(seed, pictures, steps, images)
        first = f"tinyfusion_dit/{seed}"
        ppcl.run([*common, f"name={first}", "stages=[cache,detect,generate,evaluate]"])
        for name, row in ppcl.load(f"runs/{first}").scores.items():
            yield _row(row, name, seed, 0)
        for recovery in RECOVERIES:
            name = f"{first}-{recovery}"
            stages = "stages=[finetune,export,generate,evaluate,report]"
            ppcl.run([*common, f"recovery={recovery}", f"name={name}", f"paths.base_run=runs/{first}", stages])
            row = ppcl.load(f"runs/{name}").scores["ppcl-finetuned"]
            cost = read_json(Path("runs") / name / "training" / "finetune.json", "The cost of the training")
            yield _row(row, recovery, seed, steps) | {"seconds": cost["seconds"]}


def _row(row: Any, name: str, seed: int, steps: int) -> dict[str, Any]:
    facts = {"model": name, "seed": seed, "steps": steps, "blocks": row.num_layers, "parameters": row.params}
    facts |= {"velocity_error": row.velocity_error, "fid": row.scores.overall, "seconds": 0.0}
    return facts | {"date": date.today().isoformat()}


LABELS = {"teacher": "teacher, 20 blocks", "removed": "10 blocks, no tuning", **RECOVERIES}


def result_table(found: Sequence[Mapping[str, str]]) -> str:
    """Return a row for each model, with means and standard deviations over the seeds."""
    lines = []
    for name, label in LABELS.items():
        own = select(found, model=name)
        if own:
            figures = [spread(own, "fid", 1), spread(own, "velocity_error", None)]
            lines.append([label, str(len(own)), own[0]["blocks"], *figures])
    return table(["model", "seeds", "blocks", "FID", "velocity error"], lines)


def plot() -> None:
    """Draw the FID of every model, as the mean over the seeds with each seed as a point; write the README's table."""
    found = read_csv(HERE / "results.csv")
    fill(HERE / "README.md", {"result": result_table(found)})
    figure, axis = plt.subplots(figsize=(6.4, 2.8), layout="constrained")
    for place, (name, label) in enumerate(reversed(LABELS.items())):
        values = [float(row["fid"]) for row in found if row["model"] == name]
        if not values:
            continue
        color = plots.PALETTE[5] if name in ("teacher", "removed") else plots.PALETTE[0]
        axis.barh(label, mean_and_spread(values)[0], color=color)
        axis.plot(values, [place] * len(values), "o", color="black", markersize=3)
    axis.set(xlabel="FID with the features of the toy world (lower is better)", xscale="log", xlim=(10, None))
    plots.save_figure(figure, HERE / "fid.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, default=500, help="of tuning")
    parser.add_argument("--images", type=int, default=1000, help="pictures that FID is measured on")
    parser.add_argument("--plot", action="store_true", help="measure nothing; write the plot and the table again")
    given = parser.parse_args()
    if not given.plot:
        found: list[dict[str, Any]] = []
        for row in rows(given.seeds, given.steps, given.images):  # runs that are finished are not made again
            found.append(row)
            write_csv(HERE / "results.csv", found)
    plot()


if __name__ == "__main__":
    main()
