"""Describes the artifacts of a run for W&B: their records and weights, and which artifacts they were made from."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ppcl.artifacts.files import read_json
from ppcl.artifacts.headers import fingerprint
from ppcl.artifacts.jobs import is_job
from ppcl.artifacts.plan import PruningPlan
from ppcl.context import Run

_LONGEST = 110  # characters of a name; W&B takes 128


@dataclass(frozen=True)
class Made:
    """An artifact on disk.

    `kind`: what it is, such as `plugs`. `owner`: the folder of the run that has made it.
    `records`: small JSON files that say what its weights are, and were made from. `weights`: all its other files.
    `inputs`: the artifacts that it was made from.
    """

    kind: str
    owner: Path
    records: tuple[Path, ...]
    weights: tuple[Path, ...] = ()
    inputs: tuple[Made, ...] = field(default=())

    @property
    def name(self) -> str:
        """The name in W&B, such as `plugs-demo`; that of a sweep's job begins with the sweep's name.

        W&B takes few characters. A name that has others ends in a hash, so that no two become one.
        """
        folder = self.owner.absolute()
        in_sweep = is_job(folder)
        words = f"{self.kind}-{folder.parent.name}-{folder.name}" if in_sweep else f"{self.kind}-{folder.name}"
        clean = re.sub(r"[^a-zA-Z0-9._-]", "-", words)
        return clean if clean == words else f"{clean[:_LONGEST]}-{hashlib.sha256(words.encode()).hexdigest()[:6]}"

    @property
    def digest(self) -> str:
        """A hash, 16 hex digits, of the records, which hold fingerprints or checksums of all weights."""
        return fingerprint({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in self.records})

    @property
    def metadata(self) -> dict[str, Any]:
        """The facts that W&B shows beside its files: digest, place and size, and name and digest of each input."""
        return {
            "digest": self.digest,
            "folder": str(self.owner.absolute()),
            "gigabytes": round(sum(path.stat().st_size for path in self.weights) / 1e9, 3),
            "made_from": [{"name": each.name, "digest": each.digest} for each in self.inputs],
        }


def _existing(*paths: Path) -> tuple[Path, ...]:
    return tuple(path for path in paths if path.is_file())


def _found(*made: Made | None) -> tuple[Made, ...]:
    return tuple(each for each in made if each is not None)


def _probes(run: Run) -> Made | None:
    folder = run.probe_folder
    records = _existing(folder / "probes.json")
    return Made("probes", run.folder, records, tuple(sorted(folder.glob("*.safetensors")))) if records else None


def _plan(run: Run) -> Made | None:
    folder = run.plan_path.parent
    records = _existing(run.plan_path, run.width_path, folder / "curves.json")
    if not records:
        return None
    detected = run.plan_path.exists() and "detection" in PruningPlan.load(run.plan_path).made_from
    inputs = _found(_probes(run)) if detected and run.base == run.folder else ()
    return Made("plan", run.base, records, inputs=inputs)


def _plugs(run: Run) -> Made | None:
    folder = run.plugs_folder
    records = sorted(path for path in folder.glob("*.json") if path.with_suffix(".safetensors").is_file())
    weights = tuple(path.with_suffix(".safetensors") for path in records)
    return Made("plugs", run.base, tuple(records), weights, _found(_plan(run))) if records else None


def _choice(run: Run) -> Made | None:
    records = _existing(run.choice_path)
    return Made("choice", run.folder, records, inputs=_found(_plan(run), _plugs(run))) if records else None


def _finetuned(run: Run) -> Made | None:
    return _model(run, "finetuned", _found(_choice(run), _plugs(run)))


def _export(run: Run) -> Made | None:
    return _model(run, "export", _of_result(run, run.folder / "export"))


def _quantized(run: Run) -> Made | None:
    return _model(run, "quantized", _of_result(run, run.folder / "quantized"))


def _of_result(run: Run, folder: Path) -> tuple[Made, ...]:
    """Return what the model in `folder` was made from: the fine-tuned model, or else the plugs and their choice."""
    record = folder / "ppcl.json"
    tuned = record.is_file() and read_json(record, "The record").get("made_from", {}).get("finetuned")
    return _found(_finetuned(run)) if tuned else _found(_choice(run), _plugs(run))


def _model(run: Run, kind: str, inputs: tuple[Made, ...]) -> Made | None:
    """Return the model that lies in the folder `kind` of the run's folder, or None."""
    folder = run.folder / kind
    records = _existing(folder / "ppcl.json")
    return Made(kind, run.folder, records, _others(folder, records), inputs) if records else None


def _others(folder: Path, records: Iterable[Path]) -> tuple[Path, ...]:
    return tuple(path for path in sorted(folder.rglob("*")) if path.is_file() and path not in records)


def _teacher(run: Run) -> Made | None:
    return _model(run, "teacher", ())


def _lora(run: Run) -> Made | None:
    folder = run.folder / "lora"
    records = tuple(sorted(folder.glob("*.json")))
    return Made("lora", run.folder, records, _others(folder, records), _found(_export(run))) if records else None


# What each stage makes.
MAKES: dict[str, tuple[Callable[[Run], Made | None], ...]] = {
    "pretrain": (_teacher,),
    "probe": (_probes,),
    "detect": (_plan,),
    "depth": (_plugs,),
    "import_published": (_plan, _plugs),
    "width": (_plan, _plugs),
    "plan": (_plan, _choice),
    "finetune": (_finetuned,),
    "export": (_export,),
    "quantize": (_quantized,),
    "remap_lora": (_lora,),
}


def made_by(run: Run, stage: str) -> list[Made]:
    """Return the artifacts that a stage has made, as they are on disk now. Those of `paths.base_run` are left out."""
    found = (describe(run) for describe in MAKES.get(stage, ()))
    return [each for each in found if each is not None and each.owner == run.folder]
