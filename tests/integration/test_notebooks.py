"""Every notebook runs from its first cell to its last, on the finished run that the tests share."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
from commands import REPOSITORY, succeed

NOTEBOOKS = sorted(path.name for path in (REPOSITORY / "notebooks").glob("*.ipynb"))
COUNT = 5


def code_of(name: str) -> list[dict[str, Any]]:
    content = json.loads((REPOSITORY / "notebooks" / name).read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == "code"]


@pytest.fixture(scope="module")
def sweeps(settings: list[str], chain: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two sweeps over sizes, which differ in the planner's cost, as the notebook that compares them is given them."""
    runs = tmp_path_factory.mktemp("sweeps")
    common = [*settings, f"paths.runs_dir={runs}", f"paths.base_run={chain}", "stages=[plan,generate,evaluate]"]
    common += ["generate.variants=[teacher,ppcl-planned]", "benchmark.prompts_per_category=1", "budget.num_batches=1"]
    for cost in ("velocity", "loss"):
        succeed("--multirun", *common, f"name=by_{cost}", f"budget.cost={cost}", "budget.params=0.95,0.8")
    return os.pathsep.join(str(runs / f"by_{cost}") for cost in ("velocity", "loss"))


def test_the_notebooks_are_listed_in_the_readme() -> None:
    assert len(NOTEBOOKS) == COUNT
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in readme for name in NOTEBOOKS)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_kept_clean(name: str) -> None:
    cells = code_of(name)
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    assert not any("from ppcl" in line for cell in cells for line in cell["source"])  # public names are enough


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(
    name: str, chain: Path, teacher: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = code_of(name)
    shown: list[int] = []
    mpl.use("Agg")
    monkeypatch.setattr(plt, "show", lambda: shown.extend(plt.get_fignums()))
    monkeypatch.setenv("PPCL_RUN", str(chain))
    monkeypatch.setenv("PPCL_MODEL", str(teacher))
    if any("PPCL_SWEEPS" in line for cell in cells for line in cell["source"]):
        monkeypatch.setenv("PPCL_SWEEPS", request.getfixturevalue("sweeps"))
    names: dict[str, object] = {}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), names)
    assert len({*shown}) >= sum("plt.show()" in "".join(cell["source"]) for cell in cells)
    plt.close("all")
