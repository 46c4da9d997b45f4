"""The family of a traced model: its streams are those that `trace` has found."""

from __future__ import annotations

import inspect
from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor

from ppcl.config import SamplingConfig
from ppcl.families.base import Conditions, Family
from ppcl.families.facts import FamilyFacts
from ppcl.families.registry import PRUNED_MAKER, pruned_name
from ppcl.families.traced.leaves import at
from ppcl.families.traced.streams import Stream, tokens_of
from ppcl.families.traced.trace import Trace
from ppcl.families.traced.width import TracedWidth
from ppcl.taps import Streams

NAME = "traced"
_SAMPLING = ("height", "width", "num_inference_steps", "true_cfg_scale", "guidance_scale", "max_sequence_length")


def sampling_arguments(
    sampling: SamplingConfig, takes: Container[str], arch: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the settings of `model.sampling` that are not None, of those that a pipeline's call `takes`.

    `arch`: the transformer's config, if known. A transformer that embeds no guidance scale is given none beside
    `true_cfg_scale`, because its pipeline would warn of it at every call.
    """
    found = {name: getattr(sampling, name) for name in _SAMPLING if name in takes}
    if "true_cfg_scale" in found and (arch or {}).get("guidance_embeds") is False:
        found.pop("guidance_scale", None)
    # Without a negative prompt, pipelines with `true_cfg_scale` run no second pass.
    guided = "true_cfg_scale" in found and sampling.true_cfg_scale > 1
    if "negative_prompt" in takes and (guided or sampling.negative_prompt):
        found["negative_prompt"] = sampling.negative_prompt
    return {name: value for name, value in found.items() if value is not None}


def facts_of(trace: Trace, *, takes_lora: bool = True) -> FamilyFacts:
    """Return the record of a traced model. `takes_lora`: whether its pipeline loads LoRAs."""
    return FamilyFacts(
        NAME,
        "ppcl.families.traced.family.Traced",
        trace.model,
        stacks={stack.path: stack.key for stack in trace.stacks},
        pipeline_classes=(),
        streams=(),  # with other names than those that `method.stream` takes
        first_block=max(stack.first_block for stack in trace.stacks),
        last_blocks=max(stack.last_blocks for stack in trace.stacks),
        pruned_models={pruned_name(trace.model): PRUNED_MAKER},
        takes_lora=takes_lora,
    )


class Traced(Family):
    """A transformer of which nothing is known but its trace.

    Its data are recorded calls of its own pipeline, so it never has to build the arguments of a forward.
    """

    def __init__(
        self,
        facts: FamilyFacts,
        arch: Mapping[str, Any] | None = None,
        sampling: SamplingConfig | None = None,
    ) -> None:
        super().__init__(facts, arch, sampling)
        self.trace: Trace | None = None  # None: it does not know the streams of its model yet
        self._streams: dict[str, tuple[Stream, ...]] = {}
        self._takes: frozenset[str] = frozenset()  # arguments of the pipeline's call
        self._channels = 1
        self.stream_numbers = 0  # of all streams of a sample, at the block that has most of them

    def adopt(self, trace: Trace) -> None:
        """Take the streams of the model, and how it is pruned in width, from its trace."""
        self.trace = trace
        if any(stack.feed_forwards for stack in trace.stacks):
            self.width = TracedWidth(trace)
        self._streams = {stack.path: stack.streams for stack in trace.stacks}
        every = [stream for stack in trace.stacks for stream in stack.streams]
        main = max(every, key=lambda stream: stream.tokens)
        self.main_stream, self._channels = main.name, main.channels
        sizes = [sum(stream.tokens * stream.channels for stream in stack.streams) for stack in trace.stacks]
        self.stream_numbers = max(sizes)

    @property
    def channels(self) -> int:
        """The channels of a token of the main stream; 1 before the model is traced."""
        return self._channels

    def streams_in(self, stack: str, kwargs: dict[str, Any], inputs: Mapping[str, Any]) -> Streams:
        return {stream.name: tokens_of(at(kwargs, stream.argument)) for stream in self._streams[stack]}

    def streams_out(self, stack: str, output: Any, inputs: Mapping[str, Any]) -> Streams:
        found = {stream.name: at(output, stream.slot) for stream in self._streams[stack]}
        return {name: tokens_of(value) for name, value in found.items() if value is not None}

    def masks(self, inputs: dict[str, Any]) -> dict[str, Tensor | None]:
        found: dict[str, Tensor | None] = {}
        for streams in self._streams.values():
            for stream in streams:
                mask = None if stream.mask is None else inputs.get(stream.mask)
                if found.get(stream.name) is None:
                    found[stream.name] = None if mask is None else mask.bool()
        return found

    def forward_inputs(
        self, latents: Tensor, conditions: Conditions, sigmas: Tensor, size: tuple[int, int]
    ) -> dict[str, Any]:
        raise AssertionError("a traced model is called with recorded arguments")

    def as_tensor(self, output: Any) -> Tensor:
        """Return the model's first output; if that is a list, one tensor for each sample, all of them together.

        Several outputs, as `every_output` returns them, become `[B, numbers]`. They are scaled so that the mean square
        over all numbers is the mean of the outputs' own: few tokens of sound count as much as many of a video.
        """
        if not isinstance(output, Mapping):
            return torch.stack(list(output)) if isinstance(output, list | tuple) else output
        each = [self.as_tensor(item).flatten(1) for item in output.values()]
        mean = sum(item.shape[1] for item in each) / len(each)
        return torch.cat([item * (mean / item.shape[1]) ** 0.5 for item in each], dim=1)

    # Drawing, by the signature of the pipeline's call.

    def complete(self, pipeline: Any) -> None:
        self._takes = frozenset(inspect.signature(type(pipeline).__call__).parameters)

    def sampling_arguments(self, sampling: SamplingConfig, batch_size: int) -> dict[str, Any]:
        found = sampling_arguments(sampling, self._takes, self.arch)
        if "negative_prompt" in found:
            found["negative_prompt"] = [found["negative_prompt"]] * batch_size
        return found | sampling.arguments
