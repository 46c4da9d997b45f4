"""Compare the memory plan with the live bytes of real steps, on blocks of Qwen-Image's real size.

The plan works by dry runs, in which tensors have no data. Here the same functions (`ppcl.memory.dry`) run with data:
two blocks of 3,072 channels in bfloat16, and one sample of 1328x1328 with 300 text tokens. The real VAE class encodes
and decodes one picture. Weights and inputs are random: values do not change what is alive.

    python -m experiments.scale.real_block                      # all stages, an hour on a core, 12 GB
    python -m experiments.scale.real_block depth --size 512     # one of them, at a smaller size
    python -m experiments.scale.real_block --device cuda        # a minute on a GPU

On a GPU the bytes are those of torch's allocator, with what kernels allocate for themselves. Every stage is written to
`real_block.json`, or `real_block_cuda.json`, as soon as it is measured.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._pytree import tree_leaves

from ppcl.artifacts.files import read_json, write_json
from ppcl.command import prepare
from ppcl.context import Run
from ppcl.data.batches import TrainingBatch
from ppcl.efficiency import LiveBytes
from ppcl.memory import dry
from ppcl.memory.plan import Plan

HERE = Path(__file__).parent
SEED = 0
STACK = "transformer_blocks"
# One sample, two blocks. Of width distillation, a text stream and an FFN.
SETTINGS = [
    "model=qwen_image", "model.arch.num_layers=2", "model.sampling.max_sequence_length=300", "explain=true",
    "probe.num_batches=1", "probe.num_heldout_batches=1", "intervals.transformer_blocks=[[0,1]]",
    *(f"{key}batch_size=1" for key in ("probe.", "distill.", "finetune.", "generate.", "data.encode_")),
]  # fmt: skip
MORE = {"finetune": ["finetune.lora_rank=16"]}
TINY = ["model.arch.num_attention_heads=2", "model.arch.attention_head_dim=32", "model.arch.axes_dims_rope=[8,12,12]"]


@contextmanager
def with_data(run: Run) -> Iterator[None]:
    """Give new modules and tensors the teacher's dtype in the context; in a dry run's place, they have data."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(run.teacher.dtype)
    try:
        with Recorded.device:
            yield
    finally:
        torch.set_default_dtype(before)


class Recorded(LiveBytes):
    """Keeps every recorder that was used. On a GPU it asks the allocator."""

    device = torch.device("cpu")
    found: list[LiveBytes] = []

    def __enter__(self) -> Any:
        self.found.append(self)
        if self.device.type == "cpu":
            return super().__enter__()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self.before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cpu":
            super().__exit__(*error)
        else:
            self.peak = torch.cuda.max_memory_allocated() - self.before


def measured(step: Callable[[], object]) -> list[LiveBytes]:
    """Run a function of `ppcl.memory.dry` with data; return its recorders."""
    Recorded.found.clear()
    torch.manual_seed(SEED)
    with (
        patch.object(dry, "without_data", with_data),
        patch.object(dry, "LiveBytes", Recorded),
        patch.object(dry, "blank_batch", partial(random_batch, dry.blank_batch)),
    ):
        step()
    return list(Recorded.found)


def random_batch(blank_batch: Callable[..., TrainingBatch], *arguments: Any) -> TrainingBatch:
    """Return a blank batch with random numbers in it: of zeros, normal equations have no solution."""
    batch = blank_batch(*arguments)
    for value in tree_leaves((batch.inputs, batch.target)):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.device.type != "meta":
            value.normal_()
    return batch


def of_probes(run: Run) -> dict[str, tuple[float, float]]:
    """Return planned and measured bytes of probes, of one batch to fit and one held out, without weights."""
    arguments = run, run.config.probe, 2
    (recorded,) = measured(lambda: dry.probe_peak(*arguments))
    return {"probe": (dry.probe_peak(*arguments), recorded.peak)}


