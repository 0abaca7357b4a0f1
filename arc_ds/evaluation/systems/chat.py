"""Prompts in the turns of a decoder's chat template.

User: a block's document and question. Assistant: the label of the answer, and in an in-context example the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from arc_ds.batch.segments import Segment, TokenIds
from arc_ds.data.tasks import script
from arc_ds.data.tasks.chat import Layout
from arc_ds.data.tasks.script import Special, Words, render
from arc_ds.evaluation.sample import Said
from arc_ds.inference.prompt import Vectors
from arc_ds.tokenizers import Tokenizer

_PLACE = script.Document(TokenIds((0,)), "", None)  # of vectors, while the words around them become tokens


def chat_parts(parts: Sequence[str | Vectors], layout: Layout, tokenizer: Tokenizer) -> list[Segment | Vectors]:
    """The tokens of a prompt's turns, up to the answer, with its vectors between them.

    White space at both ends of a user's words is left out: it separates blocks in running text.

    parts: of the prompt as running text, or the shared ones with which it begins.
    """
    written: list[script.Part] = [*layout.head]
    user: list[script.Part] = []
    for place, part in enumerate(parts):
        if not isinstance(part, Said):
            user.append(_PLACE if isinstance(part, Vectors) else Words(part))
            continue
        is_last = place == len(parts) - 1
        written += [*_stripped(user), *(layout.last_middle if is_last else layout.middle), Words(part)]
        written += () if is_last else layout.between
        user = []
    written += _stripped(user)
    vectors = (part for part in parts if isinstance(part, Vectors))
    return [next(vectors) if each.kind == "context" else each for each in render(written, tokenizer).prompt]


def end_ids(layout: Layout) -> tuple[int, ...]:
    """The special tokens that end an answer."""
    return tuple(idx for part in layout.end if isinstance(part, Special) for idx in part.ids)


def _stripped(user: Sequence[script.Part]) -> list[script.Part]:
    parts = list(user)
    if parts and isinstance(parts[0], Words):
        parts[0] = replace(parts[0], text=parts[0].text.lstrip())
    if parts and isinstance(parts[-1], Words):
        parts[-1] = replace(parts[-1], text=parts[-1].text.rstrip())
    return parts
