"""Index arithmetic of the blocks that pruning keeps and of those they read text from. Importing this loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ppcl.artifacts.plan import Interval
from ppcl.errors import UsageError


def kept_layers(num_layers: int, intervals: Iterable[Interval]) -> list[int]:
    """Return the teacher's block indices that are left when each interval [u, v] becomes one block at index u."""
    removed = {index for u, v in intervals for index in range(u + 1, v + 1)}
    return [index for index in range(num_layers) if index not in removed]


@dataclass(frozen=True)
class BlockMap:
    """Says which blocks of a full model the blocks of a pruned model are.

    `kept`: for each stack the full model's index of every block in place, in ascending order.
    `counts`: for each stack the number of blocks of the full model.
    """

    kept: dict[str, list[int]]
    counts: dict[str, int]

    @classmethod
    def of(cls, provenance: Mapping[str, Any] | None, counts: Mapping[str, int]) -> BlockMap:
        """Return the map of a model with `counts` blocks by stack, from the `ppcl` entry of its config.

        A model without that entry is its own full model. Raises `UsageError` if the entry has other counts.
        """
        kept: dict[str, list[int]] = {
            stack: [*found] for stack, found in (provenance or {}).get("kept_layers", {}).items()
        }
        if not kept:
            return cls({stack: list(range(count)) for stack, count in counts.items()}, dict(counts))
        for stack, count in counts.items():
            if len(kept.get(stack, [])) != count:
                raise UsageError(
                    f"the config's ppcl.kept_layers names {len(kept.get(stack, []))} blocks of {stack}, and the model "
                    f"has {count}: use the config.json that was exported with these weights."
                )
        removed: Mapping[str, Any] = (provenance or {}).get("removed_intervals", {})
        # A removed block lies in an interval, so the last block of a stack is kept or ends an interval.
        last = {stack: max([*found, *(v for _, v in removed.get(stack, []))]) for stack, found in kept.items()}
        return cls(kept, {stack: index + 1 for stack, index in last.items()})

    @property
    def removed(self) -> dict[str, list[list[int]]]:
        """The intervals [u, v] of the full model that one block stands for, by stack. That block is u."""
        found: dict[str, list[list[int]]] = {}
        for stack, kept in self.kept.items():
            ends = [index - 1 for index in [*kept[1:], self.counts[stack]]]
            found[stack] = [[u, v] for u, v in zip(kept, ends, strict=True) if v > u]
        return found

    @property
    def renumbered(self) -> list[str]:
        """The stacks in which some block has another index than in the full model, or in which the last are gone."""
        return [stack for stack, kept in self.kept.items() if kept != list(range(self.counts[stack]))]

    def then(self, kept: Mapping[str, Sequence[int]]) -> BlockMap:
        """Return the map of this pruned model pruned again, to its own blocks with the indices `kept` by stack."""
        return BlockMap({stack: [self.kept[stack][i] for i in found] for stack, found in kept.items()}, self.counts)

    def since(self, earlier: Mapping[str, Sequence[int]]) -> BlockMap:
        """Return the map from a model in between, which has the blocks `earlier` of the full model."""
        kept = {stack: [earlier[stack].index(index) for index in found] for stack, found in self.kept.items()}
        return BlockMap(kept, {stack: len(earlier[stack]) for stack in kept})


def check_counts(keys: Mapping[str, str], counts: Mapping[str, int]) -> None:
    """Raise `UsageError` if stacks that share one config key for their number of blocks differ in that number.

    `keys`: the config key of each stack. `counts`: the number of blocks of each stack.
    """
    for stack, key in keys.items():
        for other in keys:
            if keys[other] == key and counts[other] != counts[stack]:
                raise UsageError(
                    f"{stack} is left with {counts[stack]} blocks and {other} with {counts[other]}, and the model's "
                    f"config has one {key} for both: prune the same number of blocks from each."
                )


def removable(
    layers: Mapping[str, int], *, start: int = 0, end: int | None = None, last: int = 0
) -> list[tuple[str, int]]:
    """Return stack and index of the blocks that may be removed one by one.

    A removed block follows one that is kept, so block `start` stays. `layers`: the number of blocks by stack. `end`:
    the last block that may be removed, None for any. `last`: how many blocks at the end of a stack have to stay.
    """
    return [
        (stack, index)
        for stack, number in layers.items()
        for index in range(start + 1, number - last)
        if end is None or index <= end
    ]


@dataclass(frozen=True)
class Layout:
    """Settings of the structure of width-pruned blocks, with the meaning they have in `WidthConfig`."""

    text_output: str = "last"
    keep_text_query: bool = False


def references(kept: Sequence[int], text: Iterable[int]) -> dict[int, int]:
    """Return for each text-pruned block its reference: the nearest earlier kept block with an intact text stream.

    `kept`: all kept blocks, in ascending order. `text`: the text-pruned ones among them.
    Raises `UsageError` if a text-pruned block has no such block before it.
    """
    pruned = set(text)
    found: dict[int, int] = {}
    reference: int | None = None
    for index in kept:
        if index not in pruned:
            reference = index
        elif reference is None:
            raise UsageError(f"block {index} cannot lose its text stream: no intact block lies before it to read from.")
        else:
            found[index] = reference
    return found


def check_width_sets(stack: str, kept: Sequence[int], text: Sequence[int], ffn: Sequence[int], where: str) -> None:
    """Raise `UsageError` if a set names a block twice, or one that is not kept, or one without a reference to read.

    `text`, `ffn`: the blocks of `stack` that lose their text stream or FFN. `where`: the configuration key of the sets,
    for the message.
    """
    for kind, indices in (("text", text), ("ffn", ffn)):
        for number, index in enumerate(indices):
            if index in indices[:number]:
                raise UsageError(f"{where}.{stack}.{kind} names block {index} twice.")
            if index not in kept:
                raise UsageError(
                    f"{where}.{stack}.{kind}: block {index} is not among the blocks that the intervals keep "
                    f"({_ranges(kept)})."
                )
    try:
        references(kept, text)
    except UsageError as error:
        raise UsageError(f"{where}.{stack}.text: {error}") from None


def _ranges(indices: Sequence[int]) -> str:
    """Return ascending indices as text, such as `0-3, 5, 8-11`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and runs[-1][-1] == index - 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
