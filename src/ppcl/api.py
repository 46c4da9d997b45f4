"""The Python entry: `ppcl.run`, `explain`, `load`, `teacher` and `sampling`. See each function's docstring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ppcl.artifacts.files import read_json
from ppcl.artifacts.plan import plug_name
from ppcl.command import as_overrides, compose, execute, prepare
from ppcl.config import STORED_VARIANTS
from ppcl.errors import UsageError
from ppcl.paths import ASSETS
from ppcl.quiet import quiet_messages
from ppcl.results import Stored
from ppcl.sentences import in_words

if TYPE_CHECKING:
    from ppcl.context import Run
    from ppcl.surgery.plugboard import Plugboard


def run(overrides: Sequence[str] | Mapping[str, Any] = (), *, quiet: bool = False) -> Results:
    """Run stages as `ppcl *overrides` does on the command line, and return what the run's folder then holds.

        results = ppcl.run(["experiment=demo", "name=mine"])
        results = ppcl.run({"run": "runs/mine", "stages": ["generate"], "generate": {"prompt": "a red circle"}})

    `overrides` are those of the command line, as a list of strings or as a mapping from keys to values. With `quiet`
    nothing is printed. Raises `UsageError` where the command line exits with 2. A sweep needs the command line.
    """
    given = as_overrides(overrides)
    with in_words():
        raw, folder = compose(given)
        if raw.explain:
            raise UsageError("explain=true makes no run whose results could be returned: call ppcl.explain instead.")
        execute(raw, given, folder, Console(quiet=True) if quiet else None)
    return Results(folder)


def explain(overrides: Sequence[str] | Mapping[str, Any] = ()) -> None:
    """Print how much memory, disk and time each stage of a command is estimated to need, and make nothing.

        ppcl.explain(["model=auto", "model.path=/models/mine", "stages=[probe,detect,depth]"])

    `overrides` are those of `ppcl.run`. Raises `UsageError` where the command itself would at its start.
    """
    given = [*as_overrides(overrides), "explain=true"]
    with in_words():
        raw, folder = compose(given)
        execute(raw, given, folder)


def load(folder: str | Path, **settings: Any) -> Any:
    """Load a folder that ppcl has written: `Results` of a run, or the diffusers pipeline of an export.

        results = ppcl.load("runs/demo")
        pipeline = ppcl.load("runs/demo/export")

    A pipeline is in the dtype of its files and on the CPU; `settings` go to `DiffusionPipeline.from_pretrained`.
    Raises `UsageError` for a folder that is neither.
    """
    folder = Path(folder)
    if (folder / "model_index.json").is_file():
        return _load_pipeline(folder, **settings)
    if not any((*folder.glob("config.yaml"), *folder.glob("*/config.yaml"))):
        raise UsageError(
            f"{folder} is neither the folder of a run, which has a config.yaml, nor of a pipeline, which has a "
            "model_index.json: give one, such as runs/demo or runs/demo/export."
        )
    results = Results(folder)
    if settings:
        raise UsageError(f"{next(iter(settings))}= is for the folder of a pipeline, and {folder} is that of a run.")
    return results


def teacher(name: str, **settings: Any) -> Any:
    """Return the loaded diffusers pipeline of a teacher that is shipped with ppcl.

        pipeline = ppcl.teacher("tiny_qwen_image")
        picture = pipeline("a red circle", **ppcl.sampling("tiny_qwen_image")).images[0]

    `settings` go to `DiffusionPipeline.from_pretrained`. Raises `UsageError`, which lists the names, for another name.
    """
    _check_teacher(name)
    return _load_pipeline(ASSETS / name, **settings)


def sampling(name: str, count: int = 1) -> dict[str, Any]:
    """Return how a shipped teacher draws `count` prompts: size, steps and guidance, as arguments of its pipeline."""
    _check_teacher(name)
    return _sampling(prepare([f"model={name}", "stages=[plan]"]), count)


def _check_teacher(name: str) -> None:
    names = sorted(path.parent.name for path in ASSETS.glob("*/model_index.json"))
    if name not in names:
        raise UsageError(f"{name!r} is no teacher that ppcl ships; there are {', '.join(names)}.")


def _sampling(run: Run, count: int) -> dict[str, Any]:
    return run.family.sampling_arguments(run.config.model.sampling, count)


def _load_pipeline(folder: Path, **settings: Any) -> Any:
    """Return the pipeline in `folder`, in the dtype that its transformer was saved in unless `settings` say another."""
    quiet_messages()
    from diffusers import DiffusionPipeline
    from safetensors import safe_open

    if not {"dtype", "torch_dtype"} & settings.keys():
        for file in sorted(folder.glob("transformer*/*.safetensors"))[:1]:
            with safe_open(file, framework="pt") as tensors:
                settings["dtype"] = tensors.get_tensor(next(iter(tensors.keys()))).dtype
    # diffusers has to be told which components a folder was saved without.
    index = read_json(folder / "model_index.json", "The pipeline")
    without = {name: None for name, entry in index.items() if entry == [None, None]}
    return DiffusionPipeline.from_pretrained(folder, **without | settings)


class Results(Stored):
    """Artifacts of a run, each read from the run's folder when it is asked for, and pipelines made of them.

    `folder` is the run's folder. Artifacts that the run has not made are None, or empty.
    """

    @property
    def residuals(self) -> dict[str, float]:
        """The share of each block's change that linear probes miss on held-out data, by `STACK.BLOCK.STREAM`.

        0: the block is linear. Empty if the probes are no longer in the cache.
        """
        path = self._open("teacher").probe_folder / "probes.json"
        return read_json(path, "The record", "probe")["residuals"] if path.is_file() else {}

    def sampling(self, count: int = 1) -> dict[str, Any]:
        """Return how this run draws `count` prompts: size, steps and guidance, as arguments of its pipeline."""
        return _sampling(self._open("teacher"), count)

    def pipeline(self, variant: str | None = None, *, teacher_above: float | None = None) -> Any:
        """Load the diffusers pipeline with a variant of the model in it.

        `variant` is `teacher`, or one of those that `stages=[generate]` draws, such as `ppcl-finetuned`. By default it
        is the newest result: the exported pipeline if there is one, else the furthest variant the run has come to.
        The pipeline is on the GPU if there is one. With `teacher_above`, the teacher draws in the variant's place at
        noise levels sigma above that; its weights are then in memory, too. Raises `UsageError` where the run has not
        made that variant.
        """
        if variant is None and teacher_above is None and self.export is not None:
            device = self._open("teacher").device
            return _load_pipeline(self.export).to(device)
        if variant is None:
            variant = self._furthest()
        if variant not in STORED_VARIANTS:
            raise UsageError(f"{variant!r} is no variant; there are {', '.join(STORED_VARIANTS)}.")
        run = self._open(variant, teacher_above)
        from ppcl.variants.switch import Switch
        from ppcl.variants.variants import variants_of

        (chosen,), plugs = variants_of(run, [variant])
        pipeline = run.teacher.pipeline
        if variant != "teacher":
            Switch(run, plugs, alone=True)(chosen, teacher_above)
        pipeline.set_progress_bar_config()  # diffusers' own default
        return pipeline

    def board(self) -> Plugboard:
        """Load the teacher's pipeline and put all of this run's plugs into it; the pipeline is `board.pipeline`."""
        from ppcl.surgery.plugboard import plug

        if self.plugs is None:
            raise UsageError(f"{self.folder} has no plugs; run 'stages=[depth]' or 'stages=[width]' in it first.")
        return plug(self.pipeline("teacher"), self.plugs)

    def _open(self, variant: str, teacher_above: float | None = None) -> Run:
        """Return the context in which this run draws `variant`."""
        asked: dict[str, Any] = {"run": str(self.folder), "stages": ["generate"], "generate.variants": [variant]}
        asked["generate.teacher_above"] = teacher_above
        return prepare(as_overrides(asked), Console(quiet=True))

    def _furthest(self) -> str:
        from ppcl.variants.variants import furthest

        return furthest(self._open("teacher"))

    def __repr__(self) -> str:
        """Return a line for every kind of artifact that there is."""
        lines = {}
        if self.plan is not None:
            pairs = [plug_name(stack, pair) for stack, found in self.plan.intervals.items() for pair in found]
            lines["plan"] = f"{len(pairs)} intervals: {', '.join(pairs) or 'none'}"
        if self.choice is not None:
            key, value, _ = self.choice.budget
            lines["choice"] = f"{len(self.choice.plugged)} plugs for budget.{key}={value}"
        for name in ("plugs", "finetuned", "quantized", "export", "report"):
            path = getattr(self, name)
            if path is not None:
                lines[name] = str(path)
        if self.images:
            lines["images"] = ", ".join(f"{name} ({len(paths)})" for name, paths in self.images.items())
        if self.scores:
            rows = (f"{name} {row.scores.overall:.3f}" if row.scores else name for name, row in self.scores.items())
            lines["scores"] = ", ".join(rows)
        head = f"Results of {self.folder}: model {self.config.model.name}, data {self.config.data.name}"
        return "\n".join([head, *(f"  {name:<10} {text}" for name, text in lines.items())])
