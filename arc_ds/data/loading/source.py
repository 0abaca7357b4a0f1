"""A source of the mixture: open shards, and the task of their records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from arc_ds.batch.packing import PoolingSpec
from arc_ds.data.loading.estimates import Estimator, record_means
from arc_ds.data.order.order import SourceShape
from arc_ds.data.tasks import TaskLimits
from arc_ds.data.tasks.registry import all_tasks, find_task
from arc_ds.errors import DataError
from arc_ds.shards.reader import ShardSet


@dataclass(frozen=True, kw_only=True)
class Source:
    """One source. Raises DataError if the task cannot use the kind of records in the shards.

    shards: the opened shards.
    weight: share of the samples, relative to the other sources.
    task: name of the task.
    in_context_examples: maximum number (few-shot only).
    limits: sizes of the samples.
    """

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
                f"{self.shards.name} holds {kind} records, which the task {self.task} cannot use. Set its `task` to "
                f"{' or '.join(fitting)}, or use other shards."
            )

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of its samples."""
        return find_task(self.task).samples

    def tokens(self, record_idxs: Sequence[int]) -> list[int]:
        """Token counts of some records, by the tokenizer of the shards' build."""
        if self.in_context_examples:  # they come from all over the source: reading an index for each would be slow
            return [int(self.shards.num_tokens[record_idx]) for record_idx in record_idxs]
        return [self.shards.tokens(record_idx) for record_idx in record_idxs]

    def estimator(self, pooling: PoolingSpec) -> Estimator:
        """Estimates the sizes of its samples."""
        manifest = self.shards.manifest
        means = record_means(manifest, self.limits) if manifest.kind == "fine_tuning" else None
        return Estimator(self.limits, pooling, means)

    @property
    def shape(self) -> SourceShape:
        """The properties that the order depends on."""
        return SourceShape(
            shard_sizes=tuple(self.shards.shard_sizes.tolist()),
            fingerprint=self.shards.fingerprint,
            weight=self.weight,
            task=self.task,
            samples=self.tasks,
            in_context_examples=self.in_context_examples,
            name=self.shards.name,
        )
