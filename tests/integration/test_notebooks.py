"""Every notebook runs from its first cell to its last, on a finished run."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest
from commands import REPOSITORY

NOTEBOOKS = sorted(path.name for path in (REPOSITORY / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name: str, chain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = json.loads((REPOSITORY / "notebooks" / name).read_text())
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)  # it is kept clean
    assert not any("from ppcl" in line for cell in cells for line in cell["source"])  # public names are enough
    shown: list[int] = []
    mpl.use("Agg")
    monkeypatch.setattr(plt, "show", lambda: shown.extend(plt.get_fignums()))
    monkeypatch.setenv("PPCL_RUN", str(chain))
    names: dict[str, object] = {}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"{name}, cell {number}", "exec"), names)
    assert len(set(shown)) == sum("plt.show()" in "".join(cell["source"]) for cell in cells)
    plt.close("all")
