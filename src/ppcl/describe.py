"""Print which model and which data a command works on."""

from __future__ import annotations

from pathlib import Path

from ppcl.components import DEFAULT
from ppcl.context import Run
from ppcl.data.recording.table import read_rows
from ppcl.data.sources import ClassFolder, find_units
from ppcl.defaults import stored_weights
from ppcl.paths import is_single_file
from ppcl.report.text import billions, counted
from ppcl.stages import STAGES
from ppcl.validation.model import model_folder


def describe(run: Run) -> None:
    """Print a line about the model and, if a stage of the command reads data, one about the data."""
    if "pretrain" in run.config.stages:  # the model does not exist yet
        return
    run.say("model", describe_model(run))
    reads = any(STAGES[stage].data or stage == "cache" for stage in run.config.stages)
    if reads and run.config.data.name != "none":  # training from stored boundaries needs no data
        run.say("data", describe_data(run))


def describe_model(run: Run) -> str:
    """Return a description of the teacher: name, family, number of blocks, parameters, and where it comes from."""
    model, folder = run.config.model, model_folder(run.config.model)
    blocks = " + ".join(str(count) for count in run.num_layers.values())
    weights = Path(str(model.path)) if is_single_file(model.path) else folder
    known = 0 if weights is None else stored_weights(weights, model.variant, model.component)[0]
    size = f", {billions(known)} parameters" if known else ""
    place = f"{model.path or 'its configuration alone'}{f' with {model.lora}' if model.lora is not None else ''}"
    of = "" if model.component == DEFAULT else f" of {model.component}"
    return f"{model.name} ({model.family}): {blocks} blocks{of}{size}, from {place}"


def describe_data(run: Run) -> str:
    """Return a description of the run's data: what it is, where it is, and how much there is."""
    data = run.config.data
    if data.name == "shapes":
        return "the shapes world: 32x32 toy pictures with captions, endless"
    if data.cache is not None:
        return f"{'calls recorded' if data.name == 'prompts' else 'pictures encoded'} in {data.cache}"
    if data.name == "prompts":
        return f"{data.path}: {counted(len(read_rows(Path(str(data.path)))), 'prompt')}"
    units = find_units(data)
    pictures = sum(unit.count() for unit in units) if data.name == "folder" else 0
    classes = {unit.folder for unit in units if isinstance(unit, ClassFolder)}
    place = counted(len(classes), "class folder") if classes else "a table"
    return f"{data.path}: " + (f"{pictures} pictures in {place}" if pictures else f"{len(units)} shards of pictures")
