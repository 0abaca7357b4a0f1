"""GovReport: reports of two offices of the US Congress (CRS and GAO), with their summaries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from arc_ds.evaluation.datasets.long_context import rows, scrolls
from arc_ds.evaluation.datasets.reading import Entry, Layout, make_samples, own_id, read_entries
from arc_ds.evaluation.protocol import Protocol
from arc_ds.evaluation.sample import EvalSample
from arc_ds.evaluation.task import EvalTask


def read_govreport(path: Path, protocol: Protocol) -> list[EvalSample]:
    """The reports of the original JSON files (CRS, GAO), of the Hub's rows, of SCROLLS, or of other rows.

    The sections of original files are joined: title, paragraphs, then subsections. See `EvalTask.read`.
    """
    layouts = (
        Layout(name="GAO", fields=("report", "highlight"), read=_gao),
        Layout(name="CRS", fields=("reports", "summary"), read=_crs),
        Layout(name="Hub", fields=("report|document", "summary"), read=_hub),
        scrolls(has_question=False),
        rows(question=""),
    )
    return make_samples("govreport", read_entries(layouts, path))


def _hub(fields: Mapping[str, Any]) -> Iterator[Entry]:
    document = fields["report"] if "report" in fields else fields["document"]
    yield Entry(id=own_id(fields), passages=(document,), answers=(fields["summary"],))


def _gao(fields: Mapping[str, Any]) -> Iterator[Entry]:
    report, summary = ("\n\n".join(map(_section, fields[name])) for name in ("report", "highlight"))
    yield Entry(id=own_id(fields), passages=(report,), answers=(summary,))


def _crs(fields: Mapping[str, Any]) -> Iterator[Entry]:
    yield Entry(id=own_id(fields), passages=(_section(fields["reports"]),), answers=("\n".join(fields["summary"]),))


def _section(section: Mapping[str, Any]) -> str:
    own = "\n".join(filter(None, (section.get("section_title") or "", *section["paragraphs"])))
    return "\n\n".join(filter(None, (own, *map(_section, section.get("subsections") or []))))


TASKS = (
    EvalTask(
        name="govreport",
        read=read_govreport,
        metrics=("rouge_l", "f1"),
        layout="long",
        labels=("Report", "", "Summary"),
        instruction="Summarize the report in one page.",
        max_new_tokens=1024,
        stop=(),
    ),
)
