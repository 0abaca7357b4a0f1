"""Natural Questions, the open form: short questions, each with its answers.

The open form (`nq_open`) has no passages, so it can only be asked closed book. Files of a retriever add them (DPR's
`ctxs`, KILT, the reference's `w_retrieved`). A prompt reads the first one.
"""

from __future__ import annotations

from pathlib import Path

from arc_ds.evaluation.datasets.reading import KILT, ROWS, first_references, make_samples, read_entries
from arc_ds.evaluation.protocol import Protocol
from arc_ds.evaluation.sample import EvalSample
from arc_ds.evaluation.task import EvalTask, Metric

QA_METRICS: tuple[Metric, ...] = ("em", "f1", "substring", "approx_em")


def read_nq(path: Path, protocol: Protocol) -> list[EvalSample]:
    """The questions of rows or of KILT. Each is a cluster of its own. See `EvalTask.read`."""
    samples = make_samples("nq", read_entries((ROWS, KILT), path))
    return first_references(samples) if protocol.references == "first" else samples


TASKS = (EvalTask(name="nq", read=read_nq, metrics=QA_METRICS),)
