"""A disk that is full when a file of any kind is written: a sentence, and all that was whole is still there.

The kernel's limit on the size of a file stands for the disk: what is written beyond it fails in the same call.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from commands import INTERVALS, assert_same_tensors, digests, plug_tensors, ppcl_process, succeed

from ppcl.sentences import failed_access

FULL = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
limit = int(sys.argv.pop())
import ppcl.stages.depth  # what imports leave on disk is not at issue
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
from ppcl.cli import main
main()
"""


@pytest.mark.parametrize(
    ("extra", "limit"),
    [
        (["stages=[depth]"], 100_000),  # a plug
        (["stages=[depth]", "distill.checkpoint_every=3"], 100_000),  # a checkpoint
        (["stages=[boundaries]"], 50_000),  # a shard
    ],
)
def test_a_full_disk(settings: list[str], trained: Path, tmp_path: Path, extra: list[str], limit: int) -> None:
    command = [*settings, INTERVALS, f"paths.runs_dir={tmp_path}", "name=full"]
    succeed(*command, "stages=[depth]", "distill.intervals=[1-2]")
    before = digests(tmp_path / "full" / "plugs")
    failed = ppcl_process(*command, *extra, str(limit), python=FULL)
    assert failed.returncode == 2, failed.stderr
    sentence = failed.stderr.strip().splitlines()[-1]
    assert "File too large" in sentence or "is the disk full?" in sentence
    assert "finished files are intact" in sentence
    after = digests(tmp_path / "full" / "plugs")
    assert {name: after.get(name) for name in before} == before
    assert not list(tmp_path.rglob(".*.tmp"))
    succeed(*command, "stages=[depth]")
    assert_same_tensors(plug_tensors(tmp_path / "full"), plug_tensors(trained))


def test_too_few_file_handles_are_raised_before_the_same_command_continues() -> None:
    error = failed_access(OSError(errno.EMFILE, os.strerror(errno.EMFILE), "00001.png"))
    assert str(error).startswith(
        "00001.png: Too many open files; finished files are intact, and after `ulimit -n 4096`"
    )
    assert "ulimit" not in str(failed_access(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "00001.png")))
