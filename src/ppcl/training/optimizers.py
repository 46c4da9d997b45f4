"""Optimisers and learning-rate schedule of all trainings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim._muon import _adjust_lr, _zeropower_via_newtonschulz

from ppcl.config import TrainingConfig
from ppcl.families.base import Family
from ppcl.training.states import PackedStates

# Root mean square of an update's elements, relative to the learning rate.
_RMS_OF_UPDATE = {"muon": 0.2, "adamw": 1.0}
# The least RMS that a vector is taken to have, and that of a matrix of zeros.
_LEAST_SIZE = 0.02


def matrices(family: Family, blocks: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Yield the weights of the linear layers in `blocks`, without those of modulation layers.

    They are the matrices of attention and FFNs, and projectors. A modulation layer is part of a norm, as in diffusers'
    `AdaLayerNormZero`, or is named by `family.facts.modulations`.
    """
    for block in blocks:
        norms = [module for module in block.modules() if "Norm" in type(module).__name__]
        of_norms = {id(part) for norm in norms for part in norm.modules()}
        for name, module in block.named_modules():
            modulation = id(module) in of_norms or any(part in f".{name}." for part in family.facts.modulations)
            if isinstance(module, nn.Linear) and not modulation:
                yield module.weight


def split_for_muon(
    family: Family, model: nn.Module, blocks: Iterable[nn.Module]
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the trainable parameters of `model` in two lists: the `matrices` of `blocks` for Muon, and all others.

    AdamW takes the others. They include modulation layers and the embeddings that feed them (DiT has some in every
    block): the row of a class label rarely has a gradient, and Muon would scale an update of that row to the size of
    one of the whole matrix.
    """
    chosen = {id(weight) for weight in matrices(family, blocks)}
    hidden: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (hidden if id(parameter) in chosen else rest).append(parameter)
    return hidden, rest


@torch.no_grad()
def root_mean_square(weight: Tensor) -> float:
    """Return the root mean square of a tensor's elements. If it is sharded, all ranks must call this."""
    mean = weight.detach().to(_device(weight)).float().square().mean()
    return (mean.full_tensor() if isinstance(mean, DTensor) else mean).sqrt().item()


def _device(tensor: Tensor) -> Any:
    """Return the device to compute on: an offloaded shard is in host memory, where ranks cannot exchange it."""
    return tensor.device_mesh.device_type if isinstance(tensor, DTensor) else tensor.device


def relative_groups(
    parameters: Iterable[nn.Parameter], optimizer: str, relative_update: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Return a group for each of `parameters`, with the learning rate that moves it by `relative_update`.

    An update then has an RMS of `relative_update` times the RMS that the parameter has now. So one rate suits models of
    all widths: a matrix of 3,072 channels has weights of about 0.02, one of 64 channels some of 0.5.

    `optimizer`: `muon` or `adamw`. AdamW moves all weights of a row alike, so its effect on the row's output grows with
    the number of inputs, while the output itself grows with the square root of that number. Matrices with more than 16
    inputs therefore get a smaller rate from AdamW, by a factor of 4 / sqrt(inputs). Muon needs no such factor.

    A vector, such as a bias, has a size of at least 0.02 here: one that happens to be zero is to learn too.

    The weights shrink by `relative_update * weight_decay` a step at the peak of the schedule, whatever their size.
    """
    groups = []
    for parameter in parameters:
        least = _LEAST_SIZE if parameter.ndim == 1 else 0.0
        rate = relative_update * (max(root_mean_square(parameter), least) or _LEAST_SIZE) / _RMS_OF_UPDATE[optimizer]
        if optimizer == "adamw" and parameter.ndim > 1:
            rate *= min(1.0, 4 * parameter[0].numel() ** -0.5)
        decay = relative_update * weight_decay / rate if rate else 0.0
        groups.append({"params": [parameter], "lr": rate, "weight_decay": decay})
    return groups


def _shards(weight: DTensor) -> Any:
    """Return the mesh of the ranks that hold the shards of `weight`, without the replicas on other machines."""
    return weight.device_mesh["shard"] if weight.device_mesh.ndim > 1 else weight.device_mesh


def adamw(parameters: Iterable[Any], config: TrainingConfig) -> torch.optim.AdamW:
    """Return AdamW with the settings of a training, for parameters or for groups of them.

    It is the fused version, which allocates no temporary copies of the parameters.
    """
    settings: dict[str, Any] = {
        "lr": config.lr or 0.0,
        "betas": (config.beta1, config.beta2),
        "weight_decay": config.weight_decay,
        "fused": True,
    }
    if config.optimizer_states == "float32":
        return torch.optim.AdamW(parameters, **settings)
    return PackedAdamW(parameters, states=config.optimizer_states, **settings)


def muon(parameters: Iterable[Any], lr: float, weight_decay: float, states: str = "float32") -> torch.optim.Muon:
    """Return Muon with updates scaled to the RMS of AdamW's, so that both can use learning rates of one size.

    `states`: how its momentum is stored, see `ppcl.training.states`.
    """
    settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "adjust_lr_fn": "match_rms_adamw"}
    return Muon(parameters, **settings) if states == "float32" else PackedMuon(parameters, states=states, **settings)


class Muon(torch.optim.Muon):
    """Muon that also takes weights sharded by FSDP.

    The orthogonalised update of a matrix depends on all of its elements. So updates are gathered, as many at a time as
    there are ranks with a shard. Each rank orthogonalises one of them, and its shards go back to all of these ranks.
    Momentum and weights stay sharded. Machines that hold replicas all do the same, without the network between them.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        weights = [weight for group in self.param_groups for weight in group["params"]]
        if not any(isinstance(weight, DTensor) for weight in weights):
            return super().step(closure)
        todo: list[tuple[dict[str, Any], Any, Any]] = []  # settings, weight, and its update, still sharded
        for group in self.param_groups:
            found: tuple[list, list, list] = ([], [], [])
            self._init_group(group, *found)  # the weights that have gradients, these, and their momentum
            for weight, gradient, momentum in zip(*found, strict=True):
                momentum.lerp_(gradient, 1 - group["momentum"])
                update = gradient.lerp_(momentum, group["momentum"]) if group["nesterov"] else momentum
                todo.append((group, weight, update))
        while todo:
            ranks = _shards(todo[0][1]).size()
            self._step_together(todo[:ranks])
            todo = todo[ranks:]
        return None

    @staticmethod
    def _step_together(turn: list[tuple[dict[str, Any], Any, Any]]) -> None:
        """Update at most one weight for each rank."""
        mine: Tensor | None = None
        rank = _shards(turn[0][1]).get_local_rank()
        for owner, (group, weight, update) in enumerate(turn):
            whole = update.to(_device(weight)).full_tensor()
            if owner == rank:
                steps = group["ns_coefficients"], group["ns_steps"], group["eps"]
                mine = _zeropower_via_newtonschulz(whole, *steps).to(weight.dtype)
        for owner, (group, weight, _) in enumerate(turn):
            if owner == rank and mine is not None:
                whole = mine
            else:  # only the shape of this one counts
                whole = torch.empty(weight.shape, dtype=weight.dtype, device=_device(weight))
            shard: Any = distribute_tensor(whole, _shards(weight), weight.placements[-1:], src_data_rank=owner)
            mine_of_it, rate = weight.to_local(), _adjust_lr(group["lr"], group["adjust_lr_fn"], weight.shape)
            mine_of_it.mul_(1 - group["lr"] * group["weight_decay"])
            mine_of_it.add_(shard.to_local().to(weight.device), alpha=-rate)


class PackedAdamW(PackedStates, torch.optim.AdamW):
    """AdamW with its two means in fewer bits."""


class PackedMuon(PackedStates, Muon):
    """Muon with its momentum in fewer bits."""


def optimizers_of(
    family: Family, model: nn.Module, blocks: Sequence[nn.Module], config: Any
) -> list[torch.optim.Optimizer]:
    """Return the optimisers of a training that updates `model`, whose `blocks` hold its matrices.

    `config`: distillation or fine-tuning settings. `optimizer: muon` gives Muon the matrices and AdamW the rest. With
    `relative_update` every parameter has a rate of its own, see `relative_groups`.
    """
    chosen: dict[str, Any] = {"muon": [], "adamw": [p for p in model.parameters() if p.requires_grad]}
    if config.optimizer == "muon":
        chosen["muon"], chosen["adamw"] = split_for_muon(family, model, blocks)
    if config.relative_update is not None:
        relative = config.relative_update, config.weight_decay
        chosen = {name: relative_groups(parameters, name, *relative) for name, parameters in chosen.items()}
    found: list[torch.optim.Optimizer] = []
    if chosen["muon"]:
        lr = config.muon_lr if config.relative_update is None else 0.0  # else each group has its own
        found.append(muon(chosen["muon"], lr, config.weight_decay, config.optimizer_states))
    if chosen["adamw"]:
        found.append(adamw(chosen["adamw"], config))
    return found


def cosine_schedule(optimizer: torch.optim.Optimizer, config: TrainingConfig) -> torch.optim.lr_scheduler.LambdaLR:
    """Return the learning-rate scheduler of a training, which follows `cosine_with_warmup`."""
    factor = partial(cosine_with_warmup, warmup=config.warmup_steps, total=config.steps, floor=config.min_lr_ratio)
    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def cosine_with_warmup(step: int, *, warmup: int, total: int, floor: float) -> float:
    """Return the learning-rate factor at `step`: linear warm-up to 1, then a cosine decay to `floor`.

    `warmup`, `total`: the number of warm-up steps and of all steps. From `total` on the factor stays at `floor`.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * progress)).item())
