"""Copies the source of ppcl's component classes into an export, for `trust_remote_code=True`."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from types import ModuleType

from ppcl.artifacts.files import read_json, write_json
from ppcl.families.registry import component_module


def add_code(folder: Path) -> None:
    """Copy the source of every ppcl class in a saved pipeline beside its weights, and name it in the folder's indices.

    Then diffusers loads the pipeline with `trust_remote_code=True`, or without it after `import ppcl`.
    """
    index = read_json(folder / "model_index.json", "The pipeline's index")
    for component, entry in index.items():
        if not isinstance(entry, list) or entry[0] != "ppcl":
            continue
        module = import_module(str(component_module(entry[1])))
        name = module.__name__.rpartition(".")[2]
        (folder / component / f"{name}.py").write_text(_self_contained(module), encoding="utf-8")
        index[component] = [name, entry[1]]
        path = folder / component / "config.json"
        if path.exists():  # a processor has no config.json
            config = read_json(path, "The component's config")
            write_json(path, config | {"auto_map": {"AutoModel": f"{name}.{entry[1]}"}}, checked=False)
    write_json(folder / "model_index.json", index, checked=False)


def _self_contained(module: ModuleType) -> str:
    """Return a module's source, in which each import from ppcl is replaced by the source of the imported module.

    diffusers downloads one file per component, so that file must not import ppcl.
    """

    def source_of(module: ModuleType) -> str:
        return Path(str(module.__file__)).read_text(encoding="utf-8")

    def definitions(found: re.Match) -> str:
        return source_of(import_module(found[1])).partition("\n\n\n")[2].rstrip() + "\n"

    return re.sub(r"^from (ppcl\S*) import .+\n", definitions, source_of(module), flags=re.MULTILINE)
