"""The teacher of a run: its identity for fingerprints, and its pipeline, which is loaded on first use."""

from __future__ import annotations

import hashlib
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
    """The configured teacher. Its pipeline is loaded on first use and shared by all stages.

    `sharded` is true while a stage that shards the teacher over ranks (FSDP) runs. The pipeline is then loaded for that
    stage only, and it is not moved to the device.
    """

    def __init__(self, config: Config, family: Family, device: torch.device) -> None:
        self.config, self.family, self.device = config, family, device
        self.sharded = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the teacher, of plugs and of pruned models."""
        return getattr(torch, self.config.model.dtype)

    def enter(self, stage: str) -> None:
        """Prepare for a stage. The pipeline is dropped before and after a stage that shards the teacher."""
        sharded = self.config.strategy.kind == "fsdp" and STAGES[stage].ranks == "train"
        if sharded or self.sharded:
            self.forget_pipeline()
        self.sharded = sharded

    def forget_pipeline(self) -> None:
        """Drop the pipeline. It is loaded again on its next use."""
        vars(self).pop("pipeline", None)

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
        """The teacher's pipeline: frozen, in evaluation mode, on the run's device.

        On cached data, stages that encode nothing load it without VAE and text encoders. Raises `UsageError` if it
        cannot be loaded.
        """
        from diffusers import DiffusionPipeline

        model = self.config.model
        source = model_folder(model) or model.path
        assert source is not None, "checked in validation"
        try:
            left_out: dict[str, Any] = {}
            needless = self.config.data.name != "shapes" and not any(STAGES[s].encoders for s in self.config.stages)
            if needless or isinstance(source, Path):
                index = DiffusionPipeline.load_config(source, revision=model.revision)
                components = {name: entry for name, entry in index.items() if isinstance(entry, list)}
                kept = {"transformer", "scheduler"} if needless else components.keys()
                # diffusers must be told, too, which components the folder does not have.
                left_out = {name: None for name in components if name not in kept or components[name] == [None, None]}
            if model.streaming:
                left_out["transformer"] = self._streamed_transformer(source)
            pipeline = DiffusionPipeline.from_pretrained(source, revision=model.revision, dtype=self.dtype, **left_out)
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
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False)
        return pipeline

    def _streamed_transformer(self, source: Path | str) -> nn.Module:
        from ppcl.streaming import load_streamed

        if isinstance(source, str):
            from huggingface_hub import snapshot_download

            revision = self.config.model.revision
            source = Path(snapshot_download(source, revision=revision, allow_patterns="transformer/*"))
        return load_streamed(self.family, source / "transformer", self.device, self.dtype)

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
