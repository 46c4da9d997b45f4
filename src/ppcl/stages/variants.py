"""The variants of a model that are drawn and scored side by side, as arrangements of one plugboard."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import nn

from ppcl.artifacts import Plug, Projector, load_plugs, load_projectors, plug_name, projector_name, read_json
from ppcl.errors import UsageError
from ppcl.export.quantized import require_bitsandbytes, require_torchao
from ppcl.stages.run import Run
from ppcl.surgery.plugboard import Plugboard, load_student
from ppcl.validation.pruning import budget_of


@dataclass(frozen=True)
class Variant:
    """What is plugged in, and intervals that are cut to their first block; the rest is teacher.

    `finetuned` is the fingerprint of a tuned model that takes the place of all that, `quantized` that of a quantised
    one that takes the place of either; None where there is none.
    """

    name: str
    students: list[str] = field(default_factory=list)
    projectors: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    finetuned: str | None = None
    quantized: str | None = None


@dataclass
class Plugs:
    """Every plug of a run: trained students and projectors by name."""

    students: dict[str, Plug] = field(default_factory=dict)
    projectors: dict[str, Projector] = field(default_factory=dict)

    def fingerprints(self, names: list[str]) -> dict[str, str]:
        every = self.students | self.projectors
        return {name: every[name].header.fingerprint for name in names}


def _check_teacher(run: Run, plugs: dict[str, Any]) -> None:
    for name, plug in plugs.items():
        if plug.header.made_from["model"] != run.model_identity:
            raise UsageError(
                f"plug {name} in {run.folder / 'plugs'} was distilled from another teacher than "
                f"model.path={run.config.model.path}: give this run another name=."
            )


def required_students(run: Run) -> dict[str, Plug]:
    """The trained student of every interval of this run, by name."""
    plugs = load_plugs(run.plugs_folder)
    names = [plug_name(stack, pair) for stack, pairs in run.intervals.items() for pair in pairs]
    missing = [name for name in names if name not in plugs]
    if missing:
        raise UsageError(f"{run.folder / 'plugs'} has no student for {', '.join(missing)}; run stages=[depth] first.")
    found = {name: plugs[name] for name in names}
    _check_teacher(run, found)
    return found


def required_projectors(run: Run) -> dict[str, Projector]:
    """The trained projectors of this run's width sets, by name; none for `width=none`."""
    names = [
        projector_name(stack, index, kind)
        for stack, sets in run.width.items()
        for kind, indices in sets.items()
        for index in indices
    ]
    found = load_projectors(run.plugs_folder) if names else {}
    missing = [name for name in names if name not in found]
    if missing:
        raise UsageError(f"{run.folder / 'plugs'} has no projector {', '.join(missing)}; run stages=[width] first.")
    chosen = {name: item for name, item in found.items() if name in names}
    _check_teacher(run, chosen)
    return chosen


def required_plugs(run: Run) -> Plugs:
    return Plugs(required_students(run), required_projectors(run))


def finetuned_folder(run: Run) -> Path:
    return run.folder / "finetuned"


def quantized_folder(run: Run) -> Path:
    return run.folder / "quantized"


def _quantized_base(run: Run) -> str:
    """The variant that this run's quantised model was made from."""
    record = quantized_folder(run) / "ppcl.json"
    if not record.exists():
        raise UsageError(f"{record} does not exist: run stages=[quantize] first.")
    return read_json(record, "The record of the quantised model")["made_from"]["variant"]


def planned(run: Run, plugs: Plugs) -> Variant:
    """What the budget's plan plugs in; everything where no budget is set."""
    budget = budget_of(run.config)
    if budget is None:
        return Variant("ppcl-planned", list(plugs.students), list(plugs.projectors))
    if not run.choice_path.exists():
        raise UsageError(f"{run.choice_path} does not exist: run stages=[plan] with this budget first.")
    choice = read_json(run.choice_path, "The plan's choice")
    if choice["budget"] != [budget[0], budget[1], run.config.budget.cost]:
        raise UsageError(
            f"{run.choice_path} serves budget.{choice['budget'][0]}={choice['budget'][1]}, not budget.{budget[0]}="
            f"{budget[1]}: run stages=[plan] again."
        )
    names = choice["plugged"]
    students = [name for name in names if name in plugs.students]
    projectors = [name for name in names if name in plugs.projectors]
    if len(students) + len(projectors) < len(names):
        raise UsageError(f"{run.choice_path} names plugs that are not there any more: run stages=[plan] again.")
    return Variant("ppcl-planned", students, projectors)


