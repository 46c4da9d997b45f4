"""Linear CKA (Kornblith et al., 1905.00414), from Gram matrices of tokens or from covariances of features.

Both forms give the same value. Every function is batched over leading dimensions. Features must first be centred by
`centre`, which also sets padded tokens to zero.

Matrix products are in the features' dtype, but at least float32; they are summed in float64. The debiased form is
float64 throughout, because it is a difference of large numbers.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def centre(
    features: Float[Tensor, "*batch tokens dim"], mask: Bool[Tensor, "*batch tokens"] | None = None
) -> Float[Tensor, "*batch tokens dim"]:
    """Subtract the mean over valid tokens, and set padded tokens to zero. `mask`: the valid tokens, None for all."""
    if mask is None:
        return features - features.mean(dim=-2, keepdim=True)
    weight = mask.unsqueeze(-1).to(features.dtype)
    mean = (features * weight).sum(dim=-2, keepdim=True) / weight.sum(dim=-2, keepdim=True)
    return (features - mean) * weight


def _working(features: Tensor, debiased: bool = False) -> Tensor:
    return features.double() if debiased else features.to(torch.promote_types(features.dtype, torch.float32))


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the Frobenius inner product of matrices `[*batch, rows, columns]`, in float64."""
    return (a * b).sum(dim=-1).sum(dim=-1, dtype=torch.float64)


def _debias(product: Tensor, rows_x: Tensor, rows_y: Tensor, tokens: Tensor) -> Tensor:
    """Return HSIC_1 up to a factor that cancels in CKA, from ||X^T Y||_F^2 and the squared norms of rows."""
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
    """Return the CKA of centred features, ||X^T Y||_F^2 / (||X^T X||_F ||Y^T Y||_F), by the cheaper form.

    With fewer tokens than features that is the N x N Gram matrices, otherwise the D x D covariances.

    `tokens`: the number of valid tokens, needed by the debiased form if some rows are padding.
    `debiased`: whether to use HSIC_1 (Song et al., 2012) for all three terms, which needs at least four tokens.
    """
    x, y = _working(x, debiased), _working(y, debiased)
    if x.shape[-2] < max(x.shape[-1], y.shape[-1]):
        return cka_of_grams(x @ x.mT, y @ y.mT, tokens, debiased=debiased)
    products = [a.mT @ b for a, b in ((x, y), (x, x), (y, y))]
    terms = [_inner(product, product) for product in products]
    if debiased:
        count = terms[0].new_tensor(x.shape[-2]) if tokens is None else tokens.double()
        terms = _debiased(terms, x.square().sum(dim=-1), y.square().sum(dim=-1), count)
    return _ratio(*terms)


def _debiased(terms: list[Tensor], rows_x: Tensor, rows_y: Tensor, tokens: Tensor) -> list[Tensor]:
    pairs = ((rows_x, rows_y), (rows_x, rows_x), (rows_y, rows_y))
    return [_debias(term, *rows, tokens) for term, rows in zip(terms, pairs, strict=True)]


def cka_of_grams(
    gram_x: Float[Tensor, "*batch tokens tokens"],
    gram_y: Float[Tensor, "*batch tokens tokens"],
    tokens: Float[Tensor, "*batch"] | None = None,
    *,
    debiased: bool = False,
) -> Float[Tensor, "*batch"]:
    """Return the same value as `cka` from the Gram matrices X X^T and Y Y^T of centred features."""
    terms = [_inner(a, b) for a, b in ((gram_x, gram_y), (gram_x, gram_x), (gram_y, gram_y))]
    if debiased:
        count = terms[0].new_tensor(gram_x.shape[-1]) if tokens is None else tokens.double()
        terms = _debiased(terms, gram_x.diagonal(dim1=-2, dim2=-1), gram_y.diagonal(dim1=-2, dim2=-1), count)
    return _ratio(*terms)


def cka_of_linear_map(
    covariance: Float[Tensor, "*batch dim dim"], kernel: Float[Tensor, "dim dim"]
) -> Float[Tensor, "*batch"]:
    """Return CKA(X, X A) of centred X from C = X^T X and S = A A^T: tr(C S C) / (||C||_F tr(C S C S)^(1/2)).

    The tokens themselves are not needed: whatever the chain of probes A = A_{u+1} ... A_k, the cost is one product of
    D x D matrices per sample.
    """
    covariance, kernel = _working(covariance), _working(kernel)
    product = covariance @ kernel
    return _ratio(_inner(covariance, product), _inner(covariance, covariance), _inner(product, product.mT))
