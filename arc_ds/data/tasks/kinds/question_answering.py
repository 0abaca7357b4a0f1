r"""Question-answering pretraining: one passage, a question about it, and the answer, in the few-shot format.

    Document: ⟨context⟩\nQuestion: …\nAnswer: …

This is a warm-up before few-shot fine-tuning; CLaRa (arXiv 2511.18659) pretrains its compressor in this way. Each
sample reads one passage, drawn from the record's, without in-context examples. So the loss depends on the content of
that passage's vectors. A record without a question gives a paraphrase: the passage, then the answer. Build the
records so that every passage of a record answers its question.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from arc_ds.data.order.randomness import random_words
from arc_ds.data.tasks.contexts import cut_document, read_passages
from arc_ds.data.tasks.example import Example, ExampleSpec
from arc_ds.data.tasks.limits import TaskLimits
from arc_ds.data.tasks.questions import QuestionBlock, draw_question, question_example
from arc_ds.data.tasks.task import TEMPLATE_TOKENS, ChatRows, Largest, RecordMeans, SampleLengths, Task, question_rows
from arc_ds.shards.records import fine_tuning_record


def question_answering_example(records: Sequence[dict[str, Any]], spec: ExampleSpec) -> Example:
    """The example of one record. `seed` chooses the passage, and the answer if there are several.

    Raises DataError if the record has no answer, or if its passage gives no encoder token.
    """
    record = fine_tuning_record(records[0])
    passage_draw, *draws = random_words(3, spec.seed, "question-answering").tolist()
    passage = record.passages[passage_draw % len(record.passages)]
    question = draw_question(replace(record, passages=(passage,)), draws, spec)
    encoded = read_passages(question.passages, spec)
    document = cut_document(encoded, spec.limits.max_context, "data.max_context_tokens")
    is_cut = len(document.ids) < len(encoded)
    return question_example([QuestionBlock((document,), question)], record.passages, spec, cut_contexts=int(is_cut))


def _estimate(_: str, tokens: Sequence[int], limits: TaskLimits, means: RecordMeans | None) -> SampleLengths:
    means = means or RecordMeans()
    length = min(max(tokens[0] - means.other_tokens, 1), limits.max_context)
    return SampleLengths((length,), 0, means.question_rows + TEMPLATE_TOKENS)


def _largest(limits: TaskLimits, _: int, chat: ChatRows) -> Largest:
    return Largest(
        contexts=1,
        context_tokens=limits.max_context,
        longest_context=limits.max_context,
        text_rows=question_rows(limits),
    )


TASK = Task(
    name="question_answering",
    record_kinds=("fine_tuning",),
    samples=("question_answering",),
    example=question_answering_example,
    estimate=_estimate,
    largest=_largest,
    size_keys="data.max_context_tokens, data.max_question_tokens or data.max_answer_tokens",
)
