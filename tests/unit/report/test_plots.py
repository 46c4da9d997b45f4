"""Plots that a reader can tell apart: names beside points, and axes that fit what was measured."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from PIL import Image
from scored import MEASURED, SCORES, compared

from ppcl.artifacts.costs import Point
from ppcl.artifacts.decisions import Decisions, GroupDecisions
from ppcl.artifacts.scores import Fidelity, Likeness, NoiseLevel
from ppcl.pictures.images import read_picture
from ppcl.report import plots
from ppcl.report.plots import (
    contact_sheet,
    distillation_losses,
    error_by_noise_level,
    frontier,
    image_grid,
    label_points,
    quality_against_size,
)

NAMES = ["teacher", "removed", "ppcl-depth", "ppcl-mixed", "ppcl-width", "ppcl-planned", "ppcl-finetuned"]


@pytest.mark.parametrize("place", [(50.0, 0.5), (0.0, 0.0), (100.0, 1.0)])
def test_names_of_variants_that_score_alike_do_not_collide(place: tuple[float, float]) -> None:
    figure, axis = plt.subplots(figsize=(5.6, 3.4))
    axis.set(xlim=(-12, 112), ylim=(-0.05, 1.05))
    label_points(axis, NAMES, [(*place, 0.02)] * len(NAMES))
    figure.canvas.draw()
    labels = [text for text in axis.texts if isinstance(text, Annotation)]
    assert [label.get_text() for label in labels] == NAMES
    boxes = [Text.get_window_extent(label) for label in labels]
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    assert all(axis.bbox.x0 <= box.x0 and box.x1 <= axis.bbox.x1 for box in boxes)
    plt.close(figure)


@pytest.mark.parametrize(
    ("rows", "drawn"),
    [
        (compared(SCORES, **MEASURED), True),
        (compared(dict.fromkeys(SCORES), velocity_error=0.1), True),
        (compared(dict.fromkeys(SCORES), latent_distance=0.1), True),
        (compared(dict.fromkeys(SCORES)), False),
    ],
)
def test_quality_is_whatever_was_measured(rows: list, drawn: bool, tmp_path: Path) -> None:
    assert quality_against_size(tmp_path / "quality.png", rows, (0.0, 1.0)) == drawn
    assert (tmp_path / "quality.png").exists() == drawn


@pytest.mark.parametrize("levels", [[], [NoiseLevel(0.1, 0.5, 0.01), NoiseLevel(0.6, 0.9, 0.1)]])
def test_errors_by_noise_level_are_drawn_where_there_are_any(levels: list, tmp_path: Path) -> None:
    rows = compared(dict.fromkeys(SCORES), fidelity=Fidelity([Likeness(20.0, 0.5)], levels))
    assert error_by_noise_level(tmp_path / "levels.png", rows) == bool(levels)
    assert (tmp_path / "levels.png").exists() == bool(levels)


def test_a_grid_keeps_the_shape_of_each_picture(tmp_path: Path) -> None:
    image_grid(tmp_path / "grid.png", [Image.new("RGB", size, "red") for size in ((600, 300), (100, 200))], 2, 300)
    with Image.open(tmp_path / "grid.png") as grid:
        red = np.asarray(grid)[..., 1] == 0
    assert red[:, :306].sum() == 300 * 150
    assert red[:, 306:].sum() == 100 * 200


def test_a_grid_opens_one_picture_at_a_time(tmp_path: Path) -> None:
    """With fewer file handles than there are pictures."""
    for number in range(60):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    few, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = max(map(int, os.listdir("/proc/self/fd")))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (taken + 20, most))
        image_grid(tmp_path / "grid.png", (read_picture(tmp_path / f"{number}.png") for number in range(60)))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, most))
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (10 * 12 + 4, 6 * 12 + 4)
        assert grid.getpixel((8 + 9 * 12, 8 + 5 * 12)) == (59, 0, 0)


def test_a_contact_sheet_of_one_picture(tmp_path: Path) -> None:
    contact_sheet(tmp_path / "sheet.png", {"teacher": [Image.new("RGB", (8, 8))]}, ["a prompt"], {})
    with Image.open(tmp_path / "sheet.png") as image:
        image.verify()


@pytest.mark.parametrize("prompt", ["US$ 5 { US$ 6 }", "from $1 to $2", "$\\frac{$", "$$"])
def test_a_dollar_in_a_prompt_is_a_dollar(prompt: str, tmp_path: Path) -> None:
    contact_sheet(tmp_path / "sheet.png", {"teacher": [Image.new("RGB", (8, 8))]}, [prompt], {})
    assert (tmp_path / "sheet.png").exists()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Figure]]:
    """The figures that would be written, to be looked at."""
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    yield figures
    plt.close("all")


def legend_of(figure: Figure) -> list[str]:
    legend = figure.axes[0].get_legend() or figure.legends[0]
    return [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize(("smallest", "scale"), [(0.5, "linear"), (0.001, "log"), (0.0, "linear")])
def test_losses_of_more_than_a_decade_have_a_logarithmic_axis(
    smallest: float, scale: str, drawn: list[Figure], tmp_path: Path
) -> None:
    losses = {"a": {"heldout_before": 1.0, "heldout_loss": 0.7}, "b": {"heldout_before": 0.6, "heldout_loss": smallest}}
    distillation_losses(tmp_path / "losses.png", losses)
    assert drawn[0].axes[0].get_xscale() == scale
    assert legend_of(drawn[0]) == ["as it starts", "after distillation"]


def test_a_plug_that_ends_worse_than_it_began_is_marked(drawn: list[Figure], tmp_path: Path) -> None:
    losses = {"a": {"heldout_before": 1.0, "heldout_loss": 0.7}, "b": {"heldout_before": 0.6, "heldout_loss": 0.8}}
    distillation_losses(tmp_path / "losses.png", losses)
    assert legend_of(drawn[0])[-1] == "worse than it started"
    better, worse = (
        {text.get_text(): text.get_color() for text in drawn[0].axes[0].get_yticklabels()}[n] for n in "ab"
    )
    assert better != worse


@pytest.mark.parametrize("budget", [0.6, None])
def test_the_frontier_tells_the_budget_from_the_choice(
    budget: float | None, drawn: list[Figure], tmp_path: Path
) -> None:
    line = [Point([], 6, 100, size, size, 0.1, 0.2, 1 - size) for size in (0.5, 1.0)]
    frontier(tmp_path / "frontier.png", {"velocity": line, "loss": line}, 0.55, budget, "loss")
    said = legend_of(drawn[0])
    assert said[:2] == ["planned by velocity error", "planned by distillation loss, as this plan is"]
    assert said[2:] == ["this plan: 55.0%", *(["budget: 60.0%"] if budget else [])]


def test_decisions_of_two_stacks_are_drawn_one_above_the_other(tmp_path: Path) -> None:
    steps = [0, 5, 10]
    groups = {
        f"{stack}.{first}-{first + 3}": GroupDecisions(
            stack, [*range(first, first + 4)], 2, [[0.5] * 4, [0.8, 0.2, 0.6, 0.4], [1, 0, 1, 0]], [0.2, 0.5, 1.0]
        )
        for stack, first in (("double", 0), ("single", 0), ("single", 4))
    }
    plots.decisions(tmp_path / "one.png", Decisions(steps, {"double.0-3": groups["double.0-3"]}))
    plots.decisions(tmp_path / "two.png", Decisions(steps, groups))
    with read_picture(tmp_path / "one.png") as one, read_picture(tmp_path / "two.png") as two:
        assert one.width == two.width
        assert one.height < two.height
