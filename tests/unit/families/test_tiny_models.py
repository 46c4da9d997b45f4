"""Each tiny model of diffusers' transformer classes runs as its pipeline calls it, and gives the same twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models_tiny.build import build
from tests.models_tiny.case import Case
from tests.models_tiny.cases import CASES

# New models of these classes give zeros: their last layer starts at zero.
ZERO_AT_FIRST = {"ErnieImageTransformer2DModel", "LongCatAudioDiTTransformer"}


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the tensors within lists, tuples and dicts, of which diffusers' outputs are some."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, list | tuple | dict):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _tensors(part)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if isinstance(case, Case)])
@torch.no_grad()
def test_it_gives_the_same_finite_output_twice(name: str) -> None:
    case = CASES[name]
    assert isinstance(case, Case)
    model = build(name, case)
    assert set(case.config) <= set(model.config), "the class has no such argument"
    assert sum(parameter.numel() for parameter in model.parameters()) < 10_000_000
    first, second = (list(_tensors(model(**case.inputs()))) for _ in range(2))
    assert bool(first[0].any()) is (name not in ZERO_AT_FIRST)
    for one, other in zip(first, second, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)
