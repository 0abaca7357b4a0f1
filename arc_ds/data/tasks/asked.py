"""A fine-tuning record in one sample: drawn passages and answer, with question and answer cut to their limits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from arc_ds.data.tasks.contexts import first_tokens, last_tokens
from arc_ds.data.tasks.example import ExampleSpec
from arc_ds.errors import DataError
from arc_ds.shards.records import FineTuningRecord
from arc_ds.tokenizers import Tokenizer

_PLACE = "{question}"
_BLANK_LINES = re.compile(r"\n\s*\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A record's own prompt, "prefix||instruction||suffix". Its instruction is in `Asked.question`.

    prefix: text before the document.
    suffix: text before the answer.
    """

    prefix: str
    suffix: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A record's passages, question and answer in one sample.

    passages: those of this sample.
    question: the question, or the instruction in its place. None if the record has neither.
    prompt: the record's own, for chats only.
    answer: the answer of this sample.
    question_is_cut: whether the question or the prompt was cut to its limit.
    answer_is_cut: whether the answer was cut to its limit.
    """

    passages: tuple[str, ...]
    question: str | None
    prompt: ChatPrompt | None
    answer: str
    question_is_cut: bool
    answer_is_cut: bool


def ask(record: FineTuningRecord, draws: Sequence[int], spec: ExampleSpec) -> Asked:
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
    """The question, and the record's own prompt if it has one and the layout is a chat."""
    question = (record.question or "").strip()
    if record.instruction is None:
        return question or None, None
    pieces = record.instruction.split("||")
    if len(pieces) == 1:
        pattern = record.instruction if _PLACE in record.instruction else f"{record.instruction.strip()} {_PLACE}"
        return pattern.replace(_PLACE, question).strip(), None
    prefix, instruction, suffix = pieces
    if is_chat:
        return instruction.replace(_PLACE, question) or None, ChatPrompt(prefix=prefix, suffix=suffix)
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
