"""Measure at which relative update one interval trains best, in models of different widths.

    python -m experiments.recipes.widths [--channels 64 128 256] [--steps 250] [--alone]
    python -m experiments.recipes.widths --block [--device cuda]

A rate that is stated as a relative update should suit every width. The first command trains a short-lived DiT of six
blocks for each width on the shapes world, and then distils one interval at several rates. `--block` does the same with
a random block of 3,072 channels whose weights have an RMS of 0.02, as those of real models do, for 20 steps: a step is
some seconds on a GPU and a minute on one CPU core. Rows go to widths.csv beside this file as they are measured, and
what it has is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import lightning as L
import torch
from diffusers import DiTTransformer2DModel
from torch import nn

from experiments.common import make_run
from experiments.recipes import report
from experiments.recipes.cells import HERE, commit
from experiments.recipes.table import Table
from ppcl.config import DistillConfig
from ppcl.context import Run
from ppcl.data.batches import StepLoader, TrainingBatch
from ppcl.data.streams import ShapesStream
from ppcl.distill.depth import DepthDistillation
from ppcl.distill.pretrain import Pretrain
from ppcl.families.dit.tiny import build_pipeline
from ppcl.training.optimizers import matrices, root_mean_square

CHANNELS = (64, 128, 256)
RATES = (0.00625, 0.0125, 0.025, 0.05, 0.1, 0.2)
BLOCK_RATES = (0.0125, 0.025, 0.05, 0.1, 0.2)
SEED = 10
KEYS = ("what", "channels", "steps", "batch_size", "relative_update", "seed")
COLUMNS = (*KEYS, "rms", "before", "after", "seconds", "shared", "date", "commit")
STACK = "transformer_blocks"

Batches = Callable[[int], TrainingBatch]


def transformer(channels: int, num_layers: int, head: int = 32) -> Any:
    """Return an untrained transformer of the embedded DiT's class, `channels` wide."""
    torch.manual_seed(SEED)
    config = dict(build_pipeline(SEED, 1).transformer.config)
    config |= {"num_attention_heads": channels // head, "attention_head_dim": head, "num_layers": num_layers}
    return DiTTransformer2DModel.from_config(config).eval()


def train(module: L.LightningModule, batches: Callable[[int], Any], steps: int, device: str) -> None:
    """Train `module` on batches 0 to `steps` - 1, without writing anything to disk."""
    trainer = L.Trainer(
        max_steps=steps,
        accelerator=device,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, StepLoader(batches, steps))


class Widths:
    """Trains teachers and students, and writes a row for each rate to `table`."""

    def __init__(self, run: Run, table: Table, device: str, shared: bool) -> None:
        self.run, self.table, self.device, self.shared = run, table, device, shared

    def batches(self, seed: int, batch_size: int) -> Batches:
        pipeline = build_pipeline(SEED, 1)
        stream = ShapesStream(self.run.family, pipeline, self.run.config.data, seed, batch_size)
        return lambda step: self.run.data.to_device(stream(step))

    def teacher(self, channels: int, steps: int, batch_size: int) -> nn.Module:
        """Return a teacher of six blocks after a short training on the shapes world."""
        model = transformer(channels, 6)
        self.run.family.initialize(model)
        batches = self.batches(0, batch_size)
        module = Pretrain(self.run.family, model, batches, max_steps=steps, muon_lr=0.005, adam_lr=1e-3)
        train(module, lambda step: step, steps, self.device)
        return model

    def try_rates(self, what: str, teacher: nn.Module, rates: tuple[float, ...], interval: tuple[int, int],
                  config: DistillConfig) -> None:  # fmt: skip
        """Distil `interval` of `teacher` once at every rate, and write the held-out errors before and after."""
        held_out = self.batches(1, config.batch_size)
        held_out_batches = [held_out(step) for step in range(4)]
        for rate in rates:
            settings = copy.copy(config)
            settings.relative_update = rate
            facts = {"what": what, "channels": teacher.config.num_attention_heads * teacher.config.attention_head_dim}
            facts |= {"steps": config.steps, "batch_size": config.batch_size, "relative_update": rate, "seed": SEED}
            if self.table.find(**facts):
                continue
            module = DepthDistillation(self.run.family, teacher, {STACK: [interval]}, settings)
            module.to(self.device)
            module.setup("fit")
            weights = list(matrices(self.run.family, module.parts.values()))
            size = sum(root_mean_square(weight) for weight in weights) / len(weights)
            before = module.heldout(held_out_batches)[0]["loss"]
            start = time.perf_counter()
            train(module, self.batches(SEED, config.batch_size), config.steps, self.device)
            seconds = time.perf_counter() - start
            module.to(self.device)
            module.setup("fit")
            after = module.heldout(held_out_batches)[0]["loss"]
            row = {"rms": size, "before": before, "after": after, "seconds": seconds, "shared": self.shared}
            print(self.table.add(facts | row | {"date": date.today(), "commit": commit()}), flush=True)


def real_block(channels: int) -> nn.Module:
    """Return two random blocks of so many channels after the first one; all matrices have an RMS of 0.02."""
    model = transformer(channels, 3, head=128)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(0.0, 0.02, generator=generator)
    return model


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--channels", nargs="*", type=int, default=list(CHANNELS))
    parser.add_argument("--steps", type=int, default=250, help="of the distillation at each rate")
    parser.add_argument("--teacher-steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--block", nargs="?", type=int, const=3072, help="a random block of so many channels instead")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--alone", action="store_true", help="rows say that nothing else ran on the machine")
    parser.add_argument("--output", type=Path, default=HERE / "widths.csv")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    run = make_run("recipes/widths", "model=tiny_dit", "data=shapes", "distill=tiny", "data.shift=0.75",
                   f"trainer.accelerator={'cpu' if given.device == 'cpu' else 'gpu'}")  # fmt: skip
    table = Table(given.output, COLUMNS, KEYS)
    widths = Widths(run, table, given.device, not given.alone)
    config = copy.copy(run.config.distill)
    config.steps, config.batch_size = given.steps, given.batch_size
    if given.block is not None:
        config.steps, config.batch_size, config.warmup_steps = 20, 8, 4
        widths.try_rates("random block", real_block(given.block).to(given.device), BLOCK_RATES, (1, 2), config)
    else:
        for channels in given.channels:
            teacher = widths.teacher(channels, given.teacher_steps, given.batch_size)
            widths.try_rates("trained", teacher, RATES, (2, 4), config)
    folder = given.output.parent
    found = report.neighbours(folder)
    print(found["widths"])
    report.fill(folder / "README.md", found)


if __name__ == "__main__":
    main()
