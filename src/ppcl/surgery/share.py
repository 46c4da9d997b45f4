"""Builds modules that share parameters with other modules, or take them over later."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ppcl.errors import UsageError
from ppcl.streaming import is_streamed, still


def load_shared(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Make the parameters of `module` those of `state`, with shared memory and unchanged `requires_grad`.

    `load_state_dict(assign=True)` alone would copy `requires_grad` from `module` to the shared parameters.
    """
    learns = {key: value.requires_grad for key, value in state.items()}
    module.load_state_dict(state, assign=True)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(learns[name])


def skeleton(module: nn.Module) -> nn.Module:
    """Return a copy of a module that is not sharded yet, with its parameters on the meta device.

    The gathered weights of the sharded module can be loaded into it later.
    """
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, dict(empty))


@torch.inference_mode(False)  # its tensors are used, and trained, after an inference_mode of the caller ends
def share_pruned(pruned: nn.Module, block: nn.Module, projectors: Mapping[str, Tensor]) -> nn.Module:
    """Fill `pruned`, a block on the meta device, with parameters of `block` and with `projectors`; returns `pruned`.

    Parameters of equal shape are shared. A parameter that is smaller in `pruned` is the first part of that of `block`:
    the attention's half of a modulation, or the columns of an output projection that read the attention. Projectors
    that are not given are zero, which is the identity. Raises `UsageError` for a projector of another shape.
    """
    own = block.state_dict(keep_vars=True)
    first = next(block.parameters())
    state, shapes = dict[str, Tensor](), {key: empty.shape for key, empty in pruned.state_dict().items()}
    smaller = [key for key, shape in shapes.items() if key in own and own[key].shape != shape]
    streamed = is_streamed(block)
    with still(block) if smaller else nullcontext():
        for key in smaller:
            cut = own[key].detach()[tuple(map(slice, shapes[key]))]
            # A view of a streamed weight would keep all that is read with it, and change when that is overwritten.
            cut = cut.clone(memory_format=torch.contiguous_format) if streamed else cut.contiguous()
            state[key] = cut.requires_grad_(own[key].requires_grad)
    for key, empty in pruned.state_dict().items():
        if key in smaller:
            continue
        if key in own:
            state[key] = own[key]
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
