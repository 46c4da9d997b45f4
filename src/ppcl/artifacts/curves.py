"""Held-out losses that were measured during a training: `training/curves/STAGE-FINGERPRINT.json` in a run's folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ppcl.artifacts.files import read_json, write_json
from ppcl.artifacts.headers import Header
from ppcl.errors import UsageError


@dataclass(frozen=True)
class Curve:
    """Held-out losses by the name of the part that is trained, after each of `steps`."""

    steps: list[int]
    losses: list[dict[str, float]]

    def until(self, step: int) -> Curve:
        """Return what was measured up to `step`."""
        count = sum(known <= step for known in self.steps)
        return Curve(self.steps[:count], self.losses[:count])

    def then(self, step: int, losses: Mapping[str, float]) -> Curve:
        """Return the curve with one more measurement."""
        return Curve([*self.steps, step], [*self.losses, dict(losses)])

    def of(self, name: str) -> list[float]:
        """Return the losses of one part."""
        return [losses[name] for losses in self.losses]

    @property
    def names(self) -> Sequence[str]:
        """The parts, in the order in which they are trained."""
        return list(self.losses[0]) if self.losses else []

    def save(self, path: Path) -> None:
        """Write the curve's file."""
        write_json(path, {"steps": self.steps, "losses": self.losses})

    @classmethod
    def load(cls, path: Path) -> Curve:
        """Read a curve's file; `UsageError` if it is damaged."""
        content = read_json(path, "The curve of a training", "report")
        return cls(content["steps"], content["losses"])


def curve_path(folder: Path, stage: str, header: Header) -> Path:
    """Return the file with the curve of a training, in the folder of its run."""
    return folder / "training" / "curves" / f"{stage}-{header.fingerprint[:8]}.json"


def load_curves(folder: Path) -> dict[str, list[Curve]]:
    """Return the curves of the trainings in a run's folder, by stage. A stage may have trained its parts in groups."""
    found: dict[str, list[Curve]] = {}
    for path in sorted((folder / "training" / "curves").glob("*-*.json")):
        found.setdefault(path.stem.rpartition("-")[0], []).append(Curve.load(path))
    return found


def forget_curves(folder: Path, stage: str, names: Mapping[str, Any]) -> None:
    """Delete the curves of earlier trainings of the parts `names`, which are trained anew."""
    for path in folder.glob(f"{stage}-*.json"):
        try:
            known = Curve.load(path).names
        except UsageError:  # it is damaged, and nobody can say of what it is
            known = list(names)
        if {*known} & {*names}:
            path.unlink(missing_ok=True)
