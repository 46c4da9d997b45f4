"""The letters of the shapes world's category `text`, and the reader that scores them.

A letter has 3x7 pixels and stands in a cell of 4x8, so that a row of up to eight letters fits into a picture. Any two
letters differ in at least seven pixels.
"""

from __future__ import annotations

import numpy as np

CELL = (8, 4)  # height and width in pixels; the last row and the last column stay empty
MAX_LETTERS = 8
MAX_WRONG = 3  # pixels of a cell that may be wrong: less than half of the smallest difference of two letters
MAX_STRAY = 10  # coloured pixels outside of the row from which on a picture shows something besides it
_ROWS = {
    "H": "101 101 101 111 101 101 101",
    "L": "100 100 100 100 100 100 111",
    "P": "111 101 111 100 100 100 100",
    "S": "111 100 100 010 001 001 111",
    "T": "111 010 010 010 010 010 010",
    "X": "101 101 010 010 010 101 101",
    "Y": "101 101 101 010 010 010 010",
    "Z": "111 001 001 010 100 100 111",
}


def _templates() -> dict[str, np.ndarray]:
    found = {}
    for letter, rows in _ROWS.items():
        cell = np.zeros(CELL, dtype=bool)
        cell[:-1, :-1] = [[pixel == "1" for pixel in row] for row in rows.split()]
        found[letter] = cell
    return found


TEMPLATES = _templates()
LETTERS = tuple(TEMPLATES)


def read(mask: np.ndarray) -> str:
    """Return the row of letters in a picture, "" if there is none or if there is something besides it.

    `mask` `[32, 32]` says which pixels have a colour. The row may stand anywhere, and a column beside the lattice.
    """
    height, width = CELL
    classes = np.stack([np.zeros(CELL, dtype=bool), *TEMPLATES.values()])
    names = " " + "".join(LETTERS)
    best, text = MAX_STRAY + MAX_WRONG * mask.shape[1] // width, ""
    for shift in (-1, 0, 1):
        moved = np.pad(mask, ((height, height), (1, 1)))[:, 1 + shift : 1 + shift + mask.shape[1]]
        lost = mask.sum() - moved.sum()  # pixels that the shift moves out of the picture
        for top in range(1, len(moved) - height):
            row = moved[top : top + height]
            cells = row.reshape(height, -1, width).swapaxes(0, 1)  # [cells, height, width]
            wrong = (cells[:, None] != classes).sum(axis=(2, 3))
            stray = lost + moved.sum() - row.sum()
            total = stray + wrong.min(axis=1).sum()
            if stray < MAX_STRAY and wrong.min(axis=1).max() <= MAX_WRONG and total < best:
                best, text = total, "".join(names[number] for number in wrong.argmin(axis=1))
    return "" if " " in text.strip() else text.strip()
