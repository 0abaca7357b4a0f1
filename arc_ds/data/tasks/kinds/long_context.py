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
from arc_ds.data.tasks.contexts import EncodedText, cut_chunks, first_tokens, read_passages
from arc_ds.data.tasks.example import Example, ExampleSpec, TooShortError, script_example
from arc_ds.data.tasks.limits import TaskLimits
from arc_ds.data.tasks.questions import QuestionBlock, draw_question, question_example
from arc_ds.data.tasks.task import ChatRows, Largest, RecordMeans, SampleLengths, Task, question_rows
from arc_ds.data.tasks.texts import write_continuation
from arc_ds.shards.records import fine_tuning_record, pretraining_text


def long_context_example(records: Sequence[dict[str, Any]], spec: ExampleSpec) -> Example:
    """The example of a record: chunks of a text and its continuation, or all passages with their question.

    Raises DataError if the record is of neither kind, and TooShortError if fewer than two decoder tokens remain to
    continue with.
    """
    limits = spec.limits
    if "text" in records[0]:
        return _text_example(pretraining_text(records[0]), spec)
    record = fine_tuning_record(records[0])
    question = draw_question(record, random_words(2, spec.seed, "long-context").tolist(), spec)
    encoded = read_passages(record.passages, spec)
    chunks, end = cut_chunks(encoded, 0, len(encoded), limits)
    num_cut = -(-(len(encoded) - end) // limits.chunk_tokens)
    return question_example([QuestionBlock(chunks, question)], record.passages, spec, cut_chunks=num_cut)


def _text_example(text: str, spec: ExampleSpec) -> Example:
    """Chunks of a window of the text, and the text after them to continue with: at most half of the window."""
    limits = spec.limits
    encoded = EncodedText(text, spec.encoder.encode_with_ends(text), limits.marker("cont"))
    boundary_before, ends = encoded.encoding.boundary_before, encoded.encoding.ends
    num_tokens = min(len(encoded), limits.max_chunks * limits.chunk_tokens + limits.max_continuation)
    start = boundary_before(spec.seed % (len(encoded) - num_tokens + 1))
    last = boundary_before(start + num_tokens)
    middle = boundary_before(last - min(limits.max_continuation, (last - start) // 2))
    chunks, end = cut_chunks(encoded, start, middle, limits)
    if not chunks:
        raise TooShortError(
            f"the text {text[:40]!r} is too short for a chunk and a continuation. Build the shards with a larger "
            "min_tokens, or set data.on_error: skip."
        )
    following = text[ends[end] : ends[last]]
    target = first_tokens(following, spec.decoder.encode_with_ends(following), limits.max_continuation)
    return script_example(write_continuation("", chunks, target, spec), (text,), spec)


def _estimate(_: str, tokens: Sequence[int], limits: TaskLimits, means: RecordMeans | None) -> SampleLengths:
    behind = min(limits.max_continuation, tokens[0] // 2) if means is None else means.question_rows
    outside = behind if means is None else means.other_tokens
    in_chunks = min(max(tokens[0] - outside, 1), limits.max_chunks * limits.chunk_tokens)
    whole, rest = divmod(in_chunks, limits.chunk_tokens)
    return SampleLengths((limits.chunk_tokens,) * whole + ((rest,) if rest else ()), 0, behind)


def _largest(limits: TaskLimits, _: int, chat: ChatRows) -> Largest:
    return Largest(
        contexts=limits.max_chunks,
        context_tokens=limits.max_chunks * limits.chunk_tokens,
        longest_context=limits.chunk_tokens,
        text_rows=max(limits.max_continuation + chat.text, question_rows(limits)),
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
