"""Modules that share another's parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ppcl.errors import UsageError
from ppcl.streaming import still


def load_shared(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Make the parameters of `module` those of `state`, sharing memory and keeping whether each learns.

    `load_state_dict(assign=True)` alone would hand the flags of `module` to parameters that others hold too.
    """
    learns = {key: value.requires_grad for key, value in state.items()}
    module.load_state_dict(state, assign=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(learns[name])


@torch.inference_mode(False)  # what is made here outlives any such context
def share_pruned(pruned: nn.Module, block: nn.Module, projectors: Mapping[str, Tensor]) -> nn.Module:
    """`pruned`, empty, with what it keeps of `block`'s parameters and with `projectors`, else the identity.

    A parameter that is smaller there is the first part of `block`'s: the attention's half of a modulation,
    the columns of an output projection that read the attention.
    """
    own = block.state_dict(keep_vars=True)
    first = next(block.parameters())
    state: dict[str, Tensor] = {}
    for key, empty in pruned.state_dict().items():
        if key in own:
            state[key] = own[key]
            if own[key].shape != empty.shape:
                with still(block):
                    cut = own[key].detach()[tuple(map(slice, empty.shape))].contiguous()
                state[key] = cut.requires_grad_(own[key].requires_grad)
        elif key in projectors:
            if projectors[key].shape != empty.shape:
                raise UsageError(
                    f"a projector does not fit this model: {key} is {list(projectors[key].shape)}, "
                    f"the model's is {list(empty.shape)}."
                )
            state[key] = projectors[key].to(first.device, first.dtype)
        else:
            state[key] = torch.zeros(empty.shape, dtype=first.dtype, device=first.device)
    load_shared(pruned, state)
    return pruned.train(block.training)
