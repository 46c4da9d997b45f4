"""Ridge-damped least squares from streamed normal equations (paper Eq. 1), accumulated in float64."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

COPIES = 512 << 20  # the most bytes of float64 copies of samples to make at once


def in_chunks(*samples: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield the samples of tensors `[samples, ...]` of equal length, a few at a time.

    Float64 copies of what is yielded stay below a fixed size, however many samples there are, if one sample does.
    """
    size = 8 * sum(each.shape[1:].numel() for each in samples)
    return zip(*(each.split(max(1, COPIES // size)) for each in samples), strict=True)


class NormalEquations:
    """Accumulates X^T X and X^T Y over all samples that are added, with a column of ones in X for the bias.

    For D inputs and E outputs it keeps (D + 1) x (D + 1) and (D + 1) x E numbers on `device` (None: in host memory),
    however many samples are added. Products are computed on the device of the samples.
    """

    def __init__(self, dim_in: int, dim_out: int, device: torch.device | None = None) -> None:
        self.gram = torch.zeros(dim_in + 1, dim_in + 1, dtype=torch.float64, device=device)
        self.cross = torch.zeros(dim_in + 1, dim_out, dtype=torch.float64, device=device)

    def add(self, x: Float[Tensor, "samples dim_in"], y: Float[Tensor, "samples dim_out"]) -> None:
        """Add samples, one per row, with their targets. Temporary memory does not grow with the number of samples."""
        for some, targets in in_chunks(x, y):
            rows = torch.cat([some.double(), some.new_ones(len(some), 1, dtype=torch.float64)], dim=1)
            self.gram += (rows.T @ rows).to(self.gram.device)
            self.cross += (rows.T @ targets.double()).to(self.cross.device)

    def solve(
        self, *, ridge: float, bias: bool = True
    ) -> tuple[Float[Tensor, "dim_out dim_in"], Float[Tensor, " dim_out"]]:
        """Return the weight and bias of y = x W^T + b that minimise the squared error, in host memory.

        `ridge`: the damping, relative to the mean diagonal of X^T X; the bias is never damped. 0 gives the minimum-norm
        solution. `bias=False`: fit without a bias, and return zeros for it.
        """
        size = len(self.gram) if bias else len(self.gram) - 1
        gram, cross = self.gram[:size, :size].clone(), self.cross[:size]
        dim_in = len(self.gram) - 1
        damping = ridge * gram.diagonal()[:dim_in].mean()
        gram.diagonal()[:dim_in] += damping
        # Without ridge the Gram matrix may be rank-deficient; then take the minimum-norm solution, as lstsq does.
        # So it is where all inputs are 0, which leaves nothing to damp.
        if isinstance(damping, FakeTensor) or damping > 0:  # a dry run has no numbers
            solution = torch.linalg.solve(gram, cross)
        else:
            solution = torch.linalg.pinv(gram, rtol=1e-12, hermitian=True) @ cross
        weight = solution[:dim_in].T.contiguous()
        offset = solution[dim_in] if bias else weight.new_zeros(len(weight))
        return weight.cpu(), offset.cpu()
