"""The model of a tiny case."""

from __future__ import annotations

import diffusers
import torch
from diffusers.models import transformers
from torch import nn

from tests.models_tiny.case import Case


def build(name: str, case: Case) -> nn.Module:
    """Return the model of class `name`, in float32 on the CPU, with weights that are the same each time.

    Some classes leave parameters as `torch.empty` made them, to be loaded: those are drawn, too.
    """
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # what stays uninitialised is NaN
    try:
        model = getattr(diffusers, name, getattr(transformers, name, None)).from_config(case.config).eval()
    finally:
        torch.use_deterministic_algorithms(False)
    for parameter in model.parameters():
        if parameter.isnan().any():
            nn.init.normal_(parameter, std=0.02)
    return model
