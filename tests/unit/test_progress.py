"""Progress where no bar can be drawn: when a line comes, and what it says. The time is a clock that the test sets."""

from __future__ import annotations

import io

import lightning as L
import pytest
import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn
from torch.utils.data import DataLoader

from ppcl.progress import Part, WholeColumn, counter, duration, track, visible
from ppcl.training.progress import StepProgress


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def lines(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def work(console: Console, clock: Clock, count: int, seconds: float) -> list[str]:
    """The lines of `count` items that take `seconds` each."""
    for _ in track(range(count), "probes", console=console, clock=clock):
        clock.now += seconds
    return lines(console)


def test_short_work_prints_nothing(console: Console, clock: Clock) -> None:
    assert work(console, clock, 900, 0.01) == []


def test_a_line_at_every_five_percent(console: Console, clock: Clock) -> None:
    found = work(console, clock, 400, 1.0)
    assert len(found) == 19
    assert found[0] == "    probes  20/400  about 6 min left"
    assert found[-1] == "    probes  380/400  about 20 s left"


def test_one_of_several_parts_says_when_all_of_them_end(console: Console, clock: Clock) -> None:
    with counter("teacher", 60, console=console, clock=clock, part=Part(2, 5, "variants")) as advance:
        for _ in range(3):
            clock.now += 20.0
            advance(10)
    assert lines(console)[0] == "   teacher  10/60  about 2 min left, 8 min for all 5 variants"
    assert lines(console)[-1] == "   teacher  30/60  about 60 s left, 7 min for all 5 variants"


def test_a_bar_says_it_too(clock: Clock) -> None:
    column = WholeColumn(Part(2, 5, "variants"))
    bar = Progress(column, console=Console(quiet=True), get_time=clock)
    task = bar.add_task("teacher", total=60)
    assert column.render(bar.tasks[task]).plain == ""  # its speed is not known yet
    for _ in range(3):
        clock.now += 20.0
        bar.advance(task, 10)
    assert column.render(bar.tasks[task]).plain == "7 min for all 5 variants"


def test_lines_are_at_least_ten_seconds_apart(console: Console, clock: Clock) -> None:
    assert len(work(console, clock, 300, 0.1)) == 2  # of thirty seconds; the last item needs none


def test_slow_work_gives_a_line_a_minute(console: Console, clock: Clock) -> None:
    assert len(work(console, clock, 100_000, 0.02)) == 39  # 5% take 100 s: a line there, and one after a minute


def test_items_of_minutes_give_a_line_each(console: Console, clock: Clock) -> None:
    assert work(console, clock, 4, 4000.0) == [
        "    probes  1/4  about 3 h 20 min left",
        "    probes  2/4  about 2 h 13 min left",
        "    probes  3/4  about 67 min left",
    ]


def test_items_without_a_known_number_are_counted(console: Console, clock: Clock) -> None:
    for _ in track(iter(range(3)), "shards", console=console, clock=clock):
        clock.now += 61
    assert lines(console) == ["    shards  1", "    shards  2", "    shards  3"]


def test_a_counter_takes_jumps(console: Console, clock: Clock) -> None:
    with counter("caching", 200, console=console, clock=clock) as advance:
        for count in (32, 32, 136):
            clock.now += 30
            advance(count)
    assert lines(console) == ["   caching  32/200  about 3 min left", "   caching  64/200  about 2 min left"]


def test_the_time_left_does_not_count_what_an_earlier_command_did(console: Console, clock: Clock) -> None:
    with counter("teacher", 1000, console=console, done=900, clock=clock) as advance:
        clock.now += 60
        advance(10)
    assert lines(console) == ["   teacher  910/1000  about 9 min left"]


def test_a_silent_console_stays_silent(clock: Clock) -> None:
    console = Console(file=io.StringIO(), quiet=True)
    assert work(console, clock, 400, 1.0) == []


def test_a_terminal_gets_a_bar_that_disappears(clock: Clock) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    shown = "".join(work(console, clock, 400, 1.0))
    assert "probes" in shown
    assert "left" not in shown


@pytest.mark.parametrize(("seconds", "said"), [(0.4, "0 s"), (48.2, "48 s"), (837, "14 min"), (9000, "2 h 30 min")])
def test_durations(seconds: float, said: str) -> None:
    assert duration(seconds) == said


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("un café, 猫, 👨\u200d👩\u200d👧", "un café, 猫, 👨\u200d👩\u200d👧"),
        ("\x1b]0;owned\x07\x1b[2J", r"\x1b]0;owned\x07\x1b[2J"),
        ("\x9b1mC1, \x7f", r"\x9b1mC1, \x7f"),
        ("two\nlines\r", r"two\nlines\r"),
        ("gpj.\u202eexe", r"gpj.\u202eexe"),
        ("caf\udce9", r"caf\udce9"),
    ],
)
def test_what_a_terminal_would_obey_is_written_out(text: str, shown: str) -> None:
    assert visible(text) == shown


class Descent(L.LightningModule):
    """One weight; each step takes a second of the test's clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.weight, self.clock = nn.Parameter(torch.ones(())), clock

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        self.clock.now += 1.0
        return self.weight * 0.25

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def test_a_training_says_step_loss_and_time_left(console: Console, clock: Clock, tmp_path) -> None:
    trainer = L.Trainer(
        max_steps=60,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[StepProgress("depth", console, clock)],
        default_root_dir=tmp_path,
    )
    trainer.fit(Descent(clock), DataLoader(torch.zeros(60, 1)))
    found = lines(console)
    assert found[0] == "     depth  step 10/60  loss 0.2500  about 50 s left"
    assert [line.split()[2] for line in found] == ["10/60", "20/60", "30/60", "40/60", "50/60", "60/60"]
    assert found[-1] == "     depth  step 60/60  loss 0.2500  took 60 s"  # what is measured then may take minutes
