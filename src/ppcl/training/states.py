"""Optimiser states in fewer bits: they lie packed on the device, and a step unpacks those of one weight at a time.

`bfloat16` halves them. `8bit` takes a quarter: blocks of 256 neighbouring values share a scale, their largest size, and
each value is stored as a code of one byte. Codes are spaced by a root, so that small values keep precision too: for
momentum the square root of the size, for AdamW's mean of squares the fourth root. With codes that are spaced evenly,
or as in bitsandbytes, small values become 0 where the sizes within a block differ much, and AdamW divides by them.

Values are rounded to the nearest, not stochastically. A step moves a mean by a share of 1 - beta, at least 5% with the
default betas, while bfloat16 rounds by 0.4% at most, and scales change with every step. So small changes are not lost,
and a resumed training needs no random numbers. With a beta of 0.999 they would be: the mean of squares would grow to
twice its size. `ppcl.validation` therefore refuses betas above 0.99.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_BLOCK = 256  # values that share a scale
_LEAST = 4096  # elements; the states of smaller weights stay float32 with `8bit`
_SCALES = "_scales"  # ends the name of the scales of a state that is stored in codes
_SQUARES = "exp_avg_sq"  # AdamW's name for the mean of squared gradients, which are never negative


def state_bytes(weight: Tensor, states: str) -> int:
    """Return the bytes of one state of `weight`. AdamW keeps two, Muon one. `states`: as `optimizer_states`."""
    count = weight.numel()
    if states == "bfloat16":
        return 2 * count
    return count + 4 * (count // _BLOCK) if states == "8bit" and _is_coded(weight) else 4 * count


def _is_coded(weight: Tensor) -> bool:
    return weight.numel() >= _LEAST and weight.numel() % _BLOCK == 0


def encode(values: Tensor, *, squares: bool) -> tuple[Tensor, Tensor]:
    """Return codes of the shape of `values`, which it overwrites, and a float32 scale for each block.

    `squares`: whether `values` are means of squares. Their codes are 1 to 255 (uint8), of other values -127 to 127
        (int8). A code of 0 would let a mean of squares vanish, and with it what bounds AdamW's step.
    """
    blocks = values.reshape(-1, _BLOCK)
    scales = blocks.abs().amax(dim=1, keepdim=True)
    shares = blocks.div_(scales.clamp_min(torch.finfo(values.dtype).tiny))
    if squares:
        codes = shares.sqrt_().sqrt_().mul_(255).round_().clamp_(min=1).to(torch.uint8)
    else:
        codes = shares.abs().sqrt_().mul_(127).round_().copysign_(shares).to(torch.int8)
    return codes.view(values.shape), scales


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the float32 values that `encode` has stored."""
    shares = codes.float().view(-1, _BLOCK)
    if codes.dtype == torch.uint8:
        shares.div_(255).square_().square_()
    else:
        shares.mul_(shares.abs()).div_(127**2)
    return shares.mul_(scales).view(codes.shape)


class PackedStates(torch.optim.Optimizer):
    """A mixin that stores the states of an optimiser packed. It must come before the optimiser's own class.

    `states`: `bfloat16` or `8bit`. Weights are float32 and not sharded.
    """

    def __init__(self, parameters: Any, *, states: str, **settings: Any) -> None:
        super().__init__(parameters, **settings)
        self.states = states

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Update one weight after another. Only its states are unpacked meanwhile."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        groups = self.param_groups
        try:
            for group in groups:
                for weight in group["params"]:
                    if weight.grad is not None:
                        state = self.state[weight]
                        packed = dict(state)
                        state.update(self._unpacked(weight, packed))
                        self.param_groups = [group | {"params": [weight]}]
                        super().step()
                        for key, value in self._packed(weight, state).items():
                            # Into the same memory, which would otherwise be in pieces soon.
                            state[key] = packed[key].copy_(value) if key in packed else value
        finally:
            self.param_groups = groups
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load packed states as they are; torch's own way would first turn them all into float32."""
        super().load_state_dict({**state_dict, "state": {}})
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for number, found in state_dict["state"].items():
            device = weights[number].device
            self.state[weights[number]] = {key: value.to(device, copy=True) for key, value in found.items()}

    def _packed(self, weight: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the packed form of a weight's float32 states, whose memory may be overwritten."""
        floats = {key: value for key, value in state.items() if key != "step" and not key.endswith(_SCALES)}
        if self.states == "bfloat16":
            return {key: value.bfloat16() for key, value in floats.items()}
        found = {}
        if _is_coded(weight):
            for key, value in floats.items():
                found[key], found[key + _SCALES] = encode(value, squares=key == _SQUARES)
        return found

    def _unpacked(self, weight: Tensor, packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the float32 states of a weight."""
        if self.states == "bfloat16":
            return {key: value.float() for key, value in packed.items() if key != "step"}
        scales = {key: value for key, value in packed.items() if key.endswith(_SCALES)}
        return {(of := key.removesuffix(_SCALES)): decode(packed[of], value) for key, value in scales.items()}
