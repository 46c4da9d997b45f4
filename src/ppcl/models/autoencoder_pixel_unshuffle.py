"""A lossless autoencoder without trained weights: it rearranges pixels into channels.

It has the interfaces of an image VAE and of a video VAE. `QwenImagePipeline` reads `temperal_downsample` (diffusers'
spelling), `config.z_dim`, `config.latents_mean` and `config.latents_std` of its VAE, and calls `encode` and `decode` on
`[B, C, T, H, W]`. `FluxPipeline` reads `config.block_out_channels` (its length is one more than the number of
halvings), `config.scaling_factor` and `config.shift_factor`, and calls them on `[B, C, H, W]`. The pipelines of
Qwen-Image-Edit resize every picture to a megapixel first. For them, `cell` x `cell` pixels count as one.
"""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor
from torch.nn import functional as F


class PointDistribution:
    """A latent distribution that has one value, since a lossless encoder has no variance."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def mode(self) -> Tensor:
        return self.value

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self.value


class AutoencoderPixelUnshuffle(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """Space-to-depth by `factor`: pictures `[B, 3, H, W]` to latents `[B, 3 * factor^2, H/factor, W/factor]`.

    With `cell` above 1, a picture consists of cells of `cell` x `cell` pixels: `encode` reads the middle pixel of each
    cell, and `decode` fills each cell with one colour. `encode` takes a picture that is too small to have cells as one
    with a pixel per cell. `decode(encode(x))` equals `x` bit for bit if each cell has one colour.
    """

    @register_to_config
    def __init__(
        self,
        factor: int = 2,
        z_dim: int = 12,
        latents_mean: tuple[float, ...] = (0.0,) * 12,
        latents_std: tuple[float, ...] = (1.0,) * 12,
        scaling_factor: float = 1.0,
        shift_factor: float = 0.0,
        block_out_channels: tuple[int, ...] = (12, 12),
        cell: int = 1,
    ) -> None:
        super().__init__()
        if z_dim != 3 * factor**2 or factor & (factor - 1) or cell & (cell - 1):
            raise ValueError(f"z_dim={z_dim} must be 3 * factor**2, factor={factor} and cell={cell} powers of 2.")
        self.factor, self.cell = factor, cell
        self.temperal_downsample = [False] * ((factor * cell).bit_length() - 1)
        # Pixels are divided by this. A model without any tensor would have no dtype and no weights file.
        self.register_buffer("pixel_scale", torch.ones(1))

    @apply_forward_hook  # type: ignore[untyped-decorator]  # moves the model to the device if it is offloaded
    def encode(self, x: Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[PointDistribution]:
        frame = x[:, :, 0] if x.ndim == 5 else x
        if frame.shape[-1] >= self.factor * self.cell:
            frame = frame[..., self.cell // 2 :: self.cell, self.cell // 2 :: self.cell]
        latents = F.pixel_unshuffle(frame / self.pixel_scale, self.factor)  # [B, z_dim, H/f, W/f]
        posterior = PointDistribution(latents.unsqueeze(2) if x.ndim == 5 else latents)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook  # type: ignore[untyped-decorator]
    def decode(self, z: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        pixels = F.pixel_shuffle(z[:, :, 0] if z.ndim == 5 else z, self.factor) * self.pixel_scale
        pixels = pixels.repeat_interleave(self.cell, dim=-2).repeat_interleave(self.cell, dim=-1)
        sample = pixels.unsqueeze(2) if z.ndim == 5 else pixels  # [B, 3, (1,) H, W]
        return DecoderOutput(sample=sample) if return_dict else (sample,)


# A saved pipeline names this class with its module, and diffusers finds it if that module is imported. With this name,
# `import ppcl` is enough. (An export holds a copy of this file.)
if __name__.startswith("ppcl."):
    AutoencoderPixelUnshuffle.__module__ = "ppcl"
