"""Group arithmetic: how the n tokens of a context become m groups (arc_ds/README.md).

Boundaries are data. They are computed here once per batch; the model and the kernels only follow them.

Shape letters: T tokens, G groups, C contexts.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

RuleKind = Literal["factor", "count", "none", "floor_factor"]


class GroupRule(NamedTuple):
    """The number of groups of a context with n tokens.

    kind:
        "factor": ceil(n / value) groups (the paper's pooling factor).
        "count": min(n, value) groups.
        "none": n groups of one token.
        "floor_factor": n // value groups, or n groups if n < value (similarity merging).
    value: see kind.
    """

    kind: RuleKind
    value: int = 1

    def num_groups(self, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number of groups for each context length, int64 [C]. Lengths are at least 1."""
        value = min(self.value, np.iinfo(np.int64).max)  # numpy takes no larger number; no context is that long
        if self.kind == "factor":
            return -(-lengths // value)
        if self.kind == "count":
            return np.minimum(lengths, value)
        if self.kind == "floor_factor":
            return np.where(lengths < value, lengths, lengths // value)
        return lengths.copy()


def cumulative(lengths: NDArray[np.int64]) -> NDArray[np.int32]:
    """Lengths [N] to boundaries [N + 1] from 0, int32 (FlashAttention's `cu_seqlens` convention)."""
    cu = np.zeros(len(lengths) + 1, dtype=np.int32)
    lengths.cumsum(out=cu[1:])
    return cu


def group_sizes(lengths: NDArray[np.int64], rule: GroupRule) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Balanced groups of each context (paper, section 3).

    n tokens make m groups of n // m or n // m + 1 tokens, the longer ones first.

    Returns the sizes of all groups, context by context, int64 [G], and the number of groups of each context, int64 [C].
    """
    counts = rule.num_groups(lengths)
    base, longer = lengths // counts, lengths % counts
    ends = counts.cumsum()
    is_longer = np.arange(counts.sum()) < (ends - counts + longer).repeat(counts)
    return base.repeat(counts) + is_longer, counts
