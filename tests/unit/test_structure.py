"""Imports within ppcl: no circles, and layers that stay apart."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import ppcl
from ppcl.stages import STAGES

ROOT = Path(ppcl.__file__).parent
FILES = {
    ".".join(["ppcl", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}


def imports_of(module):
    """Every module of ppcl that a file imports, anywhere in it: also within functions and for types alone."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in FILES else node.module
                      for alias in node.names}  # fmt: skip
    return {name for name in found if name in FILES} - {module}


IMPORTS = {module: imports_of(module) for module in FILES}


def test_no_imports_go_in_a_circle():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_stage_imports_another():
    stages = {module for module in FILES if module.startswith("ppcl.stages.")}
    assert {module: IMPORTS[module] & stages for module in stages if IMPORTS[module] & stages} == {}


def test_ops_import_only_each_other():
    for module in FILES:
        if module.startswith("ppcl.ops"):
            assert all(name.startswith("ppcl.ops") for name in IMPORTS[module]), module


def test_stages_are_a_table_and_a_runner_each():
    assert {module.removeprefix("ppcl.stages.") for module in FILES if module.startswith("ppcl.stages.")} == {*STAGES}
    for stage in STAGES:
        tree = ast.parse(FILES[f"ppcl.stages.{stage}"].read_text(encoding="utf-8"))
        (run,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run")
        assert [argument.arg for argument in run.args.args] == ["run"], stage
