"""The run that every stage works on: its settings, folder, console, teacher, data, and earlier results."""

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
from ppcl.config import Config, DataConfig
from ppcl.data.recording.training import data_of
from ppcl.data.training import TrainingData
from ppcl.errors import UsageError
from ppcl.families.base import Family
from ppcl.families.registry import get_family
from ppcl.families.traced.family import Traced
from ppcl.families.traced.known import read_trace, trace_path
from ppcl.launch import is_first, local_rank
from ppcl.layers import Layout
from ppcl.options import identity
from ppcl.pictures.sets import set_folder, set_settings
from ppcl.progress import Item, Part, heading, track, visible
from ppcl.teacher_model import TeacherModel
from ppcl.validation.model import num_layers
from ppcl.validation.outputs import UNSCORED, has_own_prompts
from ppcl.validation.pruning import check_plan, check_width, resolve_intervals, resolve_width
from ppcl.validation.strategy import resolve_precision

PACKAGES = ("torch", "lightning", "diffusers", "transformers", "hydra-core", "safetensors", "numpy")


class Run:
    """The context that is passed to every stage. Properties load what they return on first use.

    Each kind of artifact has its own folder in `run.folder`: `plan`, `plugs`, `finetuned`, `images`, `scores` and so
    on.
    """

    def __init__(self, config: Config, folder: Path, console: Console | None = None) -> None:
        self.config = config
        self.folder = folder
        self.console = console or Console()
        self._said: set[str] = set()
        self.image_folders: dict[str, Path] = {}  # of each variant, filled by `ppcl.pictures.images.drawings`
        self.part: Part | None = None  # of a stage that does several works of one size after each other
        self.wandb: Any = None  # Lightning's logger of the W&B run, opened by `ppcl.tracking.loggers`

    @property
    def writes(self) -> bool:
        """Whether this process writes the results of work that all ranks did together: rank 0 does."""
        return self.config.strategy.kind == "single" or is_first()

    def say(self, stage: str, text: str) -> None:
        """Print a line under the name of `stage`."""
        self.console.print(heading(stage) + escape(visible(text)), highlight=False, soft_wrap=True)

    def say_once(self, stage: str, text: str) -> None:
        """Print a line like `say`, unless it is empty or a stage of this command has printed the same."""
        if text and text not in self._said:
            self._said.add(text)
            self.say(stage, text)

    @property
    def progress_console(self) -> Console:
        """The console that progress bars are drawn on. With `trainer.progress=false` it is silent."""
        return self.console if self.config.trainer.progress else Console(quiet=True)

    def track(self, items: Iterable[Item], description: str, total: int | None = None) -> Iterable[Item]:
        """Yield `items` with a progress bar. `total` is their number, by default `len(items)`."""
        return track(items, description, total, console=self.progress_console)

    def record_versions(self) -> None:
        """Write `versions.json`, with the versions of Python, ppcl and the main libraries."""
        found = {"ppcl": __version__, "python": platform.python_version()}
        for name in PACKAGES:
            try:
                found[name] = version(name)
            except PackageNotFoundError:
                found[name] = "unknown"
        write_json(self.folder / "versions.json", found)

    @cached_property
    def family(self) -> Family:
        """The model family, which knows the transformer's blocks and inputs."""
        model = self.config.model
        family = get_family(model.family, model.arch, model.sampling, model.categories)
        if isinstance(family, Traced):
            path = trace_path(self.config.paths.cache_dir, model.component, family.facts.transformer, family.arch)
            if (trace := read_trace(path)) is not None:
                family.adopt(trace)
        return family

    @cached_property
    def device(self) -> torch.device:
        """The device of the teacher: the GPU if there is one and `trainer.accelerator` allows it, else the CPU.

        Each rank that a launcher has started on a machine has a GPU of its own.
        """
        wants_gpu = self.config.trainer.accelerator in ("auto", "gpu", "cuda")
        return torch.device("cuda", local_rank()[0]) if wants_gpu and torch.cuda.is_available() else torch.device("cpu")

    @cached_property
    def teacher(self) -> TeacherModel:
        """The teacher. Its weights are loaded when its pipeline is first used."""
        results = (self.folder, *((self.base,) if self.base != self.folder else ()))
        return TeacherModel(self.config, self.family, self.device, results, self.progress_console)

    @cached_property
    def data(self) -> TrainingData:
        """The training and held-out batches."""
        return data_of(self.config, self.teacher)

    @property
    def precision(self) -> str:
        """The Lightning precision of training, `32-true` or `bf16-mixed`."""
        return resolve_precision(self.config)

    @cached_property
    def benchmark(self) -> Benchmark:
        """The configured benchmark. Pictures of the user's own prompts have no score, only distances to the teacher."""
        name, settings = self.config.benchmark.name, self.config.benchmark.settings
        if has_own_prompts(self.config) and name not in UNSCORED:
            name, settings = "fidelity", {}
        if name in UNSCORED:
            settings = {"images_per_prompt": self.config.generate.num_images} | settings
        return load_benchmark(name, settings)

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The prompt of each picture, in drawing order; a prompt comes once for each of its pictures.

        Raises `UsageError` if the benchmark has no prompts for this model, or gives a wrong number of pictures with
        one.
        """
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

    # Results of earlier stages.

    @cached_property
    def set_settings(self) -> dict[str, Any]:
        """The settings that all variants of the configured set of pictures share, as their headers store them."""
        return set_settings(self.config, self.benchmark, self.prompts)

    @property
    def set_folder(self) -> Path:
        """The folder of the configured set of pictures. It has one folder for each variant."""
        return set_folder(self.folder / "images", self.config, self.set_settings)

    @property
    def scores_folder(self) -> Path:
        """The scores of the configured set: `scores/` for a run's first set, `scores/SET` for all others."""
        return self._of_set("scores")

    @property
    def report_folder(self) -> Path:
        """The report on the configured set: `report/` for a run's first set, `report/SET` for all others."""
        return self._of_set("report")

    def _of_set(self, kind: str) -> Path:
        name = self.set_folder.name
        plain = name in ("shapes", "captions")  # the first set of the shapes benchmark, or of held-out captions
        return self.folder / kind if plain else self.folder / kind / name

    @property
    def base(self) -> Path:
        """The folder with the intervals, width sets, plugs and costs to use: `paths.base_run`, or this run's folder."""
        base = self.config.paths.base_run
        return self.folder if base is None else Path(base)

    @property
    def plan_path(self) -> Path:
        """The plan of the detected intervals, in this run or in `paths.base_run`."""
        return self.base / "plan" / "plan.json"

    @property
    def costs_paths(self) -> tuple[Path, Path]:
        """The file that this run writes measured costs to, and the file that `paths.base_run` may have them in."""
        name = "costs-removed.json" if self.config.distill.mode == "none" else "costs.json"
        return self.folder / "plan" / name, self.base / "plan" / name

    @property
    def plugs_folder(self) -> Path:
        """The folder of the trained students and projectors, in this run or in `paths.base_run`."""
        return self.base / "plugs"

    @property
    def has_intervals(self) -> bool:
        """Whether the configuration gives intervals, or this run has detected some."""
        return resolve_intervals(self.config) is not None or self.plan_path.exists()

    @cached_property
    def intervals(self) -> Intervals:
        """The intervals given in the configuration, else those that this run has detected.

        Raises `UsageError` if there are none, or if the plan on disk is for another model.
        """
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
        """The structure of blocks that are pruned in width."""
        return Layout(self.config.width.text_output, self.config.width.keep_text_query)

    @property
    def width_path(self) -> Path:
        """The plan with the width sets, in this run or in `paths.base_run`."""
        return self.base / "plan" / "width.json"

    @property
    def choice_path(self) -> Path:
        """The file that `stages=[plan]` writes the plugs chosen for the budget to."""
        return self.folder / "plan" / "choice.json"

    @property
    def known_choice_path(self) -> Path:
        """The plan's choice in this run, or if there is none, that of the run in `paths.base_run`."""
        return self.choice_path if self.choice_path.exists() else self.base / "plan" / "choice.json"

    @cached_property
    def width(self) -> Width:
        """The width sets given in the configuration, else those that this run has selected.

        Raises `UsageError` if none have been selected yet, or if they do not fit the intervals.
        """
        given = resolve_width(self.config)
        if given is None:
            if not self.width_path.exists():
                raise UsageError("width=auto has selected nothing in this run yet: add 'stages=[width]'.")
            given = PruningPlan.load(self.width_path, stage="width").width
        check_width(self.config, given, self.intervals)
        return given

    @property
    def probe_settings(self) -> dict[str, Any]:
        """Everything that the probes depend on, as their header stores it."""
        data = self.config.data
        calibration = {"seed": data.calibration_seed} | self.data.levels
        if data.caption_dropout != DataConfig.caption_dropout:  # probes of earlier versions do not say it
            calibration["caption_dropout"] = data.caption_dropout
        if data.stored:  # earlier versions fitted them to held-out samples
            calibration["fitted"] = "training"
        return {
            "model": self.teacher.identity,
            "probe": identity(self.config.probe),
            "data": calibration | self.data.source_identity,
        }

    @property
    def probe_folder(self) -> Path:
        """The folder of the probes: in the cache, under their fingerprint, since all runs on a teacher share them."""
        return Path(self.config.paths.cache_dir) / "probes" / Probes.header_for(self.probe_settings).fingerprint

    @property
    def num_layers(self) -> dict[str, int]:
        """The number of blocks of the teacher, by block stack."""
        return num_layers(self.config)
