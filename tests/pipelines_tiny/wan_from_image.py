"""Wan: image to video. Its pipeline encodes texts by ftfy alone, which is not installed, so it is given embeddings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from safetensors.torch import save_file

from tests.pipelines_tiny.wan import CHANNELS, SETTINGS, TEXT, build_as

__all__ = ["SETTINGS", "build", "write_prompts"]


def build(folder: Path) -> Path:
    """Saves the pipeline to `folder`, and returns it."""
    mask = 4  # channels that say which frames are given
    return build_as(WanImageToVideoPipeline, 2 * CHANNELS + mask, folder)


def write_prompts(folder: Path) -> Path:
    """Writes a table of a first frame and embeddings a line, and the files that it names, and returns it."""
    noise = torch.Generator().manual_seed(0)
    lines = []
    for number in range(6):
        frame = np.full((40, 56, 3), 90, np.uint8)
        frame[10 + number : 25, 12:30] = (40 * number, 200 - 40 * number, 120)
        Image.fromarray(frame).save(folder / f"{number}.png")
        texts = {"prompt_embeds": torch.randn(1, 12, TEXT, generator=noise)}
        save_file(texts | {"negative_prompt_embeds": torch.zeros(1, 12, TEXT)}, folder / f"{number}.safetensors")
        lines.append(
            {"image": f"{number}.png"}
            | dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), f"{number}.safetensors")
        )
    (folder / "prompts.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return folder / "prompts.jsonl"
