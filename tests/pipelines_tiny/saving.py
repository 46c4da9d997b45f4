"""Saves tiny pipelines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn


def flow_scheduler(**settings: Any) -> FlowMatchEulerDiscreteScheduler:
    """Return a scheduler of flow matching."""
    return FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | settings))


def shake(transformer: nn.Module) -> None:
    """Replace weights that are 0 in an untrained model, as gates and output layers often are, by small random ones."""
    for parameter in transformer.parameters():
        if not parameter.any():
            nn.init.normal_(parameter.data, std=0.02)


def saved(folder: Path, kind: Any, **parts: Any) -> Path:
    """Save a pipeline of these parts to `folder`, and return it."""
    shake(parts["transformer"])
    kind(**parts).save_pretrained(folder)
    return folder


def seed() -> None:
    """Make the weights that are drawn from here on the same in every process."""
    torch.manual_seed(0)
