r"""Long context: a text in chunks of equal size. Each chunk is a context, and all are compressed in parallel (paper,
section 5).

Text:       [bos] ⟨chunk⟩⟨chunk⟩… continuation.
Passages:   Document: ⟨chunk⟩⟨chunk⟩…\nQuestion: …\nAnswer: …

Each chunk's positions begin at 0, so the encoder never sees more positions than one chunk has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arc_ds.data.order.randomness import random_words
from arc_ds.data.tasks.asked import ask
from arc_ds.data.tasks.chat import Layout
from arc_ds.data.tasks.contexts import Reading, cut_chunks, first_tokens, read_passages
from arc_ds.data.tasks.estimate import Estimate
from arc_ds.data.tasks.example import NO_COUNTS, Example, TaskCounts, TooShortError, written_example
from arc_ds.data.tasks.limits import TaskLimits
from arc_ds.data.tasks.questions import Block, write_blocks
from arc_ds.data.tasks.script import Document
from arc_ds.data.tasks.task import ChatRows, Largest, Sizing, Task, asked_rows
from arc_ds.data.tasks.texts import write_continuation
from arc_ds.shards.records import fine_tuning_record, pretraining_text
from arc_ds.tokenizers import Tokenizer


def long_context_example(
    records: Sequence[dict[str, Any]],
    *,
    sample: str,
    seed: int,
    encoder: Tokenizer,
    decoder: Tokenizer,
    limits: TaskLimits,
    layout: Layout,
) -> Example:
    """The example of a record: chunks of a text and its continuation, or all passages with their question.

    Raises DataError if the record is of neither kind, and TooShortError if fewer than two decoder tokens remain to
    continue with.
    """
    record = records[0]
    if "text" in record:
        return _text_example(pretraining_text(record), seed, encoder, decoder, limits, layout)
    fields = fine_tuning_record(record)
    draws = random_words(2, seed, "long-context").tolist()
    asked = ask(fields, draws, decoder=decoder, limits=limits, is_chat=layout.is_chat)
    reading = read_passages(fields.passages, encoder)
    chunks, end = _chunks(reading, 0, len(reading), limits)
    counts = TaskCounts(
        cut_chunks=-(-(len(reading) - end) // limits.chunk_tokens),
        cut_questions=int(asked.question_is_cut),
        cut_answers=int(asked.answer_is_cut),
    )
    parts = write_blocks([Block(chunks, asked)], layout, limits.bos_ids(decoder))
    return written_example(sample, parts, fields.passages, counts, decoder)


def _text_example(
    text: str, seed: int, encoder: Tokenizer, decoder: Tokenizer, limits: TaskLimits, layout: Layout
) -> Example:
    """Chunks of a window of the text, and the text after them to continue with: at most half of the window."""
    reading = Reading(text, encoder.encode_with_ends(text))
    num_tokens = min(len(reading), limits.max_chunks * limits.chunk_tokens + limits.max_continuation)
    start = reading.encoding.boundary_before(seed % (len(reading) - num_tokens + 1))
    last = reading.encoding.boundary_before(start + num_tokens)
    middle = reading.encoding.boundary_before(last - min(limits.max_continuation, (last - start) // 2))
    chunks, end = _chunks(reading, start, middle, limits)
    if not chunks:
        raise TooShortError(
            f"the text {text[:40]!r} is too short for a chunk and a continuation. Build the shards with a larger "
            "min_tokens, or set data.on_error: skip."
        )
    following = text[reading.encoding.ends[end] : reading.encoding.ends[last]]
    target = first_tokens(following, decoder.encode_with_ends(following), limits.max_continuation)
    parts = write_continuation("", chunks, target, layout, limits.bos_ids(decoder))
    return written_example("long_context", parts, (text,), NO_COUNTS, decoder)


def _chunks(reading: Reading, first: int, last: int, limits: TaskLimits) -> tuple[tuple[Document, ...], int]:
    return cut_chunks(
        reading,
        first,
        last,
        chunk_tokens=limits.chunk_tokens,
        max_chunks=limits.max_chunks,
        marker=limits.marker("cont"),
    )


def _estimate(_: str, tokens: Sequence[int], sizing: Sizing) -> Estimate:
    limits, asked = sizing.limits, sizing.asked
    behind = min(limits.max_continuation, tokens[0] // 2) if asked is None else asked.asked_rows
    outside = behind if asked is None else asked.other_tokens
    in_chunks = min(max(tokens[0] - outside, 1), limits.max_chunks * limits.chunk_tokens)
    whole, rest = divmod(in_chunks, limits.chunk_tokens)
    last = (rest,) if rest else ()
    return Estimate(
        context_lengths=(limits.chunk_tokens,) * whole + last,
        prefix_rows=int(limits.bos),
        suffix_rows=whole * sizing.compressed(limits.chunk_tokens) + sum(map(sizing.compressed, last)) + behind,
    )


def _largest(limits: TaskLimits, _: int, chat: ChatRows) -> Largest:
    return Largest(
        contexts=limits.max_chunks,
        context_tokens=limits.max_chunks * limits.chunk_tokens,
        longest_context=limits.chunk_tokens,
        said_rows=max(limits.max_continuation + chat.text, asked_rows(limits)),
    )


TASK = Task(
    name="long_context",
    record_kinds=("pretraining", "fine_tuning"),
    samples=("long_context",),
    example=long_context_example,
    estimate=_estimate,
    largest=_largest,
    own_keys=("chunk_tokens",),
    size_keys="data.max_chunks or the source's chunk_tokens",
)
