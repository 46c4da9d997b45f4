"""When one rank of a run dies, all others end within seconds; when they end well, none of them is cut off."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

# A rank without torch. The port of rank 0 goes from one to the others by a file.
RANK = """
import os, sys, time
from pathlib import Path
import ppcl.watch
ppcl.watch._GRACE = 0.3
number, size, port = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
os.environ["MASTER_ADDR"] = "127.0.0.1"

def publish(text):
    port.with_suffix(".new").write_text(text)
    port.with_suffix(".new").rename(port)

def lookup():
    while not port.exists():
        time.sleep(0.01)
    return port.read_text()

watch = ppcl.watch.Watch(number, size, publish, lookup)
while len(watch._connections) < (1 if number else size - 1):
    time.sleep(0.01)
print("ready", flush=True)
end = sys.stdin.readline()
if end == "error\\n":
    raise RuntimeError
"""


def start(folder: Path, number: int, size: int) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", RANK, str(number), str(size), str(folder / "port")], **pipes)


def started(folder: Path, size: int) -> list[subprocess.Popen[str]]:
    ranks = [start(folder, number, size) for number in range(size)]
    for rank in ranks:
        assert rank.stdout.readline() == "ready\n", rank.communicate()
    return ranks


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGKILL, "error"])
def test_a_dead_rank_ends_all_others(tmp_path: Path, victim: int, way: signal.Signals | str) -> None:
    ranks = started(tmp_path, 3)
    if isinstance(way, str):
        ranks[victim].stdin.write(f"{way}\n")
        ranks[victim].stdin.flush()
    else:
        ranks[victim].send_signal(way)
    ended = [(rank.wait(timeout=20), rank.stderr.read()) for rank in ranks]
    others = [found for number, found in enumerate(ended) if number != victim]
    assert [code for code, _ in others] == [143, 143]
    said = [text for _, text in others if text]
    assert said == [f"ppcl: rank {victim} has died, so all ranks end; the same command resumes.\n"]


def test_ranks_that_end_well_end_one_after_the_other(tmp_path: Path) -> None:
    ranks = started(tmp_path, 3)
    for number in (1, 0, 2):
        ranks[number].stdin.write("\n")
        ranks[number].stdin.flush()
        assert ranks[number].wait(timeout=20) == 0
        assert ranks[number].stderr.read() == ""


def test_a_stranger_that_connects_is_no_rank(tmp_path: Path) -> None:
    """As a scan of the network does."""
    first = start(tmp_path, 0, 2)
    while not (tmp_path / "port").exists():
        time.sleep(0.01)
    address = ("127.0.0.1", int((tmp_path / "port").read_text().split()[0]))
    for word in (b"", b"GET / HTTP/1.1\r\n\r\n"):
        with socket.create_connection(address) as stranger:
            stranger.sendall(word)
    ranks = [first, start(tmp_path, 1, 2)]
    for rank in ranks:
        assert rank.stdout.readline() == "ready\n"
    for rank in ranks:
        rank.stdin.write("\n")
        rank.stdin.flush()
        assert rank.wait(timeout=20) == 0
        assert rank.stderr.read() == ""
