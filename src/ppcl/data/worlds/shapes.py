"""The shapes world: a procedural text-to-image data set with the six categories of GenEval.

A picture is 32x32 pixels with a light background. It has one to four objects of one colour and 8x8 pixels each, on a
4-pixel lattice, with at least 4 pixels between them. A scene depends on `(seed, index)` alone, so a stream needs no
files, can resume at any sample, and has other samples for another seed. Because shapes and colours are exact,
`ppcl.benchmarks.shapes` can score a picture by GenEval's rules without a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Float

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_SIZE = 32
OBJECT_SIZE = 8
LATTICE = 4
BACKGROUND = 235
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

# Hues lie 60 degrees apart, so a tint or a shade of one is never mistaken for another.
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 50, 50),
    "yellow": (230, 215, 45),
    "green": (50, 190, 60),
    "cyan": (50, 200, 210),
    "blue": (55, 70, 225),
    "purple": (205, 60, 210),
}
NUMERALS = {2: "two", 3: "three", 4: "four"}
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
RELATIONS = ("left of", "right of", "above", "below")


def _templates() -> dict[str, np.ndarray]:
    row, column = np.mgrid[0:OBJECT_SIZE, 0:OBJECT_SIZE]
    centre = (OBJECT_SIZE - 1) / 2
    return {
        "circle": (row - centre) ** 2 + (column - centre) ** 2 <= 4.1**2,
        "square": np.ones((OBJECT_SIZE, OBJECT_SIZE), dtype=bool),
        "triangle": np.abs(column - centre) <= row // 2 + 0.5,
        "cross": (np.abs(row - centre) < 1) | (np.abs(column - centre) < 1),
    }


TEMPLATES = _templates()
SHAPES = tuple(TEMPLATES)


@dataclass(frozen=True)
class SceneObject:
    """One object: its shape and colour names, and the top-left corner in pixels."""

    shape: str
    color: str
    x: int
    y: int


@dataclass(frozen=True)
class Scene:
    """A caption, the objects drawn for it, and GenEval's conditions on them.

    `include`: what a picture must show, each with a class, a count, and perhaps a colour or position. `exclude`: what
    it must not show.
    """

    category: str
    caption: str
    objects: tuple[SceneObject, ...]
    include: tuple[dict, ...]
    exclude: tuple[dict, ...] = ()

    references: ClassVar[tuple[np.ndarray, ...]] = ()  # given pictures, which only edits have


def render(objects: tuple[SceneObject, ...]) -> np.ndarray:
    """Draw objects and return the picture, uint8 `[32, 32, 3]`."""
    image = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), BACKGROUND, dtype=np.uint8)
    for item in objects:
        window = image[item.y : item.y + OBJECT_SIZE, item.x : item.x + OBJECT_SIZE]
        window[TEMPLATES[item.shape]] = COLORS[item.color]
    return image


def place(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """Return the (x, y) corners of `count` objects at random lattice positions, at least one lattice step apart."""
    steps = (IMAGE_SIZE - OBJECT_SIZE) // LATTICE + 1
    apart = OBJECT_SIZE + LATTICE
    while True:
        corners = rng.integers(0, steps, size=(count, 2)) * LATTICE
        gaps = np.abs(corners[:, None] - corners[None]).max(axis=-1)
        if (gaps[np.triu_indices(count, 1)] >= apart).all():
            return [(int(x), int(y)) for x, y in corners]


def _place_related(rng: np.random.Generator, relation: str) -> list[tuple[int, int]]:
    """Return the (x, y) corners of two objects of which the first is, for example, left of the second.

    They are on opposite sides of the picture, and at most one lattice step apart across the direction of the relation.
    """
    near, far = rng.integers(0, 3) * LATTICE, (4 + rng.integers(1, 3)) * LATTICE
    line = rng.integers(0, (IMAGE_SIZE - OBJECT_SIZE) // LATTICE + 1)
    beside = np.clip(line + rng.integers(-1, 2), 0, (IMAGE_SIZE - OBJECT_SIZE) // LATTICE)
    along = (near, far) if relation in ("left of", "above") else (far, near)
    corners = list(zip(along, (line * LATTICE, beside * LATTICE), strict=True))
    if relation in ("above", "below"):
        corners = [(y, x) for x, y in corners]
    return [(int(x), int(y)) for x, y in corners]


def _place_counted(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """Return the (x, y) corners of `count` objects in different quarters of the picture."""
    quarters = rng.permutation(4)[:count]
    far = IMAGE_SIZE - OBJECT_SIZE - LATTICE
    jitter = rng.integers(0, 2, size=(count, 2)) * LATTICE
    return [(int(q % 2 * far + dx), int(q // 2 * far + dy)) for q, (dx, dy) in zip(quarters, jitter, strict=True)]


def make_scene(seed: int, index: int, category: str | None = None, categories: Sequence[str] = CATEGORIES) -> Scene:
    """Return scene number `index` of the stream `seed`. `category`: None draws one of `categories`."""
    rng = np.random.default_rng([seed, index])
    category = category or categories[int(rng.integers(len(categories)))]
    shape, other = (str(name) for name in rng.permutation(SHAPES)[:2])
    color, second = (str(name) for name in rng.choice(tuple(COLORS), size=2))
    include: list[dict] = [{"class": shape, "count": 1}]
    exclude: tuple[dict, ...] = ()
    if category == "single_object":
        caption, corners = f"a {shape}", place(rng, 1)
    elif category == "colors":
        caption, corners = f"a {color} {shape}", place(rng, 1)
        include[0]["color"] = color
    elif category == "counting":
        count = int(rng.integers(2, 5))
        caption, corners = f"{NUMERALS[count]} {PLURALS[shape]}", _place_counted(rng, count)
        include[0]["count"] = count
        exclude = ({"class": shape, "count": count + 1},)
    else:
        include.append({"class": other, "count": 1})
        corners = place(rng, 2)
        if category == "two_object":
            caption = f"a {shape} and a {other}"
        elif category == "position":
            relation = RELATIONS[rng.integers(len(RELATIONS))]
            corners = _place_related(rng, relation)
            caption = f"a {shape} {relation} a {other}"
            include[0]["position"] = (relation, 1)
        elif category == "color_attr":
            color, second = (str(name) for name in rng.permutation(tuple(COLORS))[:2])
            caption = f"a {color} {shape} and a {second} {other}"
            include[0]["color"], include[1]["color"] = color, second
        else:
            raise ValueError(f"category={category!r} is not one of {', '.join(CATEGORIES)}.")
    kinds = [(shape, color), (other, second)] if len(include) == 2 else [(shape, color)] * len(corners)
    objects = tuple(SceneObject(s, c, x, y) for (s, c), (x, y) in zip(kinds, corners, strict=True))
    return Scene(category, caption, objects, tuple(include), exclude)


def to_tensor(images: list[np.ndarray]) -> Float[Tensor, "batch 3 height width"]:
    """Convert uint8 images `[H, W, 3]` of one size to one float32 tensor in [-1, 1]."""
    import torch  # not at the top: checks of a configuration import this module and need no torch

    stacked = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return stacked.float() / 127.5 - 1.0


def pictures(scenes: Sequence[Any]) -> Float[Tensor, "batch 3 32 32"]:
    """Draw scenes, or the results of edits, as float32 in [-1, 1]."""
    return to_tensor([render(scene.objects) for scene in scenes])


def all_captions(categories: Sequence[str] = CATEGORIES) -> list[str]:
    """Return all captions of `categories`, sorted. They are few enough to encode all of them in advance."""
    pairs = [(s, o) for s in SHAPES for o in SHAPES if s != o]
    captions = {
        "single_object": [f"a {s}" for s in SHAPES],
        "two_object": [f"a {s} and a {o}" for s, o in pairs],
        "counting": [f"{numeral} {plural}" for numeral in NUMERALS.values() for plural in PLURALS.values()],
        "colors": [f"a {c} {s}" for c in COLORS for s in SHAPES],
        "position": [f"a {s} {relation} a {o}" for s, o in pairs for relation in RELATIONS],
        "color_attr": [f"a {c} {s} and a {d} {o}" for s, o in pairs for c in COLORS for d in COLORS if c != d],
    }
    return sorted(caption for category in categories for caption in captions[category])


def vocabulary() -> list[str]:
    """Return all words that occur in captions of this world, sorted."""
    words = {"a", "and", *COLORS, *SHAPES, *PLURALS.values(), *NUMERALS.values()}
    words.update(word for relation in RELATIONS for word in relation.split())
    return sorted(words)
