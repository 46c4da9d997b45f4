"""Four families that ppcl does not ship: Wan, Z-Image, SD3 and HunyuanVideo, with their classes of diffusers.

Each describes how its blocks' streams are read and how its transformer is called. That is all a family needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor

from ppcl.artifacts.files import write_json
from ppcl.artifacts.headers import Header
from ppcl.artifacts.tensors import write_tensors
from ppcl.data.cached import EMPTY, LATENTS, unit_record
from ppcl.families.base import DualStreamFamily, Family
from ppcl.families.facts import FamilyFacts

REFINER = "context_embedder.token_refiner.refiner_blocks"
NUM_SAMPLES = 24


class Wan(Family):
    """Wan, for video: latents are `[C, F, H, W]`, and blocks are called with positional arguments.

    Text is not a stream. Blocks only attend to it.
    """

    def streams_in(self, stack, kwargs, inputs):
        return {"image": kwargs["hidden_states"]}

    def streams_out(self, stack, output, inputs):
        return {"image": output}

    def masks(self, inputs):
        return {"image": None}

    def forward_inputs(self, latents, conditions, sigmas, size):
        return {
            "hidden_states": latents,
            "timestep": sigmas * 1000,
            "encoder_hidden_states": conditions["umt5"],
            "return_dict": False,
        }


class ZImage(Family):
    """Z-Image: takes and returns lists. Image and text are one sequence, each padded to a multiple of 32 tokens.

    Timesteps and velocity go from noise to data, unlike those of the other families.
    """

    def _lengths(self, inputs):
        _, _, height, width = inputs["x"][0].shape
        return height * width // 4, [len(caption) for caption in inputs["cap_feats"]]

    def _split(self, joined, inputs):
        start = -(-self._lengths(inputs)[0] // 32) * 32
        return {"image": joined[:, :start], "text": joined[:, start:]}

    def streams_in(self, stack, kwargs, inputs):
        return self._split(kwargs["x"], inputs)

    def streams_out(self, stack, output, inputs):
        return self._split(output, inputs)

    def masks(self, inputs):
        tokens, captions = self._lengths(inputs)
        found = {}
        for name, lengths in (("image", [tokens] * len(captions)), ("text", captions)):
            positions = torch.arange(-(-max(lengths) // 32) * 32, device=inputs["t"].device)
            found[name] = positions < torch.tensor(lengths, device=positions.device)[:, None]
        return found

    def forward_inputs(self, latents, conditions, sigmas, size):
        captions = zip(conditions["caption"], conditions["caption_mask"], strict=True)
        return {
            "x": list(latents.unsqueeze(2)),
            "t": 1 - sigmas,
            "cap_feats": [caption[mask] for caption, mask in captions],
            "return_dict": False,
        }

    def as_tensor(self, output):
        return -torch.stack(output).squeeze(2)


class SD3(DualStreamFamily):
    """Stable Diffusion 3: the last block differs from the others, and returns no text."""

    def masks(self, inputs):
        return {"image": None, "text": None}

    def forward_inputs(self, latents, conditions, sigmas, size):
        return {
            "hidden_states": latents,
            "encoder_hidden_states": conditions["tokens"],
            "pooled_projections": conditions["pooled"],
            "timestep": sigmas * 1000,
            "return_dict": False,
        }


class HunyuanVideo(Family):
    """HunyuanVideo: text first passes through a stack of its own, which lies inside the text embedder."""

    def streams_in(self, stack, kwargs, inputs):
        if stack == REFINER:
            return {"text": kwargs["hidden_states"]}
        return {"image": kwargs["hidden_states"], "text": kwargs["encoder_hidden_states"]}

    def streams_out(self, stack, output, inputs):
        return {"text": output} if stack == REFINER else dict(zip(("image", "text"), output, strict=True))

    def masks(self, inputs):
        return {"image": None, "text": inputs["encoder_attention_mask"]}

    def forward_inputs(self, latents, conditions, sigmas, size):
        return {
            "hidden_states": latents,
            "timestep": sigmas * 1000,
            "encoder_hidden_states": conditions["llama"],
            "encoder_attention_mask": conditions["llama_mask"],
            "pooled_projections": conditions["clip"],
            "guidance": torch.full_like(sigmas, 6000.0),
            "return_dict": False,
        }


@dataclass(frozen=True)
class Foreign:
    """A family, a tiny model of it, and the intervals and budget that the tests prune it with."""

    facts: FamilyFacts
    arch: dict[str, Any]
    latents: tuple[int, ...]
    names: list[str]  # of intervals
    budget: float

    @property
    def transformer_class(self) -> Any:
        return getattr(diffusers, self.facts.transformer)

    def conditions(self, length: int) -> dict[str, Tensor]:
        """Return random conditions for a prompt of `length` tokens, by the names that the family uses."""
        mask, tokens = torch.ones(length, dtype=torch.bool), torch.randn(length, 16)
        return {
            "wan": {"umt5": torch.randn(8, 16)},
            "z_image": {"caption": tokens, "caption_mask": mask},
            "sd3": {"tokens": torch.randn(8, 16), "pooled": torch.randn(16)},
            "hunyuan_video": {"llama": tokens, "llama_mask": mask, "clip": torch.randn(16)},
        }[self.facts.name]

    def write_teacher(self, folder: Path) -> None:
        """Save an untrained pipeline without encoders."""
        torch.manual_seed(0)
        model = self.transformer_class(**self.arch)
        pipeline_class: Any = getattr(diffusers, self.facts.pipeline_classes[0])
        others = dict.fromkeys(pipeline_class._get_signature_keys(pipeline_class)[0])
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        pipeline_class(**others | {"transformer": model, "scheduler": scheduler}).save_pretrained(folder)

    def write_cache(self, folder: Path) -> None:
        """Write a cache of random latents and conditions, in the format of `stages=[cache]`."""
        torch.manual_seed(1)
        tensors, records, unit = {}, [], "made"
        for number in range(NUM_SAMPLES):
            sample = {LATENTS: torch.randn(self.latents)} | self.conditions(4 + number % 5)
            tensors |= {f"{number:03d}.{name}": value for name, value in sample.items()}
            records.append({"key": f"sample {number}", "caption": "", "size": [4, 4]})
        header = Header("ppcl.cache", {"model": {"family": self.facts.name}, "units": {unit: [NUM_SAMPLES, 0]}})
        write_json(folder / "cache.json", header.to_json())
        made = {"fingerprint": header.fingerprint}
        write_tensors(folder / EMPTY, self.conditions(1), made)
        write_tensors(folder / f"{unit}-000.safetensors", tensors, made)
        write_json(folder / f"{unit}-000.json", {"samples": records, "skipped": []})
        write_json(folder / unit_record(unit), {"unit": unit, "samples": NUM_SAMPLES, "skipped": []})


FOREIGN = {
    item.facts.name: item
    for item in (
        Foreign(
            FamilyFacts(
                "wan",
                "foreign.Wan",
                "WanTransformer3DModel",
                stacks={"blocks": "num_layers"},
                pipeline_classes=("WanPipeline",),
            ),
            {
                "num_attention_heads": 2,
                "attention_head_dim": 24,
                "in_channels": 4,
                "out_channels": 4,
                "text_dim": 16,
                "freq_dim": 32,
                "ffn_dim": 64,
                "num_layers": 6,
                "rope_max_seq_len": 32,
            },
            (4, 2, 8, 8),
            ["blocks.1-2", "blocks.3-5"],
            0.8,
        ),
        Foreign(
            FamilyFacts(
                "z_image",
                "foreign.ZImage",
                "ZImageTransformer2DModel",
                stacks={"layers": "n_layers"},
                pipeline_classes=("ZImagePipeline",),
                modulations=("adaLN_modulation",),
            ),
            {
                "in_channels": 4,
                "dim": 32,
                "n_layers": 5,
                "n_refiner_layers": 1,
                "n_heads": 2,
                "n_kv_heads": 2,
                "cap_feat_dim": 16,
                "axes_dims": [8, 4, 4],
                "axes_lens": [128, 32, 32],
            },
            (4, 8, 8),
            ["layers.1-2"],
            0.97,
        ),
        Foreign(
            FamilyFacts(
                "sd3",
                "foreign.SD3",
                "SD3Transformer2DModel",
                stacks={"transformer_blocks": "num_layers"},
                pipeline_classes=("StableDiffusion3Pipeline",),
                last_blocks=1,
            ),
            {
                "sample_size": 8,
                "in_channels": 4,
                "num_layers": 5,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "joint_attention_dim": 16,
                "caption_projection_dim": 32,
                "pooled_projection_dim": 16,
                "out_channels": 4,
                "pos_embed_max_size": 8,
            },
            (4, 8, 8),
            ["transformer_blocks.1-3"],
            0.9,
        ),
        Foreign(
            FamilyFacts(
                "hunyuan_video",
                "foreign.HunyuanVideo",
                "HunyuanVideoTransformer3DModel",
                stacks={
                    REFINER: "num_refiner_layers",
                    "transformer_blocks": "num_layers",
                    "single_transformer_blocks": "num_single_layers",
                },
                pipeline_classes=("HunyuanVideoPipeline",),
            ),
            {
                "in_channels": 4,
                "out_channels": 4,
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "num_layers": 3,
                "num_single_layers": 3,
                "num_refiner_layers": 4,
                "mlp_ratio": 2.0,
                "text_embed_dim": 16,
                "pooled_projection_dim": 16,
                "rope_axes_dim": [4, 6, 6],
            },
            (4, 2, 8, 8),
            [f"{REFINER}.1-3", "transformer_blocks.0-1", "single_transformer_blocks.1-2"],
            0.95,
        ),
    )
}
