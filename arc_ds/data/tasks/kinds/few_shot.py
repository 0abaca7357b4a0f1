r"""Few-shot fine-tuning: blocks of document, question and answer. The target is the last answer.

    Document: ⟨context⟩\nQuestion: …\nAnswer: …\n\nDocument: ⟨context⟩\nQuestion: …\nAnswer: …

Each document is compressed, and the loss is on the last answer only (paper, section 4 and appendix C).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arc_ds.data.order.randomness import random_words
from arc_ds.data.tasks.asked import Asked, ask
from arc_ds.data.tasks.chat import Layout
from arc_ds.data.tasks.contexts import cut_document, read_passages
from arc_ds.data.tasks.estimate import TEMPLATE_TOKENS, AskedMeans, Estimate
from arc_ds.data.tasks.example import Example, TaskCounts, written_example
from arc_ds.data.tasks.limits import TaskLimits
from arc_ds.data.tasks.questions import Block, write_blocks
from arc_ds.data.tasks.task import ChatRows, Largest, Sizing, Task, asked_rows
from arc_ds.shards.records import fine_tuning_record
from arc_ds.tokenizers import Tokenizer


def few_shot_example(
    records: Sequence[dict[str, Any]],
    *,
    sample: str,
    seed: int,
    encoder: Tokenizer,
    decoder: Tokenizer,
    limits: TaskLimits,
    layout: Layout,
) -> Example:
    """The example of the first record. The other records are its in-context examples and come before it, in order.

    The record's own document is cut to limits.max_documents. In-context examples are then added from the last one
    backwards, while their whole documents fit. An in-context example with a question or answer that is too long is left
    out. Raises DataError if a record is not a valid fine-tuning record.
    """
    draws = random_words(2 * len(records), seed, "few-shot").reshape(-1, 2).tolist()
    fields = [fine_tuning_record(record) for record in records]
    own, *others = (
        ask(record, draw, decoder=decoder, limits=limits, is_chat=layout.is_chat)
        for record, draw in zip(fields, draws, strict=True)
    )
    marker = limits.marker("cont")
    reading = read_passages(own.passages, encoder)
    document = cut_document(reading, limits.max_documents, marker)
    room = limits.max_documents - len(document.ids)
    blocks = [*_fitting(others, room, encoder, limits), Block((document,), own)]
    counts = TaskCounts(
        cut_contexts=int(len(document.ids) < len(reading)),
        cut_examples=len(others) - len(blocks) + 1,
        cut_questions=int(own.question_is_cut),
        cut_answers=int(own.answer_is_cut),
    )
    parts = write_blocks(blocks, layout, limits.bos_ids(decoder))
    return written_example(sample, parts, fields[0].passages, counts, decoder)


def _fitting(others: Sequence[Asked], room: int, encoder: Tokenizer, limits: TaskLimits) -> list[Block]:
    """Blocks of the last in-context examples whose documents together fit in `room` encoder tokens."""
    blocks: list[Block] = []
    for asked in reversed(others):
        if asked.question_is_cut or asked.answer_is_cut:
            continue
        reading = read_passages(asked.passages, encoder)
        room -= len(reading)
        if room < 0:
            break
        blocks.append(Block((reading.document(0, len(reading), limits.marker("cont")),), asked))
    return blocks[::-1]


def estimate_few_shot(_: str, tokens: Sequence[int], sizing: Sizing) -> Estimate:
    """Estimate documents by the source's means. In-context examples are added while they fit, the last ones first."""
    limits, asked = sizing.limits, sizing.asked or AskedMeans()
    own, *examples = (max(round((count - asked.other_tokens) * asked.drawn_share), 1) for count in tokens)
    own = min(own, limits.max_documents)
    room, kept = limits.max_documents - own, 0
    for length in reversed(examples):
        room -= length
        if room < 0:
            break
        kept += 1
    lengths = (*examples[len(examples) - kept :], own)
    return Estimate(
        context_lengths=lengths,
        prefix_rows=int(limits.bos),
        suffix_rows=sum(map(sizing.compressed, lengths)) + (asked.asked_rows + TEMPLATE_TOKENS) * len(lengths),
    )


def _largest(limits: TaskLimits, max_examples: int, chat: ChatRows) -> Largest:
    return Largest(
        contexts=max_examples + 1,
        context_tokens=limits.max_documents,
        longest_context=limits.max_documents,
        said_rows=asked_rows(limits) * (max_examples + 1) + chat.further * max_examples,
    )


TASK = Task(
    name="few_shot",
    record_kinds=("fine_tuning",),
    samples=("few_shot",),
    example=few_shot_example,
    estimate=estimate_few_shot,
    largest=_largest,
    own_keys=("in_context_examples", "max_passages"),
    size_keys="data.max_documents_tokens, the source's in_context_examples, data.max_question_tokens or "
    "data.max_answer_tokens",
    asks_about_last=True,
)
