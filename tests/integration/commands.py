"""Functions that the integration tests share: run commands, and compare the files that they leave."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.forks import MAIN, start_forked, wait_for

REPOSITORY = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
NUM_LAYERS = 6
INTERVALS = "intervals.transformer_blocks=[[1,2],[3,4]]"
PLUG_NAMES = ["transformer_blocks.1-2", "transformer_blocks.3-4"]
CHAIN = "stages=[probe,detect,depth,export,generate,evaluate,report]"
VARIANTS = "generate.variants=[teacher,removed,ppcl-depth,ppcl-mixed]"
NUM_PROMPTS = 12
BATCH = 6

# Simulates a power failure: the process dies when a file is written and flushed, but has not got its final name. Exit
# code 9 is the expected one. Code 8 means that the temporary file was in another folder: on another file system its
# rename would be a copy, which can stop half way.
DIE_AT_RENAME = """
import fnmatch, os, sys
pattern = sys.argv.pop(1)

def dying(rename):
    def die(source, target, **kwargs):
        if fnmatch.fnmatch(str(target), pattern):
            os._exit(9 if os.path.dirname(source) == os.path.dirname(target) else 8)
        rename(source, target, **kwargs)
    return die

os.replace, os.rename = dying(os.replace), dying(os.rename)
from ppcl.cli import main
main()
"""


@dataclass
class Outcome:
    """The exit code and the console output of a command."""

    code: int
    out: str
    err: str


def ppcl(*arguments: str) -> Outcome:
    """Run the console script in this process, which saves the time of importing everything again."""
    from ppcl.cli import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["ppcl", *arguments])
        patch.setenv("HYDRA_FULL_ERROR", "")
        patch.delenv("HYDRA_FULL_ERROR")  # main sets it for its own process; the next call must not see it
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    return Outcome(code, out.getvalue(), err.getvalue())


def succeed(*arguments: str) -> Outcome:
    """Run `ppcl` and assert that it exits with 0."""
    outcome = ppcl(*arguments)
    assert outcome.code == 0, outcome.err
    return outcome


def ppcl_process(*arguments: str, python: str | None = None, anew: bool = False) -> subprocess.CompletedProcess[str]:
    """Run `ppcl` in a process of its own.

    `python`: code for that process to run in place of `main`. It may prepare the process, and has to call `main`. It
    then runs in a fork of this process. With `anew`, or on a machine with a GPU, it runs in a new Python.
    """
    if python is not None and not anew and not torch.cuda.is_available():
        with tempfile.TemporaryDirectory() as folder:
            ended = wait_for(start_forked(arguments, Path(folder), REPOSITORY, python), Path(folder))
        return subprocess.CompletedProcess(["-c", *arguments], ended.code, ended.out, ended.err)
    return subprocess.run(
        [sys.executable, "-c", python or MAIN, *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


# Two ranks as srun would start them, as forks of a process that has imported everything. Exits with the higher code.
TWO_RANKS = """
import os, sys
from ppcl.cli import main
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": PORT, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
child = os.fork()
os.environ["RANK"] = os.environ["LOCAL_RANK"] = "0" if child else "1"
code = 0
try:
    main()
except SystemExit as stop:
    code = stop.code
if child:
    sys.exit(max(code, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""


def two_ranks(*arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run `ppcl` on two ranks. `before`: code that prepares their process and takes what it needs off `sys.argv`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return ppcl_process(*arguments, python=f"PORT = '{port}'\n{before}{TWO_RANKS}")


def start(count: int, arguments: list[str]) -> subprocess.Popen[str]:
    """Start the command under torchrun with `count` processes."""
    return subprocess.Popen(
        [*TORCHRUN, str(count), "-m", "ppcl", *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launch(count: int, *arguments: str) -> str:
    """Run the command under torchrun with `count` processes. It must end well. Returns what it printed."""
    process = start(count, list(arguments))
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def start_until(folder: Path, pattern: str, arguments: list[str]) -> subprocess.Popen[str]:
    """Start the command in a process group of its own; return as soon as `folder` has a file that matches `pattern`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ppcl", *arguments],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A shell's background jobs ignore Ctrl-C (SIGINT), and their children inherit that. The command must not.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    while not list(folder.glob(pattern)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    return process


def kill(process: subprocess.Popen[str]) -> None:
    """Send SIGKILL to the command and to everything that it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file under `folder`, by relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def modified(*folders: Path) -> dict[str, int]:
    """Return the modification time in nanoseconds of every file under `folders`, by path."""
    return {str(p): p.stat().st_mtime_ns for folder in folders for p in sorted(folder.rglob("*")) if p.is_file()}


def plug_tensors(run: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a run's plugs, by `<plug>/<key>`."""
    from ppcl.artifacts.plugs import load_plugs

    plugs = load_plugs(run / "plugs")
    return {f"{name}/{key}": value for name, plug in plugs.items() for key, value in plug.state_dict.items()}


def assert_same_tensors(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    """Assert that both have the same keys and equal tensors, bit for bit, and are not empty."""
    assert left.keys() == right.keys()
    assert left
    for key, value in left.items():
        assert torch.equal(value, right[key]), key
