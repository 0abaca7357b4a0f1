"""HotpotQA with distractors: ten paragraphs a question, of which two hold the answer.

The paper's mean length, 1285 tokens, is that of all ten in one context, though the reference's own script would read
the first one only. A prompt therefore reads all paragraphs, joined by a newline, in the data set's order and without
titles. `num_passages` of `make_prompts` takes fewer.
"""

from __future__ import annotations

from pathlib import Path

from arc_ds.evaluation.datasets.nq import QA_METRICS
from arc_ds.evaluation.datasets.reading import KILT, ROWS, make_samples, read_entries
from arc_ds.evaluation.protocol import Protocol
from arc_ds.evaluation.sample import EvalSample
from arc_ds.evaluation.task import EvalTask


def read_hotpotqa(path: Path, protocol: Protocol) -> list[EvalSample]:
    """The questions of the original file, of the Hub's rows, of other rows, or of KILT. See `EvalTask.read`."""
    return make_samples("hotpotqa", read_entries((ROWS, KILT), path))


TASKS = (EvalTask(name="hotpotqa", read=read_hotpotqa, metrics=QA_METRICS, num_passages=None),)
