"""How the tests are shared among processes, one thread each; `make test` starts one on every core."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ppcl.families.registry import FAMILIES

# Before torch is imported, here and in what tests start. Numbers that change with the number of threads would make
# bit-identity a matter of luck, and workers with a thread for every core would wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

MOST_WORKERS = 8  # each takes 1.5 GB, and the longest file is as long on more
# Files that take longest, by what they took: started first, so that no worker is left alone with one at the end.
LONGEST = [
    "test_readme",
    "test_strategies",
    "test_wheel",
    "test_families",
    "test_pins",
    "test_foreign_families",
    "test_removal",
    "test_interruption",
    "test_damage",
    "test_recording",
    "test_embedded_teachers",
    "test_bad_input",
    "test_boundaries",
    "test_quantize",
    "test_export_single_file",
    "test_loggers",
    "test_budget_chain",
    "test_cache",
    "test_configs",
    "test_full_disk",
    "test_export_width",
    "test_cache_edits",
    "test_samples",
    "test_tracking",
    "test_search",
    "test_notebooks",
    "test_multirun",
    "test_api",
]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A worker for each core that this process may use, but none for what is one file: files are not divided."""
    files = {argument.partition("::")[0] for argument in config.args}
    if all(file.endswith(".py") for file in files):
        return min(len(files), _cores()) if len(files) > 1 else 0
    return _cores()


def _cores() -> int:
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(found, MOST_WORKERS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Puts the longest files first where several workers share them; alone, the order is pytest's."""
    if hasattr(config, "workerinput"):
        places = {name: place for place, name in enumerate(LONGEST)}
        items.sort(key=lambda item: places.get(Path(item.path).stem, len(places)))


@pytest.fixture(scope="module", autouse=True)
def own_families() -> Iterator[None]:
    """Forgets the families that a file registers, so that no other file of the same process knows them."""
    before = dict(FAMILIES)
    yield
    FAMILIES.clear()
    FAMILIES.update(before)
