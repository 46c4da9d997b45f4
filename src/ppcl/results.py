"""Reads the artifacts of a run from its folder. Importing this loads no torch."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppcl.artifacts.files import is_changed, read_json
from ppcl.artifacts.plan import Choice, PruningPlan
from ppcl.artifacts.scores import ScoreRow
from ppcl.config import STORED_VARIANTS, Config
from ppcl.errors import UsageError
from ppcl.sentences import in_words

if TYPE_CHECKING:
    from omegaconf import DictConfig


def read_record(folder: Path, key: str = "run=") -> DictConfig:
    """Return the configuration that is recorded in a run's folder.

    `key`: the override that names the folder, for the message. Raises `UsageError` if there is no readable record.
    """
    from omegaconf import DictConfig, OmegaConf
    from yaml import YAMLError

    path = folder / "config.yaml"
    remedy = f"run the command that made {folder} again"
    try:
        if is_changed(path.read_text(encoding="utf-8")):
            raise UsageError(
                f"{path} has changed since it was written: {remedy}, or delete its first line to keep the change."
            )
        record = OmegaConf.load(path)
    except OSError:
        jobs = sorted(job.parent for job in folder.glob("*/config.yaml"))
        other = f"; it holds those of a sweep: name one, such as {jobs[0]}" if jobs else "; name one, such as runs/demo"
        raise UsageError(
            f"{key}{folder} is not the folder of a run, which has a config.yaml{other}; if it was deleted, {remedy}."
        ) from None
    except (YAMLError, UnicodeDecodeError, RecursionError):
        raise UsageError(f"{path} is not YAML; {remedy}.") from None
    if not isinstance(record, DictConfig) or not {"model", "stages"} <= record.keys():
        raise UsageError(f"{path} is not the record of a run; name the folder of one, such as runs/demo, or {remedy}.")
    return record


class Stored:
    """The artifacts in a run's folder, each read when it is asked for.

    `folder` is the run's folder. Artifacts that the run has not made are None, or empty. Raises
    `UsageError` for a folder that is not of a run.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        read_record(self.folder, "")  # refuses what is not a run

    @cached_property
    def config(self) -> Config:
        """The configuration of the last command that worked in this folder."""
        from omegaconf import OmegaConf

        with in_words():
            found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), read_record(self.folder, "")))
        assert isinstance(found, Config)
        return found

    @property
    def _base(self) -> Path:
        """The folder with the intervals and plugs: this run's, or that of the run it is based on."""
        base = self.config.paths.base_run
        return self.folder if base is None else Path(base)

    @property
    def plan(self) -> PruningPlan | None:
        """The intervals and width sets, given or detected."""
        path = self._base / "plan" / "plan.json"
        return PruningPlan.load(path) if path.is_file() else None

    @property
    def detection(self) -> dict[str, Any] | None:
        """The tables of CKA that detection has measured: similarities from 0 to 1, with None where there is none.

        `cka[stack][stream][u][k]`: of block k's output to what linear probes make of it from block u's on. `delta`: by
        how much that falls from block k - 1 to k. `similarity[stream][i][j]`: of the outputs of blocks i and j.
        """
        path = self._base / "plan" / "curves.json"
        return read_json(path, "The record", "detect") if path.is_file() else None

    @property
    def choice(self) -> Choice | None:
        """The plugs that `stages=[plan]` chose for the budget."""
        path = self.folder / "plan" / "choice.json"
        return Choice.load(path) if path.is_file() else None

    @property
    def plugs(self) -> Path | None:
        """The folder of the students and projectors."""
        return _holding(self._base / "plugs", "*.safetensors")

    @property
    def losses(self) -> dict[str, float]:
        """The held-out distillation loss of every plug by name, as its training left it; imported plugs have none."""
        found = {}
        for record in sorted((self._base / "plugs").glob("*.json")):
            losses = read_json(record, "The plug").get("losses", {})
            if "heldout_loss" in losses:
                found[record.stem] = losses["heldout_loss"]
        return found

    @property
    def finetuned(self) -> Path | None:
        """The folder of the fine-tuned model, or of the LoRA that was trained in its place."""
        return _holding(self.folder / "finetuned", "ppcl.json")

    @property
    def quantized(self) -> Path | None:
        """The folder of the quantised model."""
        return _holding(self.folder / "quantized", "ppcl.json")

    @property
    def export(self) -> Path | None:
        """The folder of the exported pipeline, which `DiffusionPipeline.from_pretrained` and `ppcl.load` load."""
        return _holding(self.folder / "export", "model_index.json")

    @property
    def scores(self) -> dict[str, ScoreRow]:
        """The newest scores by variant: of the benchmark that was evaluated last."""
        folder = _newest(self.folder / "scores", "*.json")
        found = {path.stem: ScoreRow.load(path) for path in folder.glob("*.json")} if folder else {}
        return dict(sorted(found.items(), key=lambda item: _place(item[0])))

    @property
    def report(self) -> Path | None:
        """The newest report's page."""
        folder = _newest(self.folder / "report", "report.html")
        return folder / "report.html" if folder else None

    @property
    def images(self) -> dict[str, list[Path]]:
        """The drawn pictures in their order, by the folder below `images/` that they lie in."""
        root, found = self.folder / "images", {}
        for folder in sorted({path.parent for path in root.rglob("[0-9]*.png")}):
            found[str(folder.relative_to(root))] = sorted(folder.glob("[0-9]*.png"))
        return found


def _holding(folder: Path, pattern: str) -> Path | None:
    """Return `folder` if it has a file of that pattern."""
    return folder if any(folder.glob(pattern)) else None


def _newest(root: Path, pattern: str) -> Path | None:
    """Return the folder, `root` or below it, of the file of that pattern that was written last."""
    found = max(root.rglob(pattern), key=lambda path: path.stat().st_mtime_ns, default=None)
    return None if found is None else found.parent


def _place(variant: str) -> tuple[int, str]:
    """Return a variant's place in a table: the usual order, then by name."""
    return (STORED_VARIANTS.index(variant) if variant in STORED_VARIANTS else len(STORED_VARIANTS), variant)
