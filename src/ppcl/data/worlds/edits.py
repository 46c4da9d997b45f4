"""Edits of the shapes world: pictures, an instruction, and the picture that must come out of it.

The first picture holds two or three objects of different shapes, so that "the circle" is one of them. An edit
says all about what it changes, but for where an added object goes; nothing else may change. With two
pictures, the second holds the one object that the instruction speaks of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ppcl.data.worlds.shapes import COLORS, IMAGE_SIZE, LATTICE, OBJECT_SIZE, SHAPES, SceneObject, place, render

ONE_PICTURE = ("recolor", "remove", "add", "move")
TWO_PICTURES = ("insert", "match_color")
CATEGORIES = ONE_PICTURE + TWO_PICTURES
_FAR = IMAGE_SIZE - OBJECT_SIZE
SIDES = {"left": ("x", 0), "right": ("x", _FAR), "top": ("y", 0), "bottom": ("y", _FAR)}


@dataclass(frozen=True)
class Edit:
    """An instruction, the objects before it and after; an `anywhere` object is the last, wherever it stands.

    `given` is what the second picture shows, if there is one.
    """

    category: str
    caption: str
    before: tuple[SceneObject, ...]
    objects: tuple[SceneObject, ...]
    anywhere: bool = False
    given: tuple[SceneObject, ...] = ()

    @property
    def references(self) -> tuple[np.ndarray, ...]:
        """The pictures that are given, uint8 `[32, 32, 3]`."""
        return tuple(render(objects) for objects in (self.before, self.given) if objects)


def _clear(objects: Sequence[SceneObject]) -> bool:
    """Whether any two objects are a lattice step or more apart, as `place` has them."""
    apart = OBJECT_SIZE + LATTICE
    return all(max(abs(a.x - b.x), abs(a.y - b.y)) >= apart for n, a in enumerate(objects) for b in objects[n + 1 :])


def make_scene(seed: int, index: int, category: str | None = None, categories: Sequence[str] = ONE_PICTURE) -> Edit:
    """Edit number `index` of the stream `seed`, in a random one of `categories` unless one is given."""
    rng = np.random.default_rng([seed, index])
    category = category or categories[int(rng.integers(len(categories)))]
    while True:  # until the outcome fits into the picture
        edit = _draw(rng, category)
        if edit.objects != edit.before and _clear(edit.objects):
            return edit


def _draw(rng: np.random.Generator, category: str) -> Edit:
    shapes = [str(shape) for shape in rng.permutation(SHAPES)]
    corners = place(rng, int(rng.integers(2, 4)))
    colors = [str(color) for color in rng.choice(tuple(COLORS), size=len(corners))]
    before = tuple(SceneObject(s, c, x, y) for s, c, (x, y) in zip(shapes, colors, corners, strict=False))
    first, *rest = before
    color = str(rng.choice(tuple(COLORS)))
    (corner,) = place(rng, 1)
    new = SceneObject(shapes[len(before)], color, *corner)
    given: tuple[SceneObject, ...] = ()
    if category == "recolor":
        caption, after = f"make the {first.shape} {color}", [replace(first, color=color), *rest]
    elif category == "remove":
        caption, after = f"remove the {first.shape}", rest
    elif category == "add":
        caption, after = f"add a {color} {new.shape}", [*before, new]
    elif category == "move":
        side = str(rng.choice(tuple(SIDES)))
        axis, value = SIDES[side]
        caption = f"move the {first.shape} to the {side}"
        after = [SceneObject(**(vars(first) | {axis: value})), *rest]
    elif category == "insert":
        caption, after, given = "add the object of picture two", [*before, new], (new,)
    elif category == "match_color":
        caption = f"make the {first.shape} the color of picture two"
        after, given = [replace(first, color=color), *rest], (new,)
    else:
        raise ValueError(f"category={category!r} is not one of {', '.join(CATEGORIES)}.")
    return Edit(category, caption, before, tuple(after), category == "add", given)


def all_captions(categories: Sequence[str] = ONE_PICTURE) -> list[str]:
    """Every instruction of those categories, sorted."""
    captions = {
        "recolor": [f"make the {s} {c}" for s in SHAPES for c in COLORS],
        "remove": [f"remove the {s}" for s in SHAPES],
        "add": [f"add a {c} {s}" for c in COLORS for s in SHAPES],
        "move": [f"move the {s} to the {side}" for s in SHAPES for side in SIDES],
        "insert": ["add the object of picture two"],
        "match_color": [f"make the {s} the color of picture two" for s in SHAPES],
    }
    return sorted(caption for category in categories for caption in captions[category])


def vocabulary() -> list[str]:
    """Every word an instruction can hold."""
    return sorted({word for caption in all_captions(CATEGORIES) for word in caption.split()})
