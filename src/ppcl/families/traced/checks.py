"""Checks on a running model that blocks of a stack can be taken out of it. Each raises `UsageError` with the reason."""

from __future__ import annotations

import copy
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.errors import UsageError
from ppcl.families.traced.calls import Call, Forward, record, replaced
from ppcl.families.traced.leaves import at, leaves, same, tensors
from ppcl.families.traced.streams import Stream
from ppcl.families.traced.structure import BlockList, plain_config, without_weights
from ppcl.streaming import still
from ppcl.surgery.share import load_shared
from ppcl.taps import BlockKey, replace_stack, stack_of

TRIED = 5  # blocks of a stack that are taken out, one after the other


def check_order(stack: BlockList, forward: Forward) -> list[Call]:
    """Return the calls of a stack's blocks.

    Raises `UsageError` unless each block was called once, in order, and no tensor that it was given or returned was
    changed in place later.
    """
    calls = [call for call in forward.calls if call.key[0] == stack.path]
    numbers = [call.key[1] for call in calls]
    if not numbers:
        raise UsageError("its blocks are not called as modules")
    twice = next((index for index, number in Counter(numbers).items() if number > 1), None)
    if twice is not None:
        raise UsageError(f"block {twice} is called {numbers.count(twice)} times in one forward")
    if numbers != list(range(stack.count)):
        raise UsageError(f"its blocks are called in the order {', '.join(map(str, numbers[:8]))} ...")
    changed = next((call for call in calls if call.changed()), None)
    if changed is not None:
        raise UsageError(f"block {changed.key[1]}: {changed.changed()} is changed in place")
    return calls


def check_handed_on(stack: BlockList, streams: Sequence[Stream], forward: Forward) -> None:
    """Raise `UsageError` if a block is given a tensor that is no stream and that the block before it was not given.

    Something is added to a stream between blocks then, such as what a ControlNet returns.
    """
    calls = [call for call in forward.calls if call.key[0] == stack.path][stack.first : stack.count - stack.last]
    places = {stream.argument for stream in streams}
    for here, following in pairwise(calls):
        earlier = [*tensors(here.arguments).values(), *tensors(here.output).values()]
        for place, value in tensors(following.arguments).items():
            if place in places or not value.is_floating_point() or value.ndim < 2:
                continue
            if not any(value is other for other in earlier) and not any(same(value, other) for other in earlier):
                name = ".".join(map(str, place))
                raise UsageError(
                    f"{name} of block {following.key[1]} is not what block {here.key[1]} was given or returned"
                )


def check_alone(transformer: nn.Module, call: Call) -> None:
    """Raise `UsageError` unless a block, called again with its arguments, returns the same."""
    with torch.no_grad():
        again = stack_of(transformer, call.key[0])[call.key[1]](**call.arguments)
    if not same(again, call.output):
        raise UsageError(f"block {call.key[1]} returns something else when it is called again with its arguments")


def removable(stack: BlockList) -> list[int]:
    """Return the blocks to take out, spread over those that are alike. The block before each of them is alike, too."""
    allowed = range(stack.first + 1, stack.count - stack.last)
    if len(allowed) <= TRIED:
        return list(allowed)
    return sorted({allowed[round(number * (len(allowed) - 1) / (TRIED - 1))] for number in range(TRIED)})


@contextmanager
def without(transformer: Any, stack: BlockList, index: int) -> Iterator[None]:
    """Take one block out of the transformer, within the context."""
    blocks = stack_of(transformer, stack.path)
    own = {str(stack.key): transformer.config[str(stack.key)]}
    replace_stack(
        transformer, stack.path, nn.ModuleList(block for number, block in enumerate(blocks) if number != index)
    )
    transformer.register_to_config(**{str(stack.key): stack.count - 1})
    try:
        yield
    finally:
        replace_stack(transformer, stack.path, blocks)
        transformer.register_to_config(**own)


def check_independent(
    transformer: nn.Module,
    inputs: Mapping[str, Any],
    stack: BlockList,
    traced: Sequence[str],
    forward: Forward,
) -> None:
    """Raise `UsageError` unless all that is computed besides blocks stays the same when one of them is taken out.

    Blocks of all stacks return what they returned in `forward`, and the block before the one that is taken out returns
    what that one did. So all blocks must be given what they were given, and the output must be the same. They are not
    where the transformer slices rows by the number of blocks, adds up what blocks returned, or goes by a block's
    position.

    `traced`: the paths of all stacks that are traced.
    """
    for index in removable(stack):
        blocks = {(path, number): block for path in traced for number, block in enumerate(stack_of(transformer, path))}
        del blocks[stack.path, index]
        given: list[tuple[BlockKey, dict[str, Any]]] = []

        def play(key: BlockKey, arguments: dict[str, Any], index: int = index, given: list = given) -> Any:
            given.append((key, arguments))
            return forward.of((stack.path, index) if key == (stack.path, index - 1) else key).output

        with without(transformer, stack, index), replaced(blocks, play), torch.no_grad():
            try:
                output = transformer(**inputs)
            except Exception as error:  # whatever a model raises that cannot do without the block
                raise UsageError(f"it does not run without block {index} ({_short(error)})") from None
        if [key for key, _ in given] != [call.key for call in forward.calls if call.key in blocks]:
            raise UsageError(f"without block {index} its other blocks are called in another order")
        for key, arguments in given:
            _check_arguments(transformer, forward.of(key), arguments, f"{stack.path}.{index}")
        if not same(output, forward.output):
            raise UsageError(
                f"what it computes besides its blocks depends on their number: without block {index} the output "
                "changes, although the blocks return the same"
            )


