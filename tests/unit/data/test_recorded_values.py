"""Nested arguments of a recorded call keep their values, whatever the strides of their tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ppcl.data.recording.nested import copied, digest, packed, unpacked


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(0.5).expand(1),
        torch.tensor(0.5),
        torch.tensor([0.5]).expand(3),
        torch.arange(6.0).view(2, 3).T,
        torch.arange(4, dtype=torch.bfloat16)[::2],
        torch.zeros(0, 3),
    ],
)
def test_a_tensor_of_any_strides_is_stored(tensor: Tensor) -> None:
    stored: dict[str, Tensor] = {}

    def keep(value: Tensor) -> str:
        stored[digest(value)] = value
        return digest(value)

    given: dict[str, Any] = {"one": tensor, "nested": [(tensor, None, 2.5)], "flag": True}
    content = packed(copied(given), keep, "arguments")
    found = unpacked(content, stored.__getitem__)
    assert len(stored) == 1
    assert found.keys() == given.keys()
    assert torch.equal(found["one"], tensor)
    assert found["one"].dtype == tensor.dtype
    assert found["nested"][0][1:] == (None, 2.5)
