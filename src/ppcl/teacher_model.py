"""The teacher of a run: its identity for fingerprints, and its pipeline, which is loaded on first use."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ppcl.config import Config
from ppcl.errors import UsageError
from ppcl.families.base import Family
from ppcl.stages import STAGES
from ppcl.validation.model import model_folder


class TeacherModel:
    """The configured teacher. Its pipeline is loaded on first use, with the parts that the present stage needs.

    Stages that need the same parts in the same memory share it. Outside of stages it is whole and on the device.

    `sharded` is true while a stage that shards the teacher over ranks (FSDP) runs. The pipeline is then loaded for that
    stage only, and it is not moved to the device.
    """

    def __init__(self, config: Config, family: Family, device: torch.device) -> None:
        self.config, self.family, self.device = config, family, device
        self.sharded = False
        self._transformer: torch.device | None = device  # None: it is not loaded
        self._encoders: torch.device | None = device  # VAE and text encoders

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the teacher, of plugs and of pruned models."""
        return getattr(torch, self.config.model.dtype)

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
        cached = data.name in ("webdataset", "folder")
        if data.name == "shapes" and (needs.data or fitted or stage == "plan"):
            encoders = "device"
        elif cached and stage == "evaluate":
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
        """The diffusers class of the teacher's pipeline; loads no weights."""
        import diffusers

        model = self.config.model
        source = model_folder(model) or model.path
        index = diffusers.DiffusionPipeline.load_config(source, revision=model.revision)
        return getattr(diffusers, index["_class_name"])

    @cached_property
    def scheduler_config(self) -> dict[str, Any]:
        """The config of the model's scheduler, with `model.sampling.scheduler`; without weights only the latter."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        model = self.config.model
        source = model_folder(model) or model.path
        own: dict[str, Any] = {}
        if source is not None:
            # It reads the file of any class of scheduler.
            own = FlowMatchEulerDiscreteScheduler.load_config(source, subfolder="scheduler", revision=model.revision)
        return dict(own) | model.sampling.scheduler

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The teacher's part of an artifact's fingerprint: config, dtype, and digest of the weights.

        Weights on the Hub are identified by `model.path` and `model.revision` instead.
        """
        model, folder = self.config.model, model_folder(self.config.model)
        identity = {"family": model.family, "arch": model.arch, "dtype": model.dtype}
        if folder is None:
            return identity | {"path": model.path, "revision": model.revision}
        return identity | {"weights": _digest((folder / "transformer").glob("*.safetensors"))}

    @cached_property
    def encoder_identity(self) -> dict[str, Any]:
        """The part of a cache's fingerprint for the VAE and text encoders: their digest, if the folder has any."""
        model, folder = self.config.model, model_folder(self.config.model)
        if folder is None:
            return {"family": model.family, "path": model.path, "revision": model.revision}
        files = {p for kind in ("vae", "text_encoder*", "tokenizer*") for p in folder.glob(f"{kind}/*") if p.is_file()}
        return {"family": model.family} | ({"encoders": _digest(files)} if files else {})

    @cached_property
    def pipeline(self) -> Any:
        """The teacher's pipeline: frozen, in evaluation mode, with the parts that the present stage needs.

        The other parts are None. Raises `UsageError` if it cannot be loaded.
        """
        from diffusers import DiffusionPipeline

        model = self.config.model
        source = model_folder(model) or model.path
        assert source is not None, "checked in validation"
        try:
            index = DiffusionPipeline.load_config(source, revision=model.revision)
            components = {name: entry for name, entry in index.items() if isinstance(entry, list)}
            places = {name: self._encoders for name in components if name not in ("transformer", "scheduler")}
            needless = {name for name, place in places.items() if place is None}
            needless |= {"transformer"} if self._transformer is None else set()
            # diffusers must be told, too, which components the folder does not have.
            left_out: dict[str, Any] = {
                name: None for name, entry in components.items() if name in needless or entry == [None, None]
            }
            if model.streaming and "transformer" not in needless:
                left_out["transformer"] = self._streamed_transformer()
            pipeline = DiffusionPipeline.from_pretrained(source, revision=model.revision, dtype=self.dtype, **left_out)
        except OSError as error:
            reason = _root(error)
            remedy = "give a pipeline folder, or a hub id in reach"
            if re.search(r"gated|\b40[13]\b", str(error)):
                remedy = f"accept the licence at https://huggingface.co/{model.path}, and log in by hf auth login"
            raise UsageError(f"model.path={model.path} could not be loaded ({reason}); {remedy}.") from None
        pipeline.set_progress_bar_config(disable=True)
        if self.config.generate.offload == "none" and not self.sharded:
            for name, part in pipeline.components.items():
                if isinstance(part, nn.Module):
                    part.to(self._transformer if name == "transformer" else self._encoders)
        self._arrange_scheduler(pipeline)
        self.family.complete(pipeline)
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False)
        return pipeline

    def own_files(self, component: str) -> Path:
        """Return the folder of a component of the teacher, which is downloaded if the teacher is on the Hub."""
        model = self.config.model
        folder = model_folder(model)
        if folder is None:
            from huggingface_hub import snapshot_download

            folder = Path(snapshot_download(str(model.path), revision=model.revision, allow_patterns=f"{component}/*"))
        return folder / component

    def _streamed_transformer(self) -> nn.Module:
        from ppcl.streaming import load_streamed

        return load_streamed(self.family, self.own_files("transformer"), self.device, self.dtype)

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


def _root(error: BaseException) -> str:
    """Return the first line of the first error that led to `error`, such as a connection that was refused."""
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return str(error).split("\n")[0]


def _digest(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for file in sorted(files):
        # A file's first and last megabyte tell it apart from others; reading all of 40 GB at each start takes too long.
        with file.open("rb") as handle:
            digest.update(f"{file.name} {file.stat().st_size}".encode())
            digest.update(handle.read(1 << 20))
            handle.seek(max(0, file.stat().st_size - (1 << 20)))
            digest.update(handle.read())
    return digest.hexdigest()[:16]
