"""Measure full-size models with random weights on one GPU: steps of distillation, and of drawing with pruned models.

    python -m experiments.scale.gpu [--only PHASE ..] [--repeats 20] [--output gpu.json]

The default output is $OUT/gpu.json, or runs/bench/gpu.json where OUT is not set. If a phase fails, the file has its
error, and the other phases still run. `--tiny` runs everything on a CPU. `distill_streamed` first writes the teacher's
41 GB to --folder, and then reads its blocks from there.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import statistics
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from experiments.common import make_run
from experiments.scale.measure import StepTimes, fit, weight_bytes
from experiments.scale.streaming import write_teacher
from ppcl.artifacts.files import read_json, write_json
from ppcl.artifacts.plan import Intervals
from ppcl.config import DistillConfig
from ppcl.context import Run
from ppcl.data.batches import TrainingBatch
from ppcl.distill.depth import DepthDistillation
from ppcl.efficiency import interleaved_latency_ms, peak_memory_mb
from ppcl.layers import kept_layers
from ppcl.streaming import load_streamed
from ppcl.training.loop import compiled

CAP = 24 * 2**30
QWEN = ("model=qwen_image", "intervals=qwen_image_paper", "width=qwen_image_paper")
FLUX = ("model=flux_dev", "intervals=flux_dev_paper")
TEXT = {"qwen_image": 128, "flux": 512}  # tokens of a prompt; FLUX always has 512
# For `--tiny`: the same numbers of blocks, but heads of 16 channels and pictures of 64 x 64.
TINY = ("model.arch.attention_head_dim=16", "model.arch.num_attention_heads=2", "model.arch.joint_attention_dim=32")
TINY += (
    "model.arch.axes_dims_rope=[4,6,6]",
    "model.sampling.height=64",
    "model.sampling.width=64",
    "model.dtype=float32",
)

Figures = dict[str, Any]


class Bench:
    """Makes models and inputs on the device."""

    def __init__(self, tiny: bool, folder: Path | None = None, repeats: int = 20) -> None:
        self.tiny, self.folder = tiny, folder
        self.device = torch.device("cpu" if tiny else "cuda")
        self.repeats = 2 if tiny else repeats

    def run(self, *overrides: str) -> Run:
        return make_run("bench/gpu", *overrides, *(TINY if self.tiny else ()))

    def model(self, run: Run, model_class: Any, config: dict[str, Any]) -> Any:
        """Return a model with random weights, made directly on the device and in its own dtype."""
        before = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, run.config.model.dtype))
        try:
            with self.device:
                return model_class.from_config(config).eval().requires_grad_(False)
        finally:
            torch.set_default_dtype(before)

    def teacher(self, run: Run) -> Any:
        return self.model(run, run.family.transformer_class, run.config.model.arch)

    def streamed_teacher(self, run: Run) -> Any:
        """Return the teacher streamed from files, with two blocks at a time on the device. The files are kept."""
        assert self.folder is not None
        write_teacher(self.folder, run.config.model.arch)
        return load_streamed(run.family, self.folder / "transformer", self.device, run.teacher.dtype)

    def pruned(self, run: Run, intervals: Intervals, width: bool = False) -> Any:
        """Return the model pruned by these intervals and, with `width`, by the run's width sets."""
        family, arch = run.family, run.config.model.arch
        kept = {stack: kept_layers(arch[key], intervals.get(stack, [])) for stack, key in family.stacks.items()}
        config = arch | {key: len(kept[stack]) for stack, key in family.stacks.items()}
        if not width:
            return self.model(run, family.transformer_class, config)
        places = {
            stack: {kind: sorted(kept[stack].index(index) for index in sets[kind]) for kind in ("text", "ffn")}
            for stack, sets in run.width.items()
        }
        return self.model(run, family.width.transformer_class, config | family.width.config(places, run.layout))

    def batch(self, run: Run) -> TrainingBatch:
        """Return a batch of one picture and prompt, without padding."""
        arch, sampling, tokens = run.config.model.arch, run.config.model.sampling, TEXT[run.family.name]
        size = (sampling.height // 16, sampling.width // 16)
        options: Any = {"device": self.device, "dtype": getattr(torch, run.config.model.dtype)}
        latents, noise = torch.randn(2, 1, size[0] * size[1], arch["in_channels"], **options)
        conditions = {
            "prompt_embeds": torch.randn(1, tokens, arch["joint_attention_dim"], **options),
            "prompt_embeds_mask": torch.ones(1, tokens, dtype=torch.bool, device=self.device),
            "pooled_prompt_embeds": torch.randn(1, arch.get("pooled_projection_dim", 1), **options),
        }
        return run.family.training_batch(latents, conditions, noise, torch.full((1,), 0.5, **options), size)


def distill(bench: Bench, teacher: str) -> Figures:
    """Return the time and peak memory of a depth step that trains the student of the last interval.

    The teacher runs 58 of its 60 blocks for it. `teacher` says where its weights are:
    - `resident`: on the card, of which all memory may be used;
    - `streamed`: in files, read block by block; at most 24 GB of the card are used;
    - `offloaded`: in host memory, moved block by block by diffusers; at most 24 GB of the card are used.
    """
    run = bench.run(*QWEN)
    pair = run.intervals["transformer_blocks"][-1]
    model = bench.streamed_teacher(run) if teacher == "streamed" else bench.teacher(run)
    batch = bench.batch(run)
    if teacher == "offloaded":
        model.to("cpu")
    module = DepthDistillation(run.family, model, {"transformer_blocks": [pair]}, DistillConfig(), run.precision)
    capped = teacher != "resident"
    if not bench.tiny:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / total) if capped else 1.0)
    if teacher == "offloaded":  # after the student was made, so that the student is a plain copy
        model.enable_group_offload(
            bench.device, offload_type="block_level", num_blocks_per_group=1, use_stream=not bench.tiny
        )
    times = StepTimes(skip=1)
    try:
        fit(module, batch, 6, times, "cpu" if bench.tiny else "gpu")
        peak = 0 if bench.tiny else torch.cuda.max_memory_reserved()
    finally:
        if not bench.tiny:
            torch.cuda.set_per_process_memory_fraction(1.0)
    return {
        "interval": list(pair),
        "image_tokens": batch.target.shape[1],
        "teacher_gb": weight_bytes(model) / 1e9,
        "seconds_a_step": statistics.median(times.seconds),
        "peak_reserved_gb": peak / 1e9,
        "cap_gb": CAP / 1e9 if capped else None,
    }


