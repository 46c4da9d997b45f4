"""Keeps traces on disk, and guesses the stacks of a model that is not traced yet."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from ppcl.artifacts.files import again, read_json, write_json
from ppcl.artifacts.headers import fingerprint
from ppcl.artifacts.model_files import components_of
from ppcl.components import DEFAULT, class_named
from ppcl.errors import UsageError, root
from ppcl.families.registry import stock_name
from ppcl.families.traced.structure import block_lists, without_weights
from ppcl.families.traced.trace import Stack, Trace, lists_left_alone, lists_to_prune

TRACE = "trace.json"  # in a run's folder
VERSION = 3  # of how models are traced


def trace_path(cache_dir: str | Path, component: str, model: str, arch: Mapping[str, Any]) -> Path:
    """Return the file that keeps the trace of a pipeline's `component`, of the class `model` with the config `arch`."""
    import diffusers

    own = {key: value for key, value in arch.items() if not key.startswith("_")}
    made_from = {"model": model, "arch": own, "diffusers": diffusers.__version__, "version": VERSION}
    if component != DEFAULT:
        made_from["component"] = component
    return Path(cache_dir) / "traces" / f"{fingerprint(made_from)}.json"


def read_trace(path: Path) -> Trace | None:
    """Return the trace in a file, or None if there is none; raises `UsageError` if it is damaged."""
    if not path.exists():
        return None
    content = read_json(path, "The trace", "cache")
    try:
        return Trace.from_json(content)
    except (KeyError, TypeError):
        raise UsageError(f"The trace {path} is damaged: {again('cache')}.") from None


def write_trace(path: Path, trace: Trace) -> None:
    """Write a trace, completely or not at all."""
    write_json(path, trace.to_json())


def transformer_of(folder: Path, component: str, index: Mapping[str, Any], arch: Mapping[str, Any]) -> Any:
    """Return the diffusers class of a pipeline folder's transformer, which is its `component`.

    Raises `UsageError` for a pipeline without one, and for a class that diffusers does not have.
    """
    components = components_of(index)
    name = arch.get("_class_name") or components.get(component, [None, None])[1]
    if not name:
        parts = ", ".join(key for key, value in components.items() if any(value)) or "it has no parts"
        raise UsageError(
            f"model.path={folder} holds a {index['_class_name']} without a transformer ({parts}): only the blocks of "
            "diffusion transformers can be pruned."
        )
    name = stock_name(str(name))
    found = class_named(name)
    if found is None:
        raise unknown_class(folder, name)
    return found


def unknown_class(folder: Path, name: str) -> UsageError:
    """Return the error that says that diffusers lacks the class `name`, which a pipeline folder holds."""
    import diffusers

    return UsageError(
        f"model.path={folder} holds a {name}, which diffusers {diffusers.__version__} does not have: install the "
        "version that the pipeline was saved with."
    )


def guessed(kind: Any, arch: Mapping[str, Any]) -> Trace:
    """Return the stacks that a transformer seems to have by its config alone, without streams.

    Raises `UsageError` if it has none.
    """
    added = ("ppcl", "auto_map", "pruned_feed_forwards")  # to the config of an export
    own = {key: value for key, value in arch.items() if not key.startswith("_") and key not in added}
    return _guessed(kind, json.dumps(own, sort_keys=True, default=str))


@lru_cache(maxsize=8)  # a command asks several times, and a large model takes seconds
def _guessed(kind: Any, arch: str) -> Trace:
    try:
        model = without_weights(kind, json.loads(arch))
    except Exception as error:  # a value of any kind can stand in the file
        raise UsageError(f"transformer/config.json is no config of a {kind.__name__} ({root(error)}).") from None
    lists = block_lists(model)
    try:
        counted = lists_to_prune(lists, lists_left_alone(lists))
    except UsageError as error:
        raise UsageError(f"{kind.__name__} cannot be pruned: {error}.") from None
    found = [
        Stack(item.path, str(item.key), item.count, item.params, item.share, (), item.first, item.last)
        for item in counted
    ]
    return Trace(kind.__name__, sum(parameter.numel() for parameter in model.parameters()), tuple(found), {})


def own_sampling(pipeline_class: str) -> dict[str, Any]:
    """Return the default values of `model.sampling` that a diffusers pipeline draws with by itself."""
    import diffusers

    found = getattr(diffusers, pipeline_class, None)
    if found is None:
        return {}
    known = {name: item.default for name, item in inspect.signature(found.__call__).parameters.items()}
    defaults = {"height": None, "width": None, "true_cfg_scale": 1.0, "guidance_scale": 1.0}
    for name in (*defaults, "num_inference_steps", "max_sequence_length"):
        value = known.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            defaults[name] = value
    return defaults
