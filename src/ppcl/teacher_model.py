"""The teacher of a run: its pipeline, which is loaded on first use with the parts that a stage needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ppcl.artifacts.model_files import components_of, has_weights, variants_of
from ppcl.components import dtype_of
from ppcl.config import Config
from ppcl.errors import UsageError
from ppcl.families.base import Family
from ppcl.stages import STAGES
from ppcl.teacher_files import TeacherFiles, loading
from ppcl.validation.model import model_folder


class TeacherModel:
    """The configured teacher. Its pipeline is loaded on first use, with the parts that the present stage needs.

    Stages that need the same parts in the same memory share it. Outside of stages it is whole and on the device.

    `sharded` is true while a stage that shards the teacher over ranks (FSDP) runs. The pipeline is then loaded for that
    stage only, and it is not moved to the device.
    """

    def __init__(
        self,
        config: Config,
        family: Family,
        device: torch.device,
        results: Sequence[Path] = (),
        console: Console | None = None,
    ) -> None:
        self.config, self.family, self.device = config, family, device
        self.files = TeacherFiles(config, family, results, console or Console(quiet=True))
        self.sharded = False
        self._transformer: torch.device | None = device  # None: it is not loaded
        self._encoders: torch.device | None = device  # VAE and text encoders

    @property
    def component(self) -> str:
        """The name of the pipeline's component that is pruned, the teacher's transformer."""
        return self.files.component

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the teacher, of plugs and of pruned models."""
        return getattr(torch, self.config.model.dtype)

    def dtype_of(self, weight: str) -> torch.dtype:
        """Return the dtype of a weight with this name, in the model or in one of its blocks."""
        return dtype_of(self.files.transformer_class, weight, self.dtype)

    def enter(self, stage: str) -> None:
        """Prepare for a stage. The pipeline is dropped if the stage needs other parts of it, or shards the teacher."""
        if not STAGES[stage].weights and stage != "plan":
            return
        sharded = self.config.strategy.kind == "fsdp" and STAGES[stage].ranks == "train"
        places = self._places(stage)
        if sharded or self.sharded or places != (self._transformer, self._encoders):
            self.forget_pipeline()
        self.sharded, (self._transformer, self._encoders) = sharded, places

    def _places(self, stage: str) -> tuple[torch.device | None, torch.device | None]:
        """Return the devices that a stage needs the transformer, and the encoders, on; None for what it does not use.

        What it only reads or saves stays in host memory, where weights are mapped from their files.
        """
        needs, data = STAGES[stage], self.config.data
        transformer, encoders = needs.transformer, needs.encoders
        fitted = stage == "quantize" and self.config.quantize.rounding == "least_squares"
        if stage == "plan":  # to count needs no weights, but with a budget plugs are measured
            transformer = "device"
        if stage == "cache" and data.name == "prompts":  # it draws
            transformer = "device"
        if data.name == "shapes" and (needs.data or fitted or stage == "plan"):
            encoders = "device"
        elif data.stored and stage == "evaluate":
            encoders = "nowhere"  # it times a cached sample
        places: dict[str, torch.device | None] = {
            "nowhere": None,
            "host": torch.device("cpu"),
            "device": self.device,
        }
        return places[transformer], places[encoders]

    def forget_pipeline(self) -> None:
        """Drop the pipeline. It is loaded again on its next use."""
        vars(self).pop("pipeline", None)

    @property
    def pipeline_class(self) -> Any:
        """The diffusers class of the teacher's pipeline; loads no weights.

        `DiffusionPipeline` itself would load optional components that it is told to leave out.
        """
        import diffusers

        return getattr(diffusers, self.files.index["_class_name"], diffusers.DiffusionPipeline)

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        """The config of the model's scheduler, with `model.sampling.scheduler`; without weights only the latter."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        model = self.config.model
        source = model_folder(model) or model.pipeline
        own: dict[str, Any] = {}
        if source is not None:
            # It reads the file of any class of scheduler.
            with loading(model):
                own = FlowMatchEulerDiscreteScheduler.load_config(
                    source, subfolder="scheduler", revision=model.revision
                )
        return dict(own) | model.sampling.scheduler

    @property
    def identity(self) -> dict[str, Any]:
        """The teacher's part of an artifact's fingerprint; see `TeacherFiles.identity`."""
        return self.files.identity

    @property
    def encoder_identity(self) -> dict[str, Any]:
        """The part of a cache's fingerprint for the VAE and text encoders; see `TeacherFiles.encoder_identity`."""
        return self.files.encoder_identity

    @cached_property
    def pipeline(self) -> Any:
        """The teacher's pipeline: frozen, in evaluation mode, with the parts that the present stage needs.

        The other parts are None. Raises `UsageError` if it cannot be loaded.
        """
        components = self._components()
        places = {name: self._encoders for name in components if name not in (self.component, "scheduler")}
        needless = {name for name, place in places.items() if place is None}
        needless |= {self.component} if self._transformer is None else set()
        needless |= {name for name, entry in components.items() if entry == [None, None]}
        folder = self.files.folder(needless)
        # diffusers must be told, too, which components the folder does not have.
        left_out: dict[str, Any] = dict.fromkeys(needless)
        if self.component not in needless:
            self.files.check()
            weights = self.files.transformer
            if self.config.model.streaming:
                from ppcl.streaming import load_streamed

                variant = self.config.model.variant
                left_out[self.component] = load_streamed(self.family, weights, self.device, self.dtype, variant)
            elif weights != folder / self.component:  # it was made of other files
                left_out[self.component] = self.files.transformer_class.from_pretrained(weights, dtype=self.dtype)
        pipeline = self._load(folder, left_out)
        pipeline.set_progress_bar_config(disable=True)
        if self.config.generate.offload == "none" and not self.sharded:
            for name, part in pipeline.components.items():
                if isinstance(part, nn.Module):
                    part.to(self._transformer if name == self.component else self._encoders)
        self._arrange_scheduler(pipeline)
        self.family.complete(pipeline)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False)
        return pipeline

    @property
    def transformer(self) -> Any:
        """The transformer in the pipeline: the teacher's, or the variant that was put in its place."""
        return getattr(self.pipeline, self.component)

    @transformer.setter
    def transformer(self, model: nn.Module) -> None:
        setattr(self.pipeline, self.component, model)

    def decoder(self) -> Any:
        """Return a pipeline that has the VAE on the device, to turn latents into pictures during a training.

        It is the teacher's own if the present stage has encoders, else one of the VAE alone, which is loaded now.
        """
        if self.pipeline.vae is not None:
            return self.pipeline
        needless = self._components().keys() - {"vae", "scheduler"}
        found = self._load(self.files.folder(needless), dict.fromkeys(needless))
        found.vae.to(self.device).eval().requires_grad_(False)
        return found

    def _components(self) -> dict[str, list[Any]]:
        """Return the entries of the pipeline's components in its index: library and class, or None twice."""
        return components_of(self.files.index)

    def _load(self, folder: Path, given: Mapping[str, Any]) -> Any:
        """Load the pipeline, with the `given` components in place of those in its folder; None leaves one out."""
        given, kind = dict(given) | self._text_encoders(folder, given), self.pipeline_class
        settings = {"variant": self.config.model.variant, "dtype": self.dtype}
        with loading(self.config.model):
            try:
                pipeline = kind.from_pretrained(folder, **settings, **given)
            except (AttributeError, TypeError):  # some classes ask their processor for something when they are made
                processors = [name for name, part in given.items() if part is None and self._is_processor(name)]
                if not processors:
                    raise
                given = {name: part for name, part in given.items() if name not in processors}
                folder = self.files.folder(name for name, part in given.items() if part is None)
                pipeline = kind.from_pretrained(folder, **settings, **given)
        for name, part in pipeline.components.items():
            if isinstance(part, nn.Module) and part is not given.get(name):
                lacking = next((key for key, value in part.state_dict().items() if value.is_meta), None)
                if lacking is not None:
                    raise UsageError(
                        f"{folder / name} lacks {lacking}, which its config.json asks for: fetch it again."
                    )
        return pipeline

    def _is_processor(self, component: str) -> bool:
        """Return whether a component is a tokenizer, or another one that has a class but no weights."""
        found = self._class_of(component)
        return found is not None and not issubclass(found, nn.Module)

    def _class_of(self, component: str) -> Any:
        """Return the class of a component; None if it has none, or if its library is not installed."""
        library, kind = self._components()[component]
        return getattr(import_module(library), kind, None) if kind and find_spec(library) else None

    def _text_encoders(self, folder: Path, given: Mapping[str, Any]) -> dict[str, nn.Module]:
        """Load the components that are models of transformers, but those `given`.

        Raises `UsageError` if the files of one lack weights. transformers would take random numbers in their place.
        """
        import transformers

        found, variant = {}, self.config.model.variant
        for name, (library, kind) in self._components().items():
            if library != "transformers" or name in given or not has_weights(folder / name):
                continue
            known = variant if variant is not None and variant in variants_of(folder / name) else None
            with loading(self.config.model, f"{name} of "):
                found[name], info = getattr(transformers, kind).from_pretrained(
                    folder / name, dtype=self.dtype, variant=known, output_loading_info=True
                )
            lacking = min(info["missing_keys"], default=None)
            if lacking is not None:
                raise UsageError(f"{folder / name} lacks {lacking}, which its config.json asks for: fetch it again.")
        return found

    def check_encoding(self) -> None:
        """Load what prepares prompts and pictures, such as the tokenizer, to see that it loads.

        Takes a second, and loads no weights. Raises `UsageError` if a file is missing or damaged.
        """
        folder = self.files.folder([self.component])
        for name in self._components():
            if name == self.component or has_weights(folder / name):
                continue
            found = self._class_of(name)
            if found is not None:
                if not (folder / name).is_dir():
                    raise UsageError(f"{folder} lacks {name}/, which its model_index.json names: fetch it again.")
                with loading(self.config.model, f"{name} of "):
                    _check_vocabulary(found.from_pretrained(folder / name), folder / name)

    def _arrange_scheduler(self, pipeline: Any) -> None:
        """Override the scheduler's settings by `model.sampling.scheduler`; `UsageError` for one that it lacks."""
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


def _check_vocabulary(part: Any, folder: Path) -> None:
    """Raise `FileNotFoundError` if `part` has a tokenizer whose files are not in `folder`.

    transformers then makes one without words, to which all prompts are alike.
    """
    names = getattr(getattr(part, "tokenizer", part), "vocab_files_names", None)
    if not names:
        return
    parts = [name for kind, name in names.items() if kind in ("vocab_file", "merges_file")]
    whole = [names[kind] for kind in ("tokenizer_file",) if kind in names]
    missing = [name for name in parts if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in whole) and (missing or not parts):
        raise FileNotFoundError(f"{' or '.join([*whole, *missing[:1]])} is missing")
