"""Tables and lines that stages print, and words that tables and the report share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table

from ppcl.artifacts.costs import Point
from ppcl.artifacts.plan import PruningPlan, read_plug_name, read_projector_name
from ppcl.artifacts.plugs import has_risen
from ppcl.artifacts.scores import ComparedRow, ScoreRow
from ppcl.context import Run
from ppcl.parallel import gathered

# The meaning of each variant. It does not depend on the method that found the intervals.
MEANINGS = {
    "teacher": "the full model, before pruning",
    "removed": "the baseline without training: of each interval only the first block is kept",
    "ppcl-depth": "each interval is replaced by its trained student block",
    "ppcl-mixed": "only the intervals with the lowest distillation loss are replaced by students",
    "ppcl-width": "all students (or removals) and all projectors; usually needs fine-tuning",
    "ppcl-planned": "the students and projectors chosen for the budget; all of them without a budget",
    "ppcl-finetuned": "the planned model after fine-tuning all its parameters on the teacher's output",
    "ppcl-quantized": "this run's result with 8-bit or 4-bit weights",
}
# Variants in the order in which they count as a run's main result.
_FEW_PICTURES = 8  # means over fewer are remarked on
_RESULTS = ("ppcl-finetuned", "ppcl-planned", "ppcl-width", "ppcl-depth", "ppcl-mixed", "ppcl-quantized", "removed")


def result_of(names: Sequence[str]) -> str | None:
    """Return the variant among `names` that is the run's main result; None if there is only the teacher."""
    return next((name for name in _RESULTS if name in names), None)