def of_depth(run: Run) -> dict[str, tuple[float, float]]:
    """Return planned and measured bytes of a step of depth distillation, without weights and optimiser states."""
    arguments = run, run.config.distill, [STACK], 1
    (recorded,) = measured(lambda: dry.depth_peak(*arguments))
    return {"depth": (dry.depth_peak(*arguments), recorded.peak)}


def of_width(run: Run) -> dict[str, tuple[float, float]]:
    """Return the same for a step of width distillation, of a text stream and of an FFN."""
    found = {}
    for kind in ("text", "ffn"):
        arguments = run, run.config.distill, STACK, [kind], 1
        (recorded,) = measured(lambda arguments=arguments: dry.width_peak(*arguments))
        found[f"width, {kind}"] = (float(dry.width_peak(*arguments)), float(recorded.peak))
    return found


def of_finetune(run: Run) -> dict[str, tuple[float, float]]:
    """Return the same for a step of a LoRA's fine-tuning, with a teacher and a student of two blocks each."""
    arguments = run, run.config.finetune, {STACK: 2}, 1
    (recorded,) = measured(lambda: dry.finetune_peak(*arguments))
    return {"finetune": (dry.finetune_peak(*arguments), recorded.peak)}


def of_vae(run: Run) -> dict[str, tuple[float, float]]:
    """Return planned and measured bytes of encoding and of decoding one picture, without the VAE's weights."""
    _, encoding, decoding = dry.vae_peaks(run, 1)
    one, other = measured(lambda: dry.vae_peaks(run, 1))
    return {"encode": (encoding, one.peak), "decode": (decoding, other.peak)}


def resident(kind: str) -> int:
    """Return the bytes of this process that are in memory now (`VmRSS`), or were at most (`VmHWM`)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(kind)).split()[1])


PARTS = {"probe": of_probes, "finetune": of_finetune, "depth": of_depth, "width": of_width, "vae": of_vae}


def compare(part: str, size: int, more: list[str]) -> dict[str, dict[str, Any]]:
    """Return what was planned and what was alive in GB, for a part of `PARTS` at `size` x `size` pixels."""
    sides = [f"model.sampling.{side}={size}" for side in ("height", "width")]
    stage = {"vae": "cache", "width": "depth"}.get(part, part)
    device = "trainer.accelerator=auto" if Recorded.device.type == "cuda" else "trainer.accelerator=cpu"
    run = prepare([*SETTINGS, *sides, *MORE.get(part, []), *more, device, f"stages=[{stage}]"])
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    start, before = time.perf_counter(), resident("VmRSS")
    found = PARTS[part](run)
    facts = {
        "pixels": size,
        "tokens": dry.stream_bytes(run, 1) // (Plan(run)._side * run.teacher.dtype.itemsize),
        "seed": SEED,
        "date": datetime.now(UTC).date().isoformat(),
        "seconds": time.perf_counter() - start,
        "process_gb": (resident("VmHWM") - before) / 1e9,  # weights and the kernels' own buffers included
    }
    return {
        name: {"planned_gb": planned / 1e9, "measured_gb": alive / 1e9, "ratio": planned / alive} | facts
        for name, (planned, alive) in found.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all of them, if none is named")
    parser.add_argument("--size", type=int, default=1328, help="pixels of the picture's sides")
    parser.add_argument("--tiny", action="store_true", help="narrow blocks: whether it runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--output", type=Path)
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    Recorded.device = torch.device(chosen.device)
    output = chosen.output or HERE / ("real_block.json" if chosen.device == "cpu" else "real_block_cuda.json")
    for part in chosen.parts or PARTS:
        found = compare(part, chosen.size, TINY if chosen.tiny else [])
        print(json.dumps(found), flush=True)
        before = read_json(output, "The record") if output.exists() else {}
        write_json(output, before | found, checked=False)


if __name__ == "__main__":
    main()