def denoise(bench: Bench, run: Run, models: dict[str, nn.Module], compile: bool) -> Figures:
    """Return each model's latency and peak memory for a denoising step with guidance, and ratios to the first model."""
    inputs = bench.batch(run).inputs
    if "encoder_hidden_states_mask" in inputs:
        inputs["encoder_hidden_states_mask"] = None  # the pipeline does the same where nothing is padded
    passes = run.family.num_passes(run.config.model.sampling)

    def step(model: nn.Module) -> None:
        with torch.inference_mode():
            for _ in range(passes):
                model(**inputs)

    def peak(model: nn.Module) -> float:
        """Return this model's peak memory, without that of the other models on the device."""
        return peak_memory_mb(lambda: step(model), weight_bytes(model), bench.device)

    blocks = [block for model in models.values() for block in run.family.blocks(model).values()]
    with compiled(blocks if compile else ()):
        steps = {name: lambda model=model: step(model) for name, model in models.items()}
        latency = interleaved_latency_ms(steps, bench.repeats)
        memory = {} if compile and bench.tiny else {name: peak(model) for name, model in models.items()}
    parameters = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    found: Figures = {"passes": passes, "text_tokens": TEXT[run.family.name], "repeats": bench.repeats}
    for name, values in {"parameters": parameters, "latency_ms": latency, "peak_mb": memory}.items():
        first = next(iter(values.values()), None)
        found[name] = values
        found[f"{name}_ratio"] = {key: value / first for key, value in values.items()}
    return found


def qwen(bench: Bench, compile: bool) -> Figures:
    """Measure the paper's 12B and 10B models. The paper's latencies are 0.577 and 0.557 of the teacher's."""
    run = bench.run(*QWEN)
    teacher = bench.teacher(run)
    pruned = {"12B": False, "10B": True}  # one at a time beside the teacher, which fits on 80 GB

    def beside(name: str) -> Figures:
        return denoise(bench, run, {"base": teacher, name: bench.pruned(run, run.intervals, pruned[name])}, compile)

    return {name: beside(name) for name in pruned}


def flux(bench: Bench, compile: bool) -> Figures:
    """Measure a model like the paper's 8B, whose latency there is 0.748 of the teacher's.

    The paper does not say which blocks it removes. Every dual-stream interval and four single-stream ones leave 7.9B.
    """
    run = bench.run(*FLUX)
    intervals = run.intervals | {"single_transformer_blocks": run.intervals["single_transformer_blocks"][:4]}
    return denoise(bench, run, {"base": bench.teacher(run), "8B": bench.pruned(run, intervals)}, compile)


PHASES: dict[str, Callable[[Bench], Figures]] = {
    "distill_resident": lambda bench: distill(bench, "resident"),
    "distill_streamed": lambda bench: distill(bench, "streamed"),
    "distill_offloaded": lambda bench: distill(bench, "offloaded"),
    "qwen_image": lambda bench: qwen(bench, compile=False),
    "flux": lambda bench: flux(bench, compile=False),
    "qwen_image_compiled": lambda bench: qwen(bench, compile=True),
    "flux_compiled": lambda bench: flux(bench, compile=True),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--tiny", action="store_true", help="whether it runs; on a CPU")
    parser.add_argument("--repeats", type=int, default=20, help="timed denoising steps of each model")
    parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", "runs/bench")) / "gpu.json")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "ppcl-gpu-bench")
    chosen = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    bench = Bench(chosen.tiny, chosen.folder / ("tiny" if chosen.tiny else "full"), chosen.repeats)
    content = read_json(chosen.output, "The bench") if chosen.output.exists() else {}
    for name in chosen.only:
        try:
            content[name] = PHASES[name](bench)
        except Exception as error:
            traceback.print_exc()
            content[name] = {"failed": f"{type(error).__name__}: {error}"}
        gc.collect()
        if not chosen.tiny:
            torch.cuda.empty_cache()
            content["device"] = torch.cuda.get_device_name()
        print(name, content[name], flush=True)
        write_json(chosen.output, content, checked=False)


if __name__ == "__main__":
    main()
