"""Selection of the text streams and FFNs that become linear projectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from ppcl.data.batches import TrainingBatch
from ppcl.distill.width import WidthDistillation
from ppcl.layers import references
from ppcl.taps import BlockKey


def select_text(
    similarity: Callable[[int, int], float], kept: Sequence[int], threshold: float, most: int | None
) -> list[int]:
    """R_txt: blocks whose text output has a CKA of `threshold` or more with their reference's, deeper first.

    A block joins only if every block of its run still passes: each one added moves the reference of those
    behind it to an earlier block.
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
    """R_ffn: the `count` blocks whose output differs least with the FFN's least-squares fit in its place."""
    return sorted(errors, key=lambda key: errors[key])[:count]


def ffn_errors(module: WidthDistillation, batches: Iterable[TrainingBatch]) -> dict[BlockKey, float]:
    """Relative error of every fitted place's output, the mean of its streams, by stack and block."""
    found = module.heldout(batches)
    errors = {}
    for item, terms in zip(module.pruned, found, strict=True):
        linear = [value for key, value in terms.items() if key.startswith("linear")]
        errors[item.place.stack, item.place.index] = sum(linear) / len(linear)
    return errors
