"""Edits in the shapes world: one or two given pictures, an instruction, and the picture that should result.

The first given picture has two or three objects of different shapes, so that "the circle" is unambiguous. The second,
if there is one, shows the single object that the instruction refers to. The instruction determines the result, except
for the position of an added object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ppcl.data.worlds.shapes import COLORS, IMAGE_SIZE, LATTICE, OBJECT_SIZE, SHAPES, SceneObject, place, render

ONE_PICTURE = ("recolor", "remove", "add", "move")
TWO_PICTURES = ("insert", "match_color")
CATEGORIES = ALL_CATEGORIES = ONE_PICTURE + TWO_PICTURES
OPEN = ()  # categories with too many captions to list
_FAR = IMAGE_SIZE - OBJECT_SIZE
SIDES = {"left": ("x", 0), "right": ("x", _FAR), "top": ("y", 0), "bottom": ("y", _FAR)}


@dataclass(frozen=True)
class Edit:
    """One edit.

    `caption`: the instruction. `before`: the objects of the first given picture. `objects`: the objects of the result.
    `anywhere`: whether the last of `objects` may be at any position. `given`: the objects of the second given picture,
    empty if there is none.
    """

    category: str
    caption: str
    before: tuple[SceneObject, ...]
    objects: tuple[SceneObject, ...]
    anywhere: bool = False
    given: tuple[SceneObject, ...] = ()

    @property
    def references(self) -> tuple[np.ndarray, ...]:
        """The given pictures, uint8 `[32, 32, 3]` each."""
        return tuple(render(objects) for objects in (self.before, self.given) if objects)


def _clear(objects: Sequence[SceneObject]) -> bool:
    """Return whether all objects are at least one lattice step apart, as `place` puts them."""
    apart = OBJECT_SIZE + LATTICE
    return all(max(abs(a.x - b.x), abs(a.y - b.y)) >= apart for n, a in enumerate(objects) for b in objects[n + 1 :])


def make_scene(seed: int, index: int, category: str | None = None, categories: Sequence[str] = ONE_PICTURE) -> Edit:
    """Return edit number `index` of the stream `seed`. `category`: None draws one of `categories`."""
    rng = np.random.default_rng([seed, index])
    category = category or categories[int(rng.integers(len(categories)))]
    while True:  # until the edit changes something and objects are far enough apart
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
    """Return all instructions of `categories`, sorted."""
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
    """Return all words that occur in instructions, sorted."""
    return sorted({word for caption in all_captions(CATEGORIES) for word in caption.split()})
