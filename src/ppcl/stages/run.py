"""One run: its configuration, its folder, and the teacher, loaded when a stage first asks for it."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from ppcl import __version__
from ppcl.artifacts import Header, Intervals, Probes, PruningPlan, Width, read_json, write_json
from ppcl.config import Config
from ppcl.errors import UsageError
from ppcl.launch import is_first, rank
from ppcl.layers import Layout
from ppcl.validation.model import model_folder, num_layers
from ppcl.validation.pruning import check_plan, check_width, resolve_intervals, resolve_width
from ppcl.validation.strategy import TRAINED, resolve_precision

PACKAGES = ("torch", "lightning", "diffusers", "transformers", "hydra-core", "safetensors", "numpy")
ENCODER_STAGES = {"cache", "generate", "evaluate", "export"}


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        # The ends tell files apart; reading all of 40 GB at each start would not be worth it.
        with file.open("rb") as handle:
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            digest.update(handle.read(1 << 20))
            handle.seek(max(0, file.stat().st_size - (1 << 20)))
            digest.update(handle.read())
    return digest.hexdigest()[:16]


class Run:
    """What every stage is given. Folders: `run.folder / "plan"` and so on, one per kind of artifact."""

    def __init__(self, config: Config, folder: Path, console: Console | None = None) -> None:
        self.config = config
        self.folder = folder
        self.console = console or Console()
        self.sharded = False

    def enter(self, stage: str) -> None:
        """Begin a stage: one that shards the teacher loads it for itself, and what comes after loads it whole."""
        sharded = self.config.strategy.kind == "fsdp" and stage in TRAINED
        if sharded or self.sharded:
            self.forget_pipeline()
        self.sharded = sharded

    def forget_pipeline(self) -> None:
        """Let the next one who asks load it."""
        vars(self).pop("pipeline", None)

    @property
    def writes(self) -> bool:
        """Whether this process writes what all ranks have made together."""
        return self.config.strategy.kind == "single" or is_first()

    def say(self, stage: str, text: str) -> None:
        self.console.print(f"[bold cyan]{stage:>9}[/]  {escape(text)}", highlight=False, soft_wrap=True)

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
    def family(self) -> Any:
        from ppcl.families import get_family

        return get_family(self.config.model.family, self.config.model.arch, self.config.model.sampling)

    @cached_property
    def device(self) -> Any:
        import torch

        wants_gpu = self.config.trainer.accelerator in ("auto", "gpu", "cuda")
        return torch.device("cuda" if wants_gpu and torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> Any:
        """Torch's name for what the teacher, plugs and results are in."""
        import torch

        return getattr(torch, self.config.model.dtype)

    @property
    def precision(self) -> str:
        """In which what learns computes."""
        return resolve_precision(self.config)

    @cached_property
    def model_identity(self) -> dict[str, Any]:
        """What tells this teacher from another: config and weights, in what an artifact is made from."""
        model, folder = self.config.model, model_folder(self.config.model)
        identity = {"family": model.family, "arch": model.arch, "dtype": model.dtype}
        if folder is None:
            return identity | {"path": model.path, "revision": model.revision}
        return identity | {"weights": _digest((folder / "transformer").glob("*.safetensors"))}

    @cached_property
    def encoder_identity(self) -> dict[str, Any]:
        """What tells this model's VAE and text encoder from another's; a folder may be without them."""
        model, folder = self.config.model, model_folder(self.config.model)
        if folder is None:
            return {"family": model.family, "path": model.path, "revision": model.revision}
        files = {p for kind in ("vae", "text_encoder*", "tokenizer*") for p in folder.glob(f"{kind}/*") if p.is_file()}
        return {"family": model.family} | ({"encoders": _digest(files)} if files else {})

    @cached_property
    def cache_header(self) -> Header:
        """What the cache of this data is made from; of one that is given, what it says."""
        from ppcl.data.sources import find_units
        from ppcl.stages.cache import source_header

        if self.config.data.cache is None:
            return source_header(self.config, find_units(self.config.data), self.encoder_identity)
        content = read_json(self.cache_folder / "cache.json", "data.cache:")
        header = Header(content["format"], content["made_from"], content["version"])
        there = self.encoder_identity
        made_by = header.made_from["model"]
        if there["family"] != made_by["family"] or ("encoders" in there and there != made_by):
            raise UsageError(
                f"data.cache={self.config.data.cache} was made by other encoders than model.path has, of a "
                f"{made_by['family']}: make one with this model."
            )
        return header

    @property
    def cache_folder(self) -> Path:
        if self.config.data.cache is not None:
            return Path(self.config.data.cache)
        return Path(self.config.paths.cache_dir) / "data" / self.cache_header.fingerprint

    @cached_property
    def data_identity(self) -> dict[str, Any]:
        """The training data, in what an artifact is made from."""
        data = self.config.data
        drawn = ("train_seed", "calibration_seed", "eval_seed", "caption_dropout", "timesteps", "shift")
        identity = {"name": data.name} | {key: getattr(data, key) for key in drawn}
        if data.name == "shapes":
            return identity
        return identity | {"cache": self.cache_header.fingerprint, "held_out": data.held_out}

    @cached_property
    def pipeline(self) -> Any:
        """The teacher's pipeline: frozen, in evaluation mode, on the run's device."""
        import torch
        from diffusers import DiffusionPipeline

        model = self.config.model
        source = model_folder(model) or model.path
        assert source is not None, "checked in config.check"
        try:
            left_out: dict[str, Any] = {}
            if self.config.data.name != "shapes" and not ENCODER_STAGES & {*self.config.stages}:
                index = DiffusionPipeline.load_config(source, revision=model.revision)
                components = {name for name, entry in index.items() if isinstance(entry, list)}
                left_out = dict.fromkeys(components - {"transformer", "scheduler"})
            if model.streaming:
                left_out["transformer"] = self._streamed_transformer(source)
            pipeline = DiffusionPipeline.from_pretrained(
                source, revision=model.revision, torch_dtype=self.dtype, **left_out
            )
        except OSError as error:
            reason = str(error.__cause__ or error).split("\n")[0]
            raise UsageError(
                f"model.path={model.path} could not be loaded ({reason}); give a pipeline folder, or a hub id in reach."
            ) from None
        pipeline.set_progress_bar_config(disable=True)
        if self.config.generate.offload == "none" and not self.sharded:
            pipeline.to(self.device)
        self._arrange_scheduler(pipeline)
        self.family.complete(pipeline)
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.eval().requires_grad_(False)
        return pipeline

    def _streamed_transformer(self, source: Path | str) -> Any:
        from ppcl.streaming import load_streamed

        if isinstance(source, str):
            from huggingface_hub import snapshot_download

            revision = self.config.model.revision
            source = Path(snapshot_download(source, revision=revision, allow_patterns="transformer/*"))
        return load_streamed(self.family, source / "transformer", self.device, self.dtype)

    def _arrange_scheduler(self, pipeline: Any) -> None:
        """`model.sampling.scheduler` over the scheduler's own settings."""
        overrides, scheduler = self.config.model.sampling.scheduler, pipeline.scheduler
        known = {key for key in scheduler.config if not key.startswith("_")}
        unknown = sorted(overrides.keys() - known)
        if unknown:
            raise UsageError(
                f"model.sampling.scheduler.{unknown[0]} is no setting of {type(scheduler).__name__}; "
                f"it has {', '.join(sorted(known))}."
            )
        if overrides:
            pipeline.scheduler = type(scheduler).from_config(scheduler.config, **overrides)

    @cached_property
    def scenes(self) -> list[Any]:
        """The benchmark's prompts, with what a picture of each must show."""
        from ppcl.benchmarks.shapes import evaluation_scenes

        config = self.config
        return evaluation_scenes(config.data.eval_seed, config.benchmark.prompts_per_category, self.family)

    def shared_stream(self, seed: int, batch_size: int) -> Any:
        """As trainings take it: of each batch the rows that are this rank's."""
        stream = self.stream(seed, batch_size)
        if self.config.strategy.kind != "single":
            stream.share = rank()
        return stream

    def stream(self, seed: int, batch_size: int) -> Any:
        """Batches of the configured data; those of the calibration seed are of samples kept from training."""
        from ppcl.data.cached import EMPTY, CachedStream, unit_record
        from ppcl.data.streams import ShapesStream

        data = self.config.data
        if data.name == "shapes":
            return ShapesStream(self.family, self.pipeline, data, seed, batch_size)
        folder = self.cache_folder
        missing = [unit for unit in self.cache_header.made_from["units"] if not (folder / unit_record(unit)).exists()]
        if missing or not (folder / EMPTY).exists():
            raise UsageError(
                f"{folder} lacks {missing[0] if missing else EMPTY}: run stages=[cache] first, to its end."
            )
        return CachedStream(self.family, folder, data, seed, batch_size, held_out=seed == data.calibration_seed)

    def to_device(self, batch: Any) -> Any:
        from lightning.fabric.utilities import move_data_to_device

        return move_data_to_device(batch, self.device)

    # What earlier stages left.

    @property
    def base(self) -> Path:
        """Where intervals, width sets, plugs and their costs lie: in this run, or in the one it is based on."""
        base = self.config.paths.base_run
        return self.folder if base is None else Path(base)

    @property
    def plan_path(self) -> Path:
        return self.base / "plan" / "plan.json"

    @property
    def costs_path(self) -> Path:
        return self.base / "plan" / "costs.json"

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
                "intervals are not given and this run has detected none: add stages=[probe,detect] or intervals=."
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

    @cached_property
    def width(self) -> Width:
        """The width sets given, or else those this run selected."""
        given = resolve_width(self.config)
        if given is None:
            if not self.width_path.exists():
                raise UsageError("width=auto has selected nothing in this run yet: add stages=[width].")
            given = PruningPlan.load(self.width_path).width
        check_width(self.config, given, self.intervals)
        return given

    @property
    def probe_settings(self) -> dict[str, Any]:
        data = self.config.data
        cached = {} if data.name == "shapes" else {"cache": self.cache_header.fingerprint, "held_out": data.held_out}
        return {
            "model": self.model_identity,
            "probe": asdict(self.config.probe),
            "data": {"seed": data.calibration_seed, "timesteps": data.timesteps, "shift": data.shift} | cached,
        }

    @property
    def probe_folder(self) -> Path:
        """Probes are the teacher's, not the run's: they lie in the cache, under what they were made from."""
        return Path(self.config.paths.cache_dir) / "probes" / Probes.header_for(self.probe_settings).fingerprint

    @property
    def num_layers(self) -> dict[str, int]:
        return num_layers(self.config)
