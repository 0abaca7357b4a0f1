"""Natural Questions, the open form, and HotpotQA with distractors: questions in rows or KILT, each its own cluster.

The open form of NQ (`nq_open`) has no passages, so it can only be asked closed book. Files of a retriever add them
(DPR's `ctxs`, KILT, the reference's `w_retrieved`). A prompt reads the first one.

HotpotQA has ten paragraphs a question, of which two hold the answer. The paper's mean length, 1285 tokens, is that of
all ten in one context, though the reference's own script would read the first one only. A prompt therefore reads all
paragraphs, joined by a newline, in the data set's order and without titles. `num_passages` of `make_prompts` takes
fewer. Single spaces join their sentences; in the reference's files there are two.
"""

from __future__ import annotations

from pathlib import Path

from arc_ds.evaluation.datasets.reading import KILT, ROWS, make_samples, read_entries
from arc_ds.evaluation.protocol import Protocol
from arc_ds.evaluation.sample import EvalSample
from arc_ds.evaluation.task import EvalTask


def read_nq(path: Path, protocol: Protocol) -> list[EvalSample]:
    """The questions of rows or of KILT. See `EvalTask.read`."""
    return make_samples("nq", read_entries((ROWS, KILT), path), only_first=protocol.references == "first")


def read_hotpotqa(path: Path, protocol: Protocol) -> list[EvalSample]:
    """The questions of the original file, of the Hub's rows, of other rows, or of KILT. See `EvalTask.read`."""
    return make_samples("hotpotqa", read_entries((ROWS, KILT), path))


TASKS = (EvalTask(name="nq", read=read_nq), EvalTask(name="hotpotqa", read=read_hotpotqa, num_passages=None))
