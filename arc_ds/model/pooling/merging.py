"""Merging and pruning: combine the most similar neighbours until a context has its target number of rows.

In every context with too many rows, each round merges the most similar pair of neighbouring runs. The row of the pair
is the mean of the two, or the later one when pruning, as in the reference. Merged runs stay consecutive. They form a
doubly linked list over the grid [C, L], so a round takes a few small operations for all contexts together.

Shape letters: T rows, C contexts, L rows of the longest context, G groups, D width. A *slot* is a place of the grid;
its number is c * L + i. One additional slot represents "nothing", so no round needs a branch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from arc_ds.batch.packing import PoolLevel
from arc_ds.model.backbone import Spans
from arc_ds.model.pooling.base import ContextGrid, Pooling, weighted_groups, widen

Similarity = Callable[[Tensor, Tensor], Tensor]

SIMILARITIES: dict[str, Similarity] = {
    "dot": lambda a, b: (a * b).sum(-1),
    "cosine": lambda a, b: F.cosine_similarity(a, b, dim=-1),
    "euclidean": lambda a, b: -(a - b).norm(dim=-1),
    "manhattan": lambda a, b: -(a - b).abs().sum(-1),
    "chebyshev": lambda a, b: -(a - b).abs().amax(-1),
}
_NEVER = float("-inf")


class MergePooling(Pooling):
    """Merge neighbouring rows, the most similar ones first.

    Each row receives a gradient according to its weight in its group.

    metric: one of `SIMILARITIES`.
    prune: keep the later row of a pair instead of the mean.
    """

    rule_kind = "floor_factor"

    def __init__(self, metric: str, *, prune: bool = False) -> None:
        self.metric = metric
        self.prune = prune

    def _pool(self, x_TD: Tensor, spans: Spans, level: PoolLevel) -> Tensor:
        grid = ContextGrid.of(x_TD.shape[0], spans, level)
        runs = _Runs(widen(x_TD.detach()), grid, SIMILARITIES[self.metric], prune=self.prune)
        for _ in range(spans.max_seqlen_k - 1):
            runs.merge_best()
        return weighted_groups(x_TD, runs.groups(), grid.gather(runs.weight_CL), level.positions.numel())


class NormPruning(Pooling):
    """Keep the rows with the largest L2 norms, in their original order, and drop the others.

    The reference keeps the smallest norms and sorts the rows by norm, contrary to its own documentation.
    """

    rule_kind = "floor_factor"

    def _pool(self, x_TD: Tensor, spans: Spans, level: PoolLevel) -> Tensor:
        grid = ContextGrid.of(x_TD.shape[0], spans, level)
        norms_CL = grid.spread(widen(x_TD.detach()).norm(dim=-1), fill=_NEVER)
        order_CL = norms_CL.argsort(dim=1, descending=True, stable=True)
        rank_CL = torch.empty_like(order_CL).scatter_(1, order_CL, _columns(grid).expand(grid.shape))
        kept_CL = rank_CL < grid.num_groups_C[:, None]
        # A dropped row joins the previous group with weight zero. Rows before the first kept row join the first group.
        group_CL = grid.first_group_C[:, None] + (kept_CL.cumsum(1) - 1).clamp(min=0)
        weight_T = grid.gather(kept_CL).to(widen(x_TD).dtype)
        return weighted_groups(x_TD, grid.gather(group_CL), weight_T, level.positions.numel())


class _Runs:
    """The runs of merged rows of all contexts. The slot of its first row (its leader) identifies a run."""

    def __init__(self, x_TD: Tensor, grid: ContextGrid, similarity: Similarity, *, prune: bool) -> None:
        self.grid, self.similarity, self.prune = grid, similarity, prune
        num_contexts, length = grid.shape
        self.nothing = num_contexts * length
        slots = torch.arange(self.nothing + 1, device=x_TD.device)
        slot_CL = slots[:-1].view(grid.shape)
        self.first_C = slot_CL[:, 0]
        self.too_many_C = grid.num_rows_C - grid.num_groups_C
        self.leader_CL = slot_CL.clone()
        self.weight_CL = x_TD.new_ones(grid.shape)
        self.value = torch.cat((grid.spread(x_TD).flatten(0, 1), x_TD.new_zeros(1, x_TD.shape[1])))
        column = _columns(grid)
        has_next_CL, has_previous_CL = column < grid.num_rows_C[:, None] - 1, (column > 0).expand(grid.shape)
        self.next = self._or_nothing(slot_CL + 1, has_next_CL)
        self.previous = self._or_nothing(slot_CL - 1, has_previous_CL)
        self.alike = self._alike(slots, self.next)

    def merge_best(self) -> None:
        """Run one round: merge the most similar neighbours of each context that has too many rows."""
        best_C = self.alike[:-1].view(self.grid.shape).argmax(dim=1) + self.first_C
        left_C = torch.where(self.too_many_C > 0, best_C, self.nothing)
        right_C = self.next[left_C]
        self.too_many_C = self.too_many_C - 1
        self._join(left_C, right_C)
        after_C, before_C = self.next[right_C], self.previous[left_C]
        self.next[left_C] = after_C
        self.previous[after_C] = left_C
        self.previous[-1] = self.nothing
        self.alike[right_C] = _NEVER
        self.alike[left_C] = self._alike(left_C, after_C)
        self.alike[before_C] = self._alike(before_C, left_C)

    def groups(self) -> Tensor:
        """The group of each row after the last round: int64 [T]."""
        slot_CL = torch.arange(self.nothing, device=self.leader_CL.device).view(self.grid.shape)
        group_CL = (self.leader_CL == slot_CL).cumsum(dim=1) - 1 + self.grid.first_group_C[:, None]
        return self.grid.gather(group_CL)

    def _join(self, left_C: Tensor, right_C: Tensor) -> None:
        """Move the rows of the right run to the left one."""
        in_left_CL, in_right_CL = self.leader_CL == left_C[:, None], self.leader_CL == right_C[:, None]
        if self.prune:
            self.value[left_C] = self.value[right_C]
            self.weight_CL = self.weight_CL.masked_fill(in_left_CL, 0.0)
        else:
            self.value[left_C] = (self.value[left_C] + self.value[right_C]) / 2
            self.weight_CL = torch.where(in_left_CL | in_right_CL, self.weight_CL / 2, self.weight_CL)
        self.leader_CL = torch.where(in_right_CL, left_C[:, None], self.leader_CL)

    def _alike(self, left: Tensor, right: Tensor) -> Tensor:
        """Similarity of two runs; -inf if one of them is "nothing"."""
        similarity = self.similarity(self.value[left], self.value[right])
        return similarity.masked_fill((left == self.nothing) | (right == self.nothing), _NEVER)

    def _or_nothing(self, slot_CL: Tensor, exists_CL: Tensor) -> Tensor:
        slots = torch.where(exists_CL, slot_CL, self.nothing).flatten()
        return torch.cat((slots, slots.new_full((1,), self.nothing)))


def _columns(grid: ContextGrid) -> Tensor:
    return torch.arange(grid.shape[1], device=grid.context_T.device)[None, :]
