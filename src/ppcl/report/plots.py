"""Plots and contact sheets as PNG files: CKA, decisions, quality by size, the frontier, losses, and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FormatStrFormatter, LogFormatter, MaxNLocator
from matplotlib.transforms import Bbox
from PIL import Image

from ppcl.artifacts.costs import Frontier
from ppcl.artifacts.curves import Curve
from ppcl.artifacts.decisions import Decisions
from ppcl.artifacts.files import atomic_path
from ppcl.artifacts.plan import Interval
from ppcl.artifacts.plugs import has_risen
from ppcl.artifacts.scores import ComparedRow

INK, GRID = "#22303c", "#dfe5ea"
PALETTE = ("#0b6e99", "#d9730d", "#5a8f3d", "#a0408a", "#8a6d3b", "#6b7a89", "#c0392b", "#2f9e95")
# Decorates what draws. A notebook's own plots keep its own style.
_styled = mpl.rc_context(
    {
        "font.size": 10,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.grid": True,
        "grid.color": GRID,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": INK,
        "ytick.color": INK,
        "legend.frameon": False,
        "figure.constrained_layout.use": True,
    }
)


def _subplots(rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], **settings: Any) -> tuple[Figure, Any]:
    """Return a figure and its axes, as `pyplot.subplots` does.

    pyplot is not used: a notebook that calls ppcl would lose the backend that shows its pictures.
    """
    figure = Figure(figsize=figsize)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, **settings)


@_styled
def save_figure(figure: Any, path: Path, *, fit: bool = False) -> None:
    """Write a matplotlib figure as a PNG. `fit`: as large as what it shows takes, whatever the figure's size."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png", bbox_inches="tight" if fit else None)


@_styled
def interval_curves(path: Path, curve: list[list[float | None]], intervals: list[Interval]) -> None:
    """Plot cka(u, k) and delta(u, k) (Eq. 3-4) against k for the first block u of each interval, and mark its end v.

    `curve`: cka(u, k) as `[u][k]`, None where it is not defined.
    """
    figure, (top, bottom) = _subplots(2, 1, figsize=(6.4, 5.2), sharex=True)
    for number, (u, v) in enumerate(intervals):
        row = np.array([np.nan if value is None else value for value in curve[u]], dtype=float)
        stop = min(v + 2, len(row) - 1)  # one block past the end shows why it ended
        ks = np.arange(u, stop + 1)
        color = PALETTE[number % len(PALETTE)]
        top.plot(ks, row[ks], "o-", color=color, markersize=3, linewidth=1.4)
        top.plot(v, row[v], "o", color=color, markersize=8, markerfacecolor="white")
        drops = -np.diff(row[ks])
        bottom.plot(ks[1:], drops, "o-", color=color, markersize=3, linewidth=1.4)
        bottom.plot(v, drops[v - u - 1], "o", color=color, markersize=8, markerfacecolor="white")
        for axis in (top, bottom):
            axis.axvspan(u - 0.4, v + 0.4, color=color, alpha=0.08, linewidth=0)
    top.set_ylabel("cka(u, k)")
    bottom.set_ylabel("delta(u, k)")
    bottom.set_xlabel("block k (open circle: v, the end of an interval)")
    bottom.set_xlim(-0.6, len(curve) - 0.4)
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
    top.set_title("Similarity of the probe surrogate, one line per interval", loc="left", color=INK)
    save_figure(figure, path)


