"""Samples of an evaluation, and the prompts made of them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalSample:
    """One question of a dataset, independent of system and decoder.

    id: the dataset's own id, or else a hash of question and first passage. Unique within its task.
    task: name of its `EvalTask`.
    passages: the texts that the answer is about, best first. A system reads them as documents.
    references: all accepted answers. The first one is the answer of an in-context example, and the one of the NLL.
    question: the question or instruction; None if the task's layout needs none.
    cluster: samples of one cluster share their errors: those of one paragraph, article or sentence.
    group: samples of one group make one score of a corpus metric, such as a direction of translation ("eng-fra"). The
        score of the task is the mean of its groups. Empty if the task has one group.
    instruction: "long" only: instruction of the file. It replaces the task's.
    """

    id: str
    task: str
    passages: tuple[str, ...]
    references: tuple[str, ...]
    question: str | None = None
    cluster: str = ""
    group: str = ""
    instruction: str = ""


@dataclass(frozen=True, slots=True)
class Document:
    """A document of a prompt. Each system decides how its decoder reads it: as text, compressed, or not at all.

    text: the document: one passage, or several joined ones.
    """

    text: str


class Said(str):
    """A text of a prompt in the decoder's own words: the label of an answer, and the answer of an example after it."""

    __slots__ = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalPrompt:
    """The prompt of one sample, before a system has read its documents.

    sample: the sample that it asks about.
    parts: texts and documents in reading order. The last document is the sample's own; the documents before it belong
        to in-context examples. Closed-book prompts have none.
    max_new_tokens: limit of the answer.
    stop: texts that end the answer; they are not part of it.
    shared: the parts with which `parts` begin and which all prompts of its batch have: in-context examples, or the
        document of a "long" task. A system reads them once.
    """

    sample: EvalSample
    parts: tuple[str | Document, ...]
    max_new_tokens: int
    stop: tuple[str, ...]
    shared: tuple[str | Document, ...] = ()
