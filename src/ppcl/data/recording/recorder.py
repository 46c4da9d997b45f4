"""Records the calls of a pipeline's transformer at some of its denoising steps, while the pipeline runs."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor, nn

from ppcl.components import other_denoisers, steps_of
from ppcl.data.batches import every_output, first_output
from ppcl.data.recording.files import Call
from ppcl.data.recording.nested import Axes, NoAxesError, axes_of, copied, joined, rows_in
from ppcl.data.recording.passes import row_of_call
from ppcl.errors import UsageError
from ppcl.taps import StopForward, by_name

_GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, are spread evenly over [0, 1)
_ROUNDING = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}  # by which a batch differs from its rows
_MANY = ("num_images_per_prompt", "num_videos_per_prompt")


@dataclass(frozen=True)
class Step:
    """A denoising step: the `arguments` of its first call, and what the scheduler was given and made of it.

    `sample`, `predicted`: the noisy latents and the prediction, in host memory. `flow`: whether it is of flow matching.
    """

    arguments: dict[str, Any]
    sample: Tensor
    predicted: Tensor
    sigma: float
    flow: bool


@dataclass
class Recording:
    """Record of one run of a pipeline: its `calls`, number of denoising `steps`, and final `latents`.

    `first`, `last`: its first and last step. `agreement`: the least cosine of an output of the transformer with the
    prediction that the scheduler was given; -1 if they are not comparable. `throughout`: whether the transformer is
    called at all steps. `partial`: whether it is also called without some of its blocks; these calls are left out.
    """

    calls: list[Call] = field(default_factory=list)
    steps: int = 0
    latents: Tensor | None = None
    first: Step | None = None
    last: Step | None = None
    agreement: float = 1.0
    throughout: bool = True
    partial: bool = False


def spread(count: int, steps: int, number: int) -> set[int]:
    """Return the `count` of a trajectory's `steps` that are recorded for prompt `number`.

    They are spread evenly. Each prompt begins at another place, so that several prompts together cover all steps.
    """
    count = min(count, steps)
    offset = number * _GOLDEN % 1
    return {math.floor((place + offset) * steps / count) for place in range(count)}


@contextmanager
def recorded(pipeline: Any, component: str, wanted: Callable[[int], set[int]]) -> Iterator[Recording]:
    """Yield what is recorded of the pipeline's calls of the transformer `component` within the context.

    `wanted`: returns the places of the steps to record, given the number of steps at which the pipeline calls it. All
    calls of such a step are recorded: both passes of guidance, whether they come as one call or as two. The pipeline
    raises `UsageError` if it is called at no step.
    """
    found, waiting, transformer = Recording(), list[Call](), getattr(pipeline, component)
    signature = inspect.signature(transformer.forward)
    chosen: set[int] | None = None
    called, opening = False, dict[str, Any]()
    ran, most = 0, 0  # blocks in this call, and in any call

    def begin(module: nn.Module, args: tuple) -> None:
        nonlocal chosen, called
        called = True
        if chosen is None:
            steps = steps_of(pipeline, component)
            chosen = {steps[place] for place in wanted(len(steps))}
            timesteps = getattr(pipeline.scheduler, "timesteps", None)
            found.throughout = timesteps is None or len(steps) == len(timesteps)

    def count(module: nn.Module, args: tuple) -> None:
        nonlocal ran
        ran += 1

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        nonlocal ran
        ran = 0
        if not opening:
            opening.update(copied(by_name(signature, args, kwargs)))
        if chosen and found.steps in chosen:
            named = by_name(signature, args, kwargs)
            waiting.append(Call(found.steps, 0.0, 0.0, copied(named), None))

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        nonlocal most
        most = max(ran, most)
        wanted = chosen and found.steps in chosen
        if ran < most:  # guidance by skipped blocks, which a pruned model does not have
            found.partial = True
            del waiting[len(waiting) - bool(wanted) :]
        elif wanted:
            waiting[-1] = replace(waiting[-1], output=copied(every_output(output)))

    def stepped(scheduler: Any, given: dict[str, Any], result: Any) -> None:
        nonlocal called
        if not called:  # a second scheduler, of another stream
            return
        called = False
        timestep, sigma = noise_level(scheduler, given["timestep"])
        for call in waiting:
            used = _used(call.first_output, given["model_output"])
            found.calls.append(replace(call, timestep=timestep, sigma=sigma, used=used))
            found.agreement = min(found.agreement, _cosine(found.calls[-1], given["model_output"]))
        if found.first is None or found.steps == len(scheduler.timesteps) - 1:
            sample, predicted = copied([given["sample"], given["model_output"]])
            found.last = Step(opening, sample, predicted, sigma, is_flow(scheduler))
            found.first = found.first or found.last
        waiting.clear()
        found.steps += 1
        found.latents = first_output(result)

    others = other_denoisers(pipeline, component).values()
    handles = [
        *(model.register_forward_pre_hook(begin) for model in (transformer, *others)),
        transformer.register_forward_pre_hook(before, with_kwargs=True),
        transformer.register_forward_hook(after),
        *(block.register_forward_pre_hook(count) for block in _blocks(transformer)),
    ]
    try:
        with _watched(type(pipeline.scheduler), stepped):
            yield found
    finally:
        for handle in handles:
            handle.remove()


def _blocks(transformer: nn.Module) -> Iterator[nn.Module]:
    """Yield the blocks of all stacks, not what blocks have lists of, such as experts."""
    for child in transformer.children():
        if isinstance(child, nn.ModuleList):
            yield from child


def is_finite(value: Any) -> bool:
    """Return whether all tensors in nested lists are finite."""
    return all(bool(leaf.isfinite().all()) for leaf in _leaves(value))


@contextmanager
def _watched(kind: Any, after: Callable[[Any, dict[str, Any], Any], None]) -> Iterator[None]:
    """Call `after` at the end of each `step` of schedulers of the class `kind`, with its arguments and its result.

    Pipelines copy their scheduler, so that it is the class which is watched, not the object.
    """
    step, own = kind.step, "step" in vars(kind)
    signature = inspect.signature(step)

    @functools.wraps(step)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = step(self, *args, **kwargs)
        after(self, dict(signature.bind(self, *args, **kwargs).arguments), result)
        return result

    kind.step = watched
    try:
        yield
    finally:
        if own:
            kind.step = step
        else:
            del kind.step


def is_flow(scheduler: Any) -> bool:
    """Return whether a scheduler is of flow matching, whose noise levels sigma are from 0 to 1."""
    config = scheduler.config
    named = "FlowMatch" in type(scheduler).__name__ or config.get("use_flow_sigmas", False)
    return bool(named or config.get("prediction_type") == "flow_prediction")


def noise_level(scheduler: Any, timestep: Any) -> tuple[float, float]:
    """Return the timestep of the step that a scheduler has just made, and its noise level sigma, from 0 to 1.

    Where a scheduler has no such levels, sigma is the timestep's share of the training's timesteps.
    """
    time, index = float(timestep), getattr(scheduler, "step_index", None)
    if is_flow(scheduler) and index:
        sigma = float(scheduler.sigmas[index - 1])
    else:
        sigma = time / scheduler.config.get("num_train_timesteps", 1000)
    return time, min(1.0, max(0.0, sigma))


def _used(output: Any, given: Any) -> int | None:
    """Return how many entries of a model's output along dimension 1 the scheduler was given; None for all.

    Models may return tokens of given pictures, or a variance, after the prediction.
    """
    if not (isinstance(output, Tensor) and isinstance(given, Tensor)) or not 2 <= output.ndim == given.ndim:
        return None
    same = output.shape[2:] == given.shape[2:]
    return given.shape[1] if same and given.shape[1] < output.shape[1] else None


def _cosine(call: Call, given: Any) -> float:
    """Return the cosine of a call's first row with what the scheduler was given, -1 if they differ in shape."""
    if not isinstance(call.first_output, Tensor) or not isinstance(given, Tensor):
        return -1.0
    own, given = call.first_output[: len(given), : call.used].float(), given.detach().cpu().float()
    return -1.0 if own.shape != given.shape else torch.cosine_similarity(own.flatten(), given.flatten(), dim=0).item()


