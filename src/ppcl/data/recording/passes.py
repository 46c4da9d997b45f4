"""The passes of classifier-free guidance, with the prompt and without it: which of the recorded calls are which.

Some pipelines make a call for each pass, others one call with a row for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ppcl.data.recording.files import ARGUMENTS, OUTPUT, Call, Entry, Joining, read_call
from ppcl.data.recording.nested import Axes, copied, digest, packed, row_of, tensors_of

_COMPARED = 3  # prompts, to see which row is the same for all of them


def with_passes(entries: Sequence[Entry], joining: Joining) -> list[Entry]:
    """Return the entries with their `unguided`. Where both passes are one call, each has an entry with its `row`.

    Prompts differ in the text that their guided calls are given. So a call is unguided if calls of other captions have
    all that sets it apart from the other pass.
    """
    if joining.rows > 1 and joining.axes is not None:
        unguided = _unguided_rows(entries, joining.axes, joining.rows)
        rows = range(joining.rows)
        return [replace(entry, row=row, unguided=row in unguided) for entry in entries for row in rows]
    captions: dict[frozenset[str], set[str]] = {}
    for entry in entries:
        captions.setdefault(entry.own, set()).add(entry.caption)
    return [replace(entry, unguided=bool(entry.own) and len(captions[entry.own]) > 1) for entry in entries]


def _unguided_rows(entries: Sequence[Entry], axes: Axes, rows: int) -> set[int]:
    """Return the numbers of the rows that are unguided. Calls of a few captions show it, if they have one shape."""
    shapes: dict[str, dict[str, Entry]] = {}
    for entry in entries:
        shapes.setdefault(entry.alike, {}).setdefault(entry.caption, entry)
    chosen = [*max(shapes.values(), key=len).values()][:_COMPARED]
    if len(chosen) < 2:
        return set()
    calls = [read_call(entry.record, entry.number) for entry in chosen]
    each = [[_tensors(row_of_call(call, axes, rows, row)) for row in range(rows)] for call in calls]
    own = [[tensors - frozenset.intersection(*of_call) for tensors in of_call] for of_call in each]
    return {row for row in range(rows) if own[0][row] and all(found[row] == own[0][row] for found in own)}


def _tensors(call: Call) -> frozenset[str]:
    return tensors_of(packed(copied(call.arguments), digest, ARGUMENTS))


def row_of_call(call: Call, axes: Axes, rows: int, row: int) -> Call:
    """Return row number `row` of a call with `rows` rows, as a call of its own."""
    arguments: Any = row_of(dict(call.arguments), axes, ARGUMENTS, rows, row)
    return replace(call, arguments=arguments, output=row_of(call.output, axes, OUTPUT, rows, row))