@_styled
def similarity_maps(path: Path, maps: dict[str, list[list[float | None]]]) -> None:
    """Plot the CKA between the outputs of all pairs of blocks, a panel for each map. Missing values stay white.

    `maps`: tables `[block][block]` by title.
    """
    columns = min(2, len(maps))
    rows = -(-len(maps) // columns)
    figure, axes = _subplots(rows, columns, figsize=(0.8 + 3.2 * columns, 3.3 * rows), squeeze=False)
    lowest = min(value for table in maps.values() for row in table for value in row if value is not None)
    for axis in axes.flat[len(maps) :]:
        axis.remove()
    for axis, (name, table) in zip(axes.flat, maps.items(), strict=False):
        drawn = axis.imshow(np.array(table, dtype=float), origin="lower", cmap="viridis", vmin=lowest, vmax=1.0)
        axis.set(title=name, xlabel="block", ylabel="block")
        axis.grid(visible=False)
        for side in (axis.xaxis, axis.yaxis):
            side.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(drawn, ax=axes.flat[: len(maps)], label="CKA", shrink=0.85)
    save_figure(figure, path)


@_styled
def decisions(path: Path, learned: Decisions) -> None:
    """Plot the probability that each block stays against the steps of a training, a panel for each stack.

    Lines divide the groups. Below is the confidence of the least decided group.
    """
    stacks = list(dict.fromkeys(group.stack for group in learned.groups.values()))
    counts = [sum(len(group.blocks) for group in learned.groups.values() if group.stack == stack) for stack in stacks]
    heights = [*(max(4, count) for count in counts), 5]
    figure, axes = _subplots(
        len(heights), 1, figsize=(6.8, 1.2 + 0.17 * sum(heights)), sharex=True, height_ratios=heights
    )
    for axis, stack in zip(axes, stacks, strict=False):
        groups = [group for group in learned.groups.values() if group.stack == stack]
        table = np.concatenate([np.array(group.probabilities).T for group in groups])
        edges = np.arange(len(table) + 1) + groups[0].blocks[0] - 0.5
        times = np.array([*learned.steps, 2 * learned.steps[-1] - learned.steps[-2]])
        drawn = axis.pcolormesh(times, edges, table, cmap="viridis", vmin=0, vmax=1)
        axis.hlines([group.blocks[0] - 0.5 for group in groups[1:]], times[0], times[-1], color="white", linewidth=1.2)
        axis.set(ylabel="block", ylim=(edges[-1], edges[0]))
        axis.set_title(stack, loc="left", color=INK)
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(visible=False)
    sure = np.array([group.confidence for group in learned.groups.values()])
    axes[-1].plot(learned.steps, sure.min(axis=0), color=PALETTE[0], label="least decided group")
    axes[-1].plot(learned.steps, sure.mean(axis=0), color=PALETTE[1], label="mean of groups")
    axes[-1].set(xlabel="step", ylabel="confidence", ylim=(0, 1.04))
    axes[-1].legend(loc="lower right", fontsize=8)
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(drawn, ax=list(axes[:-1]), label="probability of being kept", shrink=0.9)
    save_figure(figure, path)


@_styled
def quality_against_size(path: Path, rows: Sequence[ComparedRow], bounds: tuple[float, float] | None) -> bool:
    """Plot each variant's quality against its share of the teacher's parameters; return whether there was any to plot.

    Quality is the overall score with its 95% confidence interval, on an axis over `bounds` (the worst and best score)
    if these are given. Without scores it is the latent distance, and without that the velocity error.
    """
    label, values = _quality(rows)
    shown = [(row, value) for row, value in zip(rows, values, strict=True) if value is not None]
    if not shown:
        return False
    figure, axis = _subplots(figsize=(5.6, 3.4))
    taken = []
    for number, (row, y) in enumerate(shown):
        x, color = 100 * row.params_ratio, PALETTE[number % len(PALETTE)]
        margin = row.score_interval if row.scores is not None else None
        axis.errorbar(x, y, yerr=margin, fmt="o", color=color, markersize=8, elinewidth=1.2, capsize=3)
        taken.append((x, y, margin or 0.0))
    axis.set(xlabel="parameters, % of the teacher", ylabel=label)
    axis.margins(x=0.12, y=0.1)
    if rows[0].scores is None:
        axis.set_ylim(bottom=min(0.0, *axis.get_ylim()))
    elif bounds is not None:
        space = 0.05 * (bounds[1] - bounds[0])
        axis.set_ylim(bounds[0] - space, bounds[1] + space)
    label_points(axis, [row.name for row, _ in shown], taken)
    save_figure(figure, path)
    return True


@_styled
def compared_sizes(path: Path, points: Sequence[tuple[str, Mapping[str, Any]]]) -> bool:
    """Plot the quality of runs against their share of the teacher's parameters; return whether there was any to plot.

    `points`: the series that a run belongs to, and its numbers `params_percent` and `score` or `velocity_error`. Runs
    of a series are joined in the order of their size. A score has a bar of `score_interval` on both sides. More
    series than there are colours, such as the trials of a search, are points of one colour. With `lower_is_better` in
    the numbers a lower score is better.
    """
    sized = [numbers for _, numbers in points if "params_percent" in numbers]
    key = "score" if sized and all("score" in numbers for numbers in sized) else "velocity_error"
    series: dict[str, list[tuple[float, float, float]]] = {}
    for name, numbers in points:
        if "params_percent" in numbers and key in numbers:
            half = numbers.get("score_interval", 0.0) if key == "score" else 0.0
            series.setdefault(name, []).append((numbers["params_percent"], numbers[key], half))
    if not series:
        return False
    figure, axis = _subplots(figsize=(6.4, 4.0))
    if len(series) > len(PALETTE):
        style, series = "o", {"": [point for found in series.values() for point in found]}
    else:
        style = "o-"
    for color, (name, found) in zip(PALETTE, series.items(), strict=False):
        sizes, values, halves = zip(*sorted(found), strict=True)
        axis.plot(sizes, values, style, color=color, markersize=6, linewidth=1.4, label=name)
        if any(halves):
            axis.errorbar(sizes, values, yerr=halves, fmt="none", ecolor=color, capsize=3, linewidth=1, alpha=0.6)
    lower = key != "score" or any(numbers.get("lower_is_better") for _, numbers in points)
    better = "lower" if lower else "higher"
    axis.set(xlabel="parameters, % of the teacher", ylabel=f"{key.replace('_', ' ')} ({better} is better)")
    axis.margins(x=0.08, y=0.1)
    if any(series):
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize=9)
    save_figure(figure, path)
    return True