def billions(count: int) -> str:
    """Return a number of parameters in words: 20430401088 -> `20.430B`, 3029488 -> `3.029M`."""
    return f"{count / 1e9:.3f}B" if count >= 1e8 else f"{count / 1e6:.3f}M"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 unit`, `3 units`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def by_ranks(numbers: Sequence[int]) -> str:
    """Return how many items each rank did, to follow the number of all; empty if there is one rank."""
    low, high = min(numbers), max(numbers)
    each = f"{low}" if low == high else f"{low} to {high}"
    return f" ({each} by each of {len(numbers)} ranks)" if len(numbers) > 1 else ""


def show_shares(run: Run, stage: str, mine: int, what: str) -> None:
    """Print how many items each rank did, if there are several ranks. Every rank must call this.

    `mine`: how many this rank did. `what`: their name.
    """
    numbers = gathered(mine)
    if len(numbers) > 1:
        run.say(stage, f"{what}: {sum(numbers)}{by_ranks(numbers)}")


def plugs_in_words(names: Iterable[str]) -> list[str]:
    """Return plugs as lines, one for each kind and stack, such as `students in transformer_blocks: 3-5, 9-11`."""
    lines: dict[str, list[str]] = {}
    for name in names:
        removed = name.removesuffix(".removed")
        if interval := read_plug_name(removed):
            stack, (u, v) = interval
            title = f"students in {stack}" if removed == name else f"cut to their first block in {stack}"
            lines.setdefault(title, []).append(f"{u}-{v}")
        elif projector := read_projector_name(name):
            stack, index, kind = projector
            title = f"projectors for {'text streams' if kind == 'text' else 'FFNs'} in {stack}"
            lines.setdefault(title, []).append(str(index))
    return [f"{title}: {', '.join(places)}" for title, places in lines.items()]


def plugs_of(row: ScoreRow) -> list[str]:
    """Return the names of all plugs of a variant: students, removals and projectors."""
    return [*row.students, *(f"{name}.removed" for name in row.removed), *row.projectors]


def score_columns(rows: Sequence[ComparedRow], *, details: bool = False) -> dict[str, list[str]]:
    """Return the table of variants as columns by title, with a cell for each row. Empty columns are left out.

    `details`: add the share of the teacher's parameters, and the score of each category.
    """
    categories = {name: None for row in rows if row.scores and details for name in row.scores.categories}
    columns: dict[str, list[str | None]] = {
        "variant": [row.name for row in rows],
        "blocks": [str(row.num_layers) for row in rows],
        "params": [billions(row.params) for row in rows],
    }
    if details:
        columns["of the\nteacher"] = [f"{100 * row.params_ratio:.1f}%" for row in rows]
    for category in categories:
        values = [row.scores.categories.get(category) if row.scores else None for row in rows]
        columns[category.replace("_", "\n")] = [_number(value, 2) for value in values]
    columns |= {
        "score": [_score(row) for row in rows],
        "drop\n%": [_number(row.drop_percent, 1) for row in rows],
        "velocity\nerror": [_number(row.velocity_error, 4) for row in rows],
        "latent\ndistance": [_number(row.latent_distance, 3) for row in rows],
        "PSNR\ndB": [_number(row.psnr, 1) for row in rows],
        "SSIM": [_number(row.ssim, 3) for row in rows],
        "ms a\nstep": [f"{row.latency_ms:.1f}" for row in rows],
        "peak\nMB": [f"{row.peak_memory_mb:.{1 if row.peak_memory_mb < 1000 else 0}f}" for row in rows],
    }
    return {title: [cell or "" for cell in cells] for title, cells in columns.items() if any(cells)}


def level_columns(rows: Sequence[ComparedRow]) -> dict[str, list[str]]:
    """Return the table of velocity errors by noise level as columns by title; empty where nothing was measured."""
    measured = [(row.name, row.fidelity.noise_levels) for row in rows if row.fidelity and row.fidelity.noise_levels]
    columns = {"variant": [name for name, _ in measured]}
    for levels in zip(*(levels for _, levels in measured), strict=True):
        title = f"\u03c3 {levels[0].low:.2f}\nto {levels[0].high:.2f}"
        columns[title] = [f"{level.velocity_error:.4f}" for level in levels]
    return columns if measured else {}


def _number(value: float | None, digits: int) -> str | None:
    return None if value is None else f"{value:.{digits}f}"


def _score(row: ScoreRow) -> str | None:
    """Return the overall score with half of its confidence interval: `0.878 ± 0.03`."""
    if row.scores is None:
        return None
    margin = "" if row.score_interval is None else f" ± {row.score_interval:.2f}"
    return f"{row.scores.overall:.3f}{margin}"


def notes_of(rows: Sequence[ComparedRow], label: str) -> list[str]:
    """Return an explanation of each measure in the table of `rows`. `label`: what the score means."""
    notes = []
    if any(row.scores is not None for row in rows):
        margin = (
            "; ± is half of the 95% confidence interval" if any(row.score_interval is not None for row in rows) else ""
        )
        lower = any(row.lower_is_better for row in rows)
        notes.append(f"score: {label}, {'lower' if lower else 'higher'} is better{margin}")
        notes.append(f"drop: the share of the teacher's score that is {'added to it' if lower else 'lost'}")
    if any(row.velocity_error is not None for row in rows):
        notes.append(
            "velocity error: ||v - v_T||² / ||v_T||² of the output v to the teacher's v_T, held-out, lower is better"
        )
    if any(row.latent_distance is not None for row in rows):
        notes.append(
            "latent distance: final latents to the teacher's from equal seeds, 0 for the same pictures, about 2 for "
            "unrelated ones"
        )
    if any(row.fidelity is not None for row in rows):
        notes.append("PSNR and SSIM: pictures to the teacher's from equal seeds, higher is better, SSIM 1 for the same")
    pictures = [len(row.fidelity.pictures) for row in rows if row.fidelity is not None]
    if pictures and max(pictures) < _FEW_PICTURES:
        notes.append(
            f"PSNR and SSIM are of {counted(max(pictures), 'picture')}, too few to tell variants apart: give more "
            "prompts in data.path, or draw others with generate.prompt_file"
        )
    shares = [row.teacher_share for row in rows if row.teacher_share is not None]
    if shares:
        notes.append(
            f"{100 * shares[0]:.0f}% of the steps, those at most noise, are the teacher's in place of each variant; "
            "ms a step is the mean over all steps of a picture, parameters and memory are those of both models"
        )
    return notes


def show_plan(run: Run, plan: PruningPlan) -> None:
    """Print a plan: its intervals and width sets, and how many blocks and parameters are left."""
    counts = plan.parameters
    for stack, pairs in plan.intervals.items():
        run.say("plan", f"{stack}: {' '.join(f'[{u},{v}]' for u, v in pairs)}")
    for stack, sets in plan.width.items():
        for kind, indices in sets.items():
            if indices:
                run.say("plan", f"{stack} without {kind}: {' '.join(map(str, indices))}")
    layers = counts["teacher_layers"], counts["student_layers"]
    run.say("plan", f"blocks      {layers[0]} -> {layers[1]} ({layers[1] / layers[0]:.3f})")
    before = counts["teacher"]
    for step in ("depth", "text", "ffn") if "depth" in counts else ("student",):
        after, name = counts[step], "parameters" if step == "student" else step
        if after == before and step in ("text", "ffn"):
            continue  # nothing of that kind is pruned
        run.say("plan", f"{name:<11} {billions(before)} -> {billions(after)} ({after / counts['teacher']:.3f})")
        before = after


def show_risen(run: Run, stage: str, losses: Mapping[str, Mapping[str, float]], rate: str, leave_out: str) -> None:
    """Print a warning if plugs have ended a training with a higher held-out loss than they began it with.

    `losses`: those of all plugs of the training, by name. `rate`: the key of the learning rate that it had.
    `leave_out`: how the user leaves a plug out.
    """
    risen = [name for name, found in losses.items() if has_risen(found)]
    if risen:
        of = f"{len(risen)} of {counted(len(losses), 'plug')} {'is' if len(risen) == 1 else 'are'}"
        run.say(
            stage,
            f"warning: {of} worse after training than before ({', '.join(risen)}): lower {rate}, raise "
            f"{rate.partition('.')[0]}.steps, or {leave_out}",
        )


def score_table(rows: Sequence[ComparedRow]) -> Table:
    """Return the table of variants for a terminal, at most 80 columns wide."""
    return _table(score_columns(rows))


def _table(columns: Mapping[str, Sequence[str]]) -> Table:
    """Return columns by title as a table for a terminal."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for title in columns:
        table.add_column(title, justify="left" if title == "variant" else "right", no_wrap=True, vertical="bottom")
    for cells in zip(*columns.values(), strict=True):
        table.add_row(*cells)
    return table


def show_scores(run: Run, rows: Sequence[ComparedRow]) -> None:
    """Print the table of variants, velocity errors by noise level, and an explanation of the measures."""
    run.console.print(score_table(rows))
    levels = level_columns(rows)
    if levels:
        run.say("evaluate", "velocity error by noise level sigma, from 0 for a picture to 1 for noise:")
        run.console.print(_table(levels))
    for note in notes_of(rows, run.benchmark.label):
        run.say("evaluate", note)


def show_frontier(run: Run, points: list[Point]) -> None:
    """Print the points of a frontier as a table."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("params", "ratio", "blocks", "plugs", "latency", "GB", "predicted", "velocity error"):
        table.add_column(title, justify="right")
    for point in points:
        table.add_row(
            billions(point.params),
            f"{point.params_ratio:.3f}",
            str(point.num_layers),
            str(len(point.plugged)),
            f"{point.latency_ratio:.3f}",
            f"{point.memory_gb:.3g}",
            f"{point.predicted:.4f}",
            f"{point.velocity_error:.4f}",
        )
    run.console.print(table)
