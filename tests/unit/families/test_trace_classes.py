"""`ppcl.trace` over all transformer classes of diffusers, at tiny size: the README says which can be pruned.

`PPCL_RENEW_TABLE=1 pytest tests/unit/families/test_trace_classes.py -n 0` writes that table anew.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import diffusers
import pytest
from diffusers import ModelMixin

import ppcl
from ppcl.artifacts.files import atomic_path
from tests.models_tiny.build import build
from tests.models_tiny.cases import CASES

README = Path(__file__).parents[3] / "README.md"
BEGIN, END = "<!-- traced classes -->\n", "<!-- end of traced classes -->"
WIDEST = 120  # characters of a row


@pytest.fixture(scope="session")
def table() -> dict[str, str]:
    """The table in README.md, by class."""
    text = README.read_text().partition(BEGIN)[2].partition(END)[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE))


def outcome(name: str) -> str:
    """Return what is in the table for a class: its stacks that are pruned, or why none is."""
    case = CASES[name]
    if isinstance(case, str):
        return f"refused: {case}"
    try:
        found = ppcl.trace(build(name, case), case.inputs())
    except ppcl.UsageError as error:
        reason = str(error).removeprefix(f"{name} cannot be traced: ").partition(" (")[0].rstrip(".")
        room = WIDEST - len(f"| `{name}` | refused:  |")
        return f"refused: {reason if len(reason) <= room else reason[: room - 3] + '...'}"
    return ", ".join(f"`{stack.path.rpartition('.')[2]}`" for stack in found.stacks)


def test_every_transformer_class_of_diffusers_has_a_case() -> None:
    classes = vars(diffusers.models.transformers)
    models = {name for name, value in classes.items() if isinstance(value, type) and issubclass(value, ModelMixin)}
    assert models - {"DualTransformer2DModel"} == CASES.keys()  # that one holds two whole transformers


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_class_is_traced_or_refused_as_the_readme_says(name: str, table: dict[str, str]) -> None:
    found = outcome(name)
    if os.environ.get("PPCL_RENEW_TABLE"):
        table[name] = found
    assert table.get(name) == found


def test_the_readme_counts_its_rows(table: dict[str, str]) -> None:
    whole = sum(not row.startswith("refused") for row in table.values())
    if os.environ.get("PPCL_RENEW_TABLE"):
        before, _, rest = README.read_text().partition(BEGIN)
        rows = "".join(f"| `{name}` | {table[name]} |\n" for name in sorted(table))
        head = "| Class | Pruned |\n| --- | --- |\n"
        with atomic_path(README) as temporary:
            temporary.write_text(before + BEGIN + head + rows + END + rest.partition(END)[2])
    assert f"{whole} of {len(table)} classes" in README.read_text()
    assert whole >= 52


def test_chroma_is_refused() -> None:
    assert outcome("ChromaTransformer2DModel").startswith("refused: transformer_blocks: temb of")
