r"""Few-shot fine-tuning: blocks of document, question and answer. The target is the last answer.

    Document: ⟨context⟩\nQuestion: …\nAnswer: …\n\nDocument: ⟨context⟩\nQuestion: …\nAnswer: …

Each document is compressed, and the loss is on the last answer only (paper, section 4 and appendix C).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arc_ds.data.order.randomness import random_words
from arc_ds.data.tasks.contexts import cut_document, read_passages
from arc_ds.data.tasks.example import Example, ExampleSpec
from arc_ds.data.tasks.limits import TaskLimits
from arc_ds.data.tasks.questions import Question, QuestionBlock, draw_question, question_example
from arc_ds.data.tasks.task import TEMPLATE_TOKENS, ChatRows, Largest, RecordMeans, SampleLengths, Task, question_rows
from arc_ds.shards.records import fine_tuning_record


def few_shot_example(records: Sequence[dict[str, Any]], spec: ExampleSpec) -> Example:
    """The example of the first record. The other records are its in-context examples and come before it, in order.

    The record's own document is cut to limits.max_documents. In-context examples are then added from the last one
    backwards, while their whole documents fit. An in-context example with a question or answer that is too long is left
    out. Raises DataError if a record is not a valid fine-tuning record.
    """
    limits = spec.limits
    draws = random_words(2 * len(records), spec.seed, "few-shot").reshape(-1, 2).tolist()
    fields = [fine_tuning_record(record) for record in records]
    own, *others = (draw_question(record, draw, spec) for record, draw in zip(fields, draws, strict=True))
    encoded = read_passages(own.passages, spec)
    document = cut_document(encoded, limits.max_documents, "data.max_documents_tokens")
    blocks = [*_fitting(others, limits.max_documents - len(document.ids), spec), QuestionBlock((document,), own)]
    is_cut, num_left_out = int(len(document.ids) < len(encoded)), len(records) - len(blocks)
    return question_example(blocks, fields[0].passages, spec, cut_contexts=is_cut, cut_examples=num_left_out)


def _fitting(others: Sequence[Question], room: int, spec: ExampleSpec) -> list[QuestionBlock]:
    """Blocks of the last in-context examples whose documents together fit in `room` encoder tokens."""
    blocks: list[QuestionBlock] = []
    for question in reversed(others):
        if question.cuts:
            continue
        encoded = read_passages(question.passages, spec)
        room -= len(encoded)
        if room < 0:
            break
        blocks.append(QuestionBlock((encoded.document(0, len(encoded)),), question))
    return blocks[::-1]


def _estimate(_: str, tokens: Sequence[int], limits: TaskLimits, means: RecordMeans | None) -> SampleLengths:
    """Estimate documents by the source's means. In-context examples are added while they fit, the last ones first."""
    means = means or RecordMeans()
    own, *examples = (max(round((count - means.other_tokens) * means.drawn_share), 1) for count in tokens)
    lengths = [min(own, limits.max_documents)]
    for length in reversed(examples):
        if sum(lengths) + length > limits.max_documents:
            break
        lengths.insert(0, length)
    return SampleLengths(tuple(lengths), 0, (means.question_rows + TEMPLATE_TOKENS) * len(lengths))


def _largest(limits: TaskLimits, max_examples: int, chat: ChatRows) -> Largest:
    return Largest(
        contexts=max_examples + 1,
        context_tokens=limits.max_documents,
        longest_context=limits.max_documents,
        text_rows=question_rows(limits) * (max_examples + 1) + chat.further * max_examples,
    )


TASK = Task(
    name="few_shot",
    record_kinds=("fine_tuning",),
    samples=("few_shot",),
    example=few_shot_example,
    estimate=_estimate,
    largest=_largest,
    own_keys=("in_context_examples", "max_passages"),
    size_keys="data.max_documents_tokens, the source's in_context_examples, data.max_question_tokens or "
    "data.max_answer_tokens",
    asks_about_last=True,
)
