"""QMSum: summaries of meetings, each written for a query."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from arc_ds.evaluation.datasets.long_context import rows, scrolls
from arc_ds.evaluation.datasets.reading import Entry, Layout, make_samples, read_entries, text_id
from arc_ds.evaluation.protocol import Protocol
from arc_ds.evaluation.sample import EvalSample
from arc_ds.evaluation.task import EvalTask


def read_qmsum(path: Path, protocol: Protocol) -> list[EvalSample]:
    """The queries of the original meetings, of SCROLLS, or of rows. See `EvalTask.read`. A meeting is a cluster."""
    meeting = Layout(name="meeting", fields=("meeting_transcripts", "specific_query_list"), read=_meeting)
    layouts = (meeting, scrolls(has_question=True), rows())
    return make_samples("qmsum", read_entries(layouts, path), merge=True)


def _meeting(fields: Mapping[str, Any]) -> Iterator[Entry]:
    transcript = "\n".join(f"{turn['speaker']}: {turn['content']}" for turn in fields["meeting_transcripts"])
    for query in (*fields.get("general_query_list", ()), *fields["specific_query_list"]):
        yield Entry(
            question=query["query"], passages=(transcript,), answers=(query["answer"],), cluster=text_id(transcript)
        )


TASKS = (
    EvalTask(
        name="qmsum",
        read=read_qmsum,
        metrics=("rouge_l", "f1"),
        layout="long",
        labels=("Transcript", "Query", "Answer"),
        instruction="Answer the query about the meeting in a few sentences.",
        max_new_tokens=256,
    ),
)
