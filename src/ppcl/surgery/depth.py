"""Depth surgery: builds student blocks. A depth-pruned model is the stock class with fewer blocks."""

from __future__ import annotations

import copy

import torch
from torch import nn

from ppcl.artifacts.plan import Interval
from ppcl.streaming import still


def student_block(blocks: list[nn.Module], interval: Interval, init: str) -> nn.Module:
    """Return a new trainable student block for `interval` = (u, v) of the teacher's `blocks`.

    `init`: `first` copies block u (the paper), `middle` copies block (u + v) // 2 (the authors' code), `average` takes
    the mean of the weights of blocks u to v.
    """
    u, v = interval
    source = {"first": u, "middle": (u + v) // 2, "average": u}[init]
    with still(blocks[source]):
        student = copy.deepcopy(blocks[source])
    if init == "average":
        with still(*blocks[u : v + 1]):
            states = [blocks[index].state_dict() for index in range(u, v + 1)]
            student.load_state_dict({k: torch.stack([s[k] for s in states]).mean(dim=0) for k in states[0]})
    return student.requires_grad_(True)
