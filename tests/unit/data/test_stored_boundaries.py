"""Boundaries on disk give back what was written."""

import torch

from ppcl.data.boundaries import TRAIN, Boundary, BoundaryWriter, read_step


def test_rotary_embeddings_of_complex_numbers_come_back_in_each_precision(tmp_path):
    for dtype in (torch.complex64, torch.complex128):
        kwargs = {"hidden_states": torch.randn(1, 3, 4), "rotary": (torch.randn(3, 2, dtype=dtype), "text")}
        written = Boundary(kwargs, {"hidden_states": torch.randn(1, 3, 4)}, {"hidden_states": None})
        writer = BoundaryWriter(tmp_path / str(dtype), TRAIN, "fingerprint")
        for _ in range(2):  # the second is equal to the first, and is not stored again
            writer.add(written, torch.ones(1))
        writer.flush()
        found, _ = read_step(tmp_path / str(dtype), TRAIN, 1, "fingerprint")
        rotary, text = found.kwargs["rotary"]
        assert rotary.dtype == dtype
        assert torch.equal(rotary, kwargs["rotary"][0])
        assert text == "text"
