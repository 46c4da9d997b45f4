"""Progress of long work: rich's bar on a terminal, elsewhere a plain line now and then. Importing this loads no torch.

A log file, a pipe, or a cluster's output cannot redraw a bar. There a line comes at every 5% of the work, but no sooner
than 10 seconds after the last one, and after a minute in any case. Work of less than 10 seconds prints nothing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, ProgressColumn, Task
from rich.text import Text

Item = TypeVar("Item")
Clock = Callable[[], float]

PARTS = 20  # a line after each of these equal parts of the work
SHORTEST, LONGEST = 10.0, 60.0  # seconds from one line to the next


# Control characters except tab, those that turn the direction of text, and halves of surrogate pairs.
_UNSEEN = re.compile("[\\x00-\\x08\\x0a-\\x1f\\x7f-\\x9f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


def visible(text: str) -> str:
    """Return a line of text with characters that a terminal would obey, such as `\\x1b`, written out.

    Names of files that come from elsewhere may hold such characters.
    """
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def draws_bars(console: Console) -> bool:
    """Whether `console` can redraw what it shows: a terminal or a notebook."""
    return console.is_interactive or console.is_jupyter


def heading(label: str) -> str:
    """The coloured first column of everything that stages print: the name of the stage."""
    return f"[bold cyan]{escape(label):>10}[/]  "


@dataclass(frozen=True)
class Part:
    """Says that a piece of work is number `number` of `count` of the same size, called `noun`, such as `groups`."""

    number: int
    count: int
    noun: str

    def left(self, pace: float, total: int, left: int) -> str:
        """Return how long the rest of all parts takes: `pace` seconds an item, `left` of `total` items in this one."""
        return f"{duration(pace * (left + (self.count - self.number) * total))} for all {self.count} {self.noun}"


class Lines:
    """Plain lines for work of `total` items (None where nobody knows), of which `done` are done already.

    `unit` stands before the count: `depth  step 120/400  loss 0.1234  about 3 min left`. `part`: the part of a longer
    work that this is, whose end is told, too. `clock` gives seconds.
    """

    def __init__(
        self,
        console: Console,
        label: str,
        total: int | None,
        *,
        done: int = 0,
        unit: str = "",
        part: Part | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self.console, self.label, self.total, self.unit, self.clock = console, label, total, unit, clock
        self.part = part
        self.first, self.start = done, clock()
        self.last, self.last_time = done, self.start

    def due(self, done: int) -> bool:
        """Whether a line is due now that `done` items are done. The last item needs none: its stage says so itself."""
        if self.console.quiet or done == self.total:
            return False
        waited = self.clock() - self.last_time
        enough = self.total and done * PARTS // self.total > self.last * PARTS // self.total
        return waited >= LONGEST or bool(enough and waited >= SHORTEST)

    def write(self, done: int, *facts: str) -> None:
        """Write a line, with `facts` between the count and the time left, or after the last item the time taken."""
        self.last, self.last_time = done, self.clock()
        count = f"{self.unit}{done}" if self.total is None else f"{self.unit}{done}/{self.total}"
        left = self._left(done)
        parts = [count, *facts, *([left] if left else [])]
        self.console.print(heading(self.label) + escape(visible("  ".join(parts))), highlight=False, soft_wrap=True)

    def _left(self, done: int) -> str | None:
        """The time that the rest takes at the pace so far, or that all has taken; None where that is not known."""
        if self.total is None or done <= self.first:
            return None
        if done == self.total:
            return f"took {duration(self.last_time - self.start)}"
        pace, left = (self.last_time - self.start) / (done - self.first), max(0, self.total - done)
        whole = "" if self.part is None else f", {self.part.left(pace, self.total, left)}"
        return f"about {duration(pace * left)} left{whole}"


class WholeColumn(ProgressColumn):
    """The column of a bar that says how long all parts of a longer work take; empty where there is but one."""

    def __init__(self, part: Part | None) -> None:
        super().__init__()
        self.part = part

    def render(self, task: Task) -> Text:
        """Return the column's text."""
        if self.part is None or not task.speed or task.total is None:
            return Text("")
        return Text(self.part.left(1 / task.speed, int(task.total), int(task.total - task.completed)), style="dim")


def duration(seconds: float) -> str:
    """Return a time in words: `48 s`, `14 min`, `2 h 30 min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


@contextmanager
def counter(
    description: str,
    total: int | None,
    *,
    console: Console,
    done: int = 0,
    part: Part | None = None,
    clock: Clock = time.monotonic,
) -> Iterator[Callable[[int], None]]:
    """Show on `console` how many of `total` items are done. `done`: how many an earlier command did.

    Gives the block a function that it calls with how many items were done since the last call. `part`: the part of a
    longer work that this is. `clock` gives seconds, and times the plain lines.
    """
    if draws_bars(console):
        with Progress(*Progress.get_default_columns(), WholeColumn(part), console=console, transient=True) as bar:
            task = bar.add_task(description, total=total, completed=done)
            yield lambda count: bar.advance(task, count)
        return
    lines = Lines(console, description, total, done=done, part=part, clock=clock)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if lines.due(done):
            lines.write(done)

    yield advance


def track(
    items: Iterable[Item],
    description: str,
    total: int | None = None,
    *,
    console: Console,
    clock: Clock = time.monotonic,
) -> Iterator[Item]:
    """Yield `items` and show on `console` how many of `total` are done; by default `total` is their length.

    An item is done when the next one is asked for. `clock` gives seconds, and times the plain lines.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with counter(description, total, console=console, clock=clock) as advance:
        for item in items:
            yield item
            advance(1)
