"""A fine-tuning record as one sample asks it: this many passages, this answer, question and answer within limits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from arc_ds.data.tasks.contexts import first_tokens, last_tokens
from arc_ds.data.tasks.limits import TaskLimits
from arc_ds.errors import DataError
from arc_ds.shards.records import FineTuningRecord
from arc_ds.tokenizers import Tokenizer

_PLACE = "{question}"
_BLANK_LINES = re.compile(r"\n\s*\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """What a record's own prompt, "prefix||instruction||suffix", puts in front of and behind the document and in front
    of the answer; the instruction stands in `Asked.question`."""

    prefix: str
    suffix: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """question: the question, or the instruction in its place; None where the record has neither. prompt: the record's
    own, used in a chat only. question_is_cut, answer_is_cut: whether they lost what their limit left no room for, the
    question together with the prompt."""

    passages: tuple[str, ...]
    question: str | None
    prompt: ChatPrompt | None
    answer: str
    question_is_cut: bool
    answer_is_cut: bool


def ask(
    record: FineTuningRecord, draws: Sequence[int], *, decoder: Tokenizer, limits: TaskLimits, is_chat: bool
) -> Asked:
    """What a sample takes of a record.

    draws: two random 64-bit numbers, which choose how many passages (1 to limits.max_passages, the first ones) and
    which of the answers. A question too long loses its beginning, an answer its end. A chat prompt has the question's
    limit for its instruction, suffix and prefix together; each of them, in this order, loses the beginning for which
    those before it leave no room. White space around question and answer is left out: the templates say what stands
    there. So are, in the plain layout, blank lines within an answer: there a blank line is an answer's end, and
    generation stops at it. Like other white space that is not counted as a cut. DataError where the answer has no
    tokens.
    """
    num_passages = 1 + draws[0] % min(limits.max_passages, len(record.passages))
    question, prompt = _question(record, is_chat=is_chat)
    said = (question or "", *((prompt.suffix, prompt.prefix) if prompt else ()))
    kept = _last_tokens(said, limits.max_question, decoder)
    answer = record.answers[draws[1] % len(record.answers)].strip()
    if not is_chat:
        answer = _BLANK_LINES.sub("\n", answer)
    kept_answer = _cut_answer(answer, limits.max_answer, decoder)
    return Asked(
        passages=record.passages[:num_passages],
        question=None if question is None else kept[0],
        prompt=None if prompt is None else ChatPrompt(suffix=kept[1], prefix=kept[2]),
        answer=kept_answer,
        question_is_cut=kept != said,
        answer_is_cut=kept_answer != answer,
    )


def _question(record: FineTuningRecord, *, is_chat: bool) -> tuple[str | None, ChatPrompt | None]:
    """What is asked, and the record's own prompt where it has one and a chat can use it."""
    question = (record.question or "").strip()
    if record.instruction is None:
        return question or None, None
    pieces = record.instruction.split("||")
    if len(pieces) == 1:
        return _filled(pieces[0], question).strip(), None
    prefix, instruction, suffix = pieces
    if is_chat:
        return instruction.replace(_PLACE, question) or None, ChatPrompt(prefix=prefix, suffix=suffix)
    return question or instruction.replace(_PLACE, "").strip() or None, None


def _filled(instruction: str, question: str) -> str:
    """An instruction with the question where it says, else behind it."""
    if _PLACE in instruction:
        return instruction.replace(_PLACE, question)
    return f"{instruction.strip()} {question}"


def _last_tokens(texts: tuple[str, ...], max_tokens: int, decoder: Tokenizer) -> tuple[str, ...]:
    """The texts, each without the beginning for which `max_tokens` less the tokens of those before it are no room."""
    if sum(map(len, texts)) + len(texts) <= max_tokens and all(map(str.isascii, texts)):
        return texts  # an ASCII character has at most one token; some tokenizers put a space in front of a text
    kept = []
    for text in texts:
        encoding = decoder.encode_with_ends(text)
        kept.append(last_tokens(text, encoding, max_tokens))
        max_tokens = max(max_tokens - len(encoding.ids), 0)
    return tuple(kept)


def _cut_answer(answer: str, max_tokens: int, decoder: Tokenizer) -> str:
    encoding = decoder.encode_with_ends(answer)
    if len(encoding.ids) == 0:
        raise DataError(f"the answer {answer[:40]!r} gives no decoder token. Mend the record, or leave it out.")
    kept = first_tokens(answer, encoding, max_tokens).rstrip()
    if not kept:
        raise DataError(
            f"the answer {answer[:40]!r} has no character that fits {max_tokens} tokens. Raise data.max_answer_tokens."
        )
    return kept
