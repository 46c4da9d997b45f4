"""The report's section on fidelity: the prompts whose pictures are least like the teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ppcl.artifacts.scores import ComparedRow, Fidelity
from ppcl.context import Run
from ppcl.pictures.images import image_folder, read_image
from ppcl.report.sheets import Sheet
from ppcl.report.text import counted, result_of

PAIRS, LISTED = 4, 12  # prompts that are shown with pictures, and prompts in the table


def fidelity_section(run: Run, rows: Sequence[ComparedRow], largest: int) -> dict[str, Any] | None:
    """Return the section as the template expects it; None if no variant has a fidelity.

    Prompts are ordered by the mean SSIM of the run's main result, worst first. Pictures are at most `largest` pixels
    per side, and of each prompt they are the least like one.
    """
    measured = {row.name: row.fidelity for row in rows if row.fidelity is not None}
    result = result_of(list(measured))
    if result is None:
        return None
    each = run.benchmark.images_per_prompt
    texts = [prompt.text for prompt in run.prompts[::each]]
    likenesses = {name: fidelity.prompts(each) for name, fidelity in measured.items()}
    order = sorted(range(len(texts)), key=lambda prompt: likenesses[result][prompt].ssim)
    shown = [_worst_picture(measured[result], prompt, each) for prompt in order[:PAIRS]]
    names = ("teacher", result)
    pictures = {name: [read_image(run, name, number) for number in shown] for name in names}
    captions = [run.prompts[number].text for number in shown]
    return {
        "result": result,
        "count": counted(len(texts), "prompt"),
        "rows": Sheet(image_folder(run, result).parent, captions, pictures).cells(largest),
        "pairs": [
            {"caption": caption, "ssim": picture.ssim, "psnr": picture.psnr}
            for caption, picture in zip(captions, (measured[result].pictures[number] for number in shown), strict=True)
        ],
        "variants": list(measured),
        "prompts": [
            {"text": texts[prompt], "cells": [likenesses[name][prompt] for name in measured]}
            for prompt in order[:LISTED]
        ],
    }


def _worst_picture(fidelity: Fidelity, prompt: int, each: int) -> int:
    """Return the number of the picture with the lowest SSIM among the `each` pictures of a prompt."""
    numbers = range(each * prompt, each * (prompt + 1))
    return min(numbers, key=lambda number: fidelity.pictures[number].ssim)
