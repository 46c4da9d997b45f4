"""What every trained stage shares: Lightning's trainer, loggers, and checkpoints that resume exactly."""

from __future__ import annotations

import logging
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, WandbLogger
from torch import nn

from ppcl.artifacts import Header, fingerprint, is_current, write_json
from ppcl.callbacks.cost import TrainingCost
from ppcl.callbacks.progress import StepProgress
from ppcl.data.batches import StepLoader
from ppcl.errors import UsageError
from ppcl.parallel import barrier
from ppcl.stages.run import Run
from ppcl.stages.strategies import SHARDED, processes


def make_logger(run: Run, stage: str) -> Logger | bool:
    """The logger that `logger=` names; W&B gets the resolved configuration, and a run per folder and stage."""
    settings = run.config.logger
    if settings.kind == "none":
        return False
    if settings.kind == "csv":
        return CSVLogger(run.folder, name=f"logs/{stage}")
    logger = WandbLogger(
        project=settings.project,
        name=f"{run.config.name}/{stage}",
        save_dir=str(run.folder),
        mode=settings.mode,
        id=fingerprint({"folder": str(run.folder.resolve()), "stage": stage}),
        resume="allow",
    )
    logger.experiment.config.update(asdict(run.config), allow_val_change=True)
    return logger


def finish_logger(logger: Logger | bool) -> None:
    """Close a logger for good: W&B would give the next job of a sweep the same run."""
    if isinstance(logger, WandbLogger):
        logger.experiment.finish()


def check_resumable(folder: Path, header: Header, *, sharded: bool = False) -> bool:
    """Whether `folder` holds a checkpoint of just this training; `UsageError` if of another one.

    `sharded`: of a training that shards, which no other can read, nor it theirs.
    """
    record = folder / "checkpoint.json"
    if not is_current(record, header):
        return False
    mine, other = (SHARDED, "last.ckpt") if sharded else ("last.ckpt", SHARDED)
    if not (folder / mine).exists():
        if (folder / other).exists():
            written, asked = ("single or ddp", "fsdp") if sharded else ("fsdp", "single and ddp")
            raise UsageError(
                f"{folder} holds a checkpoint of strategy={written}, which {asked} cannot read: go on as it was begun, "
                f"with any number of ranks, or delete {folder} to train anew."
            )
        return False
    if sharded:
        return True
    if not zipfile.is_zipfile(folder / "last.ckpt"):
        raise UsageError(f"{folder / 'last.ckpt'} is truncated or no checkpoint: delete {folder} to train anew.")
    return True


def fit(
    run: Run,
    stage: str,
    module: L.LightningModule,
    loader: StepLoader,
    folder: Path,
    header: Header,
    checkpoint_every: int,
    blocks: Iterable[nn.Module],
) -> None:
    """Train `module` for the loader's steps, from the last checkpoint in `folder` if there is one.

    A run killed at any moment and started again ends with the weights of one never interrupted:
    batches depend on the step alone, and model, optimisers and the step are restored together.
    `blocks` are those that a step runs: `trainer.compile` compiles them for as long as the training lasts.
    """
    resumable = check_resumable(folder, header, sharded=run.sharded)
    barrier()  # before the first rank changes what others look at
    if run.writes:
        if not resumable:
            shutil.rmtree(folder, ignore_errors=True)  # a checkpoint nobody vouches for is not resumed
        write_json(folder / "checkpoint.json", header.to_json())
    barrier()
    if resumable:
        run.say(stage, f"resuming from {folder / 'last.ckpt'}")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)  # hardware notes and tips
    callbacks: list[Callback] = [
        ModelCheckpoint(
            folder,
            save_top_k=0,
            save_last=True,
            every_n_train_steps=checkpoint_every,
            enable_version_counter=False,
        )
    ]
    callbacks.append(TrainingCost(run.folder / "training" / f"{stage}.json"))
    if run.config.trainer.progress:
        callbacks.append(StepProgress(stage, run.console))
    logger = make_logger(run, stage) if run.writes else False
    trainer = L.Trainer(
        max_steps=loader.num_steps,
        accelerator=run.config.trainer.accelerator,
        logger=logger,
        callbacks=callbacks,
        enable_progress_bar=False,  # ours counts steps
        enable_model_summary=False,
        log_every_n_steps=min(25, loader.num_steps),
        default_root_dir=run.folder,
        **processes(run.config.strategy),
    )
    checkpoint = str(folder / "last.ckpt") if resumable else None
    try:
        with compiled(blocks if run.config.trainer.compile else ()):
            trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True)
    except SystemExit:  # how Lightning passes Ctrl-C on
        raise KeyboardInterrupt from None
    finally:
        finish_logger(logger)
    if trainer.global_step < loader.num_steps:
        raise UsageError(f"{stage} stopped at step {trainer.global_step} of {loader.num_steps}.")


@contextmanager
def compiled(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """`blocks` with compiled forwards, eager again afterwards, where batches of every size are drawn.

    Only the forwards: `compile_repeated_blocks` compiles the hooks of a block too, and taps come and go.
    """
    eager = [(block, vars(block).get("forward")) for block in blocks]  # offloading has put its own there
    for block, _ in eager:
        block.forward = torch.compile(block.forward)
    try:
        yield
    finally:
        for block, own in eager:
            del block.forward
            if own is not None:
                block.forward = own


def discard_checkpoint(run: Run, folder: Path) -> None:
    """Remove a finished training's checkpoint: its result is on disk as an artifact by now."""
    if run.writes:
        shutil.rmtree(folder, ignore_errors=True)


def split_for_muon(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The matrices of attention and FFNs, which Muon is made for, and all others that are trained.

    Modulations and what embeds for them (DiT: in every block) are of the others: a label's row gets a step only now and
    then, and Muon would make it as large as a whole matrix's.
    """
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        modulation = "_mod." in name or ".norm" in name
        matrix = parameter.ndim == 2 and "_blocks." in name and not modulation
        (hidden if matrix else rest).append(parameter)
    return hidden, rest


def cosine_with_warmup(step: int, *, warmup: int, total: int, floor: float) -> float:
    """Learning-rate factor: linear to 1 over `warmup` steps, then half a cosine down to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item())
