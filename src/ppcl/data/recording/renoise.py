"""Whether a recorded call can be made anew at any noise level, from the final latents of its prompt and fresh noise.

Of flow matching, the input at the noise level sigma is (1 - sigma) x_0 + sigma n, and the transformer predicts n - x_0.
Whether that is so for a model is looked up in what its pipeline does, not taken for granted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppcl.data.recording.files import ARGUMENTS, Call
from ppcl.data.recording.nested import replaced
from ppcl.data.recording.recorder import Recording

_ROUNDING = 2e-2  # in bfloat16
_UNIT = 0.1  # by which mean and deviation of the noise of one sample may differ from 0 and 1
_AGREES = 0.5  # the least cosine of the transformer's output with what the scheduler is given


class NoRenoisingError(ValueError):
    """A pipeline whose calls cannot be made anew. The message says why."""


@dataclass(frozen=True)
class Renoising:
    """The arguments that change with the noise level: `latents` and `timestep`, by their paths.

    The timestep is `slope` * sigma + `offset`.
    """

    latents: str
    timestep: str
    slope: float
    offset: float

    def arguments(self, call: Call, noisy: Tensor, sigma: float) -> dict[str, Any]:
        """Return the arguments of a call with the `noisy` latents of one sample in place of its own, at level `sigma`.

        Where the call has both passes of guidance, both get them. Tokens of given pictures after them stay.
        """
        leaves = dict(_leaves(dict(call.arguments), ARGUMENTS))
        own, time = leaves[self.latents], leaves[self.timestep]
        rows = noisy.repeat(len(own) // len(noisy), *[1] * (noisy.ndim - 1))
        given = torch.cat([rows.to(own), own[:, rows.shape[1] :]], dim=1)
        value = self.slope * sigma + self.offset
        then = torch.full_like(time, value) if isinstance(time, Tensor) else type(time)(value)
        changed = replaced(dict(call.arguments), ARGUMENTS, self.latents, given)
        return replaced(changed, ARGUMENTS, self.timestep, then)


def find_renoising(scheduler: Any, found: Recording) -> Renoising:
    """Return how the calls that were recorded of one prompt can be made anew.

    Raises `NoRenoisingError` if the noise of the first step and the final latents do not make up what the transformer
    was given, or if more than two arguments change from step to step.
    """
    if not found.throughout:
        raise NoRenoisingError("the model is called at some of the denoising steps alone")
    first, last = found.first, found.last
    if not (first and last and found.latents is not None and last.flow):
        raise NoRenoisingError("its scheduler is not of flow matching")
    latents = found.latents.detach().cpu()
    if scheduler.config.get("use_dynamic_shifting") and latents.ndim != 3:
        raise NoRenoisingError("its noise levels depend on a number of tokens that its latents do not show")
    if abs(first.sigma - 1) > _ROUNDING:
        raise NoRenoisingError(f"it begins at the noise level {first.sigma:.3g}, not with noise alone")
    if abs(first.sample.float().mean()) > _UNIT or abs(first.sample.float().std() - 1) > _UNIT:
        raise NoRenoisingError("it does not begin with noise of mean 0 and deviation 1")
    if not _near(last.sample.float() - last.sigma * last.predicted.float(), latents.float()):
        raise NoRenoisingError("its last step does not end at x - sigma v")
    if found.agreement < _AGREES:
        raise NoRenoisingError("its transformer does not predict the velocity that its scheduler is given")
    changing = _changing(found.calls)
    opening = dict(_leaves(first.arguments, ARGUMENTS))
    paths = [path for path in changing if _begins_with(opening.get(path), first.sample)]
    if len(paths) != 1:
        raise NoRenoisingError("none of the transformer's arguments is the noise that the first step begins with")
    times = [path for path in changing if path != paths[0]]
    if len(times) != 1:
        raise NoRenoisingError(f"{' and '.join(sorted(times)) or 'no timestep'} changes from step to step")
    return Renoising(paths[0], times[0], *_affine(found.calls, times[0]))


def _near(one: Tensor, two: Tensor) -> bool:
    return one.shape == two.shape and bool((one - two).norm() <= _ROUNDING * two.norm())


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield path and value of everything in nested values that is no dict, list or tuple."""
    if isinstance(value, Mapping):
        items: Any = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        yield path, value
        return
    for key, item in items:
        yield from _leaves(item, f"{path}.{key}")


def _changing(calls: Sequence[Call]) -> list[str]:
    """Return the paths of arguments that differ between calls of the same pass in different steps."""
    passes: dict[int, list[dict[str, Any]]] = {}
    for number, call in enumerate(calls):
        place = sum(other.step == call.step for other in calls[:number])
        passes.setdefault(place, []).append(dict(_leaves(dict(call.arguments), ARGUMENTS)))
    found: dict[str, None] = {}
    for same in passes.values():
        if any(other.keys() != same[0].keys() for other in same):
            raise NoRenoisingError("its transformer is called with other arguments from step to step")
        for path in same[0]:
            if any(not _equal(other[path], same[0][path]) for other in same[1:]):
                found[path] = None
    return list(found)


def _equal(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        return one.shape == two.shape and torch.equal(one, two)
    return type(one) is type(two) and bool(one == two)


def _begins_with(value: Any, sample: Tensor) -> bool:
    """Return whether an argument is the sample of one prompt, in each pass, with or without tokens after it."""
    if not isinstance(value, Tensor) or value.ndim != sample.ndim or value.shape[2:] != sample.shape[2:]:
        return False
    if value.shape[1] < sample.shape[1] or len(value) % len(sample):
        return False
    rows = sample.repeat(len(value) // len(sample), *[1] * (sample.ndim - 1))
    return _near(value[:, : sample.shape[1]].float(), rows.float())


def _affine(calls: Sequence[Call], path: str) -> tuple[float, float]:
    """Return slope and offset of the timestep in the argument `path` as a function of sigma."""
    points = []
    for call in calls:
        value = dict(_leaves(dict(call.arguments), ARGUMENTS))[path]
        values = value.float() if isinstance(value, Tensor) else torch.tensor([float(value)])
        if values.numel() == 0 or bool((values != values.reshape(-1)[0]).any()):
            raise NoRenoisingError(f"{path} changes from step to step and is no timestep")
        points.append((call.sigma, values.reshape(-1)[0].item()))
    (high, at_high), (low, at_low) = max(points), min(points)
    if high == low:
        raise NoRenoisingError("one recorded step does not show how its timestep follows from the noise level")
    slope = (at_high - at_low) / (high - low)
    offset = at_high - slope * high
    size = max(abs(value) for _, value in points)
    if any(abs(slope * sigma + offset - value) > _ROUNDING * size for sigma, value in points):
        raise NoRenoisingError(f"its timestep {path} is no linear function of the noise level")
    return slope, offset
