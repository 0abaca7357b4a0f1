"""Training tasks as pure functions: records become an Example for one decoder (paper, section 4; design 7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arc_ds.data.order.order import Task
from arc_ds.data.tasks.chat import PLAIN, Layout
from arc_ds.data.tasks.example import NO_COUNTS, Example, TaskCounts, TooShortError
from arc_ds.data.tasks.few_shot import few_shot_example
from arc_ds.data.tasks.limits import TaskLimits
from arc_ds.data.tasks.long_context import long_context_example
from arc_ds.data.tasks.pretraining import pretraining_example
from arc_ds.data.tasks.variants import closed, mismatched, open_
from arc_ds.shards.records import pretraining_text
from arc_ds.tokenizers import Tokenizer

__all__ = [
    "NO_COUNTS",
    "Example",
    "TaskCounts",
    "TaskLimits",
    "TooShortError",
    "closed",
    "make_example",
    "mismatched",
    "open_",
]


def make_example(
    records: Sequence[dict[str, Any]],
    *,
    task: Task,
    seed: int,
    encoder: Tokenizer,
    decoder: Tokenizer,
    limits: TaskLimits,
    layout: Layout = PLAIN,
) -> Example:
    """The example that records give: a pure function of its arguments.

    records: the sample's own first, then its in-context examples. seed: 64 bits for the example's own choices (window,
    number of passages, which answer). layout: how the decoder is spoken to. DataError where the record lacks what the
    task needs; TooShortError, which is one, where it is only too short for it.
    """
    if task == "few_shot":
        return few_shot_example(records, seed=seed, encoder=encoder, decoder=decoder, limits=limits, layout=layout)
    if task == "long_context":
        return long_context_example(
            records[0], seed=seed, encoder=encoder, decoder=decoder, limits=limits, layout=layout
        )
    return pretraining_example(
        pretraining_text(records[0]),
        task=task,
        seed=seed,
        encoder=encoder,
        decoder=decoder,
        limits=limits,
        layout=layout,
    )
