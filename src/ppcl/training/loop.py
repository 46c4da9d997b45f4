"""Runs a training with Lightning, with checkpoints from which it resumes bit-exactly."""

from __future__ import annotations

import logging
import pickle
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch import nn

from ppcl.artifacts.headers import Header, is_current
from ppcl.artifacts.locks import locked
from ppcl.config import PretrainConfig, TrainingConfig
from ppcl.context import Run
from ppcl.data.batches import StepLoader
from ppcl.errors import UsageError
from ppcl.launch import rank
from ppcl.parallel import barrier, together
from ppcl.precision import fast_products, same_bits
from ppcl.tracking.loggers import make_logger
from ppcl.training.checkpoints import CHECKPOINT, Checkpoints
from ppcl.training.cost import TrainingCost
from ppcl.training.drawing import Drawn, SamplePictures
from ppcl.training.progress import StepProgress
from ppcl.training.stops import Stop
from ppcl.training.strategies import SHARDED, discard_others, processes
from ppcl.training.watching import HeldOut, Watching

_MOST_GRAPHS = 64  # of the blocks of one class


def check_resumable(folder: Path, header: Header, *, sharded: bool = False) -> bool:
    """Return whether `folder` has a checkpoint of exactly this training.

    `sharded`: whether this training is sharded (`fsdp`). Sharded and other trainings cannot read each other's
        checkpoints. Raises `UsageError` for a checkpoint of other settings or of the other kind, and for a damaged one.
    """
    record = folder / "checkpoint.json"
    advice = f"go on with that setting, or delete {folder} to train anew"
    mine, other = (SHARDED, CHECKPOINT) if sharded else (CHECKPOINT, SHARDED)
    if not (folder / mine).exists() and not (folder / other).exists():
        return False  # a training that was killed before its first checkpoint leaves the record alone
    if not is_current(record, header, advice):
        return False
    if not (folder / mine).exists():
        written, asked = ("single or ddp", "fsdp") if sharded else ("fsdp", "single and ddp")
        raise UsageError(
            f"{folder} holds a checkpoint of strategy={written}, which {asked} cannot read: go on as it was begun, "
            f"with any number of ranks, or delete {folder} to train anew."
        )
    if sharded:
        return True
    if not _is_sound(folder / CHECKPOINT, (folder / CHECKPOINT).stat().st_mtime_ns):
        raise UsageError(f"{folder / CHECKPOINT} is damaged or no checkpoint: delete {folder} to train anew.")
    return True


@lru_cache(maxsize=4)
def _is_sound(checkpoint: Path, changed: int) -> bool:
    """Return whether a checkpoint is whole: the checksum of every part is compared, which torch does not do.

    `changed`: the time of the file's last change, for which the result is remembered.
    """
    try:
        with zipfile.ZipFile(checkpoint) as parts:
            return parts.testzip() is None
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError):
        return False


def fit(
    run: Run,
    stage: str,
    module: L.LightningModule,
    loader: StepLoader,
    folder: Path,
    header: Header,
    settings: TrainingConfig | PretrainConfig,
    blocks: Iterable[nn.Module],
    heldout: HeldOut | None = None,
    drawn: Drawn | None = None,
) -> None:
    """Train `module` for the steps of `loader`, resuming from the last checkpoint in `folder` if there is one.

    A training that is killed and started again ends with the same weights as an uninterrupted one: batches depend only
    on the step, and module, optimisers and step are restored together.

    `header`: identifies the training. It is stored with the checkpoints.
    `settings`: says when checkpoints are saved (`checkpoint_every`, `checkpoint_minutes`).
    `blocks`: the blocks that a step runs, which `trainer.compile` compiles for the duration of the training.
    `heldout`: measures held-out losses, which is done now and then (`watch`).
    `drawn`: the models that sample pictures are drawn with, which is also done now and then.

    SIGINT (Ctrl-C), SIGTERM, SIGUSR1 and SIGUSR2 end the training with `Stopped`, after a checkpoint of the running
    step. Raises `UsageError` if the training stops early, if the disk has no room for checkpoints, or as
    `check_resumable` does.
    """
    with _alone(run, stage, folder):
        resumable = _prepared(run, stage, folder, header)
        stop = Stop()
        pictures = None if heldout is None else SamplePictures(run, stage, header, drawn, _at_once(run, settings))
        watching = Watching(run, stage, header, settings.batch_size, heldout, pictures)
        # The cost first, so that it is of the steps alone.
        callbacks: list[Callback] = [TrainingCost(run.folder / "training" / f"{stage}.json"), watching]
        if run.config.trainer.progress:
            callbacks.append(StepProgress(stage, run.console, part=run.part))
        callbacks.append(Checkpoints(run, stage, folder, header, settings, stop))
        logger = make_logger(run, stage) if run.writes else False
        trainer = _trainer(run, loader.num_steps, folder, callbacks, logger)
        checkpoint = str(folder / CHECKPOINT) if resumable else None
        compiling = compiled(blocks if run.config.trainer.compile else ())
        products = fast_products(run.device, wanted=run.config.trainer.tf32)
        try:
            with stop, compiling, products, same_bits(run.device, wanted=run.config.trainer.deterministic):
                trainer.fit(module, loader, ckpt_path=checkpoint, weights_only=True)
        except SystemExit:  # Lightning raises it for a second Ctrl-C
            raise KeyboardInterrupt from None
        except pickle.UnpicklingError:  # which lists what torch.load would trust
            raise UsageError(
                f"{folder / CHECKPOINT} is damaged, or holds more than tensors and settings: delete {folder} to train "
                "anew."
            ) from None
        if stop.agreed:
            stop.finish(run, stage)
        if trainer.global_step < loader.num_steps:
            raise UsageError(f"{stage} stopped at step {trainer.global_step} of {loader.num_steps}.")