def _check_arguments(transformer: nn.Module, call: Call, arguments: dict[str, Any], gone: str) -> None:
    """Raise `UsageError` if a block is given other arguments than in `call`, and does not return the same with them."""
    for place in sorted({*dict(leaves(call.arguments)), *dict(leaves(arguments))}, key=str):
        there, here = (_or_none(each, place) for each in (call.arguments, arguments))
        if same(there, here):
            continue
        try:
            with torch.no_grad():
                output = stack_of(transformer, call.key[0])[call.key[1]](**arguments)
        except Exception:  # of any kind, by arguments of another shape
            output = None
        if not same(output, call.output):
            raise UsageError(
                f"{'.'.join(map(str, place))} of {call.key[0]}.{call.key[1]} changes when {gone} is taken out"
            )
        return  # it makes no difference to what the block returns


def read_elsewhere(
    transformer: nn.Module, inputs: Mapping[str, Any], stack: BlockList, traced: Sequence[str], forward: Forward
) -> list[int]:
    """Return the blocks of which the transformer uses weights outside of the blocks' own calls.

    DiT's output head does so with those of its first block. Blocks return what they returned in `forward`, and the
    weights of one stack, then of one block, are no numbers.
    """
    blocks = {(path, number): block for path in traced for number, block in enumerate(stack_of(transformer, path))}

    def uses(spoilt: Sequence[nn.Module]) -> bool:
        with replaced(blocks, lambda key, _: forward.of(key).output), _spoilt(spoilt), torch.no_grad():
            return not same(transformer(**inputs), forward.output)

    every = list(stack_of(transformer, stack.path))
    return [index for index, block in enumerate(every) if uses([block])] if uses(every) else []


@contextmanager
def _spoilt(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Make all weights of `modules` no numbers, within the context."""
    own = [(parameter, parameter.data) for module in modules for parameter in module.parameters()]
    try:
        for parameter, data in own:
            parameter.data = torch.full((), torch.nan, dtype=data.dtype, device=data.device).expand(data.shape)
        yield
    finally:
        for parameter, data in own:
            parameter.data = data


def _or_none(value: Any, place: tuple) -> Any:
    try:
        return at(value, place)
    except (KeyError, IndexError, TypeError):
        return None


def check_export(transformer: Any, inputs: Mapping[str, Any], stack: BlockList) -> None:
    """Raise `UsageError` unless the stock class, built with one block fewer, computes what the rest of the model does.

    Its weights are those of the blocks that are left, numbered anew.
    """
    index = removable(stack)[len(removable(stack)) // 2]
    config = plain_config(transformer) | {str(stack.key): stack.count - 1}
    smaller = without_weights(type(transformer), config)
    with without(transformer, stack, index), torch.no_grad():
        expected = transformer(**inputs)
        state = transformer.state_dict(keep_vars=True)
        try:
            load_shared(smaller, state)
        except RuntimeError as error:
            raise UsageError(f"the class with {stack.count - 1} blocks has other weights ({_short(error)})") from None
    _as_of(smaller, transformer)
    with torch.no_grad():
        found = smaller(**inputs)
    if not same(found, expected):
        raise UsageError(f"the class with {stack.count - 1} blocks computes something else than the model without one")


def _as_of(model: nn.Module, other: nn.Module) -> None:
    """Move the buffers of `model` to the device and dtype of those of `other`."""
    wanted = dict(other.named_buffers())
    for name, buffer in model.named_buffers():
        if name in wanted:
            owner, _, attribute = name.rpartition(".")
            model.get_submodule(owner)._buffers[attribute] = buffer.to(wanted[name].device, wanted[name].dtype)


def check_learns(transformer: nn.Module, call: Call, streams: Sequence[Stream]) -> None:
    """Raise `UsageError` unless a block, called alone, back-propagates from its streams to its weights."""
    source = stack_of(transformer, call.key[0])[call.key[1]]
    with still(source):
        block = copy.deepcopy(source).requires_grad_(True)
    try:
        with torch.enable_grad():
            output = block(**call.arguments)
            loss = torch.stack([at(output, stream.slot).float().square().mean() for stream in streams]).sum()
            found = torch.autograd.grad(loss, list(block.parameters()), allow_unused=True)
    except torch.OutOfMemoryError:  # which is no property of the model
        raise
    except Exception as error:  # whatever an operation without a backward raises
        raise UsageError(f"block {call.key[1]} does not back-propagate ({_short(error)})") from None
    gradients = [each for each in found if each is not None]  # zeros, where an untrained model's gates are 0
    if not gradients or not all(bool(each.isfinite().all()) for each in gradients):
        raise UsageError(f"block {call.key[1]} has no finite gradient")


def check_repeats(transformer: nn.Module, inputs: Mapping[str, Any], stacks: Sequence[str], forward: Forward) -> None:
    """Raise `UsageError` unless a second forward gives the same output."""
    if not same(record(transformer, inputs, stacks).output, forward.output):
        raise UsageError("two forwards on the same inputs differ")


def finite(output: Any) -> bool:
    """Return whether all tensors of an output are finite."""
    return all(bool(value.isfinite().all()) for value in tensors(output).values() if isinstance(value, Tensor))


def _short(error: Exception) -> str:
    return textwrap.shorten(f"{type(error).__name__}: {error}", 160, placeholder=" ...")
