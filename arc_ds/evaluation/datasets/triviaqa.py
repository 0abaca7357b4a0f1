"""TriviaQA: trivia questions, with the names of the answer's page as further answers.

A prompt reads one passage: the first one of a retriever (`ctxs` or `passages`). The data set's own files come with
whole documents instead, and the first one (Wikipedia before the web) is then the passage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from arc_ds.errors import DataError
from arc_ds.evaluation.datasets.reading import (
    KILT,
    ROWS,
    Entry,
    Layout,
    make_samples,
    passage_texts,
    read_entries,
    row_entry,
)
from arc_ds.evaluation.protocol import Protocol
from arc_ds.evaluation.sample import EvalSample
from arc_ds.evaluation.task import EvalTask
from arc_ds.shards.building.question_rows import TRIVIAQA_DOCUMENTS, rows_of
from arc_ds.system.user_files import decode_user_text, read_user_bytes

_UNPACK = "Unpack TriviaQA's evidence again, as the folder next to the file's folder."


def read_triviaqa(path: Path, protocol: Protocol) -> list[EvalSample]:
    """The questions of an original file, of the Hub's rows, of other rows, or of KILT. See `EvalTask.read`.

    The documents of an original file `qa/NAME.json` are in `evidence/`. Without this folder, the questions have no
    passage. With `references: first`, the accepted answers of the data set's own files are the aliases alone, as in the
    reference.
    """
    aliases_only = protocol.references == "first"
    folder = path.absolute() if path.is_dir() else path.absolute().parent
    evidence = folder.parent / "evidence"
    layouts = (
        Layout(name="original", fields=("Data",), read=partial(_original, evidence, aliases_only)),
        Layout(name="Hub", fields=("question", "question_id", "answer"), read=partial(_hub, aliases_only)),
        ROWS,
        KILT,
    )
    return make_samples("triviaqa", read_entries(layouts, path))


def _original(evidence: Path, aliases_only: bool, fields: Mapping[str, Any]) -> Iterator[Entry]:
    has_evidence = evidence.is_dir()
    for question in fields["Data"]:
        answer = question["Answer"]
        main = [] if aliases_only and answer.get("Aliases") else [answer["Value"]]
        yield Entry(
            id=question["QuestionId"],
            question=question["Question"],
            passages=_first_document(question, evidence) if has_evidence else (),
            answers=(*main, *answer.get("Aliases", []), *([] if aliases_only else answer.get("HumanAnswers", []))),
        )


def _first_document(question: Mapping[str, Any], evidence: Path) -> tuple[str, ...]:
    for kind, folder in (("EntityPages", "wikipedia"), ("SearchResults", "web")):
        for page in question.get(kind) or []:
            path = evidence / folder / page["Filename"]
            raw = read_user_bytes(path, DataError, remedy=_UNPACK)
            return (decode_user_text(raw, str(path), DataError, remedy=_UNPACK, errors="replace"),)
    return ()


def _hub(aliases_only: bool, fields: Mapping[str, Any]) -> Iterator[Entry]:
    answer = fields["answer"]
    if aliases_only and isinstance(answer, dict) and answer.get("aliases"):
        answer = answer["aliases"]
    entry = row_entry({**fields, "answer": answer})
    documents = tuple(
        passage
        for field, text in TRIVIAQA_DOCUMENTS.items()
        for page in rows_of(fields.get(field) or [])
        for passage in passage_texts(page.get(text))
    )
    yield replace(entry, passages=entry.passages or documents)


TASKS = (EvalTask(name="triviaqa", read=read_triviaqa),)
