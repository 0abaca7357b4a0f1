"""GovReport: reports of two offices of the US Congress (CRS and GAO), with their summaries. QMSum: summaries of
meetings, each written for a query.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from arc_ds.evaluation.datasets.long_context import long_task
from arc_ds.evaluation.datasets.reading import Entry, Layout, own_id
from arc_ds.shards.building.question_rows import rows_of


def _hub(fields: Mapping[str, Any]) -> Iterator[Entry]:
    document = fields["report"] if "report" in fields else fields["document"]
    yield Entry(id=own_id(fields), passages=(document,), answers=(fields["summary"],))


def _gao(fields: Mapping[str, Any]) -> Iterator[Entry]:
    report, summary = ("\n\n".join(map(_section, fields[name])) for name in ("report", "highlight"))
    yield Entry(id=own_id(fields), passages=(report,), answers=(summary,))


def _crs(fields: Mapping[str, Any]) -> Iterator[Entry]:
    summary = "\n".join(rows_of(fields["summary"]))
    yield Entry(id=own_id(fields), passages=(_section(fields["reports"]),), answers=(summary,))


def _section(section: Mapping[str, Any]) -> str:
    """Title, paragraphs, then subsections."""
    own = "\n".join(filter(None, (section.get("section_title"), *section["paragraphs"])))
    return "\n\n".join(filter(None, (own, *map(_section, section.get("subsections") or []))))


def _meeting(fields: Mapping[str, Any]) -> Iterator[Entry]:
    transcript = "\n".join(f"{turn['speaker']}: {turn['content'] or ''}" for turn in fields["meeting_transcripts"])
    for query in (*(fields.get("general_query_list") or ()), *fields["specific_query_list"]):
        yield Entry(question=query["query"], passages=(transcript,), answers=(query["answer"],))


_REPORTS = (
    Layout(name="GAO", fields=("report", "highlight"), read=_gao),
    Layout(name="CRS", fields=("reports", "summary"), read=_crs),
    Layout(name="Hub", fields=("report|document", "summary"), read=_hub),
)
_MEETINGS = (Layout(name="meeting", fields=("meeting_transcripts", "specific_query_list"), read=_meeting),)

TASKS = (
    long_task(
        "govreport",
        labels=("Report", "", "Summary"),
        instruction="Summarize the report in one page.",
        layouts=_REPORTS,
        max_new_tokens=1024,
        stop=(),
    ),
    long_task(
        "qmsum",
        labels=("Transcript", "Query", "Answer"),
        instruction="Answer the query about the meeting in a few sentences.",
        layouts=_MEETINGS,
        max_new_tokens=256,
    ),
)
