"""Ends a training at a signal: notes it, and says what follows once the running step has been saved."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from types import FrameType
from typing import Any, NoReturn

from ppcl.context import Run
from ppcl.errors import Stopped
from ppcl.launch import is_first
from ppcl.parallel import barrier

# Ctrl-C; the end of a job or a machine; and the warnings that SLURM (`--signal=USR1@120`) and submitit (USR2) send.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_REPEATED = 1.0  # seconds within which a second Ctrl-C is taken for the first, which torchrun passes on to its workers


class Stop:
    """Notes the first signal that arrives within the context, in place of what it would do otherwise.

    `noted`: the signal that this rank has got, or 0.
    `agreed`: the signal at which all ranks stop, or 0. The training sets it at the end of a step, which it saves, and
        leaves the context; then `finish` ends the command. A signal that comes too late for that has its usual effect
        when the context ends. A second Ctrl-C ends the command at once.

    Signals that are ignored when the context begins stay ignored. Outside of the main thread no signal is noted.
    """

    def __init__(self) -> None:
        self.noted = self.agreed = 0
        self._noted_at = 0.0
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: not Python's, cannot be restored
                    self._earlier[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        if self.noted and not self.agreed and kind is None:
            signal.raise_signal(self.noted)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.noted:
            if number == signal.SIGINT and time.monotonic() - self._noted_at > _REPEATED:
                raise KeyboardInterrupt
            return
        self.noted, self._noted_at = number, time.monotonic()
        if is_first():
            again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
            text = f"ppcl: {signal.Signals(number).name}: stopping after a checkpoint of this step{again}.\n"
            os.write(2, text.encode())  # a print might have been interrupted, and cannot be entered twice

    def finish(self, run: Run, stage: str) -> NoReturn:
        """End the command with `Stopped`. All ranks must call this, after the context, once they have agreed.

        If another program in this process had a handler for the signal, that is called first: submitit's puts its job
        back into the queue. Else SLURM is asked to run the job again if the signal was a warning (USR1 or USR2).
        """
        handler = self._earlier.get(self.agreed)
        if callable(handler) and handler is not signal.default_int_handler:
            handler(self.agreed, None)
        elif self.agreed in (signal.SIGUSR1, signal.SIGUSR2) and run.writes and "SLURM_JOB_ID" in os.environ:
            run.say(stage, requeue())
        barrier()  # a rank that exits makes a launcher end the others, which must not cut off the request to SLURM
        raise Stopped(self.agreed)


def requeue() -> str:
    """Ask SLURM to put this job back into its queue. Returns a sentence that says whether it will."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_TASK_ID" in os.environ:  # the number of one task may also be that of the whole array
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        return f"submit job {job} again: there is no scontrol here to requeue it"
    except subprocess.CalledProcessError as error:
        return f"submit job {job} again: scontrol requeue failed ({' '.join(error.stderr.split())})"
    return f"SLURM has requeued job {job}"
