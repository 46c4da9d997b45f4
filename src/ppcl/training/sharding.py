"""Sharding of teacher and students with FSDP2 (`strategy=fsdp`).

Every rank holds a shard of each block. A block is one FSDP unit: it is all-gathered while it runs. A student or a
projector is an FSDP root of its own, because it is called and back-propagated during the teacher's forward. Parameters
that two modules share, such as those of a pruned block and of the teacher's block, are copied and sharded for each.

On several machines, `strategy.shard_over=machine` shards over the ranks of each machine and replicates across machines.
Blocks are then gathered over the fast links within a machine, and only gradients go over the network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

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
from ppcl.launch import is_first, rank, shard_ranks
from ppcl.taps import StopForward

Found = TypeVar("Found")


@dataclass
class Sharding:
    """Settings of a run's sharding: the mesh of all ranks, this rank's device, and the training precision.

    `mesh`: `[ranks]`, or `[machines, ranks of each]` if parameters are replicated across machines.
    `cpu_offload`: whether shards are kept in host memory while they are not in use.
    """

    mesh: DeviceMesh
    device: torch.device
    precision: str
    cpu_offload: bool

    @classmethod
    def of(cls, run: Run) -> Sharding:
        """Return the sharding of `run`, over all its ranks or over those of each machine."""
        config = run.config.strategy
        mesh = _mesh(run.device.type, rank()[1], shard_ranks(config.shard_over))
        return cls(mesh, run.device, run.precision, config.cpu_offload)

    def unit(self, module: nn.Module, *, learns: bool = False, whole_dtype: torch.dtype | None = None) -> None:
        """Make `module` one FSDP unit, without parameters that are sharded already; do nothing if it is one already.

        `learns`: whether its trainable parameters stay trainable, as float32; otherwise all are frozen.
        `whole_dtype`: the dtype that parameters are cast to before they are all-gathered; None keeps theirs.
        """
        if isinstance(module, FSDPModule):
            return
        _own_parameters(module, self.device, learns)
        # Autocast casts the inputs, so FSDP must not. Gradients of any dtype are reduced in float32.
        reduce_dtype = torch.float32 if learns else None
        policy = MixedPrecisionPolicy(whole_dtype, reduce_dtype, cast_forward_inputs=False)
        fully_shard(
            module,
            mesh=self.mesh,
            # Also for a root, which by default stays all-gathered after its forward: without a backward pass to reshard
            # it, the optimiser would see whole parameters.
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
        """Shard a transformer: each block as a unit, then everything else as one. `learns`: as in `unit`."""
        # Gather in the dtype that autocast would cast to. Students and projectors, sharded by `unit`, are gathered as
        # float32, because they are also evaluated outside of a training.
        whole_dtype = torch.bfloat16 if learns and self.precision == "bf16-mixed" else None
        for part in (*family.called_apart(model), *family.blocks(model).values()):
            self.unit(part, learns=learns, whole_dtype=whole_dtype)
        # `observe` may end a forward early. Return normally then, so that FSDP's post-forward hooks still run.
        forward: Callable[..., Any] = model.forward
        model.forward = lambda *args, **kwargs: _until_stopped(forward, *args, **kwargs)
        self.unit(model, learns=learns, whole_dtype=whole_dtype)


@cache  # every mesh of several machines has process groups of its own
def _mesh(device: str, ranks: int, sharing: int) -> DeviceMesh:
    """Return the mesh of `ranks` ranks, of which each `sharing` adjacent ones share the parameters among them."""
    if sharing == ranks:
        return init_device_mesh(device, (ranks,), mesh_dim_names=("shard",))
    return init_device_mesh(device, (ranks // sharing, sharing), mesh_dim_names=("replicate", "shard"))


def _until_stopped(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `forward`, and return `(None,)` if a hook raised `StopForward`."""
    try:
        return forward(*args, **kwargs)
    except StopForward:
        return (None,)


def _own_parameters(module: nn.Module, device: torch.device, learns: bool) -> None:
    """Replace the parameters of `module` that are not sharded yet by copies on `device`.

    Without a copy they could be shared with another module, or be memory-mapped from a file. They are frozen unless
    `learns`, in which case trainable ones stay trainable and are copied as float32.
    """
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            if not isinstance(parameter, DTensor):
                learning = learns and parameter.requires_grad
                copied = parameter.detach().to(device, torch.float32 if learning else None, copy=True)
                setattr(child, name, nn.Parameter(copied, requires_grad=learning))


def place(run: Run, module: Any) -> None:
    """Move a training's module to the run's device, or shard it if the run is sharded; then set it up for training."""
    if not run.teacher.sharded:
        module.to(run.device)
    elif not module.is_sharded:
        module.shard(Sharding.of(run))
    module.setup("fit")


def ready(run: Run) -> Callable[[nn.Module], Any]:
    """Return the function that moves one trained module to the run's device, or shards it if the run is sharded."""
    if run.teacher.sharded:
        return partial(Sharding.of(run).unit, learns=True)
    return lambda module: module.to(run.device)


def whole_call(block: nn.Module, function: Callable[[nn.Module, dict[str, Any]], Found], kwargs: Any) -> Found:
    """Return `function(block, kwargs)`; a sharded block is all-gathered for the call as it is for its forward."""
    if not isinstance(block, FSDPModule):
        return function(block, kwargs)
    sharded: Any = block
    return sharded.whole_call(function, kwargs)


def assign(parameter: nn.Parameter, value: Tensor) -> None:
    """Copy `value` into `parameter`; if that is sharded, every rank gets its shard of rank 0's `value`."""
    if isinstance(parameter, DTensor):
        value = value.to(parameter.device_mesh.device_type, parameter.dtype)
        parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))
    else:
        parameter.copy_(value)


@torch.no_grad()
def whole_state(module: nn.Module, dtype_of: Callable[[str], torch.dtype] | None = None) -> dict[str, Tensor]:
    """Return the state dict of `module` on the CPU, with sharded tensors all-gathered. Every rank must call this.

    Only rank 0's result has the sharded tensors; other ranks get those that are not sharded. `dtype_of`: returns the
    dtype that a tensor is cast to, given its name; None keeps theirs.
    """
    state: dict[str, Tensor] = {}
    for key, value in module.state_dict().items():
        dtype = None if dtype_of is None else dtype_of(key)
        if isinstance(value, DTensor):
            sharded: Any = value.to(value.device_mesh.device_type)  # an offloaded shard is in host memory
            whole = sharded.full_tensor()
            if is_first():
                state[key] = whole.to("cpu", dtype)
        else:
            state[key] = value.detach().to("cpu", dtype)
    return state
