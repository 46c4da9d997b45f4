"""Selects the text streams and FFNs that are replaced by linear projectors (`width=auto`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from ppcl.data.batches import TrainingBatch
from ppcl.distill.width import WidthDistillation
from ppcl.layers import references
from ppcl.taps import BlockKey


def select_text(
    similarity: Callable[[int, int], float], kept: Sequence[int], threshold: float, most: int | None
) -> list[int]:
    """Return R_txt: blocks whose text output has a CKA of at least `threshold` with that of their reference block.

    Deeper blocks are tried first, up to `most` blocks (None: no limit). Adding a block gives the blocks after it an
    earlier reference, so it is added only if all chosen blocks still pass.

    `similarity(reference, pruned)`: the CKA of two blocks' text outputs. `kept`: all kept blocks, ascending.
    """
    chosen: set[int] = set()
    for index in reversed(kept[1:]):
        if most is not None and len(chosen) >= most:
            break
        reads = references(kept, chosen | {index})
        if all(similarity(reference, pruned) >= threshold for pruned, reference in reads.items()):
            chosen.add(index)
    return sorted(chosen)


def select_ffn(errors: Mapping[BlockKey, float], count: int) -> list[BlockKey]:
    """Return R_ffn: the `count` blocks whose output changes least when a least-squares fit replaces their FFN."""
    return sorted(errors, key=lambda key: errors[key])[:count]


def ffn_errors(module: WidthDistillation, batches: Iterable[TrainingBatch]) -> dict[BlockKey, float]:
    """Return the relative error of each FFN-pruned block's output, averaged over its streams, by stack and index.

    `module`: with projectors fitted by `fit_linear`. `batches`: held-out batches.
    """
    found = module.heldout(batches)
    errors = {}
    for item, terms in zip(module.pruned, found, strict=True):
        linear = [value for key, value in terms.items() if key.startswith("linear")]
        errors[item.place.stack, item.place.index] = sum(linear) / len(linear)
    return errors
