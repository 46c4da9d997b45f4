"""Teacher and students in shards (`strategy=fsdp`): every rank holds a part of each block, whole while it runs.

PyTorch's FSDP2, a block a unit. A student, or what of a block learns, is a root of its own, since it is called from
within the teacher's forward and back-propagated there. Parameters that modules share, a pruned block and the
teacher's own, are sharded for each.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from ppcl.context import Run
from ppcl.families.base import Family
from ppcl.launch import is_first, rank
from ppcl.taps import StopForward


@dataclass
class Sharding:
    """The ranks that shard, and how they do it."""

    mesh: DeviceMesh
    device: torch.device
    precision: str
    cpu_offload: bool

    @classmethod
    def of(cls, run: Run) -> Sharding:
        mesh = init_device_mesh(run.device.type, (rank()[1],))
        return cls(mesh, run.device, run.precision, run.config.strategy.cpu_offload)

    def unit(self, module: nn.Module, *, learns: bool = False, whole_dtype: torch.dtype | None = None) -> None:
        """Shard what of `module` is not sharded yet; what does not learn is frozen.

        `whole_dtype`: what its parameters are cast to before they are put together; None leaves them.
        """
        if isinstance(module, FSDPModule):
            return
        _own_parameters(module, self.device, learns)
        # Autocast sees to the inputs; gradients are added up in float32 whatever they come in.
        reduce_dtype = torch.float32 if learns else None
        policy = MixedPrecisionPolicy(whole_dtype, reduce_dtype, cast_forward_inputs=False)
        fully_shard(
            module,
            mesh=self.mesh,
            # Also of a root: what a forward without gradient left whole no optimiser may see.
            reshard_after_forward=True,
            mp_policy=policy,
            offload_policy=CPUOffloadPolicy(pin_memory=self.device.type == "cuda")
            if self.cpu_offload
            else OffloadPolicy(),
        )
        sharded: Any = module
        sharded.whole_call = lambda function, kwargs: function(module, kwargs)
        register_fsdp_forward_method(module, "whole_call")

    def model(self, family: Family, model: nn.Module, *, learns: bool = False) -> None:
        """Shard a transformer, block by block and then the rest."""
        # As autocast would cast them; parts that are also measured outside of a training stay as they are.
        whole_dtype = torch.bfloat16 if learns and self.precision == "bf16-mixed" else None
        for part in (*family.called_apart(model), *family.blocks(model).values()):
            self.unit(part, learns=learns, whole_dtype=whole_dtype)
        # A forward that a tap ends early has to come back to FSDP's hooks, which tidy up behind it.
        forward: Callable[..., Any] = model.forward
        model.forward = lambda *args, **kwargs: _until_stopped(forward, *args, **kwargs)
        self.unit(model, learns=learns, whole_dtype=whole_dtype)


def _until_stopped(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return forward(*args, **kwargs)
    except StopForward:
        return (None,)


def _own_parameters(module: nn.Module, device: torch.device, learns: bool) -> None:
    """Give `module` copies on `device` of the parameters it shares, and of those that wait in a file's pages.

    What learns is copied as float32.
    """
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                learning = learns and parameter.requires_grad
                copied = parameter.detach().to(device, torch.float32 if learning else None, copy=True)
                setattr(child, name, nn.Parameter(copied, requires_grad=learning))


def skeleton(module: nn.Module) -> nn.Module:
    """A copy of `module` as it is before it is sharded, its parameters on the meta device."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, dict(empty))


def place(run: Run, module: Any) -> None:
    """Bring a training's module to where it runs: to the device, or into shards."""
    if not run.teacher.sharded:
        module.to(run.device)
    elif not module.is_sharded:
        module.shard(Sharding.of(run))
    module.setup("fit")


def whole_call(block: nn.Module, function: Callable[[nn.Module, dict[str, Any]], Tensor], kwargs: Any) -> Tensor:
    """`function(block, kwargs)`, for which a sharded block is made whole as for its forward."""
    if not isinstance(block, FSDPModule):
        return function(block, kwargs)
    sharded: Any = block
    return sharded.whole_call(function, kwargs)


def assign(parameter: nn.Parameter, value: Tensor) -> None:
    """Set a parameter, sharded or not; of a sharded one the first rank's value counts."""
    if isinstance(parameter, DTensor):
        value = value.to(parameter.device_mesh.device_type, parameter.dtype)
        parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))
    else:
        parameter.copy_(value)


@torch.no_grad()
def whole_state(module: nn.Module, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A module's state dict on the CPU; of what is sharded the first rank has it, put together, and others nothing.

    `dtype`: what it is cast to; None leaves it.
    """
    state: dict[str, Tensor] = {}
    for key, value in module.state_dict().items():
        if isinstance(value, DTensor):
            sharded: Any = value.to(value.device_mesh.device_type)  # from where offloading has it
            whole = sharded.full_tensor()
            if is_first():
                state[key] = whole.to("cpu", dtype)
        else:
            state[key] = value.detach().to("cpu", dtype)
    return state
