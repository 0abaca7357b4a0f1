"""A source of the mixture: opened shards, and how their records become samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from arc_ds.batch.packing import PoolingSpec
from arc_ds.data.loading.estimates import Estimator, asked_means
from arc_ds.data.order.order import SourceShape
from arc_ds.data.tasks import TaskLimits
from arc_ds.data.tasks.registry import all_tasks, find_task
from arc_ds.errors import DataError
from arc_ds.shards.reader import ShardSet


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source. weight: its share of the samples, relative to the others'. in_context_examples: at most, few-shot
    only. DataError where the shards hold records of another kind than the task needs."""

    shards: ShardSet
    weight: float = 1.0
    task: str = "pretraining"
    in_context_examples: int = 0
    limits: TaskLimits = field(default_factory=TaskLimits)

    def __post_init__(self) -> None:
        kind = self.shards.manifest.kind
        if kind not in find_task(self.task).record_kinds:
            fitting = [task.name for task in all_tasks().values() if kind in task.record_kinds]
            raise DataError(
                f"{self.shards.name} holds {kind} records, which give no sample of the task {self.task}. Set its "
                f"`task` to {' or '.join(fitting)}, or name other shards."
            )

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of its samples."""
        return find_task(self.task).samples

    def tokens(self, record_idxs: Sequence[int]) -> list[int]:
        """Tokens of some records, by the tokenizer that the shards were built with."""
        if self.in_context_examples:  # drawn from everywhere: an index read for each of them would be slow
            return [int(self.shards.num_tokens[record_idx]) for record_idx in record_idxs]
        return [self.shards.tokens(record_idx) for record_idx in record_idxs]

    def estimator(self, pooling: PoolingSpec) -> Estimator:
        """How large its samples will be."""
        manifest = self.shards.manifest
        asked = asked_means(manifest, self.limits) if manifest.kind == "fine_tuning" else None
        return Estimator(self.limits, pooling, asked)

    @property
    def shape(self) -> SourceShape:
        """What the order must know of it."""
        return SourceShape(
            shard_sizes=tuple(self.shards.shard_sizes.tolist()),
            fingerprint=self.shards.fingerprint,
            weight=self.weight,
            task=self.task,
            samples=self.tasks,
            in_context_examples=self.in_context_examples,
            name=self.shards.name,
        )
