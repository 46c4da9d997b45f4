"""Check whether `budget.params` can be reached, as soon as intervals are known and before anything is trained."""

from __future__ import annotations

import math

from ppcl.artifacts.plan import Intervals, Width
from ppcl.context import Run
from ppcl.errors import UsageError
from ppcl.layers import kept_layers
from ppcl.report.text import billions
from ppcl.surgery.count import count_parameters
from ppcl.validation.pruning import check_width, resolve_width

_MORE = {
    "none": "add width=auto",
    "auto": "raise width.num_ffn or width.num_text",
    "given": "name more blocks in the width sets",
    "plan": "name more blocks in the width sets",
}


def check_reachable(run: Run, intervals: Intervals, width: Width | None = None) -> None:
    """Raise `UsageError` if even with all `intervals` and `width` sets plugged in more than `budget.params` are left.

    `width`: the selected sets. None: the configured ones, or with `width=auto` the largest that it may select. The
        error names the smallest possible budget. Does nothing without `budget.params`.
    """
    budget, arch = run.config.budget.params, run.config.model.arch
    if budget is None:
        return
    width = largest_width(run, intervals) if width is None else width
    counts = count_parameters(run.family, arch, intervals, width, run.layout)
    teacher, least = counts["teacher"], counts["student"]
    if least <= (budget * teacher if budget <= 1 else budget):
        return
    share = math.ceil(1000 * least / teacher) / 1000
    raise UsageError(
        f"budget.params={budget:g} is out of reach: with everything plugged in that these intervals and "
        f"width.source={run.config.width.source} allow, {share:.3f} of the teacher's parameters are left "
        f"({billions(least)}). Raise it to {f'{share:.3f}' if budget <= 1 else least}, "
        f"{_MORE[run.config.width.source]}, or use more or longer intervals."
    )


def largest_width(run: Run, intervals: Intervals) -> Width:
    """Return the width sets that leave the fewest parameters: those given, or the largest that `width=auto` can select.

    It can select every text stream except the first of each stack, up to `width.num_text` per stack, and
    `width.num_ffn` FFNs of all stacks together.
    """
    given, settings, family = resolve_width(run.config), run.config.width, run.family
    if given is not None:
        check_width(run.config, given, intervals)  # detected intervals may have removed such a block
    if given is not None or family.width is None:
        return given or {}
    kept = {stack: kept_layers(count, intervals.get(stack, [])) for stack, count in run.num_layers.items()}
    width: Width = {stack: {"text": [], "ffn": []} for stack in kept}
    for stack in family.facts.text_stacks:
        most = len(kept[stack]) if settings.num_text is None else settings.num_text
        width[stack]["text"] = kept[stack][max(1, len(kept[stack]) - most) :]

    def left(stack: str, ffn: list[int]) -> int:
        sets = width | {stack: width[stack] | {"ffn": ffn}}
        return count_parameters(family, run.config.model.arch, intervals, sets, run.layout)["student"]

    # Blocks of a stack differ only in whether they have a text stream, so one of each kind tells what an FFN saves.
    kinds = []
    for stack, blocks in kept.items():
        text = width[stack]["text"]
        able = family.width.ffn_blocks(stack, blocks)
        for places in ([i for i in able if i in text], [i for i in able if i not in text]):
            if places:
                kinds.append((left(stack, places[:1]), stack, places))
    room = settings.num_ffn
    for _, stack, places in sorted(kinds):
        chosen = places[: max(0, room)]
        room -= len(chosen)
        width[stack]["ffn"] = sorted([*width[stack]["ffn"], *chosen])
    return width
