"""Questions on documents (paper, appendices C and D).

`draw_question` draws passages and answer of a fine-tuning record, and cuts question and answer to their limits.
`question_example` writes questions with their documents as a script, plain or in a chat.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from arc_ds.data.tasks.chat import Layout, Turn
from arc_ds.data.tasks.contexts import first_tokens, last_tokens
from arc_ds.data.tasks.example import Example, ExampleSpec, TaskCounts, script_example, task_counts
from arc_ds.data.tasks.script import Document, Part, Special, Words
from arc_ds.errors import DataError
from arc_ds.shards.records import FineTuningRecord
from arc_ds.tokenizers import Tokenizer

_BLANK_LINE = "\n\n"
_PLACE = "{question}"
_BLANK_LINES = re.compile(r"\n\s*\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A record's passages, question and answer in one sample.

    passages: those of this sample.
    text: the question, or the instruction in its place. None if the record has neither.
    prompt: prefix and suffix of the record's own prompt "prefix||instruction||suffix", for chats only. The prefix is
        text before the document, and the suffix is text before the answer. The instruction is in `text`.
    answer: the answer of this sample.
    cuts: whether question (or prompt) and answer were cut to their limits.
    """

    passages: tuple[str, ...]
    text: str | None
    prompt: tuple[str, str] | None
    answer: str
    cuts: TaskCounts


@dataclass(frozen=True, slots=True)
class QuestionBlock:
    """Documents with a question and its answer.

    documents: the chunks of one text, or a single document.
    question: question and answer.
    """

    documents: tuple[Document, ...]
    question: Question


def draw_question(record: FineTuningRecord, draws: Sequence[int], spec: ExampleSpec) -> Question:
    """Draw passages and answer of a record for one sample, and cut its question and answer to their limits.

    A question that is too long loses its beginning, and an answer its end. Instruction, suffix and prefix of a chat
    prompt share the question's limit. Each of them, in this order, gets the room that the ones before it leave, and
    loses its beginning if that is too little.

    White space around question and answer is removed, because the templates define it. The plain layout also removes
    blank lines within an answer: there a blank line ends an answer, and generation stops at it. Removed white space
    does not count as a cut.

    record: the record.
    draws: two random 64-bit numbers. The first chooses how many passages to use (1 to limits.max_passages, the first
        ones), and the second chooses the answer.
    spec: tokenizers, sizes and layout.

    Raises DataError if the answer has no tokens.
    """
    decoder, limits, is_chat = spec.decoder, spec.limits, spec.layout.is_chat
    num_passages = 1 + draws[0] % min(limits.max_passages, len(record.passages))
    question, prompt = _text_and_prompt(record, is_chat=is_chat)
    said = (question or "", *reversed(prompt or ()))
    kept = _last_tokens(said, limits.max_question, decoder)
    answer = record.answers[draws[1] % len(record.answers)].strip()
    if not is_chat:
        answer = _BLANK_LINES.sub("\n", answer)
    kept_answer = _cut_answer(answer, limits.max_answer, decoder)
    return Question(
        passages=record.passages[:num_passages],
        text=None if question is None else kept[0],
        prompt=None if prompt is None else (kept[2], kept[1]),
        answer=kept_answer,
        cuts=task_counts(cut_questions=int(kept != said), cut_answers=int(kept_answer != answer)),
    )


def _text_and_prompt(record: FineTuningRecord, *, is_chat: bool) -> tuple[str | None, tuple[str, str] | None]:
    """The question, and prefix and suffix of the record's own prompt if it has one and the layout is a chat."""
    question = (record.question or "").strip()
    if record.instruction is None:
        return question or None, None
    pieces = record.instruction.split("||")
    if len(pieces) == 1:
        pattern = record.instruction if _PLACE in record.instruction else f"{record.instruction.strip()} {_PLACE}"
        return pattern.replace(_PLACE, question).strip(), None
    prefix, instruction, suffix = pieces
    if is_chat:
        return instruction.replace(_PLACE, question) or None, (prefix, suffix)
    return question or instruction.replace(_PLACE, "").strip() or None, None


