"""A user's own data: objects with `question`, `answer` and `passages`, scored as answers, summaries or translations.

A text in `passages` is one passage. `answer` is a text, or a list of all accepted ones. `id`, `cluster` and `group` are
optional. Records of `arc-ds shards` fit, too: their `instruction` is the question if they have none.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from arc_ds.evaluation.datasets.reading import KILT, make_samples, read_entries, rows_with
from arc_ds.evaluation.datasets.summaries import CNN_QUESTION
from arc_ds.evaluation.protocol import Protocol
from arc_ds.evaluation.sample import EvalSample
from arc_ds.evaluation.task import EvalTask


def read_own(path: Path, protocol: Protocol, *, name: str, question: str | None) -> list[EvalSample]:
    """The samples of rows or of KILT. Their cluster is the field `cluster`, or else the first passage.

    name: name of the task.
    question: the question of rows that have none; None: they must have one.
    """
    asked = ("question|query|instruction",) if question is None else ()
    rows = rows_with("answer|answers", *asked, question=question)
    return make_samples(name, read_entries((rows, KILT), path), by_passage=True)


def _task(name: str, question: str | None, max_new_tokens: int) -> EvalTask:
    read = partial(read_own, name=name, question=question)
    return EvalTask(name=name, read=read, num_passages=None, max_new_tokens=max_new_tokens)


TASKS = (_task("qa", None, 64), _task("summary", CNN_QUESTION, 256), _task("translation", None, 256))
