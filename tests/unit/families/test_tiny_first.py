"""Each tiny model of the first half of diffusers' transformer classes runs as its pipeline calls it."""

from collections.abc import Iterator
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from tests.models_tiny.case import Case
from tests.models_tiny.first import CASES

ZERO_AT_FIRST = {"ErnieImageTransformer2DModel"}  # classes whose last layer starts at zero


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, list | tuple | dict):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _tensors(part)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if isinstance(case, Case)])
def test_it_gives_the_same_finite_output_twice(name: str) -> None:
    case = CASES[name]
    assert isinstance(case, Case)
    torch.manual_seed(0)
    model = getattr(diffusers, name).from_config(case.config).eval()
    assert set(case.config) <= set(model.config), "the class has no such argument"
    assert sum(parameter.numel() for parameter in model.parameters()) < 10_000_000

    with torch.no_grad():
        first, second = (list(_tensors(model(**case.inputs()))) for _ in range(2))

    for one, other in zip(first, second, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)
    assert bool(first[0].any()) is (name not in ZERO_AT_FIRST)
