"""Each tiny model of the second half of diffusers' transformer classes runs, and gives the same twice."""

import pytest
import torch

from tests.models_tiny.build import build
from tests.models_tiny.case import Case
from tests.models_tiny.second import CASES

# New models of these classes give zeros: their last layer starts at zero.
ZERO = {"LongCatAudioDiTTransformer"}


def tensors(output):
    """Returns the tensors within lists, tuples and the outputs of diffusers, which are dicts."""
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [tensor for value in values for tensor in tensors(value)]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if isinstance(case, Case)])
@torch.no_grad()
def test_runs(name):
    model = build(name, CASES[name])
    first, second = (tensors(model(**CASES[name].inputs())) for _ in range(2))
    assert sum(parameter.numel() for parameter in model.parameters()) < 10e6
    assert first
    for one, again in zip(first, second, strict=True):
        assert one.isfinite().all()
        assert one.any() != (name in ZERO)
        torch.testing.assert_close(one, again, rtol=0, atol=0)
