"""Score a teacher of the toy world in more detail: text by its length, and relations by what went wrong.

python -m experiments.tiny_teacher_v2.measure SOURCE PROMPTS [KEY=VALUE ..]

SOURCE is a pipeline folder, `embedded:NAME`, or the checkpoint of a pretraining. PROMPTS of each category are drawn.
The keys are those of ppcl, such as data.eval_seed=7.

Chance for position is measured, not assumed: the same pictures are scored against prompts with another relation in
place of theirs: the mean over all four, and over the two of the `same axis`, left and right or above and below.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from dataclasses import replace
from importlib import import_module
from statistics import fmean

import numpy as np
import torch

from experiments.common import draw_prompts, make_run
from ppcl.benchmarks.shapes import fulfils, to_pixels
from ppcl.context import Run
from ppcl.data.worlds.shapes import ALL_CATEGORIES, RELATIONS, Scene
from ppcl.families.registry import builders


def load_run(source: str, overrides: list[str]) -> Run:
    """Return a run with the teacher in `source`."""
    settings = ["model=tiny_qwen_image_v2", "trainer=cpu", *overrides]
    if not source.endswith(".ckpt"):
        return make_run("measure", *settings, f"model.path={source}")
    run = make_run("measure", *settings, "model.path=embedded:tiny_qwen_image")
    build = import_module(builders()[str(run.config.model.builder)]).build_pipeline
    state = torch.load(source, map_location="cpu", weights_only=True)
    pipeline = build(0, categories=ALL_CATEGORIES)
    for part in ("transformer", "text_encoder"):
        prefix = f"{part}."
        own = {key.removeprefix(prefix): value for key, value in state["state_dict"].items() if key.startswith(prefix)}
        getattr(pipeline, part).load_state_dict(own)
        getattr(pipeline, part).eval().requires_grad_(False)
    pipeline.set_progress_bar_config(disable=True)
    vars(run.teacher)["pipeline"] = pipeline
    print(f"{source}: step {state['global_step']}")
    return run


def related(scene: Scene, picture: np.ndarray) -> dict[str, bool]:
    """Return for each relation whether `picture` would be right if the prompt of `scene` asked for that relation."""
    first, second = scene.include
    return {
        relation: fulfils(replace(scene, include=(first | {"position": (relation, 1)}, second)), picture)
        for relation in RELATIONS
    }


def main() -> None:
    source, count, *overrides = sys.argv[1:]
    run = load_run(source, overrides)
    prompts, images = draw_prompts(run, int(count))
    for name, value in run.benchmark.score(prompts, images).to_json().items():
        print(f"{name:16} {value:.3f}")
    lengths: dict[int, list[bool]] = defaultdict(list)
    outcomes: dict[str, list[tuple[bool, bool, float, float]]] = defaultdict(list)
    opposite = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
    for prompt, image in zip(prompts, images, strict=True):
        scene, picture = prompt.fact, to_pixels(image)
        if scene.text:
            lengths[len(scene.text)].append(fulfils(scene, picture))
        elif "position" in scene.include[0]:
            relation = scene.include[0]["position"][0]
            holds = related(scene, picture)
            axis = (holds[relation] + holds[opposite[relation]]) / 2
            outcomes[scene.category].append((holds[relation], holds[opposite[relation]], fmean(holds.values()), axis))
    for length, right in sorted(lengths.items()):
        print(f"text of {length} letters: {sum(right)} of {len(right)}")
    for category, rows in outcomes.items():
        right, swapped, chance, axis = (fmean(column) for column in zip(*rows, strict=True))
        print(f"{category}: right {right:.3f}, swapped {swapped:.3f}; chance {chance:.3f}, same axis {axis:.3f}")


if __name__ == "__main__":
    main()
