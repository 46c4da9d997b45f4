"""The variants of a model that are drawn and compared, each described by the plugs it contains."""

from __future__ import annotations

from collections.abc import Container, Iterable
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
    """A model made of the teacher and these plugs. Where there is no plug, the teacher's blocks remain.

    `students`, `projectors`: names of the plugs.
    `removed`: names of the intervals that are cut to their first block.
    `finetuned`: the fingerprint of the fine-tuned model, which replaces the model made of these plugs. None: it is not
        used.
    `quantized`: the same for the quantised model, which replaces either.
    """

    name: str
    students: list[str] = field(default_factory=list)
    projectors: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    finetuned: str | None = None
    quantized: str | None = None


def made_of(variant: Variant, plugs: Plugs) -> dict[str, Any]:
    """Return what a header says about the plugs and removals of a variant."""
    made_from: dict[str, Any] = {"plugs": plugs.fingerprints([*variant.students, *variant.projectors])}
    return made_from | ({"removed": variant.removed} if variant.removed else {})


def finetuned_folder(run: Run) -> Path:
    """Return the folder of this run's fine-tuned model."""
    return run.folder / "finetuned"


def quantized_folder(run: Run) -> Path:
    """Return the folder of this run's quantised model."""
    return run.folder / "quantized"


def _quantized_base(run: Run) -> str:
    """Return the variant that this run's quantised model was made from; raises `UsageError` without such a model."""
    record = quantized_folder(run) / "ppcl.json"
    if not record.exists():
        raise UsageError(f"{record} does not exist: run 'stages=[quantize]' first.")
    return read_json(record, "The record", "quantize")["made_from"]["variant"]


def _arranged(name: str, plugs: Plugs, names: Iterable[str]) -> Variant:
    """Return the variant `name` with exactly the plugs `names`."""
    names = list(names)
    removed = [plug_name(*plugs.removals[each]) for each in names if each in plugs.removals]
    students = [each for each in names if each in plugs.students]
    return Variant(name, students, [each for each in names if each in plugs.projectors], removed)


def planned(run: Run, plugs: Plugs) -> Variant:
    """Return the variant `ppcl-planned`: the plugs that `stages=[plan]` has chosen, or all without a plan and a budget.

    Raises `UsageError` if the budget has no plan yet, or if the plan is for another budget or for plugs that are gone.
    """
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
    """Return the record of this run's fine-tuned model; raises `UsageError` if there is none."""
    path = finetuned_folder(run) / "ppcl.json"
    if not path.exists():
        raise UsageError(f"{path} does not exist: run 'stages=[finetune]' first.")
    return read_json(path, "The record", "finetune")


def tuned(run: Run, plugs: Plugs) -> Variant:
    """Return the variant `ppcl-finetuned`, with the plugs that its record names.

    Raises `UsageError` if these plugs have changed since, if the budget's plan has others, or if `width` settings
    differ.
    """
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
        key, value = budget
        raise UsageError(
            f"{path} was tuned from other plugs than budget.{key}={value:g} plugs in: give budget.{key}=null to use "
            f"what was tuned, or run 'stages=[plan,finetune]' under another name=, as in {based_on_this(run)}."
        )
    layout = asdict(run.layout)
    if arranged.projectors and made_from.get("layout", layout) != layout:
        difference = first_difference(made_from["layout"], layout, "width.")
        raise UsageError(f"{path} was tuned with {difference}: repeat that setting.")
    return replace(arranged, name="ppcl-finetuned", finetuned=record["fingerprint"])


def check_choice(run: Run, plugs: Plugs, plugged: list[str]) -> None:
    """Raise `UsageError` if this run has a tuned model of other plugs than `plugged`.

    A run has one choice and one tuned model of it: another choice would leave the tuned model without its own.
    """
    folder = finetuned_folder(run)
    if not (folder / "ppcl.json").exists():
        return
    made_from = tuned_record(run)["made_from"]
    arranged = made_of(_arranged("ppcl-planned", plugs, plugged), plugs)
    if {key: value for key, value in made_from.items() if key in ("plugs", "removed")} != arranged:
        raise UsageError(
            f"{folder} is tuned for another choice than this budget's, so this run keeps that: make the other size a "
            f"run of its own, as in {based_on_this(run)}, or delete {folder} first."
        )


