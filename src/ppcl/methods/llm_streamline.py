"""LLM-Streamline: replace the one run of blocks that turns its input least by one trained block (arXiv 2403.19135)."""

from __future__ import annotations

from ppcl.methods.windows import Window


class LlmStreamline(Window):
    """Chooses the window [u, v] with the highest mean cosine of the input of block u and the output of block v."""

    skipped = 0
