"""News articles with summaries: CNN/DailyMail (highlights) and XSum (one sentence).

The wording of the questions is ours; the reference's is in its own files, and rows that have a `question` keep it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from arc_ds.errors import DataError
from arc_ds.evaluation.datasets.reading import Entry, Layout, make_samples, own_id, read_entries, row_entry
from arc_ds.evaluation.protocol import Protocol
from arc_ds.evaluation.sample import EvalSample
from arc_ds.evaluation.task import EvalTask
from arc_ds.system.user_files import read_user_text

CNN_QUESTION = "Summarize the previous document in a few short sentences."
XSUM_QUESTION = "Summarize the previous document in one sentence."
_XSUM_PARTS = re.compile(r"^\[SN\](.+?)\[SN\]$", re.MULTILINE)
_REMEDY = "Download the file again."


def read_cnn(path: Path, protocol: Protocol) -> list[EvalSample]:
    """The articles of the Hub's rows, of other rows, or of a folder of `.story` files. See `EvalTask.read`."""
    if path.is_dir() and any(path.glob("*.story")):
        return make_samples("cnn", _files(path, ".story", _story))
    hub = partial(_hub, "article", "highlights", CNN_QUESTION)
    return make_samples("cnn", read_entries((_layout("article", "highlights", hub), _rows(CNN_QUESTION)), path))


def read_xsum(path: Path, protocol: Protocol) -> list[EvalSample]:
    """The articles of the Hub's rows, of other rows, or of a folder of the BBC's `.summary` files."""
    if path.is_dir() and any(path.glob("*.summary")):
        return make_samples("xsum", _files(path, ".summary", _bbc))
    hub = partial(_hub, "document", "summary", XSUM_QUESTION)
    return make_samples("xsum", read_entries((_layout("document", "summary", hub), _rows(XSUM_QUESTION)), path))


def _layout(article: str, summary: str, read: Any) -> Layout:
    return Layout(name="Hub", fields=(article, summary), read=read)


def _rows(question: str) -> Layout:
    def read(fields: Mapping[str, Any]) -> Iterator[Entry]:
        yield row_entry(fields, question=question)

    return Layout(name="rows", fields=("passages|passage|context", "answer|answers"), read=read)


def _hub(article: str, summary: str, question: str, fields: Mapping[str, Any]) -> Iterator[Entry]:
    yield Entry(id=own_id(fields), question=question, passages=(fields[article],), answers=(fields[summary],))


def _files(folder: Path, ending: str, read: Any) -> Iterator[tuple[str, Entry]]:
    """The entries of a folder's files; the id is the file's name."""
    for path in sorted(folder.glob(f"*{ending}")):
        yield str(path), read(path, read_user_text(path, DataError, remedy=_REMEDY))


def _story(path: Path, text: str) -> Entry:
    """The article up to the first "@highlight"; the highlights after each of them are its summary."""
    article, *highlights = (part.strip() for part in text.split("@highlight"))
    return Entry(id=path.stem, question=CNN_QUESTION, passages=(article,), answers=("\n".join(highlights),))


def _bbc(path: Path, text: str) -> Entry:
    """The article under [SN]RESTBODY[SN], its summary under [SN]FIRST-SENTENCE[SN]."""
    pieces = _XSUM_PARTS.split(text.replace("\r\n", "\n"))
    parts = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    if not {"FIRST-SENTENCE", "RESTBODY"} <= parts.keys():
        raise DataError(
            f"{path}: found the parts {', '.join(parts) or 'none'}; wanted [SN]FIRST-SENTENCE[SN] and "
            f"[SN]RESTBODY[SN]. {_REMEDY}"
        )
    summary, body = (" ".join(parts[name].split()) for name in ("FIRST-SENTENCE", "RESTBODY"))
    return Entry(id=path.stem, question=XSUM_QUESTION, passages=(body,), answers=(summary,))


TASKS = (
    EvalTask(name="cnn", read=read_cnn, max_new_tokens=256),
    EvalTask(name="xsum", read=read_xsum),
)
