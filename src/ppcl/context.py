"""The context of a run: its configuration, folder and console, its teacher and data, and what earlier stages left."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape

from ppcl import __version__
from ppcl.artifacts.files import write_json
from ppcl.artifacts.plan import Intervals, PruningPlan, Width
from ppcl.artifacts.probes import Probes
from ppcl.benchmarks.base import Benchmark, Prompt, load_benchmark
from ppcl.config import Config
from ppcl.data.training import TrainingData
from ppcl.errors import UsageError
from ppcl.families.base import Family
from ppcl.families.registry import get_family
from ppcl.launch import is_first
from ppcl.layers import Layout
from ppcl.options import identity
from ppcl.pictures.sets import set_folder, set_settings
from ppcl.progress import Item, heading, track
from ppcl.teacher_model import TeacherModel
from ppcl.validation.model import num_layers
from ppcl.validation.outputs import has_own_prompts
from ppcl.validation.pruning import check_plan, check_width, resolve_intervals, resolve_width
from ppcl.validation.strategy import resolve_precision

PACKAGES = ("torch", "lightning", "diffusers", "transformers", "hydra-core", "safetensors", "numpy")


class Run:
    """The context that every stage is given. Folders: `run.folder / "plan"` and so on, one per kind of artifact."""

    def __init__(self, config: Config, folder: Path, console: Console | None = None) -> None:
        self.config = config
        self.folder = folder
        self.console = console or Console()
        self.image_folders: dict[str, Path] = {}  # by variant, as `ppcl.pictures.images.drawings` has found them

    @property
    def writes(self) -> bool:
        """Whether this process writes what all ranks have made together."""
        return self.config.strategy.kind == "single" or is_first()

    def say(self, stage: str, text: str) -> None:
        self.console.print(heading(stage) + escape(text), highlight=False, soft_wrap=True)

    @property
    def progress_console(self) -> Console:
        """The console that progress is shown on: a silent one with `trainer.progress=false`."""
        return self.console if self.config.trainer.progress else Console(quiet=True)

    def track(self, items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:
        """Yield `items` and show how many of `total` are done, by default of all of them."""
        return track(items, description, total, console=self.progress_console)

    def record_versions(self) -> None:
        """Write `versions.json`: what this run was made with."""
        found = {"ppcl": __version__, "python": platform.python_version()}
        for name in PACKAGES:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = "unknown"
        write_json(self.folder / "versions.json", found)

    @cached_property
    def family(self) -> Family:
        return get_family(self.config.model.family, self.config.model.arch, self.config.model.sampling)

    @cached_property
    def device(self) -> torch.device:
        wants_gpu = self.config.trainer.accelerator in ("auto", "gpu", "cuda")
        return torch.device("cuda" if wants_gpu and torch.cuda.is_available() else "cpu")

    @cached_property
    def teacher(self) -> TeacherModel:
        return TeacherModel(self.config, self.family, self.device)

    @cached_property
    def data(self) -> TrainingData:
        return TrainingData(self.config, self.teacher)

    @property
    def precision(self) -> str:
        """Lightning precision of the trained modules."""
        return resolve_precision(self.config)

    @cached_property
    def benchmark(self) -> Benchmark:
        """The configured benchmark; pictures of the user's own prompts have none that scores them."""
        config = self.config.benchmark
        if has_own_prompts(self.config) or config.name == "none":
            settings = config.settings if config.name == "none" else {}
            return load_benchmark("none", {"images_per_prompt": self.config.generate.num_images} | settings)
        return load_benchmark(config.name, config.settings)

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The prompt of each picture to draw, in their order."""
        name, family = self.config.benchmark.name, self.family
        prompts = self.benchmark.prompts(family, self.config)
        if not prompts:
            raise UsageError(f"benchmark.name={name} has no prompt for model.family={family.name}.")
        most = family.facts.max_references
        for prompt in prompts:
            if not min(most, 1) <= len(prompt.references) <= most:
                raise UsageError(
                    f"benchmark.name={name} gives {len(prompt.references)} pictures with a prompt, and "
                    f"model.family={family.name} takes {f'1 to {most}' if most > 1 else most}."
                )
        return [prompt for prompt in prompts for _ in range(self.benchmark.images_per_prompt)]

    # What earlier stages left.

    @cached_property
    def set_settings(self) -> dict[str, Any]:
        """What all variants of the configured set of pictures share, as headers hold it."""
        return set_settings(self.config, self.benchmark, self.prompts)

    @property
    def set_folder(self) -> Path:
        """The folder of the configured set of pictures, with a folder for each variant."""
        return set_folder(self.folder / "images", self.config, self.set_settings)

    @property
    def scores_folder(self) -> Path:
        """Scores of the configured set of pictures; of all sets but the first of shapes in folders of their own."""
        return self._of_set("scores")

    @property
    def report_folder(self) -> Path:
        return self._of_set("report")

    def _of_set(self, kind: str) -> Path:
        name = self.set_folder.name
        return self.folder / kind if name == "shapes" else self.folder / kind / name

    @property
    def base(self) -> Path:
        """Where intervals, width sets, plugs and their costs lie: in this run, or in the one it is based on."""
        base = self.config.paths.base_run
        return self.folder if base is None else Path(base)

    @property
    def plan_path(self) -> Path:
        return self.base / "plan" / "plan.json"

    @property
    def costs_paths(self) -> tuple[Path, Path]:
        """Measured costs of plugs: where this run writes them, and where the run it is based on may have them."""
        name = "costs-removed.json" if self.config.distill.mode == "none" else "costs.json"
        return self.folder / "plan" / name, self.base / "plan" / name

    @property
    def plugs_folder(self) -> Path:
        return self.base / "plugs"

    @property
    def has_intervals(self) -> bool:
        """Whether intervals are given, or this run has detected some."""
        return resolve_intervals(self.config) is not None or self.plan_path.exists()

    @cached_property
    def intervals(self) -> Intervals:
        """The intervals given, or else those this run detected."""
        given = resolve_intervals(self.config)
        if given is not None:
            return given
        if not self.has_intervals:
            raise UsageError(
                "intervals are not given and this run has detected none: add 'stages=[probe,detect]' or intervals=."
            )
        plan = PruningPlan.load(self.plan_path)
        check_plan(plan, self.config, self.plan_path)
        return plan.intervals

    @property
    def layout(self) -> Layout:
        return Layout(self.config.width.text_output, self.config.width.keep_text_query)

    @property
    def width_path(self) -> Path:
        return self.base / "plan" / "width.json"

    @property
    def choice_path(self) -> Path:
        return self.folder / "plan" / "choice.json"

    @property
    def known_choice_path(self) -> Path:
        """The choice of this run's plan, or, without one, that of the run it is based on."""
        return self.choice_path if self.choice_path.exists() else self.base / "plan" / "choice.json"

    @cached_property
    def width(self) -> Width:
        """The width sets given, or else those this run selected."""
        given = resolve_width(self.config)
        if given is None:
            if not self.width_path.exists():
                raise UsageError("width=auto has selected nothing in this run yet: add 'stages=[width]'.")
            given = PruningPlan.load(self.width_path).width
        check_width(self.config, given, self.intervals)
        return given

    @property
    def probe_settings(self) -> dict[str, Any]:
        """Settings that probes are made from."""
        data = self.config.data
        calibration = {"seed": data.calibration_seed, "timesteps": data.timesteps, "shift": data.shift}
        return {
            "model": self.teacher.identity,
            "probe": identity(self.config.probe),
            "data": calibration | self.data.source_identity,
        }

    @property
    def probe_folder(self) -> Path:
        """Probes are the teacher's, not the run's: they lie in the cache, under what they were made from."""
        return Path(self.config.paths.cache_dir) / "probes" / Probes.header_for(self.probe_settings).fingerprint

    @property
    def num_layers(self) -> dict[str, int]:
        return num_layers(self.config)
