"""Linear CKA (Kornblith et al., 1905.00414), from token Grams or from feature covariances, equally.

Every function is batched over leading dimensions and takes padded tokens as zero rows: centre first
with `centre`, which also zeroes them. Products are in the features' own precision, at least float32; their sums in
float64, and so is all of the debiased form, which is a difference of large numbers.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def centre(
    features: Float[Tensor, "*batch tokens dim"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch tokens dim"]:
    """Subtract the mean over valid tokens; padded rows become zero."""
    if mask is None:
        return features - features.mean(dim=-2, keepdim=True)
    weight = mask.unsqueeze(-1).to(features.dtype)
    mean = (features * weight).sum(dim=-2, keepdim=True) / weight.sum(dim=-2, keepdim=True)
    return (features - mean) * weight


def _working(features: Tensor, debiased: bool = False) -> Tensor:
    return features.double() if debiased else features.to(torch.promote_types(features.dtype, torch.float32))


def _square(products: Tensor) -> Tensor:
    """The squared Frobenius norm."""
    return products.square().sum(dim=(-2, -1), dtype=torch.float64)


def _debias(product: Tensor, rows_x: Tensor, rows_y: Tensor, tokens: Tensor) -> Tensor:
    """HSIC_1 up to a factor both CKA terms share, from ||X^T Y||_F^2 and squared row norms."""
    n = tokens
    return (
        product
        - n / (n - 2) * (rows_x * rows_y).sum(dim=-1)
        + rows_x.sum(dim=-1) * rows_y.sum(dim=-1) / ((n - 1) * (n - 2))
    )


def _ratio(cross: Tensor, self_x: Tensor, self_y: Tensor) -> Tensor:
    return cross / (self_x * self_y).sqrt()


def cka(
    x: Float[Tensor, "*batch tokens dim_x"],
    y: Float[Tensor, "*batch tokens dim_y"],
    tokens: Float[Tensor, "*batch"] | None = None,
    *,
    debiased: bool = False,
) -> Float[Tensor, "*batch"]:
    """CKA of centred features: ||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F), by the cheaper form.

    With fewer tokens than features the N x N Grams are smaller than the D x D covariances.
    `tokens` counts valid tokens where some rows are padding. `debiased` uses HSIC_1 (Song et al.,
    2012) for all three terms, and needs four tokens or more.
    """
    x, y = _working(x, debiased), _working(y, debiased)
    if x.shape[-2] < max(x.shape[-1], y.shape[-1]):
        gram_x, gram_y = x @ x.mT, y @ y.mT  # [*, N, N]
        pairs = ((gram_x, gram_y), (gram_x, gram_x), (gram_y, gram_y))
        terms = [(a * b).sum(dim=(-2, -1), dtype=torch.float64) for a, b in pairs]
    else:
        terms = [_square(a.mT @ b) for a, b in ((x, y), (x, x), (y, y))]
    if debiased:
        count = terms[0].new_tensor(x.shape[-2]) if tokens is None else tokens.double()
        rows_x, rows_y = x.square().sum(dim=-1), y.square().sum(dim=-1)
        pairs = ((rows_x, rows_y), (rows_x, rows_x), (rows_y, rows_y))
        terms = [_debias(term, *rows, count) for term, rows in zip(terms, pairs, strict=True)]
    return _ratio(*terms)


def cka_of_linear_map(
    covariance: Float[Tensor, "*batch dim dim"], linear_map: Float[Tensor, "dim dim"]
) -> Float[Tensor, "*batch"]:
    """CKA(X, X A) of centred X from C = X^T X alone: ||C A||_F^2 / (||C||_F ||A^T C A||_F).

    No token is touched, so any chain of probes A = A_{u+1} ... A_k costs two D^3 products.
    """
    covariance, linear_map = _working(covariance), _working(linear_map)
    product = covariance @ linear_map
    return _ratio(_square(product), _square(covariance), _square(linear_map.mT @ product))
