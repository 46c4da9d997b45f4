"""Small real models: a Qwen-Image transformer of width 64, its pipeline, and a teacher whose blocks are linear."""

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch import nn

from ppcl.data.batches import TrainingBatch
from ppcl.families.base import Family
from ppcl.families.facts import FamilyFacts
from ppcl.families.qwen_image.tiny import build_pipeline
from ppcl.families.registry import get_family

WIDTH = 64


@pytest.fixture(scope="session")
def family():
    return get_family("qwen_image")


@pytest.fixture(scope="session")
def pipeline():
    """An untrained pipeline; tests that change anything in it must build their own."""
    return build_pipeline(0, num_layers=2)


@pytest.fixture(scope="session")
def make_transformer():
    """`make_transformer(num_layers, seed)`: a fresh Qwen-Image transformer of width 64."""

    def make(num_layers, seed=0, channels=48):
        torch.manual_seed(seed)
        return QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=channels,
            out_channels=12,
            num_layers=num_layers,
            attention_head_dim=32,
            num_attention_heads=WIDTH // 32,
            joint_attention_dim=WIDTH,
            axes_dims_rope=(8, 12, 12),
        ).eval()

    return make


@pytest.fixture(scope="session")
def make_batch(family):
    """`make_batch(seed, text_lengths, size)`: random latents, and prompts padded with noise to one length."""

    def make(seed=0, text_lengths=(5, 9), size=(4, 4), padded_to=None, channels=48):
        generator = torch.Generator().manual_seed(seed)
        count, longest = len(text_lengths), padded_to or max(text_lengths)
        latents = torch.randn(count, size[0] * size[1], channels, generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        embeddings = torch.randn(count, longest, WIDTH, generator=generator)
        mask = torch.arange(longest) < torch.tensor(text_lengths)[:, None]
        conditions = {"prompt_embeds": embeddings, "prompt_embeds_mask": mask}
        sigmas = torch.rand(count, generator=generator)
        return family.training_batch(latents, conditions, noise, sigmas, size)

    return make


class LinearBlock(nn.Module):
    """x -> x + x W^T + b: what a probe can copy exactly."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, *, hidden_states):
        return hidden_states + hidden_states @ self.weight.T + self.bias


class LinearTransformer(nn.Module):
    """A transformer whose blocks are all linear."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, hidden_states):
        for block in self.blocks:
            hidden_states = block(hidden_states=hidden_states)
        return (hidden_states,)


class LinearFamily(Family):
    """One stack, one stream, no padding."""

    transformer_class = LinearTransformer

    def __init__(self):
        stacks = {"blocks": "num_layers"}
        super().__init__(FamilyFacts("linear", "", "LinearTransformer", stacks, (), categories=()))

    def forward_inputs(self, latents, conditions, sigmas, size):
        return {"hidden_states": latents}

    def streams_in(self, stack, kwargs, inputs):
        return {"image": kwargs["hidden_states"]}

    def streams_out(self, stack, output, inputs):
        return {"image": output}

    def masks(self, inputs):
        return {"image": None}


@pytest.fixture(scope="session")
def make_linear_teacher():
    """`make_linear_teacher(scales, seed)`: family, transformer and batches, to plant runs of blocks in.

    Block i has two directions of its own. It multiplies the variance along one by 1 + scales[i] and
    along the other by 1 - scales[i], so cka(u, k) falls with the sum of squares of the scales u + 1..k.
    Directions are hidden by a random rotation; tokens are white within each sample.
    """

    def make(scales, seed=0, tokens=200):
        generator = torch.Generator().manual_seed(seed)
        width = 2 * len(scales)

        def normal(*shape):
            return torch.randn(*shape, generator=generator)

        directions = torch.linalg.qr(normal(width, width)).Q.T
        blocks = []
        for scale, (grown, shrunk) in zip(scales, directions.view(-1, 2, width), strict=True):
            weight = ((1 + scale) ** 0.5 - 1) * torch.outer(grown, grown)
            weight += ((1 - scale) ** 0.5 - 1) * torch.outer(shrunk, shrunk)
            blocks.append(LinearBlock(weight, 0.1 * normal(width)))
        batches = []
        for _ in range(2):
            drawn = normal(4, tokens, width)
            white = torch.linalg.qr(drawn - drawn.mean(dim=1, keepdim=True)).Q * tokens**0.5
            inputs = {"hidden_states": white + normal(4, 1, width)}
            batches.append(TrainingBatch(inputs, torch.zeros_like(white), torch.full((4,), 0.5)))
        return LinearFamily(), LinearTransformer(blocks), batches

    return make
