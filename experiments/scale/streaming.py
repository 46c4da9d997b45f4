"""Measure the peak resident memory of stages with a streamed teacher.

`experiments.scale.run --only stream` measures how it grows with the number of blocks. The full-size model, with 20
billion parameters, has a command of its own, which writes 41 GB to FOLDER:

    python -m experiments.scale.streaming FOLDER
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel

from ppcl.artifacts.files import write_json
from ppcl.artifacts.headers import Header
from ppcl.artifacts.tensors import write_tensors
from ppcl.data.cached import EMPTY, unit_record
from ppcl.families.qwen_image.tiny import build_pipeline
from ppcl.paths import conf_dir

HERE = Path(__file__).parent
QUIET = ["trainer=cpu", "trainer.progress=false", "logger=none"]
STAGES = ("probe", "depth")
STEPS = ["recipe=paper", "distill.steps=3", "distill.batch_size=16"]


# The child reads its own peak memory. The figure that the system gives the parent would include the memory that the
# parent had when it forked.
CHILD = """
import sys
from pathlib import Path

target = Path(sys.argv.pop())
from ppcl.cli import main
try:
    main()
finally:
    lines = Path("/proc/self/status").read_text().splitlines()
    target.write_text(next(line.split()[1] for line in lines if line.startswith("VmHWM")))
"""


def peak(*arguments: str) -> dict[str, float]:
    """Run `ppcl` with these arguments; return its peak resident memory in GB (1e9 bytes), and its seconds."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "peak"
        subprocess.run([sys.executable, "-c", CHILD, *arguments, str(target)], check=True)
        kilobytes = int(target.read_text())
    return {"peak_gb": kilobytes * 1024 / 1e9, "seconds": time.perf_counter() - start}


def growth(counts: Sequence[int] = (20, 60), width: int = 512) -> dict[str, Any]:
    """Return the peak memory in GB of `probe` and `depth` by number of blocks, with streamed and resident teachers."""
    found: dict[str, Any] = {"blocks": list(counts), "width": width}
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            torch.manual_seed(0)
            pipeline = build_pipeline(0, 1)
            config = {k: v for k, v in pipeline.transformer.config.items() if not k.startswith("_")}
            config |= {
                "num_layers": count,
                "attention_head_dim": 64,
                "num_attention_heads": width // 64,
                "axes_dims_rope": (16, 24, 24),
            }
            pipeline.transformer = QwenImageTransformer2DModel(**config)
            pipeline.save_pretrained(f"{folder}/teacher")
            del pipeline
            for streaming in ("true", "false"):
                common = [
                    *QUIET, *STEPS, "model=auto", f"model.path={folder}/teacher", f"model.streaming={streaming}",
                    f"paths.runs_dir={folder}/{streaming}", "probe.num_batches=2", "probe.num_heldout_batches=1",
                    "probe.batch_size=8", f"intervals.transformer_blocks=[[{count - 3},{count - 2}]]",
                ]  # fmt: skip
                for stage in STAGES:
                    kind = "streamed" if streaming == "true" else "resident"
                    found.setdefault(f"{stage}_{kind}_gb", []).append(peak(*common, f"stages=[{stage}]")["peak_gb"])
    return found


