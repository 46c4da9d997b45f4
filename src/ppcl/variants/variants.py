"""The variants of a model that are drawn and scored side by side, as arrangements of one plugboard."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ppcl.artifacts.files import read_json
from ppcl.artifacts.headers import first_difference
from ppcl.artifacts.plan import Choice, plug_name, read_projector_name
from ppcl.artifacts.plugs import Plug, Projector
from ppcl.context import Run
from ppcl.errors import UsageError
from ppcl.export.quantized import require_bitsandbytes, require_torchao
from ppcl.validation.pruning import budget_of
from ppcl.variants.plugs import (
    Plugs,
    projector_names,
    required_projectors,
    required_removals,
    required_students,
    student_names,
)


@dataclass(frozen=True)
class Variant:
    """Plugs that are in, and intervals that are cut to their first block; the rest is teacher.

    `finetuned` is the fingerprint of a tuned model that takes the place of all that, `quantized` that of a quantised
    one that takes the place of either; None where there is none.
    """

    name: str
    students: list[str] = field(default_factory=list)
    projectors: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    finetuned: str | None = None
    quantized: str | None = None


def made_of(variant: Variant, plugs: Plugs) -> dict[str, Any]:
    """Plugs that are in and intervals that are cut: an arrangement's part of what an artifact is made from."""
    made_from: dict[str, Any] = {"plugs": plugs.fingerprints([*variant.students, *variant.projectors])}
    return made_from | ({"removed": variant.removed} if variant.removed else {})


def finetuned_folder(run: Run) -> Path:
    return run.folder / "finetuned"


def quantized_folder(run: Run) -> Path:
    return run.folder / "quantized"


def _quantized_base(run: Run) -> str:
    """The variant that this run's quantised model was made from."""
    record = quantized_folder(run) / "ppcl.json"
    if not record.exists():
        raise UsageError(f"{record} does not exist: run 'stages=[quantize]' first.")
    return read_json(record, "The record of the quantised model")["made_from"]["variant"]


def _arranged(name: str, plugs: Plugs, names: Iterable[str]) -> Variant:
    """The variant `name` with just these students, removals and projectors in."""
    names = list(names)
    removed = [plug_name(*plugs.removals[each]) for each in names if each in plugs.removals]
    students = [each for each in names if each in plugs.students]
    return Variant(name, students, [each for each in names if each in plugs.projectors], removed)


def planned(run: Run, plugs: Plugs) -> Variant:
    """Return the arrangement of the plan's choice; everything is in where there is neither a choice nor a budget."""
    budget, path = budget_of(run.config), run.known_choice_path
    if not path.exists():
        if budget is None:
            return _arranged("ppcl-planned", plugs, plugs.names)
        raise UsageError(f"{run.choice_path} does not exist: run 'stages=[plan]' with this budget first.")
    choice = Choice.load(path)
    if budget is not None and choice.budget != (*budget, run.config.budget.cost):
        raise UsageError(
            f"{path} serves budget.{choice.budget[0]}={choice.budget[1]}, not budget.{budget[0]}={budget[1]}: run "
            "'stages=[plan]' again."
        )
    if not {*choice.plugged} <= {*plugs.names}:
        raise UsageError(f"{path} names plugs that are not there any more: run 'stages=[plan]' again with a budget.")
    return _arranged("ppcl-planned", plugs, choice.plugged)


def tuned_record(run: Run) -> dict[str, Any]:
    """Return the record of this run's tuned model; raises `UsageError` where there is none."""
    path = finetuned_folder(run) / "ppcl.json"
    if not path.exists():
        raise UsageError(f"{path} does not exist: run 'stages=[finetune]' first.")
    return read_json(path, "The record of the tuned model")


def tuned(run: Run, plugs: Plugs) -> Variant:
    """Return the tuned model's arrangement as it is recorded; under a budget, what is planned must equal it."""
    path, record = finetuned_folder(run) / "ppcl.json", tuned_record(run)
    budget = budget_of(run.config)
    if budget is None:
        removals = {plug_name(*place): name for name, place in plugs.removals.items()}
        names = [removals.get(name, name) for name in record["plugged"]]
        arranged = _arranged("ppcl-finetuned", plugs, names)
    else:
        arranged = planned(run, plugs)
    made_from = record["made_from"]
    if {key: value for key, value in made_from.items() if key in ("plugs", "removed")} != made_of(arranged, plugs):
        if budget is None:
            raise UsageError(f"{path} was tuned from other plugs than there are: {another_run(run, path.parent)}.")
        raise UsageError(
            f"{path} was tuned from other plugs than budget.{budget[0]}={budget[1]:g} plugs in: leave the budget out "
            f"to use what was tuned, or run 'stages=[plan,finetune]' under another name=, as in {based_on_this(run)}."
        )
    layout = asdict(run.layout)
    if arranged.projectors and made_from.get("layout", layout) != layout:
        difference = first_difference(made_from["layout"], layout, "width.")
        raise UsageError(f"{path} was tuned with {difference}: repeat that setting.")
    return replace(arranged, name="ppcl-finetuned", finetuned=record["fingerprint"])


def based_on_this(run: Run) -> str:
    """Return overrides of a new run that takes its plugs from this one, or from what this one is based on."""
    runs, name, number = Path(run.config.paths.runs_dir), run.config.name, 2
    while (runs / f"{name}-{number}").exists():
        number += 1
    base = run.base.relative_to(Path.cwd()) if run.base.is_relative_to(Path.cwd()) else run.base
    return f"name={name}-{number} paths.base_run={base}"


