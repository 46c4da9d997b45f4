"""Pretraining of the embedded teachers by flow matching; the only stage that trains from nothing."""

from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from typing import Any, cast

import lightning as L
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ppcl.artifacts import Header, atomic_folder, is_current, read_json, write_json
from ppcl.data.batches import StepLoader, TrainingBatch
from ppcl.data.streams import ShapesStream
from ppcl.errors import UsageError
from ppcl.precision import computing
from ppcl.stages.run import Run
from ppcl.stages.training import check_resumable, discard_checkpoint, fit, split_for_muon
from ppcl.validation.model import local_folder


class Pretrain(L.LightningModule):
    """Flow matching with Muon on the blocks' matrices and AdamW on everything else.

    The learning rate warms up, stays, and falls linearly to zero over the last `decay` of the steps,
    which makes an average of the weights unnecessary.
    """

    def __init__(
        self,
        transformer: nn.Module,
        *,
        max_steps: int,
        muon_lr: float = 0.02,
        adam_lr: float = 2e-3,
        warmup_steps: int = 50,
        decay: float = 0.4,
        max_grad_norm: float = 1.0,
        precision: str = "32-true",
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["transformer"])
        self.transformer = transformer
        # Two optimisers take turns on one step, which Lightning leaves to manual optimisation.
        self.automatic_optimization = False

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        with computing(self.hparams["precision"], batch.sigmas.device):
            output = self.transformer(**batch.inputs)[0]
        loss = (batch.prediction(output) - batch.target).square().mean()
        if not torch.isfinite(loss):
            raise UsageError(
                f"pretrain.muon_lr={self.hparams['muon_lr']} and pretrain.adam_lr={self.hparams['adam_lr']} made the "
                f"loss {loss.item()} at step {self.global_step}; lower them. The last checkpoint is intact."
            )
        self.manual_backward(loss)
        nn.utils.clip_grad_norm_(self.transformer.parameters(), self.hparams["max_grad_norm"])
        muon, adam = cast(list, self.optimizers())
        muon.step()
        adam.optimizer.step()  # the bare optimiser: a second counted step would halve max_steps
        self.transformer.zero_grad()
        for scheduler in cast(list, self.lr_schedulers()):
            scheduler.step()
        self.log("pretrain/loss", loss, prog_bar=True)
        return loss.detach()

    def configure_optimizers(self) -> tuple[list, list]:
        hidden, rest = split_for_muon(self.transformer)
        muon = torch.optim.Muon(hidden, lr=self.hparams["muon_lr"], weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(rest, lr=self.hparams["adam_lr"], betas=(0.9, 0.95), fused=True)
        optimizers = [muon, adam]
        return optimizers, [torch.optim.lr_scheduler.LambdaLR(o, self._lr_factor) for o in optimizers]

    def _lr_factor(self, step: int) -> float:
        total = self.hparams["max_steps"]
        left = (total - step) / max(1.0, self.hparams["decay"] * total)
        return min(1.0, (step + 1) / self.hparams["warmup_steps"], max(0.0, left))


def teacher_header(run: Run) -> Header:
    """What a teacher is made from; one that it continues enters by its own fingerprint, not by its path."""
    config = run.config.pretrain
    settings = {k: v for k, v in asdict(config).items() if k != "checkpoint_every"}
    if config.init is not None:
        settings["init"] = read_json(local_folder(config.init) / "ppcl.json", "pretrain.init:")["fingerprint"]
    made_from = {
        "builder": run.config.model.builder,
        "seed": run.config.data.train_seed,
        "pretrain": settings,
        "data": run.data_identity,
    }
    return Header("ppcl.teacher", made_from)


def _start(run: Run) -> Any:
    """A pipeline whose transformer is to be trained: untrained, an earlier one, or another family's in its place."""
    config = run.config.pretrain
    build = import_module(f"ppcl.families.{run.config.model.builder}").build_pipeline
    layers = {} if config.num_layers is None else {"num_layers": config.num_layers}
    pipeline = build(run.config.data.train_seed, **layers)
    if config.init is None:
        run.family.initialize(pipeline.transformer)
        return pipeline
    earlier = DiffusionPipeline.from_pretrained(local_folder(config.init), torch_dtype=torch.float32)
    if type(earlier) is type(pipeline):
        return earlier  # with the text encoder that it has learned to read
    pipeline.transformer.load_state_dict(earlier.transformer.state_dict())
    return pipeline


def run(run: Run) -> None:
    config, folder = run.config.pretrain, run.folder / "teacher"
    header = teacher_header(run)
    if is_current(folder / "ppcl.json", header):
        run.say("pretrain", f"reused {folder}")
        return
    checkpoints = run.folder / "pretrain-checkpoint"
    check_resumable(checkpoints, header)
    pipeline = _start(run)
    run.family.complete(pipeline)
    stream = ShapesStream(run.family, pipeline, run.config.data, run.config.data.train_seed, config.batch_size)
    module = Pretrain(
        pipeline.transformer,
        max_steps=config.steps,
        muon_lr=config.muon_lr,
        adam_lr=config.adam_lr,
        warmup_steps=config.warmup_steps,
        decay=config.decay,
        precision=run.precision,
    )
    loader = StepLoader(stream, config.steps)
    blocks = run.family.blocks(pipeline.transformer).values()
    fit(run, "pretrain", module, loader, checkpoints, header, config.checkpoint_every, blocks)
    # Half the bytes, and no loss that a picture shows. The text encoder stays float32: what the
    # transformer has learned is to read just these embeddings.
    pipeline.transformer.to("cpu", torch.bfloat16)
    with atomic_folder(folder) as temporary:
        pipeline.save_pretrained(temporary)
        write_json(temporary / "ppcl.json", header.to_json())
    discard_checkpoint(run, checkpoints)
    run.say("pretrain", f"wrote {folder}")
