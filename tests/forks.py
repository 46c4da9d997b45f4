"""Runs `ppcl` in forks of this process, which saves the time of importing everything again."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MAIN = "from ppcl.cli import main; main()"


@dataclass
class Ended:
    """How a command ended: its exit code, negative for a signal, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def refused(self) -> bool:
        """Whether it ended in one sentence. A library may have printed something before it."""
        *_, last = self.err.strip().split("\n")
        return self.code == 2 and last.startswith("ppcl: ") and "Traceback" not in self.err


def start_forked(arguments: Sequence[str], folder: Path, inside: Path | None = None, python: str = MAIN) -> int:
    """Start `ppcl` in a fork of this process, which has imported everything; return the process number.

    A fork only keeps the thread that calls it. Without a GPU that is enough, since only one thread computes.

    `folder`: where its output is kept. `inside`: the folder that it works in. `python`: code to run in place of `main`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        for name, number in (("out.txt", 1), ("err.txt", 2)):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        sys.argv = ["ppcl", *arguments]
        os.chdir(inside or os.getcwd())
        exec(python, {"__name__": "__main__"})
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:  # leave without pytest's own exit handlers, which must run once
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_for(child: int, folder: Path) -> Ended:
    """Return how a process that `start_forked` has started ends."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    out, err = ((folder / name).read_text(errors="replace") for name in ("out.txt", "err.txt"))
    return Ended(code, out, err)


def run_forked(
    arguments: Sequence[str], folder: Path, kill_after: float | None = None, inside: Path | None = None
) -> Ended:
    """Run `ppcl` as `start_forked` does. `kill_after`: after how many seconds it is sent SIGKILL."""
    child = start_forked(arguments, folder, inside)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    return wait_for(child, folder)