def _quality(rows: Sequence[ComparedRow]) -> tuple[str, list[float | None]]:
    """Return the label of the quality axis, and each row's value on it (None where it is missing)."""
    if any(row.scores is not None for row in rows):
        better = "lower" if rows[0].lower_is_better else "higher"
        return f"overall score ({better} is better)", [row.scores.overall if row.scores else None for row in rows]
    latents = [row.latent_distance for row in rows]
    if any(value is not None for value in latents):
        return "latent distance (lower is better)", latents
    return "velocity error (lower is better)", [row.velocity_error for row in rows]


@_styled
def error_by_noise_level(path: Path, rows: Sequence[ComparedRow]) -> bool:
    """Plot each variant's velocity error against the noise level; return whether any was measured."""
    measured = {row.name: row.fidelity.noise_levels for row in rows if row.fidelity and row.fidelity.noise_levels}
    if not measured:
        return False
    figure, axis = _subplots(figsize=(5.6, 3.4))
    for number, row in enumerate(rows):  # colours are those of `quality_against_size`
        levels, color = measured.get(row.name, []), PALETTE[number % len(PALETTE)]
        middles = [(level.low + level.high) / 2 for level in levels]
        errors = [level.velocity_error for level in levels]
        axis.hlines(errors, [level.low for level in levels], [level.high for level in levels], color=color, linewidth=4)
        axis.plot(middles, errors, color=color, linewidth=1.2, label=row.name if levels else None)
    axis.set(xlabel="noise level sigma (1 is noise)", ylabel="velocity error (lower is better)", xlim=(0, 1))
    axis.set_yscale("log")
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    save_figure(figure, path)
    return True