def cost(plug: Plug) -> float:
    """Held-out distillation loss per block saved: what plugging this student in costs."""
    u, v = plug.interval
    return distillation_loss(plug) / (v - u)


def distillation_loss(plug: Plug | Projector) -> float:
    """What a plug lost on held-out data when it was trained."""
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
        plugs.students = required_students(run)
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
        return Variant(name, list(plugs.students), list(plugs.projectors))
    plan = planned(run, plugs)
    if name == "ppcl-planned":
        return plan
    record = finetuned_folder(run) / "ppcl.json"
    if not record.exists():
        raise UsageError(f"{record} does not exist: run stages=[finetune] first.")
    tuned = read_json(record, "The record of the tuned model")
    if tuned["made_from"]["plugs"] != plugs.fingerprints([*plan.students, *plan.projectors]):
        raise UsageError(
            f"{record} was tuned from other plugs than this configuration plugs in: run stages=[finetune] under "
            "another name=, or with the budget it was tuned for."
        )
    return Variant(name, plan.students, plan.projectors, finetuned=tuned["fingerprint"])


def _quantized(run: Run, plugs: Plugs) -> Variant:
    path = quantized_folder(run) / "ppcl.json"
    record = read_json(path, "The record of the quantised model")
    base = _variant(run, record["made_from"]["variant"], plugs)
    made_from = {
        "model": run.model_identity,
        "plugs": plugs.fingerprints([*base.students, *base.projectors]),
        "finetuned": base.finetuned,
    }
    if any(record["made_from"][key] != value for key, value in made_from.items()):
        raise UsageError(
            f"{path} was quantised from another {base.name} than this configuration makes: run stages=[quantize] under "
            "another name=, or delete that folder to make it anew."
        )
    if record["made_from"]["quantize"]["scheme"] == "nf4":
        require_bitsandbytes()
    else:
        require_torchao(f"variant ppcl-quantized in {path.parent}")
    return replace(base, name="ppcl-quantized", quantized=record["fingerprint"])


class Switch:
    """Makes the run's pipeline any of its variants. Leave it with `restore`."""

    def __init__(self, run: Run, plugs: Plugs) -> None:
        self.run = run
        self.teacher = transformer = run.pipeline.transformer
        students = {name: load_student(run.family, transformer, plug) for name, plug in plugs.students.items()}
        intervals = run.intervals if run.has_intervals else {}  # a teacher can be drawn without any
        self.board = Plugboard(run.family, transformer, intervals, students, plugs.projectors, run.layout)
        self._finetuned: Any = None
        self._quantized: Any = None
        self.teacher_size = sum(parameter.numel() for parameter in transformer.parameters())

    def __call__(self, variant: Variant) -> nn.Module:
        """Arrange the pipeline's transformer as `variant` and return it."""
        self.board.arrange(students=variant.students, removed=variant.removed, projectors=variant.projectors)
        if variant.quantized:
            self.run.pipeline.transformer = self.quantized
        else:
            self.run.pipeline.transformer = self.finetuned if variant.finetuned else self.teacher
        return self.run.pipeline.transformer

    @property
    def finetuned(self) -> Any:
        if self._finetuned is None:
            self._finetuned = self._load(finetuned_folder(self.run))
        return self._finetuned

    @property
    def quantized(self) -> Any:
        if self._quantized is None:
            self._quantized = self._load(quantized_folder(self.run))
        return self._quantized

    def _load(self, folder: Path) -> Any:
        """The transformer in `folder`, of the class of the present arrangement."""
        model_class: Any = type(self.board.standalone())
        model = model_class.from_pretrained(folder / "transformer", torch_dtype=self.run.dtype)
        return model.to(self.run.device).eval().requires_grad_(False)

    def restore(self) -> None:
        self.board()
        self.run.pipeline.transformer = self.teacher
