"""Take the README's way for a small card on a GPU, with a Qwen-Image of full size, and compare memory with the plan.

    python -m experiments.scale.documented_way FOLDER [--gb 24] [--only STAGE ..] [--output FILE]

The pipeline has all its parts in their real sizes: transformer, text encoder and VAE. Its tokenizer is small, and most
weights are zero, in sparse files, so that FOLDER gets 60 GB instead of 100. Pictures are random. Each stage runs by the
README's settings, but for a few steps. torch may use `--gb` GB of the card. A row says what the plan estimates and what
torch allocated and reserved at most. The output is written after each stage. `--tiny` runs everything on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import AutoencoderKLQwenImage
from PIL import Image
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

import ppcl
from experiments.scale.streaming import DENSE, write_sparse, write_teacher
from ppcl.artifacts.files import read_json, write_json
from ppcl.command import prepare
from ppcl.data.worlds import shapes
from ppcl.families.qwen_image.tiny import build_pipeline
from ppcl.memory.plan import STAGES, Plan
from ppcl.paths import conf_dir

SEED = 0
WORDS = 250  # of a caption; each is a token
PICTURES = 24
INTERVALS = "intervals.transformer_blocks=[[5,19],[22,36],[40,54]]"
# The README's first command for a small card, with fewer steps and samples.
FIRST = [
    "experiment=prune", "name=small", "distill.optimizer_states=8bit", "finetune.lora_rank=16", INTERVALS,
    "data.samples_per_file=8", "data.held_out=0.3", "probe.num_batches=2", "probe.num_heldout_batches=1",
    "probe.batch_size=4", "distill.steps=2", "width.steps=2", "width.num_batches=1", "width.source=given",
    "width.transformer_blocks={text:[21],ffn:[21]}", "budget.params=null", "finetune.steps=1", "finetune.batch_size=2",
    "model.sampling.num_inference_steps=2", "logger=none", "trainer.progress=false",
]  # fmt: skip
STREAMED = "model.streaming=true"
WAY: dict[str, list[str]] = {
    "cache": [],
    "probe": [STREAMED],
    "detect": [STREAMED, "method.num_samples=4", "method.num_timesteps=2"],
    "depth": [STREAMED],
    "width": [STREAMED],
    "finetune": [STREAMED, "finetune.accumulate=2"],
    "generate": ["generate.offload=group", "generate.variants=[ppcl-finetuned]", "generate.prompt=a"],
}
TINY = ["intervals.transformer_blocks=[[1,2],[4,5]]", "width.transformer_blocks={text:[3],ffn:[3]}"]
TINY += ["trainer=cpu", "trainer.progress=false", "model.sampling.height=32", "model.sampling.width=32"]


def write_pipeline(folder: Path) -> None:
    """Write a Qwen-Image pipeline folder of full size. Files that exist are kept."""
    arch = yaml.safe_load((conf_dir() / "model" / "qwen_image.yaml").read_text())["arch"]
    write_teacher(folder, arch, DENSE)
    small = build_pipeline(SEED, 1)
    small.tokenizer.save_pretrained(folder / "tokenizer")
    _write_text_encoder(folder / "text_encoder", small.text_encoder.config)
    _write_vae(folder / "vae")
    index = read_json(folder / "model_index.json", "The index")
    index |= {
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
    }
    write_json(folder / "model_index.json", index, checked=False)


def _write_text_encoder(folder: Path, small: Any) -> None:
    """Write a Qwen2.5-VL of 7B with the special tokens of the config `small`, all weights zero."""
    config = small.to_dict()
    config["text_config"] |= {
        "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 128000, "layer_types": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    config["vision_config"] |= {
        "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }  # fmt: skip
    full = Qwen2_5_VLConfig(**{k: v for k, v in config.items() if k not in ("model_type", "transformers_version")})
    full.dtype = torch.bfloat16
    full.architectures = ["Qwen2_5_VLForConditionalGeneration"]
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(full)
    full.save_pretrained(folder)
    write_sparse(folder / "model.safetensors", {n: tuple(p.shape) for n, p in model.named_parameters()})


def _write_vae(folder: Path) -> None:
    """Write the VAE with random weights."""
    if not (folder / "config.json").exists():
        torch.manual_seed(SEED)
        AutoencoderKLQwenImage().to(torch.bfloat16).save_pretrained(folder)


def write_pictures(folder: Path, size: int) -> None:
    """Write random pictures of `size` x `size` with long captions."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, words = np.random.default_rng(SEED), sorted(shapes.vocabulary())
    lines = ["file_name,text"]
    for number in range(PICTURES):
        coarse = generator.integers(0, 256, (size // 16, size // 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((size, size)).save(folder / f"{number:03d}.jpg")
        lines.append(f"{number:03d}.jpg,{' '.join(generator.choice(words, WORDS))}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")


def command_of(folder: Path, stage: str, gb: float, tiny: bool) -> list[str]:
    """Return the settings of the command for this stage."""
    places = [f"model.path={folder}/teacher", f"data.path={folder}/pictures", f"paths.runs_dir={folder}/runs"]
    places += [f"paths.cache_dir={folder}/cache", f"trainer.memory_gb={gb}", f"stages=[{stage}]"]
    settings = FIRST + WAY[stage] + places + (TINY if tiny else [])
    if stage == "detect":  # by a run of its own, as the others are given their intervals
        settings = [s for s in settings if not s.startswith("intervals")] + ["name=detected", "method.min_cka=-1"]
    return list({setting.partition("=")[0]: setting for setting in settings}.values())  # the last of each key


def measured(folder: Path, stage: str, gb: float, tiny: bool) -> dict[str, Any]:
    """Run a stage; return the plan's estimate, the peaks of torch's allocator in GB, and seconds."""
    command = command_of(folder, stage, gb, tiny)
    need = STAGES[stage](Plan(prepare(command), ranks=1))
    cuda = not tiny
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    found: dict[str, Any] = {"planned_gb": need.total / 1e9, "parts": {k: v / 1e9 for k, v in need.device.items()}}
    start = time.perf_counter()
    try:
        ppcl.run(command)
    except Exception as error:
        traceback.print_exc()
        found["failed"] = f"{type(error).__name__}: {error}"
    found["seconds"] = time.perf_counter() - start
    if cuda:
        found["allocated_gb"] = torch.cuda.max_memory_allocated() / 1e9
        found["reserved_gb"] = torch.cuda.max_memory_reserved() / 1e9
        gc.collect()
        torch.cuda.empty_cache()
        found["left_gb"] = torch.cuda.memory_allocated() / 1e9
        found["ratio"] = found["planned_gb"] / found["allocated_gb"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gb", type=float, default=24, help="how much of the card torch may use")
    parser.add_argument("--only", nargs="+", choices=WAY, default=list(WAY))
    parser.add_argument("--tiny", action="store_true", help="whether it runs; on a CPU")
    parser.add_argument(
        "--output", type=Path, default=Path(os.environ.get("OUT", "runs/bench")) / "documented_way.json"
    )
    chosen = parser.parse_args()
    if chosen.tiny:
        build_pipeline(SEED, 8).save_pretrained(chosen.folder / "teacher")
    else:
        write_pipeline(chosen.folder / "teacher")
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, 1e9 * chosen.gb / total))
    write_pictures(chosen.folder / "pictures", 32 if chosen.tiny else 1328)
    content = read_json(chosen.output, "The record") if chosen.output.exists() else {}
    for stage in chosen.only:
        found = measured(chosen.folder, stage, chosen.gb, chosen.tiny)
        found |= {"date": datetime.now(UTC).date().isoformat(), "cap_gb": chosen.gb}
        found |= {} if chosen.tiny else {"device": torch.cuda.get_device_name()}
        print(json.dumps({stage: found}), flush=True)
        content[stage] = found
        write_json(chosen.output, content, checked=False)


if __name__ == "__main__":
    main()