def label_points(axis: Any, names: Sequence[str], points: Sequence[tuple[float, float, float]]) -> None:
    """Write a name beside each point, where it overlaps no other point or name.

    `points`: (x, y, half of the error bar) in data coordinates.
    """
    axis.figure.canvas.draw()  # fixes the layout, so that positions in pixels are known
    renderer = axis.figure.canvas.get_renderer()
    size = 7 * axis.figure.dpi / 72
    taken = []
    for x, y, margin in points:
        (left, low), (_, high) = axis.transData.transform([(x, y - margin), (x, y + margin)])
        taken.append(Bbox.from_extents(left - size, low - size, left + size, high + size))
    shifts = [(side, 13 * step) for step in sorted(range(-9, 10), key=abs) for side in (1, -1)]
    for name, (x, y, _) in zip(names, points, strict=True):
        for side, shift in shifts:
            label = axis.annotate(
                name,
                (x, y),
                xytext=(13 * side, shift),
                textcoords="offset points",
                ha="left" if side > 0 else "right",
                va="center",
                color=INK,
                arrowprops={"arrowstyle": "-", "color": "#9aa7b1", "linewidth": 0.8, "shrinkB": 5} if shift else None,
            )
            label.set_in_layout(False)
            label.update_positions(renderer)
            box = Text.get_window_extent(label, renderer)  # without its line to the point
            inside = axis.bbox.x0 <= box.x0 and box.x1 <= axis.bbox.x1 and axis.bbox.y0 <= box.y0 <= axis.bbox.y1
            if inside and not any(box.overlaps(other) for other in taken):
                taken.append(box)
                break
            if (side, shift) != shifts[-1]:
                label.remove()


@_styled
def frontier(path: Path, points: Frontier, chosen: float, budget: float | None, cost: str) -> None:
    """Plot the measured velocity error of the planner's choices against their size, a line for each kind of cost.

    `chosen`, `budget`: the share of the teacher's parameters in the actual choice, and in a budget of parameters; None
    for another budget. `cost`: the kind of cost that the actual choice has the least of.
    """
    figure, axis = _subplots(figsize=(5.6, 3.6))
    names = {"velocity": "velocity error", "loss": "distillation loss"}
    for number, (kind, line) in enumerate(points.items()):
        line = sorted(line, key=lambda point: point.params)
        x = [100 * point.params_ratio for point in line]
        label = f"planned by {names[kind]}{', as this plan is' if kind == cost else ''}"
        axis.plot(x, [point.velocity_error for point in line], "o-", color=PALETTE[number], label=label)
    axis.plot(
        100 * chosen, 0, "^", transform=axis.get_xaxis_transform(), color=PALETTE[6], markersize=9, clip_on=False,
        zorder=3, label=f"this plan: {100 * chosen:.1f}%",
    )  # fmt: skip
    if budget is not None:
        axis.axvline(100 * budget, color=INK, linewidth=1, linestyle=":", label=f"budget: {100 * budget:.1f}%")
    axis.set(xlabel="parameters, % of the teacher", ylabel="velocity error (lower is better)", ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=2, fontsize=9)
    save_figure(figure, path)


@_styled
def distillation_losses(path: Path, losses: dict[str, dict[str, float]]) -> None:
    """Plot the held-out loss of each student and projector before and after training, and mark those that rose.

    The axis is logarithmic where the losses span more than a factor of ten.
    """
    figure, axis = _subplots(figsize=(6.4, 0.9 + (0.42 if len(losses) <= 12 else 0.24) * len(losses)))
    names = list(losses)[::-1]
    before = [losses[name]["heldout_before"] for name in names]
    after = [losses[name]["heldout_loss"] for name in names]
    rose = [number for number, name in enumerate(names) if has_risen(losses[name])]
    axis.hlines(range(len(names)), after, before, color=GRID, linewidth=5)
    axis.plot(before, range(len(names)), "o", color=PALETTE[1], label="as it starts")
    axis.plot(after, range(len(names)), "o", color=PALETTE[0], label="after distillation")
    if rose:
        axis.hlines(rose, [before[n] for n in rose], [after[n] for n in rose], color=PALETTE[6], linewidth=2)
        axis.plot([after[n] for n in rose], rose, "X", color=PALETTE[6], markersize=8, label="worse than it started")
    axis.set_yticks(range(len(names)), names)
    for number in rose:
        axis.get_yticklabels()[number].set_color(PALETTE[6])
    axis.set(xlabel="held-out distillation loss", ylim=(-0.7, len(names) - 0.3))
    if min(before + after) > 0 and max(before + after) > 10 * min(before + after):
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.xaxis.set_minor_formatter(_PlainMinor())
    else:
        axis.set_xlim(0, 1.06 * max(before + after))
    figure.legend(loc="outside upper center", ncols=3)
    save_figure(figure, path)