def based_on_this(run: Run) -> str:
    """Return the overrides of a new run that uses the plugs of this one, for an error message."""
    runs, name, number = Path(run.config.paths.runs_dir), run.config.name, 2
    while (runs / f"{name}-{number}").exists():
        number += 1
    base = run.base.relative_to(Path.cwd()) if run.base.is_relative_to(Path.cwd()) else run.base
    return f"name={name}-{number} paths.base_run={base}"


def another_run(run: Run, folder: Path, variant: Variant | None = None) -> str:
    """Return the remedy for a result in `folder` that was made from other plugs or settings, for an error message.

    A fine-tuned `variant` exists only in this run, so the remedy cannot be a new run.
    """
    if variant is not None and variant.finetuned:
        return f"move or delete {folder} to make it anew"
    return f"give this run another name=, as in {based_on_this(run)}, or delete {folder} to make it anew"


def default_variants(run: Run) -> list[str]:
    """Return the variants that are drawn for `generate.variants=null`.

    These are the teacher, `removed` (the baseline without training), the newest result, and the quantised model if any.
    """
    names = ["teacher", "removed"] if run.has_intervals else ["teacher"]
    last = newest(run)
    names += [last] if last else []
    return names + (["ppcl-quantized"] if (quantized_folder(run) / "ppcl.json").exists() else [])


def furthest(run: Run) -> str:
    """Return the variant that is exported and quantised by default: the newest result, or `removed` without students.

    Raises `UsageError` if nothing has been trained or planned.
    """
    last = newest(run)
    if last is None and run.config.distill.mode == "none" and run.has_intervals:
        return "removed"
    if last is None:
        raise UsageError(f"{run.folder} has no pruned model yet: run 'stages=[depth]' in it first.")
    return last


def newest(run: Run, made: Container[str] = ()) -> str | None:
    """Return the variant that this run has made last, or will have once the stages `made` have run.

    None if nothing has been trained or planned.
    """
    if "finetune" in made or (finetuned_folder(run) / "ppcl.json").exists():
        return "ppcl-finetuned"
    if not run.has_intervals:
        return None
    if budget_of(run.config) is not None or run.known_choice_path.exists():
        return "ppcl-planned"

    def trained(names: list[str], stage: str) -> bool:
        there = all((run.plugs_folder / f"{name}.json").exists() for name in names)
        return bool(names) and (stage in made or there)

    if run.config.width.source == "auto" and not run.width_path.exists():  # selects what it trains
        if "width" in made:
            return "ppcl-width"
    elif trained(projector_names(run), "width"):
        return "ppcl-width"
    return "ppcl-depth" if run.config.distill.mode != "none" and trained(student_names(run), "depth") else None


def cost(plug: Plug) -> float:
    """Return the held-out distillation loss of a student per block that it saves."""
    u, v = plug.interval
    return distillation_loss(plug) / (v - u)


def distillation_loss(plug: Plug | Projector) -> float:
    """Return the held-out loss of a plug after training; raises `UsageError` for an imported plug."""
    if "heldout_loss" not in plug.losses:
        raise UsageError(
            f"{plug.name} was imported, so its distillation loss is not known: choose by budget.cost=velocity, and "
            "leave ppcl-mixed out of generate.variants."
        )
    return plug.losses["heldout_loss"]


def variants_of(run: Run, names: list[str] | None = None) -> tuple[list[Variant], Plugs]:
    """Return the variants `names`, by default the configured ones, and the plugs that they use. Loads no model.

    Raises `UsageError` if a variant is not available.
    """
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
    """Return the projectors in the plan's choice or the fine-tuned model, configured in `width` or not."""
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
    record = read_json(path, "The record", "quantize")
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
