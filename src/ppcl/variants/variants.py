"""The variants of a model that are drawn and scored side by side, as arrangements of one plugboard."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ppcl.artifacts.files import read_json
from ppcl.artifacts.plan import Choice, plug_name
from ppcl.artifacts.plugs import Plug, Projector
from ppcl.context import Run
from ppcl.errors import UsageError
from ppcl.export.quantized import require_bitsandbytes, require_torchao
from ppcl.validation.pruning import budget_of
from ppcl.variants.plugs import Plugs, required_projectors, required_removals, required_students


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
    """Return the arrangement of the budget's plan; everything is in where no budget is set."""
    budget = budget_of(run.config)
    if budget is None:
        return _arranged("ppcl-planned", plugs, plugs.names)
    if not run.choice_path.exists():
        raise UsageError(f"{run.choice_path} does not exist: run 'stages=[plan]' with this budget first.")
    choice = Choice.load(run.choice_path)
    if choice.budget != (*budget, run.config.budget.cost):
        raise UsageError(
            f"{run.choice_path} serves budget.{choice.budget[0]}={choice.budget[1]}, not budget.{budget[0]}="
            f"{budget[1]}: run 'stages=[plan]' again."
        )
    if not {*choice.plugged} <= {*plugs.names}:
        raise UsageError(f"{run.choice_path} names plugs that are not there any more: run 'stages=[plan]' again.")
    return _arranged("ppcl-planned", plugs, choice.plugged)


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
    """The configured variants, and the plugs they use; reads no model."""
    names = run.config.generate.variants if names is None else names
    plugs = Plugs()
    used = {_quantized_base(run) if name == "ppcl-quantized" else name for name in names}
    if any(name.startswith("ppcl") for name in used):
        plugs.students, plugs.removals = required_students(run), required_removals(run)
    if {"ppcl-width", "ppcl-planned", "ppcl-finetuned"} & used:
        plugs.projectors = required_projectors(run)
    return [_variant(run, name, plugs) for name in names], plugs


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
    plan = planned(run, plugs)
    if name == "ppcl-planned":
        return plan
    record = finetuned_folder(run) / "ppcl.json"
    if not record.exists():
        raise UsageError(f"{record} does not exist: run 'stages=[finetune]' first.")
    tuned = read_json(record, "The record of the tuned model")
    if {key: value for key, value in tuned["made_from"].items() if key in ("plugs", "removed")} != made_of(plan, plugs):
        raise UsageError(
            f"{record} was tuned from other plugs than this configuration plugs in: run 'stages=[finetune]' under "
            "another name=, or with the budget it was tuned for."
        )
    return replace(plan, name=name, finetuned=tuned["fingerprint"])


def _quantized(run: Run, plugs: Plugs) -> Variant:
    path = quantized_folder(run) / "ppcl.json"
    record = read_json(path, "The record of the quantised model")
    base = _variant(run, record["made_from"]["variant"], plugs)
    made_from = {"model": run.teacher.identity, "finetuned": base.finetuned} | made_of(base, plugs)
    told = ("model", "finetuned", "plugs", "removed")
    if {key: value for key, value in record["made_from"].items() if key in told} != made_from:
        raise UsageError(
            f"{path} was quantised from another {base.name} than this configuration makes: run 'stages=[quantize]' "
            "under another name=, or delete that folder to make it anew."
        )
    if record["made_from"]["quantize"]["scheme"] == "nf4":
        require_bitsandbytes()
    else:
        require_torchao(f"variant ppcl-quantized in {path.parent}")
    return replace(base, name="ppcl-quantized", quantized=record["fingerprint"])
