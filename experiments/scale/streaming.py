"""Measure the peak resident memory of stages with a streamed teacher.

`experiments.scale.run --only stream` measures how it grows with the number of blocks. The full-size model, with 20
billion parameters, has commands of its own. The first writes 41 GB to FOLDER. Fine-tuning also writes the tuned model,
so the second leaves most blocks zero, in sparse files, which take no disk; FOLDER gets 20 GB.

    python -m experiments.scale.streaming FOLDER probe depth
    python -m experiments.scale.streaming FOLDER width finetune --sparse
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel

from ppcl.artifacts.files import read_json, write_json
from ppcl.artifacts.headers import Header
from ppcl.artifacts.plugs import Plug
from ppcl.artifacts.tensors import read_tensors, write_tensors
from ppcl.command import prepare
from ppcl.data.cached import EMPTY, unit_record
from ppcl.families.qwen_image.tiny import build_pipeline
from ppcl.paths import conf_dir
from ppcl.stages.depth import plug_header

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


def write_sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write a safetensors file of bfloat16 zeros, sparse: it takes no room on disk."""
    entries, end = dict[str, Any](), 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


def write_teacher(folder: Path, arch: dict[str, Any], dense: Collection[int] | None = None) -> None:
    """Write a pipeline folder with a random bfloat16 Qwen-Image transformer of this `arch`, with a file for each block.

    `dense`: the numbers of random blocks; the others are zero, in sparse files. None: all are random. Files that exist
    are kept.
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
        path, own = folder / "transformer" / file, {name: shapes[name] for name in names}
        if path.exists():
            pass
        elif dense is None or number == 0 or number - 1 in dense:
            write_tensors(path, _random(own, pool, number), {"format": "pt"})
        else:
            write_sparse(path, own)
        files |= dict.fromkeys(names, file)
    index = {"metadata": {}, "weight_map": files}
    write_json(folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json", index, checked=False)
    config = {"_class_name": "QwenImageTransformer2DModel", **arch}
    write_json(folder / "transformer" / "config.json", config, checked=False)
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")
    entries = {part: [None, None] for part in ("vae", "text_encoder", "tokenizer")}
    entries |= {
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    }
    index = {"_class_name": "QwenImagePipeline", "_diffusers_version": "0.36.0", **entries}
    write_json(folder / "model_index.json", index, checked=False)


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
    made = {"fingerprint": header.fingerprint}
    write_tensors(folder / EMPTY, {name: value for name, value in sample() if name != "latents"}, made)
    write_tensors(folder / "random-000.safetensors", tensors, {"unit": "random", **made})
    write_json(folder / "random-000.json", {"samples": samples, "skipped": []})
    write_json(folder / unit_record("random"), {"unit": "random", "samples": count, "skipped": []})
    write_json(folder / "cache.json", header.to_json())


def write_students(*arguments: str) -> None:
    """Write the students of the intervals of a run with these arguments, each with the weights of the first block."""
    run = prepare(list(arguments))
    transformer = Path(str(run.config.model.path)) / "transformer"
    files = read_json(transformer / "diffusion_pytorch_model.safetensors.index.json", "The index")["weight_map"]
    for stack, pairs in run.intervals.items():
        for u, v in pairs:
            prefix = f"{stack}.{u}."
            file = next(file for name, file in files.items() if name.startswith(prefix))
            tensors, _ = read_tensors(transformer / file)
            state = {name.removeprefix(prefix): value for name, value in tensors.items()}
            Plug(plug_header(run, stack, (u, v)), stack, state, {"heldout_loss": 0.0}, (u, v)).save(run.plugs_folder)


DENSE = (5, 10, 22, 28, 30, 31, 40)  # the random blocks with --sparse

# What each stage runs on the full size: tokens of an image (height, width) and of a prompt, and its settings.
FULL: dict[str, tuple[tuple[int, int], int, list[str]]] = {
    "probe": ((8, 8), 16, ["probe.num_batches=2", "probe.num_heldout_batches=1", "probe.batch_size=8"]),
    "depth": ((8, 8), 16, ["distill.steps=3", "distill.batch_size=8", "intervals.transformer_blocks=[[28,30]]"]),
    "width": (
        (2, 2),
        4,
        [
            "intervals.transformer_blocks=[[28,30]]", "distill.batch_size=16", "width.steps=1", "width.num_batches=1",
            "width.source=given", "width.transformer_blocks={text:[31],ffn:[31]}",
        ],
    ),
    "finetune": (
        (2, 2),
        4,
        [
            "intervals.transformer_blocks=[[5,19],[22,36],[40,54]]", "finetune.batch_size=16", "finetune.steps=1",
            "finetune.lora_rank=4",
        ],
    ),
}  # fmt: skip


def full(
    folder: Path, stages: Sequence[str], arch: dict[str, Any], dense: Collection[int] | None = None
) -> dict[str, Any]:
    """Return the peak memory and seconds of these stages for a streamed model of this `arch` on a CPU, by stage.

    Width distillation and fine-tuning start from students that are copies of the first block of their intervals.
    `dense`: as in `write_teacher`.
    """
    write_teacher(folder / "teacher", arch, dense)
    found = {}
    for stage in stages:
        size, tokens, settings = FULL[stage]
        cache = folder / f"cache-{size[0]}x{size[1]}"
        torch.manual_seed(0)
        write_cache(cache, size=size, tokens=tokens, count=64)
        command = [
            *QUIET, "recipe=paper", *settings, "model=auto", f"model.path={folder}/teacher", "model.streaming=true",
            "model.dtype=bfloat16", f"paths.runs_dir={folder}/runs-{stage}", "data=folder", f"data.cache={cache}",
            "data.held_out=0.5", f"stages=[{stage}]",
            "trainer.check_memory=false",  # it would count samples of 1328x1328
        ]  # fmt: skip
        if stage in ("width", "finetune"):
            write_students(*command)
        facts = {"date": datetime.now(UTC).date().isoformat(), "tokens": math.prod(size) + tokens}
        facts |= {} if dense is None else {"random_blocks": sorted(dense)}
        found[stage] = peak(*command) | facts
        print(json.dumps({stage: found[stage]}), flush=True)
    return found


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("stages", nargs="+", choices=FULL)
    parser.add_argument("--sparse", action="store_true", help="make most blocks zero, in sparse files")
    options = parser.parse_args()
    arch = yaml.safe_load((conf_dir() / "model" / "qwen_image.yaml").read_text())["arch"]
    record = HERE / "full_size.json"
    for stage in options.stages:
        result = full(options.folder, [stage], arch, DENSE if options.sparse else None)
        write_json(record, read_json(record, "The record") | result, checked=False)