def _random(shapes: dict[str, tuple[int, ...]], pool: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """Return tensors of these shapes, each copied from a random place of `pool`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        size = torch.Size(shape).numel()
        start = int(torch.randint(len(pool) - size, (), generator=generator))
        tensors[name] = pool[start : start + size].view(shape).clone()
    return tensors


def write_teacher(folder: Path, arch: dict[str, Any]) -> None:
    """Write a pipeline folder with a random bfloat16 Qwen-Image transformer of this `arch`, with a file for each block.

    Files that exist are kept.
    """
    with torch.device("meta"):
        model = QwenImageTransformer2DModel(**arch)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    pool = (torch.randn(1 << 28, generator=torch.Generator().manual_seed(0)) * 0.02).to(torch.bfloat16)
    files: dict[str, str] = {}
    rest = [name for name in shapes if not name.startswith("transformer_blocks.")]
    groups = [rest] + [
        [n for n in shapes if n.startswith(f"transformer_blocks.{i}.")] for i in range(arch["num_layers"])
    ]
    for number, names in enumerate(groups):
        file = f"diffusion_pytorch_model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        if not (folder / "transformer" / file).exists():
            tensors = _random({name: shapes[name] for name in names}, pool, number)
            write_tensors(folder / "transformer" / file, tensors, {"format": "pt"})
        files |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": files}
    write_json(folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json", index)
    write_json(folder / "transformer" / "config.json", {"_class_name": "QwenImageTransformer2DModel", **arch})
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    entries = {part: [None, None] for part in ("vae", "text_encoder", "tokenizer")}
    entries |= {
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    write_json(
        folder / "model_index.json", {"_class_name": "QwenImagePipeline", "_diffusers_version": "0.36.0", **entries}
    )


def write_cache(folder: Path, size: tuple[int, int], tokens: int, count: int) -> None:
    """Write a cache as `stages=[cache]` would, of `count` random latents and prompts.

    Latents have `size` (height and width in tokens), and prompts have `tokens` tokens.
    """

    def sample() -> Iterator[tuple[str, torch.Tensor]]:
        yield "latents", torch.randn(size[0] * size[1], 64).to(torch.bfloat16)
        yield "prompt_embeds", torch.randn(tokens, 3584).to(torch.bfloat16)
        yield "prompt_embeds_mask", torch.ones(tokens, dtype=torch.bool)

    header = Header("ppcl.cache", {"model": {"family": "qwen_image"}, "units": {"random": [0, 0]}})
    samples = [{"key": f"{number:06d}", "caption": "", "size": list(size)} for number in range(count)]
    tensors = {f"{number:03d}.{name}": value for number in range(count) for name, value in sample()}
    write_tensors(folder / EMPTY, {name: value for name, value in sample() if name != "latents"}, {})
    write_tensors(folder / "random-000.safetensors", tensors, {"unit": "random"})
    write_json(folder / "random-000.json", {"samples": samples, "skipped": []})
    write_json(folder / unit_record("random"), {"unit": "random", "samples": count, "skipped": []})
    write_json(folder / "cache.json", header.to_json())


def full(folder: Path) -> dict[str, Any]:
    """Return the peak memory and seconds of probes and of three depth steps on the full-size model, on a CPU."""
    arch = yaml.safe_load((conf_dir() / "model" / "qwen_image.yaml").read_text())["arch"]
    write_teacher(folder / "teacher", arch)
    torch.manual_seed(0)
    write_cache(folder / "cache", size=(8, 8), tokens=16, count=64)
    common = [
        *QUIET, "recipe=paper", "distill.steps=3", "distill.batch_size=8", "model=auto", f"model.path={folder}/teacher",
        "model.streaming=true", "model.dtype=bfloat16",
        f"paths.runs_dir={folder}/runs", "data=folder", f"data.cache={folder}/cache", "data.held_out=0.5",
        "probe.num_batches=2", "probe.num_heldout_batches=1", "probe.batch_size=8",
    ]  # fmt: skip
    return {
        "probe": peak(*common, "stages=[probe]"),
        "depth": peak(*common, "stages=[depth]", "intervals.transformer_blocks=[[28,30]]"),
    }


def figures(tiny: bool) -> dict[str, Any]:
    """Return this module's figures by name. With `tiny` they only show that the code runs."""
    found = growth((4, 8), 64) if tiny else growth()
    peaks = {stage: dict(zip(found["blocks"], found[f"{stage}_streamed_gb"], strict=True)) for stage in STAGES}
    ratios = {stage: max(of.values()) / min(of.values()) for stage, of in peaks.items()}
    stage = max(ratios, key=lambda name: ratios[name])
    of = {f"{stage}, {count} blocks": value for count, value in reversed(peaks[stage].items())}
    figure = {"ratio": ratios[stage], "of": of, "unit": "GB resident at most"}
    return {"stream_memory_growth": figure, "stream": found}


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    result = full(Path(sys.argv[1]))
    print(json.dumps(result, indent=2))
    write_json(HERE / "full_size.json", result)
