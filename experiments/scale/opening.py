"""Measure the seconds to open a large teacher and a plug for the first time, and again when they are remembered.

    python -m experiments.scale.opening FOLDER                  # a teacher of 2 GB and a plug of 0.7 GB, random numbers
    python -m experiments.scale.opening FOLDER --gigabytes 41   # the size of Qwen-Image in bfloat16

Writes files of that size to FOLDER, and removes them at the end. `hash` is what `digests` takes: it reads every byte,
hashes it, and checks that every number is finite. The first time files lie partly in the system's page cache, as after
a download. `read` is a plain pass over the bytes alone, in as many threads, for comparison.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import save_file

from ppcl.artifacts import contents
from ppcl.artifacts.contents import digests
from ppcl.artifacts.files import write_json

SHARD, PLUG = 5.0, 0.7  # GB; the shards that diffusers writes, and a student of Qwen-Image in bfloat16
CHUNK = 32 << 20


def write(folder: Path, gigabytes: float) -> list[Path]:
    """Write shards with so many GB (1e9 bytes) of random bfloat16 numbers, and return them."""
    folder.mkdir(parents=True)
    files = []
    generator = torch.Generator().manual_seed(0)
    while gigabytes > 1e-3:
        size = min(SHARD, gigabytes)
        rows = max(1, int(size * 1e9 / 2 / 3072))
        block = torch.randn(3072, 3072, generator=generator).bfloat16()
        tensors = {
            f"blocks.{number}.weight": block[: min(3072, rows - start)].clone()
            for number, start in enumerate(range(0, rows, 3072))
        }
        files.append(folder / f"model-{len(files):05d}.safetensors")
        save_file(tensors, files[-1])
        gigabytes -= size
    return files


def plain_read(files: list[Path]) -> None:
    """Read all bytes, in as many threads as `digests` has."""

    def read(file: Path) -> None:
        buffer = bytearray(CHUNK)
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(read, files))


def seconds(function: object, *arguments: object) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    function(*arguments)  # type: ignore[operator]
    return round(time.perf_counter() - start, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the teacher")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    place, console = given.folder / "opening", Console()
    found: dict[str, object] = {"cpus": os.cpu_count(), "gigabytes": given.gigabytes}
    try:
        sizes = {"teacher": given.gigabytes, "plug": PLUG}
        files = {name: write(place / name, size) for name, size in sizes.items()}
        time.sleep(contents._RECENT / 1e9 + 0.1)  # what was written just now is not remembered
        for name, own in files.items():
            found[f"{name}_read"] = seconds(plain_read, own)
            found[f"{name}_hash"] = seconds(digests, own, place / "memory", console)
            found[f"{name}_remembered"] = seconds(digests, own, place / "memory", console)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    print(json.dumps(found, indent=2))
    if given.output is not None:
        write_json(given.output, found, checked=False)


if __name__ == "__main__":
    main()
