"""The Inception v3 that FID is defined by, without its weights: the network of TensorFlow's `inception-2015-12-05`.

Its layers have the names of `pt_inception-2015-12-05`, the file in which pytorch-fid publishes its weights for PyTorch.
It differs from torchvision's Inception v3: pools average over the picture alone, without its zero padding; the last
block takes the maximum of a neighbourhood in place of the mean; and pictures are resized as TensorFlow 1 did.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d

SIZE = 299  # pixels per side that the network takes

Kernel = int | tuple[int, int]


class Convolution(nn.Module):
    """A convolution without bias, a batch norm and a ReLU."""

    def __init__(self, before: int, after: int, kernel: Kernel, stride: int = 1, padding: Kernel = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, after, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(after, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


def _same(before: int, after: int, kernel: Kernel) -> Convolution:
    """Return a convolution that keeps height and width."""
    pair = (kernel, kernel) if isinstance(kernel, int) else kernel
    return Convolution(before, after, kernel, padding=(pair[0] // 2, pair[1] // 2))


def _mean(x: Tensor) -> Tensor:
    """Return the mean of each 3x3 neighbourhood, over what of it lies in the picture."""
    return avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


class Mixed(nn.Module):
    """Branches of convolutions side by side, whose outputs are joined, and after them that of a pool.

    `branches`: the convolutions of each branch by name, in order.
    `ends`: the last convolutions of a branch by name, given the branch's number. All of them take what the branch has
        computed, and their outputs are joined.
    `pooled`: the convolution after the pool, which takes the mean of each neighbourhood, or its maximum (`by_maximum`).
        None: there is no such convolution, and the pool halves height and width by the maximum.
    """

    def __init__(
        self,
        *branches: dict[str, Convolution],
        ends: dict[int, dict[str, Convolution]] | None = None,
        pooled: Convolution | None = None,
        by_maximum: bool = False,
    ) -> None:
        super().__init__()
        self.branch_pool, self.by_maximum = pooled, by_maximum
        ends = ends or {}
        self.names = [(list(branch), list(ends.get(number, {}))) for number, branch in enumerate(branches)]
        for named in (*branches, *ends.values()):
            for name, convolution in named.items():
                self.add_module(name, convolution)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for names, ends in self.names:
            y = x
            for name in names:
                y = self.get_submodule(name)(y)
            found += [self.get_submodule(name)(y) for name in ends] or [y]
        if self.branch_pool is None:
            return torch.cat([*found, max_pool2d(x, 3, stride=2)], dim=1)
        pooled = max_pool2d(x, 3, stride=1, padding=1) if self.by_maximum else _mean(x)
        return torch.cat([*found, self.branch_pool(pooled)], dim=1)


def _block_5(before: int, pooled: int) -> Mixed:
    """Return a block for 35x35, with convolutions of 1x1, of 5x5 and twice of 3x3."""
    return Mixed(
        {"branch1x1": _same(before, 64, 1)},
        {"branch5x5_1": _same(before, 48, 1), "branch5x5_2": _same(48, 64, 5)},
        _doubled(before, _same(96, 96, 3)),
        pooled=_same(before, pooled, 1),
    )


def _doubled(before: int, last: Convolution) -> dict[str, Convolution]:
    """Return the branch with two 3x3 convolutions, the second of which is `last`."""
    return {"branch3x3dbl_1": _same(before, 64, 1), "branch3x3dbl_2": _same(64, 96, 3), "branch3x3dbl_3": last}


def _block_6(width: int) -> Mixed:
    """Return a block for 17x17, whose 7x7 convolutions are a row and a column each, with `width` channels between."""
    row, column = (1, 7), (7, 1)
    once: list[tuple[int, int, Kernel]] = [(768, width, 1), (width, width, row), (width, 192, column)]
    twice: list[tuple[int, int, Kernel]] = [
        *((768, width, 1), (width, width, column), (width, width, row)),
        *((width, width, column), (width, 192, row)),
    ]
    return Mixed(
        {"branch1x1": _same(768, 192, 1)},
        {f"branch7x7_{number}": _same(*each) for number, each in enumerate(once, start=1)},
        {f"branch7x7dbl_{number}": _same(*each) for number, each in enumerate(twice, start=1)},
        pooled=_same(768, 192, 1),
    )


def _block_7(before: int, *, by_maximum: bool) -> Mixed:
    """Return a block for 8x8, whose 3x3 convolutions are a row and a column beside each other."""

    def ends(name: str) -> dict[str, Convolution]:
        return {f"{name}a": _same(384, 384, (1, 3)), f"{name}b": _same(384, 384, (3, 1))}

    return Mixed(
        {"branch1x1": _same(before, 320, 1)},
        {"branch3x3_1": _same(before, 384, 1)},
        {"branch3x3dbl_1": _same(before, 448, 1), "branch3x3dbl_2": _same(448, 384, 3)},
        ends={1: ends("branch3x3_2"), 2: ends("branch3x3dbl_3")},
        pooled=_same(before, 192, 1),
        by_maximum=by_maximum,
    )


class Inception(nn.Module):
    """Inception v3 up to its last pool: uint8 pictures `[B, 3, H, W]` become features `[B, 2048]`."""

    num_features = 2048

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Convolution(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = _same(32, 64, 3)
        self.Conv2d_3b_1x1 = Convolution(64, 80, 1)
        self.Conv2d_4a_3x3 = Convolution(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _block_5(192, 32), _block_5(256, 64), _block_5(288, 64)
        self.Mixed_6a = Mixed(
            {"branch3x3": Convolution(288, 384, 3, stride=2)}, _doubled(288, Convolution(96, 96, 3, stride=2))
        )
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d = _block_6(128), _block_6(160), _block_6(160)
        self.Mixed_6e = _block_6(192)
        sevens = [_same(768, 192, 1), _same(192, 192, (1, 7)), _same(192, 192, (7, 1)), Convolution(192, 192, 3, 2)]
        self.Mixed_7a = Mixed(
            {"branch3x3_1": _same(768, 192, 1), "branch3x3_2": Convolution(192, 320, 3, stride=2)},
            {f"branch7x7x3_{number}": each for number, each in enumerate(sevens, start=1)},
        )
        self.Mixed_7b, self.Mixed_7c = _block_7(1280, by_maximum=False), _block_7(2048, by_maximum=True)

    def forward(self, pictures: Tensor) -> Tensor:
        x = (resized(pictures.float(), SIZE) - 128) / 128
        for name, layer in self.named_children():
            x = layer(x)
            if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                x = max_pool2d(x, 3, stride=2)
        return x.mean(dim=(2, 3))


def resized(pictures: Tensor, size: int) -> Tensor:
    """Return pictures `[B, C, H, W]` enlarged or reduced to `size` x `size` as TensorFlow 1 does it, not antialiased.

    Pixel n of a side is taken at n * length / size of the given one, between its two neighbours there.
    """
    for dim in (2, 3):
        length = pictures.shape[dim]
        place = torch.arange(size, device=pictures.device) * (length / size)
        low = place.long()
        share = (place - low).reshape([-1, 1] if dim == 2 else [-1])
        high = (low + 1).clamp(max=length - 1)
        first, second = pictures.index_select(dim, low), pictures.index_select(dim, high)
        pictures = first + (second - first) * share
    return pictures
