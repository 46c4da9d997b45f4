"""ReplaceMe: replace the one run of blocks whose output is nearest to its first block's (arXiv 2505.02819).

Only the selection is here. The paper replaces the run by a linear map of the first block's output, which it merges into
that block's feed-forward network. In a diffusion transformer a gate that changes with the timestep stands between the
two, so that no merged map is exact. In ppcl a student replaces the run, or nothing does.
"""

from __future__ import annotations

from ppcl.methods.windows import Window


class ReplaceMe(Window):
    """Chooses the window [u, v] with the lowest mean cosine distance of the output of block u and that of block v."""

    skipped = 1