def another_run(run: Run, folder: Path, variant: Variant | None = None) -> str:
    """Return the advice for what lies in `folder` and was made of the plugs, or of `variant`, with other settings.

    A run that takes the plugs of this one does not have its tuned model.
    """
    if variant is not None and variant.finetuned:
        return f"move or delete {folder} to make it anew"
    return f"give this run another name=, as in {based_on_this(run)}, or delete {folder} to make it anew"


def default_variants(run: Run) -> list[str]:
    """Return what is drawn where `generate.variants` is None: teacher, smallest honest baseline, and newest result."""
    names = ["teacher", "removed"] if run.has_intervals else ["teacher"]
    newest = _newest(run)
    names += [newest] if newest else []
    return names + (["ppcl-quantized"] if (quantized_folder(run) / "ppcl.json").exists() else [])


def _newest(run: Run) -> str | None:
    """The variant that this run has come to; None where nothing has been trained or planned."""
    if (finetuned_folder(run) / "ppcl.json").exists():
        return "ppcl-finetuned"
    if not run.has_intervals:
        return None
    if budget_of(run.config) is not None or run.known_choice_path.exists():
        return "ppcl-planned"

    def trained(names: list[str]) -> bool:
        return bool(names) and all((run.plugs_folder / f"{name}.json").exists() for name in names)

    selected = run.config.width.source != "auto" or run.width_path.exists()
    if selected and trained(projector_names(run)):
        return "ppcl-width"
    return "ppcl-depth" if run.config.distill.mode != "none" and trained(student_names(run)) else None


def cost(plug: Plug) -> float:
    """Held-out distillation loss per block saved: what plugging this student in costs."""
    u, v = plug.interval
    return distillation_loss(plug) / (v - u)


def distillation_loss(plug: Plug | Projector) -> float:
    """Return the held-out loss of a plug after its training; `UsageError` for an imported one."""
    if "heldout_loss" not in plug.losses:
        raise UsageError(
            f"{plug.name} was imported, so its distillation loss is not known: choose by budget.cost=velocity, and "
            "leave ppcl-mixed out of generate.variants."
        )
    return plug.losses["heldout_loss"]


def variants_of(run: Run, names: list[str] | None = None) -> tuple[list[Variant], Plugs]:
    """The configured variants, or those named, and the plugs they use; reads no model."""
    if names is None:
        names = default_variants(run) if run.config.generate.variants is None else run.config.generate.variants
    plugs = Plugs()
    used = {_quantized_base(run) if name == "ppcl-quantized" else name for name in names}
    if any(name.startswith("ppcl") for name in used):
        plugs.students, plugs.removals = required_students(run), required_removals(run)
    if {"ppcl-width", "ppcl-planned", "ppcl-finetuned"} & used:
        plugs.projectors = required_projectors(run, _recorded_projectors(run, used))
    return [_variant(run, name, plugs) for name in names], plugs


def _recorded_projectors(run: Run, used: set[str]) -> list[str]:
    """Projectors that are in the plan's choice or in the tuned model, whatever `width` says in this configuration."""
    if budget_of(run.config) is not None:
        return []
    names: list[str] = []
    if "ppcl-planned" in used and run.known_choice_path.exists():
        names += Choice.load(run.known_choice_path).plugged
    if "ppcl-finetuned" in used:
        names += tuned_record(run)["plugged"]
    return [name for name in names if read_projector_name(name)]


def _variant(run: Run, name: str, plugs: Plugs) -> Variant:
    if name == "teacher":
        return Variant(name)
    if name == "ppcl-quantized":
        return _quantized(run, plugs)
    every = [plug_name(stack, pair) for stack, pairs in run.intervals.items() for pair in pairs]
    if name == "removed":
        return Variant(name, removed=every)
    if name == "ppcl-depth":
        return Variant(name, list(plugs.students))
    if name == "ppcl-mixed":
        cheapest = sorted(plugs.students, key=lambda name: cost(plugs.students[name]))
        share = max(1, round(len(cheapest) * run.config.generate.plug_fraction))
        return Variant(name, sorted(cheapest[:share], key=every.index))
    if name == "ppcl-width":
        return _arranged(name, plugs, plugs.names)
    return planned(run, plugs) if name == "ppcl-planned" else tuned(run, plugs)


def _quantized(run: Run, plugs: Plugs) -> Variant:
    path = quantized_folder(run) / "ppcl.json"
    record = read_json(path, "The record of the quantised model")
    base = _variant(run, record["made_from"]["variant"], plugs)
    made_from = {"model": run.teacher.identity, "finetuned": base.finetuned} | made_of(base, plugs)
    told = ("model", "finetuned", "plugs", "removed")
    if {key: value for key, value in record["made_from"].items() if key in told} != made_from:
        raise UsageError(
            f"{path} was quantised from another {base.name} than this configuration makes: delete {path.parent} and "
            "run 'stages=[quantize]' again."
        )
    if record["made_from"]["quantize"]["scheme"] == "nf4":
        require_bitsandbytes()
    else:
        require_torchao(f"variant ppcl-quantized in {path.parent}")
    return replace(base, name="ppcl-quantized", quantized=record["fingerprint"])