def _at_once(run: Run, settings: TrainingConfig | PretrainConfig) -> int:
    """Return how many samples of a step a rank passes at once."""
    ranks = 1 if run.config.strategy.kind == "single" else rank()[1]
    return max(1, settings.batch_size // ranks // getattr(settings, "accumulate", 1))


@contextmanager
def _alone(run: Run, stage: str, folder: Path) -> Iterator[None]:
    """Hold the lock of the checkpoint folder within the context; `UsageError` if another process trains in it."""
    with ExitStack() as locks:
        with together():
            if run.writes:
                what, remedy = f"{stage} is being trained in {folder.parent}", "wait for its end, or give another name="
                locks.enter_context(locked(folder.with_name(f".{folder.name}.lock"), what, remedy))
        yield


def _prepared(run: Run, stage: str, folder: Path, header: Header) -> bool:
    """Return whether the training resumes from a checkpoint in `folder`; delete what it cannot resume from."""
    resumable = check_resumable(folder, header, sharded=run.teacher.sharded)
    barrier()  # all ranks must have looked before rank 0 changes the folder
    if run.writes and resumable:
        discard_others(folder)
    elif run.writes:
        shutil.rmtree(folder, ignore_errors=True)  # a checkpoint without a record may have other settings
    barrier()
    if resumable:
        run.say(stage, f"resuming from the last checkpoint in {folder}")
    return resumable


def _trainer(run: Run, num_steps: int, folder: Path, callbacks: list[Callback], logger: Logger | bool) -> L.Trainer:
    """Return Lightning's trainer for so many steps, which leaves checkpoints, progress and signals to `callbacks`."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # hardware notes and tips
    trainer = L.Trainer(
        max_steps=num_steps,
        accelerator=run.config.trainer.accelerator,
        logger=logger,
        callbacks=callbacks,
        enable_checkpointing=False,  # Lightning's own are neither saved by the clock nor at signals
        enable_progress_bar=False,  # `StepProgress` counts steps instead
        enable_model_summary=False,
        log_every_n_steps=min(25, num_steps),
        default_root_dir=folder,
        **processes(run.config.strategy),
    )
    # Lightning's handler of SIGTERM broadcasts: with several ranks, in the middle of another collective operation.
    signals: Any = trainer._signal_connector
    signals.register_signal_handlers = lambda: None
    return trainer


@contextmanager
def compiled(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Compile the forward methods of `blocks` within the context. Afterwards they run eagerly, for any batch size.

    Only `forward` is compiled. `compile_repeated_blocks` of diffusers would also compile hooks, which change during a
    run.

    Sizes are dynamic, so that a graph serves all aspect ratios and text lengths. All blocks of a class share their
    graphs. There is one for each way of calling them: with and without gradients, autocast and a text mask, as the
    first block, and for each kind of pruned block. These can be more than the 8 after which torch would run a class
    eagerly.
    """
    eager = [(block, vars(block).get("forward")) for block in blocks]  # offloading may have replaced it
    for block, _ in eager:
        block.forward = torch.compile(block.forward, dynamic=True)
    try:
        with torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS) if eager else nullcontext():
            yield
    finally:
        for block, own in eager:
            del block.forward
            if own is not None:
                block.forward = own


def discard_checkpoint(run: Run, folder: Path) -> None:
    """Delete the checkpoint of a finished training, whose result has been written."""
    if run.writes:
        shutil.rmtree(folder, ignore_errors=True)
