"""Shorten the document of a prompt that exceeds a decoder's window."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from arc_ds.evaluation.sample import Document, EvalPrompt
from arc_ds.evaluation.systems.system import System

Part = Literal["head", "tail", "middle"]

_TRIES = 12
_CLOSE_ENOUGH = 0.98  # of the window


def shorten(prompt: EvalPrompt, system: System, max_rows: int, part: Part) -> tuple[EvalPrompt, int] | None:
    """The prompt with a part of its last document, so that it takes at most `max_rows` decoder rows.

    The part is cut between words. It fills the window to about 98% or better, because every try tokenizes it again.

    prompt: its last part that is a document is the sample's own.
    max_rows: rows of the prompt without its answer.
    part: the part of the document that is kept.

    Returns the prompt and the number of characters that were cut. None: not even one word of the document fits.
    """
    place = max((idx for idx, each in enumerate(prompt.parts) if isinstance(each, Document)), default=None)
    if place is None:
        return None
    document = prompt.parts[place]
    assert isinstance(document, Document)
    whole = document.text
    best: tuple[EvalPrompt, int] | None = None
    fits, exceeds = 0, len(whole)  # the number of characters to keep lies between
    rows, keep = system.num_rows(prompt), len(whole)
    for _ in range(_TRIES):
        keep = min(max(int(keep * max_rows / rows), fits + 1), exceeds - 1)
        kept = _part(whole, keep, part)
        if not kept or fits >= exceeds - 1:
            break
        parts = (*prompt.parts[:place], replace(document, text=kept), *prompt.parts[place + 1 :])
        shorter = replace(prompt, parts=parts)
        rows = system.num_rows(shorter)
        if rows > max_rows:
            exceeds = keep
            continue
        fits, best = keep, (shorter, len(whole) - len(kept))
        if rows >= _CLOSE_ENOUGH * max_rows:
            break
    return best


def _part(text: str, num_characters: int, part: Part) -> str:
    """At most so many characters of a text, without words that are cut in two."""
    start = {"head": 0, "tail": len(text) - num_characters, "middle": (len(text) - num_characters) // 2}[part]
    end = start + num_characters
    if start > 0 and not text[start - 1].isspace():
        start = next((idx for idx in range(start, end) if text[idx].isspace()), end)
    if end < len(text) and not text[end].isspace():
        end = next((idx for idx in range(end, start, -1) if text[idx - 1].isspace()), start)
    return text[start:end].strip()
