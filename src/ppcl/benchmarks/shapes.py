"""Scores toy pictures by the rules of GenEval, with an exact detector in place of a neural one.

GenEval (Ghosh et al., arXiv 2310.11513) detects objects and then checks `include` and `exclude` clauses: enough objects
of a class, not too many, of the right colour, in the right relation. The detector here segments by colour, finds
connected components, and compares them with the templates of the shapes. Text is right if exactly the letters asked for
are read, in their order.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from scipy import ndimage, signal

from ppcl.artifacts.scores import Scores
from ppcl.benchmarks.base import Benchmark, Prompt
from ppcl.data.worlds import glyphs
from ppcl.data.worlds.edits import Edit
from ppcl.data.worlds.shapes import (
    CATEGORIES,
    COLORS,
    IMAGE_SIZE,
    OBJECT_SIZE,
    TEMPLATES,
    Scene,
    SceneObject,
    make_scene,
)

if TYPE_CHECKING:
    from ppcl.config import Config
    from ppcl.families.base import Family

MIN_CHROMA = 70  # half of the palest colour's chroma: an edge pixel with more is mostly object
MIN_AREA = 10  # pixels; smaller components are no objects
MIN_OVERLAP = 0.6  # intersection over union with a template
MAX_DRIFT = 2  # pixels by which an object may be misplaced; the lattice step is 4
MAX_CHANGE = 8.0  # mean difference, of 255, that is allowed where an edit must change nothing
POSITION_MARGIN = 0.1  # GenEval: smaller offsets, relative to the sum of both sizes, do not count
_HUES = {name: colorsys.rgb_to_hsv(*(c / 255 for c in rgb))[0] for name, rgb in COLORS.items()}


@dataclass(frozen=True)
class Detected:
    """A detected object.

    `overlap`: intersection over union with its shape's template, in [0, 1]. `centre`, `size`: (x, y) and (width,
        height) in pixels.
    """

    shape: str
    color: str
    overlap: float
    centre: tuple[float, float]
    size: tuple[float, float]


def _color_index(image: np.ndarray) -> np.ndarray:
    """Return for each pixel `[H, W]` the index in `COLORS` of the nearest hue, or -1 for a pixel without colour."""
    rgb = image.astype(np.float64)
    highest, chroma = rgb.max(axis=-1), np.ptp(rgb, axis=-1)
    safe = np.where(chroma > 0, chroma, 1)
    r, g, b = np.moveaxis(rgb, -1, 0)
    sector = np.where(highest == r, (g - b) / safe, np.where(highest == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    distance = np.abs((sector / 6 % 1)[..., None] - np.array(list(_HUES.values())))
    nearest = np.minimum(distance, 1 - distance).argmin(axis=-1)
    return np.where(chroma >= MIN_CHROMA, nearest, -1)


def _best_shape(component: np.ndarray) -> tuple[str, float]:
    """Return the shape whose template fits the mask best, over all shifts, and their intersection over union."""
    best = ("", 0.0)
    for shape, template in TEMPLATES.items():
        common = signal.correlate2d(component.astype(int), template.astype(int)).max()
        overlap = common / (component.sum() + template.sum() - common)
        best = max(best, (shape, float(overlap)), key=lambda pair: pair[1])
    return best


def detect(image: np.ndarray) -> list[Detected]:
    """Return the objects in a uint8 picture `[H, W, 3]`, best overlap first."""
    index = _color_index(image)
    found = []
    for number, color in enumerate(COLORS):
        labels, _ = ndimage.label(index == number)
        for label, slices in enumerate(ndimage.find_objects(labels), start=1):
            component = labels[slices] == label
            if component.sum() < MIN_AREA:
                continue
            shape, overlap = _best_shape(component)
            if overlap < MIN_OVERLAP:
                continue
            rows, columns = slices
            found.append(
                Detected(
                    shape,
                    color,
                    overlap,
                    ((columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2),
                    (columns.stop - columns.start, rows.stop - rows.start),
                )
            )
    return sorted(found, key=lambda item: -item.overlap)


def read(image: np.ndarray) -> str:
    """Return the row of letters in a uint8 picture `[32, 32, 3]`, "" if it shows none or something besides."""
    return glyphs.read(_color_index(image) >= 0)


def relations(first: Detected, second: Detected) -> set[str]:
    """Return the relations of `first` to `second` by GenEval's rule, such as {`left of`, `above`}.

    The offset of their centres is reduced by a margin and normalised. A relation holds if its component exceeds 1/2.
    """
    offset = np.subtract(first.centre, second.centre)
    margin = POSITION_MARGIN * np.add(first.size, second.size)
    offset = np.sign(offset) * np.maximum(np.abs(offset) - margin, 0)
    if not offset.any():
        return set()
    dx, dy = offset / np.linalg.norm(offset)
    named = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in named.items() if holds}


def satisfies(scene: Scene, objects: list[Detected]) -> bool:
    """Return whether the objects fulfil every `include` clause of a scene, and no `exclude` clause."""
    groups: list[list[Detected]] = []
    for clause in scene.include:
        matched = [item for item in objects if item.shape == clause["class"]]
        if "color" in clause:
            matched = [item for item in matched if item.color == clause["color"]]
        matched = matched[: clause["count"]]
        if len(matched) < clause["count"]:
            return False
        groups.append(matched)
    for clause, matched in zip(scene.include, groups, strict=True):
        if "position" in clause:
            relation, target = clause["position"]
            if any(relation not in relations(a, b) for a in matched for b in groups[target]):
                return False
    return not any(
        sum(item.shape == clause["class"] for item in objects) >= clause["count"] for clause in scene.exclude
    )


def stays(kept: SceneObject, objects: Sequence[Detected]) -> bool:
    """Return whether exactly one object has the shape and colour of `kept`, and is at its place."""
    alike = [item for item in objects if (item.shape, item.color) == (kept.shape, kept.color)]
    centre = kept.x + OBJECT_SIZE / 2, kept.y + OBJECT_SIZE / 2
    return len(alike) == 1 and max(abs(np.subtract(alike[0].centre, centre))) <= MAX_DRIFT


def edited(edit: Edit, image: np.ndarray) -> bool:
    """Return whether a picture is the correct result of an edit.

    It must show the objects that the edit leaves, at their places, and no others. All pixels that the edit does not
    concern must equal those of the given picture, up to `MAX_CHANGE` in the mean.
    """
    objects = detect(image)
    certain = edit.objects[: -1 if edit.anywhere else None]
    if len(objects) != len(edit.objects) or not all(stays(item, objects) for item in certain):
        return False
    touched = np.zeros(image.shape[:2], dtype=bool)
    for item in {*edit.before} ^ {*edit.objects}:
        touched[item.y : item.y + OBJECT_SIZE, item.x : item.x + OBJECT_SIZE] = True
    if edit.anywhere:
        new = edit.objects[-1]
        found = [item for item in objects if (item.shape, item.color) == (new.shape, new.color)]
        if len(found) != 1:
            return False
        touched[:] = False
        (x, y), (width, height) = (np.array(pair) for pair in (found[0].centre, found[0].size))
        top, left = max(0, int(y - height / 2) - 1), max(0, int(x - width / 2) - 1)  # a pixel of blur around it
        touched[top : int(y + height / 2) + 1, left : int(x + width / 2) + 1] = True
    change = np.abs(image.astype(float) - edit.references[0])
    return bool(change[~touched].mean() <= MAX_CHANGE)


def fulfils(scene: Scene | Edit, image: np.ndarray) -> bool:
    """Return whether a uint8 picture `[32, 32, 3]` shows what its prompt asks for."""
    if isinstance(scene, Edit):
        return edited(scene, image)
    return read(image) == scene.text if scene.text else satisfies(scene, detect(image))


def to_pixels(image: Image.Image) -> np.ndarray:
    """Return a picture as uint8 `[32, 32, 3]`. In a larger one each pixel is a square of one colour."""
    return np.asarray(image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.NEAREST))


def evaluation_scenes(seed: int, per_category: int, family: Family | None = None) -> list[Any]:
    """Return the scenes to evaluate, `per_category` of each category, ordered by category.

    `family`: the model family whose scenes and categories are used. None: those of Qwen-Image.
    """
    make = make_scene if family is None else family.world.make_scene
    categories = CATEGORIES if family is None else family.categories
    return [make(seed, index, category) for category in categories for index in range(per_category)]


def score(scenes: Sequence[Any], images: Iterable[np.ndarray]) -> dict[str, float]:
    """Return the share of correct pictures per category, and `overall`, the mean of these."""
    return _scores(scenes, images).to_json()


def _scores(scenes: Sequence[Any], images: Iterable[np.ndarray]) -> Scores:
    right = (fulfils(scene, image) for scene, image in zip(scenes, images, strict=True))
    return Scores.by_category([scene.category for scene in scenes], right)


@dataclass(kw_only=True)
class Shapes(Benchmark):
    """Draws toy scenes or edits, `benchmark.prompts_per_category` in each category, and counts correct pictures."""

    label = "share of pictures that show what the prompt asks for"

    def prompts(self, family: Family, config: Config) -> list[Prompt]:
        scenes = evaluation_scenes(config.data.eval_seed, config.benchmark.prompts_per_category, family)
        return [Prompt(scene.caption, scene.category, scene.references, scene) for scene in scenes]

    def score(self, prompts: Sequence[Prompt], images: Iterable[Image.Image]) -> Scores:
        return _scores([prompt.fact for prompt in prompts], map(to_pixels, images))

    def fulfils(self, prompt: Prompt, image: Image.Image) -> bool:
        return fulfils(prompt.fact, to_pixels(image))

    def given(self, prompts: Sequence[Prompt], config: Config) -> dict[str, Any]:
        """Return the seed that all given pictures are made from, if there are any."""
        return {"eval_seed": config.data.eval_seed} if any(prompt.references for prompt in prompts) else {}
