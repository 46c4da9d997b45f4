"""The shapes world: a procedural text-to-image data set with the six categories of GenEval, and two more.

A picture is 32x32 pixels with a light background. It has one to four objects of one colour and 8x8 pixels each, on a
4-pixel lattice, with at least 4 pixels between them. In the category `text` they are a row of two to eight letters
(`ppcl.data.worlds.glyphs`). A scene depends on `(seed, index)` alone, so a stream needs no files, can resume at any
sample, and has other samples for another seed. Because shapes and colours are exact, `ppcl.benchmarks.shapes` can score
a picture by GenEval's rules without a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from jaxtyping import Float

from ppcl.data.worlds import glyphs

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_SIZE = 32
OBJECT_SIZE = 8
LATTICE = 4
BACKGROUND = 235
CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")  # GenEval's
ALL_CATEGORIES = (*CATEGORIES, "color_position", "text")
OPEN = ("text",)  # categories with too many captions to list

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
    """One object: its shape (or letter) and colour names, and the top-left corner in pixels."""

    shape: str
    color: str
    x: int
    y: int


@dataclass(frozen=True)
class Scene:
    """A caption, the objects drawn for it, and GenEval's conditions on them.

    `include`: what a picture must show, each with a class, a count, and perhaps a colour or position. `exclude`: what
    it must not show. `text`: the letters that it must show, and nothing else.
    """

    category: str
    caption: str
    objects: tuple[SceneObject, ...]
    include: tuple[dict, ...]
    exclude: tuple[dict, ...] = ()
    text: str = ""

    references: ClassVar[tuple[np.ndarray, ...]] = ()  # given pictures, which only edits have


def render(objects: tuple[SceneObject, ...]) -> np.ndarray:
    """Draw objects and return the picture, uint8 `[32, 32, 3]`."""
    image = np.full((IMAGE_SIZE, IMAGE_SIZE, 3), BACKGROUND, dtype=np.uint8)
    for item in objects:
        template = glyphs.TEMPLATES[item.shape] if item.shape in glyphs.TEMPLATES else TEMPLATES[item.shape]
        height, width = template.shape
        image[item.y : item.y + height, item.x : item.x + width][template] = COLORS[item.color]
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


def _write(rng: np.random.Generator, color: str) -> Scene:
    """Return a row of letters, centred on the lattice across the picture and anywhere down it."""
    count = int(rng.integers(2, glyphs.MAX_LETTERS + 1))
    letters = [str(letter) for letter in rng.choice(glyphs.LETTERS, size=count)]
    height, width = glyphs.CELL
    left = LATTICE * ((IMAGE_SIZE // width - count) // 2)
    y = LATTICE * int(rng.integers(0, 1 + (IMAGE_SIZE - height) // LATTICE))
    objects = tuple(SceneObject(letter, color, left + width * n, y) for n, letter in enumerate(letters))
    return Scene("text", f"the text {' '.join(letters)}", objects, (), text="".join(letters))


def make_scene(seed: int, index: int, category: str | None = None, categories: Sequence[str] = CATEGORIES) -> Scene:
    """Return scene number `index` of the stream `seed`. `category`: None draws one of `categories`."""
    rng = np.random.default_rng([seed, index])
    category = category or categories[int(rng.integers(len(categories)))]
    shape, other = (str(name) for name in rng.permutation(SHAPES)[:2])
    color, second = (str(name) for name in rng.choice(tuple(COLORS), size=2))
    if category == "text":
        return _write(rng, color)
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
        elif category in ("position", "color_position"):
            relation = RELATIONS[rng.integers(len(RELATIONS))]
            corners = _place_related(rng, relation)
            caption = f"a {shape} {relation} a {other}"
            include[0]["position"] = (relation, 1)
            if category == "color_position":
                color, second = (str(name) for name in rng.permutation(tuple(COLORS))[:2])
                caption = f"a {color} {shape} {relation} a {second} {other}"
                include[0]["color"], include[1]["color"] = color, second
        elif category == "color_attr":
            color, second = (str(name) for name in rng.permutation(tuple(COLORS))[:2])
            caption = f"a {color} {shape} and a {second} {other}"
            include[0]["color"], include[1]["color"] = color, second
        else:
            raise ValueError(f"category={category!r} is not one of {', '.join(ALL_CATEGORIES)}.")
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


def longest_caption() -> str:
    """Return a caption with the most words that a caption of this world has."""
    return f"the text {' '.join(glyphs.LETTERS[0] * glyphs.MAX_LETTERS)}"


def all_captions(categories: Sequence[str] = CATEGORIES) -> list[str]:
    """Return all captions of `categories`, sorted. They are few enough to encode all of them in advance.

    Captions of a category in `OPEN` are too many: `KeyError`.
    """
    pairs = [(s, o) for s in SHAPES for o in SHAPES if s != o]
    colors = [(c, d) for c in COLORS for d in COLORS if c != d]
    captions = {
        "single_object": [f"a {s}" for s in SHAPES],
        "two_object": [f"a {s} and a {o}" for s, o in pairs],
        "counting": [f"{numeral} {plural}" for numeral in NUMERALS.values() for plural in PLURALS.values()],
        "colors": [f"a {c} {s}" for c in COLORS for s in SHAPES],
        "position": [f"a {s} {relation} a {o}" for s, o in pairs for relation in RELATIONS],
        "color_attr": [f"a {c} {s} and a {d} {o}" for s, o in pairs for c, d in colors],
        "color_position": [f"a {c} {s} {r} a {d} {o}" for s, o in pairs for c, d in colors for r in RELATIONS],
    }
    return sorted(caption for category in categories for caption in captions[category])


def vocabulary(categories: Sequence[str] = CATEGORIES) -> list[str]:
    """Return all words that occur in captions of `categories`, which are GenEval's and perhaps more, sorted."""
    words = {"a", "and", *COLORS, *SHAPES, *PLURALS.values(), *NUMERALS.values()}
    words.update(word for relation in RELATIONS for word in relation.split())
    if "text" in categories:
        words |= {"the", "text", *glyphs.LETTERS}
    return sorted(words)
