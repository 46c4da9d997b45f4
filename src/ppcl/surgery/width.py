"""Width surgery: pruned blocks made of a model's own.

A pruned block shares every parameter it keeps with the block it is made from; what it loses is gone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from ppcl.artifacts.plan import projector_name
from ppcl.errors import UsageError
from ppcl.families.base import Family
from ppcl.families.width import WidthSurgery
from ppcl.layers import Layout


def width_surgery(family: Family) -> WidthSurgery:
    """The width surgery of `family`; `UsageError` for one whose blocks cannot be pruned in width."""
    if family.width is None:
        raise UsageError(f"model.family={family.name} cannot be pruned in width: use width=none.")
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
    """`modules`, which stand at the teacher's indices `kept`, with those in the sets pruned in width.

    `projectors` holds state dicts by `projector_name`; without one a projector is the identity.
    `made` keeps pruned blocks from one call to the next, for the same modules and projectors.
    """
    if not {*text, *ffn}:
        return list(modules)
    surgery = width_surgery(family)
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
        if made is not None:
            made[key] = block
        pruned.append(block)
    return pruned
