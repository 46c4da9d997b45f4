"""Builds modules that share parameters with other modules."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ppcl.errors import UsageError
from ppcl.streaming import still


def load_shared(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Make the parameters of `module` those of `state`, with shared memory and unchanged `requires_grad`.

    `load_state_dict(assign=True)` alone would copy `requires_grad` from `module` to the shared parameters.
    """
    learns = {key: value.requires_grad for key, value in state.items()}
    module.load_state_dict(state, assign=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(learns[name])


@torch.inference_mode(False)  # its tensors are used, and trained, after an inference_mode of the caller ends
def share_pruned(pruned: nn.Module, block: nn.Module, projectors: Mapping[str, Tensor]) -> nn.Module:
    """Fill `pruned`, a block on the meta device, with parameters of `block` and with `projectors`; returns `pruned`.

    Parameters of equal shape are shared. A parameter that is smaller in `pruned` is the first part of that of `block`:
    the attention's half of a modulation, or the columns of an output projection that read the attention. Projectors
    that are not given are zero, which is the identity. Raises `UsageError` for a projector of another shape.
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
