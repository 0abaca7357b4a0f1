"""Shorten the document of a prompt that exceeds a decoder's window."""

from __future__ import annotations

from dataclasses import replace

from arc_ds.evaluation.sample import Document, EvalPrompt
from arc_ds.evaluation.systems.budget import Part
from arc_ds.evaluation.systems.system import System

_TRIES = 16
_CLOSE_ENOUGH = 0.98  # of the window
_AIM = 0.99  # of the window
_MAX_WORD = 100  # characters


def shorten(prompt: EvalPrompt, system: System, max_rows: int, part: Part) -> EvalPrompt | None:
    """The prompt with a part of its document, so that it takes at most `max_rows` decoder rows.

    The part is cut between words. It fills the window to about 98% or better. Every try tokenizes it again, and takes
    the rows between two tries as linear in the characters.

    prompt: of a "long" task. It has one document, or none in a closed book.
    max_rows: rows of the prompt without its answer.
    part: the part of the document that is kept.

    None: not even one word of the document fits.
    """
    whole = next((each.text for each in prompt.parts if isinstance(each, Document)), None)
    if whole is None:
        return None
    best: EvalPrompt | None = None
    fits, exceeds = 0, len(whole)  # the number of characters to keep lies between
    keep, rows = len(whole), system.num_rows(prompt)
    aim = keep * max_rows / rows
    for _ in range(_TRIES):
        if exceeds - fits < 2:
            break
        before = keep, rows
        keep = int(aim) if fits < int(aim) < exceeds else (fits + exceeds) // 2
        kept = _part(whole, keep, part)
        if not kept:
            fits, aim = keep, 2 * keep
            continue
        shorter = with_document(prompt, kept)
        rows = system.num_rows(shorter)
        if rows > max_rows:
            exceeds = keep
        else:
            fits, best = keep, shorter
            if rows >= _CLOSE_ENOUGH * max_rows:
                break
        slope = (before[1] - rows) / (before[0] - keep)
        aim = keep + (_AIM * max_rows - rows) / slope if slope > 0 else 0
    return best


def with_document(prompt: EvalPrompt, text: str) -> EvalPrompt:
    """The prompt of a "long" task with another text of its document."""
    parts = tuple(Document(text) if isinstance(each, Document) else each for each in prompt.parts)
    return replace(prompt, parts=parts, shared=parts[: len(prompt.shared)])


def _part(text: str, num_characters: int, part: Part) -> str:
    """A part of a text of at most this many characters, without words that are cut in two."""
    start = {"head": 0, "tail": len(text) - num_characters, "middle": (len(text) - num_characters) // 2}[part]
    end = start + num_characters
    if _cuts_word(text, start):
        near = range(start, min(start + _MAX_WORD, end))
        start = next((idx for idx in near if text[idx].isspace()), start if len(near) == _MAX_WORD else end)
    if _cuts_word(text, end):
        near = range(end, max(end - _MAX_WORD, start), -1)
        end = next((idx for idx in near if text[idx - 1].isspace()), end if len(near) == _MAX_WORD else start)
    return text[start:end].strip()


def _cuts_word(text: str, place: int) -> bool:
    """Whether a word stands on both sides of a place. Long runs without white space, as in Chinese, are no words."""
    if not 0 < place < len(text) or text[place - 1].isspace() or text[place].isspace():
        return False
    return any(map(str.isspace, text[max(place - _MAX_WORD, 0) : place + _MAX_WORD]))