def _last_tokens(texts: tuple[str, ...], max_tokens: int, decoder: Tokenizer) -> tuple[str, ...]:
    """Cut the texts to `max_tokens` together. Earlier texts have priority, and a text loses its beginning."""
    if sum(map(len, texts)) + len(texts) <= max_tokens and all(map(str.isascii, texts)):
        return texts  # an ASCII character has at most one token; + len(texts): some tokenizers prepend a space
    kept = []
    for text in texts:
        encoding = decoder.encode_with_ends(text)
        kept.append(last_tokens(text, encoding, max_tokens))
        max_tokens = max(max_tokens - len(encoding.ids), 0)
    return tuple(kept)


def _cut_answer(answer: str, max_tokens: int, decoder: Tokenizer) -> str:
    encoding = decoder.encode_with_ends(answer)
    if len(encoding.ids) == 0:
        raise DataError(f"the answer {answer[:40]!r} gives no decoder token. Correct the record, or leave it out.")
    kept = first_tokens(answer, encoding, max_tokens).rstrip()
    if not kept:
        raise DataError(
            f"the answer {answer[:40]!r} has no character that fits {max_tokens} tokens. Raise data.max_answer_tokens."
        )
    return kept


def question_example(
    blocks: Sequence[QuestionBlock], passages: tuple[str, ...], spec: ExampleSpec, **cuts: int
) -> Example:
    """The example of some blocks. It counts the cuts of the last question and answer.

    blocks: at least one. The last one is the question; the others are in-context examples.
    passages: all of the sample's own record.
    spec: tokenizers, sizes and layout.
    cuts: other fields of `TaskCounts`.
    """
    counts = blocks[-1].question.cuts + task_counts(**cuts)
    return script_example(_write(blocks, spec), passages, spec, counts)


def _write(blocks: Sequence[QuestionBlock], spec: ExampleSpec) -> tuple[Part, ...]:
    """Write the blocks as a script. The target is the last answer and its end.

    An answer that was cut has no end, so nothing after it is a target.
    """
    layout = spec.layout
    is_whole = not blocks[-1].question.cuts.cut_answers
    turns = [_turn(block, layout, is_last=place == len(blocks) - 1) for place, block in enumerate(blocks)]
    if layout.is_chat:
        return layout.chat(turns, is_whole=is_whole)
    parts: list[Part] = [Special(spec.bos_ids)] if spec.bos_ids else []
    for turn in turns[:-1]:
        parts += [*turn.user, *turn.assistant, Words(_BLANK_LINE)]
    # The blank line before a next block ends an answer, and generation stops there. The in-context examples show this
    # pattern to the decoder; an end-of-text would be new to it.
    end = (Words(_BLANK_LINE, in_loss=True),) if is_whole else ()
    return (*parts, *turns[-1].user, *turns[-1].assistant, *end)


def _turn(block: QuestionBlock, layout: Layout, *, is_last: bool) -> Turn:
    question = block.question
    answer = Words(question.answer, in_loss=is_last)
    if layout.is_chat and question.prompt is not None:
        prefix, suffix = question.prompt
        space = " " if suffix and not suffix[-1].isspace() else ""
        before = Words(prefix, with_context=True)
        return Turn((before, *block.documents, Words(question.text or "")), (Words(suffix + space), answer))
    before = Words("Document: ", with_context=True)
    line = "" if question.text is None else f"Question: {question.text}"
    line_end = Words("\n", with_context=True)
    if layout.is_chat:
        behind = (line_end, Words(line)) if line else ()
        return Turn((before, *block.documents, *behind), (Words("Answer: "), answer))
    words = Words(f"{line}\n" if line else "")
    return Turn((before, *block.documents, line_end, words), (Words("Answer: "), answer))
