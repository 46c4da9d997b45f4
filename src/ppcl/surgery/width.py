"""Width surgery: replaces blocks by width-pruned blocks, which share the parameters they keep with the originals."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from ppcl.artifacts.plan import projector_name
from ppcl.errors import UsageError
from ppcl.families.base import Family
from ppcl.families.width import WidthSurgery
from ppcl.layers import Layout
from ppcl.streaming import follow


def width_surgery(family: Family) -> WidthSurgery:
    """Return the width surgery of `family`; `UsageError` if its blocks cannot be pruned in width."""
    if family.width is None:
        raise UsageError(
            f"model.family={family.name} cannot be pruned in width: use width=none, and leave width out of stages."
        )
    return family.width


def prune_blocks(
    family: Family,
    stack: str,
    kept: Sequence[int],
    modules: Sequence[nn.Module],
    text: Collection[int],
    ffn: Collection[int],
    layout: Layout,
    projectors: Mapping[str, Mapping[str, Tensor]],
    made: dict[tuple, nn.Module] | None = None,
) -> list[nn.Module]:
    """Return the blocks `modules` of a stack, with those in the sets `text` and `ffn` replaced by pruned ones.

    `kept` holds the teacher's index of each module; `text` and `ffn` are indices in the teacher too. `projectors` holds
    a state dict for each `projector_name`; a projector that is not given starts as the identity. `made` is a cache of
    pruned blocks that the caller keeps between calls with the same modules and projectors.
    """
    if not {*text, *ffn}:
        return list(modules)
    surgery = width_surgery(family)
    _check_ffn(surgery, stack, ffn)
    roles = surgery.roles(stack, [kept.index(i) for i in text], [kept.index(i) for i in ffn], len(kept), layout)
    pruned: list[nn.Module] = []
    for index, module, role in zip(kept, modules, roles, strict=True):
        if role is None:
            pruned.append(module)
            continue
        key = (stack, index, module, *role.values())
        block = made.get(key) if made is not None else None
        if block is None:
            states = [projectors.get(projector_name(stack, index, kind), {}) for kind in ("text", "ffn")]
            block = surgery.prune(module, role, {**states[0], **states[1]})
            follow(block, module)
        if made is not None:
            made[key] = block
        pruned.append(block)
    return pruned


def _check_ffn(surgery: WidthSurgery, stack: str, ffn: Collection[int]) -> None:
    """Raise `UsageError` if a block has no FFN that a linear map can replace."""
    lacking = sorted({*ffn} - {*surgery.ffn_blocks(stack, ffn)})
    if lacking:
        raise UsageError(
            f"width.{stack}.ffn: block {lacking[0]} has no feed-forward network that a linear map can replace; leave "
            "it out."
        )
