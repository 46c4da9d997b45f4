"""Train the network whose features the benchmark `fid` compares toy pictures by, and ship it with ppcl.

python -m experiments.fid_features.train

It learns to tell what a picture shows: the shapes and colours of its objects, letters counting as one shape, and how
many there are. Half of the pictures are blurred or noisy, as those of a pruned model may be. Prints how often it is
right on pictures that it has not seen.
"""

from __future__ import annotations

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits, cross_entropy

from ppcl.artifacts.files import atomic_path
from ppcl.data.worlds.shapes import ALL_CATEGORIES, COLORS, SHAPES, Scene, make_scene, render
from ppcl.pictures.features import SHAPES_WEIGHTS, ShapesFeatures

SEED, STEPS, BATCH, RATE = 0, 1500, 64, 4e-3
MOST = 8  # objects or letters in a picture
KINDS = [(shape, color) for shape in (*SHAPES, "letter") for color in COLORS]


def targets(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Return which kinds of objects each scene shows, `[B, kinds]`, and how many objects, less one, `[B]`."""
    shown = torch.zeros(len(scenes), len(KINDS))
    for row, scene in enumerate(scenes):
        for item in scene.objects:
            shape = item.shape if item.shape in SHAPES else "letter"
            shown[row, KINDS.index((shape, item.color))] = 1
    return shown, torch.tensor([len(scene.objects) - 1 for scene in scenes])


def batch(seed: int, number: int) -> tuple[Tensor, list[Scene]]:
    """Return the pictures of batch `number`, uint8 `[B, 3, 32, 32]`, and their scenes."""
    scenes = [make_scene(seed, number * BATCH + row, categories=ALL_CATEGORIES) for row in range(BATCH)]
    return torch.from_numpy(np.stack([render(scene.objects) for scene in scenes])).permute(0, 3, 1, 2), scenes


def disturbed(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Return pictures of which the second quarter is blurred and the last half noisy, both by chance more or less."""
    changed, quarter = pictures.float(), len(pictures) // 4
    share = torch.rand(quarter, 1, 1, 1, generator=generator)
    blurred = avg_pool2d(changed[quarter : 2 * quarter], 3, stride=1, padding=1, count_include_pad=False)
    changed[quarter : 2 * quarter] += share * (blurred - changed[quarter : 2 * quarter])
    strength = 40 * torch.rand(2 * quarter, 1, 1, 1, generator=generator)
    changed[2 * quarter :] += strength * torch.randn(2 * quarter, *pictures.shape[1:], generator=generator)
    return changed.clamp(0, 255).to(torch.uint8)


def main() -> None:
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    network, head = ShapesFeatures(), nn.Linear(ShapesFeatures.num_features, len(KINDS) + MOST)
    parameters = [*network.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    for step in range(STEPS):
        pictures, scenes = batch(SEED, step)
        shown, count = targets(scenes)
        found = head(network(disturbed(pictures, generator)))
        loss = binary_cross_entropy_with_logits(found[:, : len(KINDS)], shown) + 0.1 * cross_entropy(
            found[:, len(KINDS) :], count
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 250 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    network.eval()
    right = []
    with torch.no_grad():
        for number in range(16):
            pictures, scenes = batch(SEED + 1, number)
            shown, count = targets(scenes)
            found = head(network(pictures))
            kinds = ((found[:, : len(KINDS)] > 0) == shown.bool()).all(dim=1).float().mean().item()
            right.append((kinds, (found[:, len(KINDS) :].argmax(dim=1) == count).float().mean().item()))
    print("right on {} new pictures: kinds {:.3f}, number {:.3f}".format(16 * BATCH, *np.mean(right, axis=0)))
    with atomic_path(SHAPES_WEIGHTS) as temporary:
        save_file(network.state_dict(), temporary)


if __name__ == "__main__":
    main()
