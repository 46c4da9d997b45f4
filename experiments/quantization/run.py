"""Measure the quality that 8 and 4 bits cost the fine-tuned half-size models and the teacher, by rounding method."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

from experiments.common import SEEDS, make_run, mean_and_spread, score_pipeline, write_csv
from ppcl.artifacts.files import read_json
from ppcl.benchmarks.shapes import to_pixels
from ppcl.context import Run
from ppcl.export.quantized import split_linears, torchao_config, weight_bytes
from ppcl.export.rounding import round_linears
from ppcl.pictures.drawing import draw
from ppcl.stages.quantize import quantize
from ppcl.variants.switch import Switch
from ppcl.variants.variants import variants_of

matplotlib.use("agg")
from matplotlib import pyplot as plt

HERE = Path(__file__).parent

PER_CATEGORY = 60
HELD_OUT = 4  # batches; their numbers are far above those of the calibration batches
OWN = "own inputs"
EVERYTHING = ("quantize.skip=[]",)
# Each name: the overrides, and whether pictures are scored.
INT4 = ("quantize=int4",)
NEAREST = (*INT4, "quantize.rounding=nearest")
VARIANTS: dict[str, tuple[tuple[str, ...], bool]] = {
    "int8 nearest": (("quantize=int8",), False),
    "int4 nearest": (NEAREST, True),
    "int4 nearest, all layers": ((*NEAREST, *EVERYTHING), False),
    "int4 GPTQ": ((*INT4, OWN), False),
    "int4 least squares": (INT4, True),
    "int4 least squares, all layers": ((*INT4, *EVERYTHING), False),
    "int4 least squares, groups of 32": ((*INT4, "quantize.group_size=32"), False),
}
TEACHER = ("int8 nearest", "int4 nearest", "int4 least squares")


def to_own_inputs(layers: Any, moments: Any, **settings: Any) -> None:
    """Round by GPTQ's objective: keep each layer's output on the inputs it has now.

    `least_squares` keeps the output that the layer has in the unrounded model, on that model's inputs.
    """
    own = copy.copy(moments)
    own.cross, own.sum_given = own.gram, own.sum_rounded
    round_linears(layers, own, **settings)


def velocities(run: Run, model: Any) -> torch.Tensor:
    """Return the velocities of `model` on the held-out batches, in float64."""
    stream = run.data.stream(run.config.data.calibration_seed, 32)
    with torch.no_grad():
        return torch.cat([model(**stream(1000 + step).inputs)[0] for step in range(HELD_OUT)]).double()


def pictures(run: Run) -> np.ndarray:
    """Draw with the run's pipeline as it is now; return pictures `[60, H, W, 3]` in [0, 1].

    Prompts and noise are the same in every call.
    """
    prompts = run.prompts[:: len(run.prompts) // 60][:60]
    texts = [prompt.text for prompt in prompts]
    images = [drawn.picture for drawn in draw(run, run.teacher.pipeline, texts, range(60))]
    return np.stack([np.asarray(to_pixels(image), dtype=float) / 255 for image in images])


def measure(base: str, seed: int, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return rows of variant `base` of half_size's run with that seed.

    The first row is the unquantised model. Then there is one for each of `names`, which are keys of `VARIANTS`.
    """
    common = ("experiment=half_size", f"data.train_seed={seed}", "trainer.compile=false")
    common += (f"benchmark.prompts_per_category={PER_CATEGORY}",)
    run = make_run(f"half_size/{seed}", *common)
    (variant,), plugs = variants_of(run, [base])
    whole = Switch(run, plugs).standalone(variant)
    run.teacher.pipeline.transformer = whole
    wanted, drawn = velocities(run, whole), pictures(run)
    before = read_json(run.folder / "scores" / f"{base}.json", "The scores")["scores"]["overall"]
    facts = {"model": "teacher" if base == "teacher" else "half size", "seed": seed}
    size = weight_bytes(whole)
    rows = [facts | row("unquantised", size, 0.0, np.zeros(1), before, before, 0.0)]
    for name in names:
        overrides, scored = VARIANTS[name]
        run.config.quantize = make_run(
            f"half_size/{seed}", *common, *(item for item in overrides if item != OWN)
        ).config.quantize
        settings, model, start = run.config.quantize, copy.deepcopy(whole), time.process_time()
        chosen, skipped, undivided = split_linears(model, settings.skip, settings.group_size)
        config = torchao_config(settings.scheme, settings.group_size, [*skipped, *undivided])
        quantize(run, model, chosen, config, to_own_inputs if OWN in overrides else round_linears)
        seconds = time.process_time() - start
        run.teacher.pipeline.transformer = model
        found = velocities(run, model)
        velocity = ((found - wanted).square().sum() / wanted.square().sum()).item()
        distances = np.square(pictures(run) - drawn).mean(axis=(1, 2, 3))
        overall = score_pipeline(run, PER_CATEGORY)["overall"] if scored else None
        rows.append(facts | row(name, weight_bytes(model), velocity, distances, overall, before, seconds))
        print(rows[-1], flush=True)
    return rows


def row(
    name: str, size: int, velocity: float, distances: np.ndarray, overall: float | None, before: float, seconds: float
) -> dict[str, Any]:
    drop = "" if overall is None else 100 * (1 - overall / before)
    return {
        "quantised": name,
        "bytes": size,
        "velocity_error": velocity,
        "picture_distance": float(distances.mean()),
        "median_distance": float(np.median(distances)),
        "overall": "" if overall is None else overall,
        "drop_percent": drop,
        "seconds": seconds,
    }


def plot(rows: list[dict[str, Any]]) -> None:
    labels = [*VARIANTS]
    _, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    styles = {"half size": {"color": "tab:blue", "marker": "o"}, "teacher": {"color": "tab:orange", "marker": "^"}}
    for axis, key in zip(axes, ("velocity_error", "median_distance"), strict=True):
        for model, style in styles.items():
            own = [item for item in rows if item["model"] == model and item["quantised"] in VARIANTS]
            places = [labels.index(item["quantised"]) for item in own]
            axis.scatter([item[key] for item in own], places, s=30, alpha=0.7, label=model, **style)
        axis.set(xscale="log", xlabel=key.replace("_", " "))
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    axes[1].legend()
    plt.tight_layout()
    plt.savefig(HERE / "quantization.png", dpi=120)


def main() -> None:
    rows: list[dict[str, Any]] = []
    for seed in SEEDS:
        rows += measure("ppcl-finetuned", seed, tuple(VARIANTS))
        write_csv(HERE / "results.csv", rows)
    rows += measure("teacher", SEEDS[0], TEACHER)
    write_csv(HERE / "results.csv", rows)
    plot(rows)
    for model in ("half size", "teacher"):
        for name in ("unquantised", *VARIANTS):
            own = [item for item in rows if (item["model"], item["quantised"]) == (model, name)]
            if not own:
                continue
            parts = [f"{model:9} {name:33} {own[0]['bytes'] / 1e6:.2f} MB"]
            for key in ("velocity_error", "picture_distance", "median_distance", "drop_percent"):
                values = [item[key] for item in own if item[key] != ""]
                if values:
                    mean, spread = mean_and_spread(values)
                    parts.append(f"{key} {mean:.3g} +- {spread:.2g}")
            print("  ".join(parts))


if __name__ == "__main__":
    main()
