"""Networks whose features of pictures the FID compares: a small one for the toy world, and Inception.

Both take uint8 pictures `[B, 3, H, W]` and return float32 features `[B, num_features]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ppcl.artifacts.model_files import pickled_tensors
from ppcl.data.worlds.shapes import IMAGE_SIZE
from ppcl.errors import UsageError
from ppcl.paths import ASSETS
from ppcl.pictures.inception import Inception

SHAPES_WEIGHTS = ASSETS / "shapes_features.safetensors"


class ShapesFeatures(nn.Module):
    """A convolutional network for toy pictures. `experiments/fid_features` trains it to tell what they show."""

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64, self.num_features)
        self.layers = nn.Sequential()
        for number, (before, after) in enumerate(pairwise(widths)):
            self.layers.append(nn.Conv2d(before, after, 3, stride=2 - number % 2, padding=1))
            self.layers.append(nn.ReLU())

    def forward(self, pictures: Tensor) -> Tensor:
        pictures = interpolate(pictures.float(), (IMAGE_SIZE, IMAGE_SIZE), mode="nearest-exact")
        return self.layers(pictures / 127.5 - 1).mean(dim=(2, 3))


def load_features(file: str | None) -> nn.Module:
    """Return the network with the weights in `file`, those of Inception; None: the network of the toy world.

    Raises `UsageError` if the file does not hold exactly the weights of Inception.
    """
    if file is None:
        network: nn.Module = ShapesFeatures()
        network.load_state_dict(load_file(SHAPES_WEIGHTS))
    else:
        network = Inception()
        _fill(network, file)
    return network.eval().requires_grad_(False)


def _fill(network: nn.Module, file: str) -> None:
    """Load the weights in `file` into Inception. The last layer in the file, which names classes, is left out."""
    path, key = Path(file), "benchmark.settings.features"
    stored: Mapping[str, Tensor] = load_file(path) if path.suffix == ".safetensors" else pickled_tensors(path)
    # The number of batches that a norm has seen is not used, and some files lack it.
    state = {name: value for name, value in stored.items() if not name.startswith("fc.")}
    own = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    wrong = next((name for name in sorted({*own} ^ {*state}) if not name.startswith("AuxLogits.")), None)
    wrong = wrong or next((name for name in own if own[name].shape != state[name].shape), None)
    if wrong is not None:
        raise UsageError(
            f"{key}={file} is not the Inception that FID is defined by, as {wrong} shows: give "
            "pt_inception-2015-12-05-6726825d.pth, as pytorch-fid publishes it."
        )
    network.load_state_dict({name: state[name] for name in own}, strict=False)


@torch.no_grad()
def to_batch(pictures: list, device: torch.device) -> Tensor:
    """Return PIL pictures of one size as uint8 `[B, 3, H, W]` on a device."""
    import numpy as np

    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).to(device)