def _first_call(pipeline: Any, transformer: Any, arguments: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """Run the pipeline to the end of the transformer's first call, and return the call's arguments and output."""
    found: list[Any] = []
    signature = inspect.signature(transformer.forward)

    def after(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        found.extend(copied([by_name(signature, args, kwargs), every_output(output)]))
        raise StopForward

    handle = transformer.register_forward_hook(after, with_kwargs=True)
    try:
        with suppress(StopForward):
            pipeline(**arguments)
    finally:
        handle.remove()
    if not found:
        raise NoAxesError("the pipeline does not call its transformer")
    return found[0], found[1]


def find_axes(
    pipeline: Any, transformer: Any, one: dict[str, Any], two: dict[str, Any], paths: tuple[str, str]
) -> Axes:
    """Return how calls of `transformer` are joined, by running its pipeline for one sample and for two.

    Both runs end at the transformer's first call. `one`, `two`: arguments of the pipeline's call. `paths`: what the
    axes name the transformer's arguments and output by. Raises `NoAxesError` if these two calls do not show it.
    """
    try:
        calls = [_first_call(pipeline, transformer, arguments) for arguments in (one, two)]
    except (UsageError, NoAxesError):
        raise
    except Exception as error:  # whatever a pipeline raises that takes one sample only
        raise NoAxesError(f"the pipeline takes one sample at once ({type(error).__name__}: {error})") from error
    axes = {path: axis for pair in zip(*calls, paths, strict=True) for path, axis in axes_of(*pair).items()}
    if axes.get(paths[1], 0) is None:
        raise NoAxesError("its output is as large for one sample as for two")
    return axes


def for_two(pipeline: Any, arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the arguments of a pipeline's call for two samples in place of one: of two prompts, or two of a prompt."""
    if "generator" in arguments:
        arguments = arguments | {"generator": [torch.Generator().manual_seed(seed) for seed in (0, 1)]}
    listed = {name: value * 2 for name, value in arguments.items() if isinstance(value, list) and len(value) == 1}
    texts = {name: [value] * 2 for name, value in arguments.items() if "prompt" in name and isinstance(value, str)}
    if listed or texts:
        yield arguments | listed | texts
    parameters = inspect.signature(type(pipeline).__call__).parameters
    yield from (arguments | {name: 2} for name in _MANY if name in parameters)


@torch.no_grad()
def check_joined(transformer: nn.Module, calls: list[Call], axes: Axes, paths: tuple[str, str]) -> None:
    """Run the transformer on calls joined into one batch; `NoAxesError` if its output is not theirs within rounding."""
    device, dtype = next((weight.device, weight.dtype) for weight in transformer.parameters())
    inputs = move_data_to_device(joined([dict(call.arguments) for call in calls], axes, paths[0]), device)
    output = copied(every_output(transformer(**inputs)))
    wanted = joined([call.output for call in calls], axes, paths[1])
    for found, own in zip(_leaves(output), _leaves(wanted), strict=True):
        if found.shape != own.shape:
            raise NoAxesError("calls that are joined have an output of another shape")
        error = (found.float() - own.float()).norm() / own.float().norm().clamp(min=1e-12)
        if not error <= _ROUNDING.get(dtype, 1e-1):
            raise NoAxesError(f"calls that are joined have another output, by {error:.2g} of its norm")


def rows_of(transformer: nn.Module, call: Call, axes: Axes, paths: tuple[str, str]) -> int:
    """Return the number of rows of a call for one sample, each of which has the same output as a call of its own.

    1 if there is one row, or if the output of a row depends on the others.
    """
    rows = rows_in(call.output, axes, paths[1])
    try:
        for row in range(rows if rows > 1 else 0):
            check_joined(transformer, [row_of_call(call, axes, rows, row)], axes, paths)
    except Exception:  # whatever a transformer raises that takes all rows alone
        return 1
    return rows


def _leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in _leaves(item)]
