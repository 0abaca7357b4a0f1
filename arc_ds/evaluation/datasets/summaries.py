"""News articles with summaries: CNN/DailyMail (highlights) and XSum (one sentence).

The wording of the questions is ours; the reference's is in its own files, and rows that have a `question` keep it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

from arc_ds.errors import DataError
from arc_ds.evaluation.datasets.reading import Entry, Layout, make_samples, own_id, read_entries, rows_with
from arc_ds.evaluation.protocol import Protocol
from arc_ds.evaluation.sample import EvalSample
from arc_ds.evaluation.task import EvalTask
from arc_ds.system.user_files import read_user_text

CNN_QUESTION = "Summarize the previous document in a few short sentences."
XSUM_QUESTION = "Summarize the previous document in one sentence."
_XSUM_PARTS = re.compile(r"^\[SN\](.+?)\[SN\]\r?$", re.MULTILINE)
_REMEDY = "Download the file again."


def read_news(
    path: Path,
    protocol: Protocol,
    *,
    name: str,
    question: str,
    fields: tuple[str, str],
    ending: str,
    parts_of: Callable[[Path, str], tuple[str, str]],
) -> list[EvalSample]:
    """The articles of the Hub's rows, of other rows, or of a folder of original files. See `EvalTask.read`.

    name: name of the task.
    question: the question of rows that have none.
    fields: the Hub's names of article and summary.
    ending: that of original files. Their names are the ids.
    parts_of: article and summary of an original file, from (path, text).
    """
    if path.is_dir() and (files := sorted(path.rglob(f"*{ending}"))):
        texts = ((file, parts_of(file, read_user_text(file, DataError, remedy=_REMEDY))) for file in files)
        entries = (
            (str(file), Entry(id=file.stem, question=question, passages=(article,), answers=(summary,)))
            for file, (article, summary) in texts
        )
        return make_samples(name, entries)
    hub = Layout(
        name="Hub",
        fields=fields,
        read=lambda row: [
            Entry(id=own_id(row), question=question, passages=(row[fields[0]],), answers=(row[fields[1]],))
        ],
    )
    rows = rows_with("passages|passage|context", "answer|answers", question=question)
    return make_samples(name, read_entries((hub, rows), path))


def _story(path: Path, text: str) -> tuple[str, str]:
    """The article up to the first "@highlight"; the highlights after each of them are its summary."""
    article, *highlights = (part.strip() for part in text.split("@highlight"))
    return article, "\n".join(highlights)


def _bbc(path: Path, text: str) -> tuple[str, str]:
    """The article under [SN]RESTBODY[SN], its summary under [SN]FIRST-SENTENCE[SN]."""
    pieces = _XSUM_PARTS.split(text)
    parts = dict(zip(pieces[1::2], pieces[2::2], strict=True))
    if not {"FIRST-SENTENCE", "RESTBODY"} <= parts.keys():
        raise DataError(
            f"{path}: found the parts {', '.join(parts) or 'none'}; wanted [SN]FIRST-SENTENCE[SN] and "
            f"[SN]RESTBODY[SN]. {_REMEDY}"
        )
    return " ".join(parts["RESTBODY"].split()), " ".join(parts["FIRST-SENTENCE"].split())


TASKS = tuple(
    EvalTask(
        name=name,
        read=partial(read_news, name=name, question=question, fields=fields, ending=ending, parts_of=parts_of),
        num_passages=None,
        max_new_tokens=max_new_tokens,
    )
    for name, question, fields, ending, parts_of, max_new_tokens in (
        ("cnn", CNN_QUESTION, ("article", "highlights"), ".story", _story, 256),
        ("xsum", XSUM_QUESTION, ("document", "summary"), ".summary", _bbc, 64),
    )
)
