"""Modules that share another's parameters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


def load_shared(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Make the parameters of `module` those of `state`, sharing memory and keeping whether each learns.

    `load_state_dict(assign=True)` alone would hand the flags of `module` to parameters that others hold too.
    """
    learns = {key: value.requires_grad for key, value in state.items()}
    module.load_state_dict(state, assign=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(learns[name])