class _PlainMinor(LogFormatter):
    """Labels minor ticks of a logarithmic axis as plain numbers, where that leaves few of them."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


@_styled
def training_curves(path: Path, curves: Mapping[str, Sequence[Curve]]) -> bool:
    """Plot held-out losses against the steps of the training, a panel for each stage; return whether there were any.

    Every part that is trained has a thin line; the mean of those that were trained together is bold. Curves of one
    point are left out.
    """
    shown = {stage: long for stage, found in curves.items() if (long := [c for c in found if len(c.steps) > 1])}
    if not shown:
        return False
    figure, axes = _subplots(len(shown), 1, figsize=(6.4, 0.5 + 2.3 * len(shown)), squeeze=False)
    for (stage, found), axis in zip(shown.items(), axes[:, 0], strict=True):
        for number, curve in enumerate(found):
            color = PALETTE[number % len(PALETTE)]
            if len(curve.names) > 1:
                for name in curve.names:
                    axis.plot(curve.steps, curve.of(name), color=color, linewidth=0.8, alpha=0.35)
            mean = [sum(losses.values()) / len(losses) for losses in curve.losses]
            axis.plot(curve.steps, mean, "o-", color=color, markersize=3, linewidth=2)
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axis.yaxis.set_minor_formatter(_PlainMinor())
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        several = max(len(curve.names) for curve in found)
        axis.set(xlabel="step", ylabel="held-out loss" if stage != "finetune" else "velocity error", xlim=(0, None))
        title = f"{stage}: a thin line for each of {several} parts, their mean bold" if several > 1 else stage
        axis.set_title(title, loc="left", color=INK)
    save_figure(figure, path)
    return True


@_styled
def contact_sheet(
    path: Path, rows: Mapping[str, list[Image.Image]], captions: list[str], fails: Mapping[str, list[bool | None]]
) -> None:
    """Draw pictures in a table, with a row for each variant and a column for each prompt.

    `fails`: for each variant, whether its pictures fail their prompts. These get a red frame. None: not judged.
    """
    figure, axes = _subplots(
        len(rows), len(captions), figsize=(1.12 * len(captions) + 1.6, 1.15 * len(rows) + 1.2), squeeze=False
    )
    for axis_row, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image, wrong in zip(axis_row, images, fails.get(name, [None] * len(images)), strict=True):
            axis.imshow(image, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.grid(visible=False)
            for spine in axis.spines.values():
                spine.set(visible=True, color="#c0392b" if wrong else "#9aa7b1", linewidth=2 if wrong else 0.8)
        axis_row[0].set_ylabel(name, rotation=0, ha="right", va="center", labelpad=8, color=INK, fontsize=11)
    for axis, caption in zip(axes[0], captions, strict=True):
        axis.set_title(_wrap(caption), fontsize=9, color=INK, parse_math=False)  # $ is a dollar in a prompt
    save_figure(figure, path, fit=True)  # long names stand left of the pictures


def image_grid(path: Path, images: Iterable[Image.Image], columns: int = 10, largest: int = 256) -> None:
    """Write pictures edge to edge in rows. They may differ in size; sides of more than `largest` pixels are reduced.

    Pictures are taken one after the other, and only the reduced ones are kept in memory.
    """
    small = [_reduced(image, largest) for image in images]
    (width, height), gap = map(max, zip(*(image.size for image in small), strict=True)), 4
    rows = -(-len(small) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for number, image in enumerate(small):
        row, column = divmod(number, columns)
        left, top = gap + column * (width + gap), gap + row * (height + gap)
        sheet.paste(image, (left + (width - image.width) // 2, top + (height - image.height) // 2))
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


def _reduced(image: Image.Image, largest: int) -> Image.Image:
    scale = min(1.0, largest / max(image.size))
    return image.convert("RGB").resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))


def _wrap(caption: str, width: int = 15, most: int = 6) -> str:
    """Return a caption in lines of about `width` characters, cut after `most` lines."""
    lines = [""]
    for word in caption.split():
        if lines[-1] and len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines if len(lines) <= most else [*lines[: most - 1], "..."])
