"""A script is a sequence before tokenising: words, special tokens and documents. `render` turns it into segments.

Adjacent words are tokenised as one text, so the tokens do not depend on how a task composed it. A special token ends a
text: the words after it are tokenised as a new one. Words after a document are tokenised as the middle of a text.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

from arc_ds.batch.segments import Marker, Segment, TokenIds
from arc_ds.tokenizers import Tokenizer, read_together


@dataclass(frozen=True, slots=True)
class Words:
    """Text from any source. A special token's name in it is plain text.

    text: the text.
    in_loss: whether it is a target.
    with_context: whether it only makes sense with the document ("Document: "). It is then left out with it.
    """

    text: str
    in_loss: bool = False
    with_context: bool = False


@dataclass(frozen=True, slots=True)
class Special:
    """Special tokens of the decoder, by id."""

    ids: tuple[int, ...]
    in_loss: bool = False


@dataclass(frozen=True, slots=True)
class Document:
    """A context to compress.

    ids: encoder tokens, at least one.
    text: the text of these tokens.
    marker: its marker, or None.
    """

    ids: TokenIds
    text: str
    marker: Marker | None


Part = Words | Special | Document


class Rendered(NamedTuple):
    """A tokenised script.

    prompt: the segments before the first target.
    target: the segments from the first target on.
    """

    prompt: tuple[Segment, ...]
    target: tuple[Segment, ...]


def with_spaces_in_targets(parts: Sequence[Part]) -> tuple[Part, ...]:
    """Move a space before a target into the target.

    Tokenizers join a space to the next word, and a prompt that ends with a space is unusual for a decoder.
    """
    moved: list[Part] = []
    for part in parts:
        if isinstance(part, Words) and not part.text:
            continue
        before = moved[-1] if moved else None
        if isinstance(part, Words) and part.in_loss and isinstance(before, Words) and not before.in_loss:
            kept = before.text.removesuffix(" ")
            moved[-1] = replace(before, text=kept)
            part = replace(part, text=before.text[len(kept) :] + part.text)
        moved.append(part)
    return tuple(moved)


def render(parts: Sequence[Part], decoder: Tokenizer) -> Rendered:
    """The segments of a script. If a target follows a document, its first token is input only: no row predicts it."""
    prompt: list[Segment] = []
    target: list[Segment] = []
    after_document = False
    for is_text, members in groupby(parts, key=lambda part: isinstance(part, Words)):
        group = list(members)
        pieces = _read_words(group, decoder, inside=after_document) if is_text else map(_fixed, group)
        for segment, in_target in pieces:
            segments = target if target or in_target else prompt
            if segments and segments[-1].kind == segment.kind == "text" and segments[-1].in_loss == segment.in_loss:
                segments[-1] = Segment.text(segments[-1].ids + segment.ids, in_loss=segment.in_loss)
            else:
                segments.append(segment)
            after_document = segment.kind == "context"
    return Rendered(tuple(prompt), tuple(target))


def _read_words(words: Iterable[Part], decoder: Tokenizer, *, inside: bool) -> Iterator[tuple[Segment, bool]]:
    """Segments of adjacent words. The flag says whether a segment belongs to a target."""
    texts = (part for part in words if isinstance(part, Words) and part.text)
    stretches = [
        (in_loss, "".join(part.text for part in group))
        for in_loss, group in groupby(texts, key=lambda part: part.in_loss)
    ]
    pieces = read_together(decoder, [text for _, text in stretches], inside=inside) if stretches else []
    for place, ((in_loss, _), ids) in enumerate(zip(stretches, pieces, strict=True)):
        num_unpredicted = 1 if in_loss and inside and place == 0 else 0
        for part, is_predicted in ((ids[:num_unpredicted], False), (ids[num_unpredicted:], in_loss)):
            if len(part):
                yield Segment.text(part, in_loss=is_predicted), in_loss


def _fixed(part: Part) -> tuple[Segment, bool]:
    """The segment of a document or of special tokens. The flag says whether it belongs to a target."""
    if isinstance(part, Document):
        return Segment.context(part.ids, part.marker), False
    assert isinstance(part, Special), "words are tokenised together"
    return Segment.text(part.ids, in_loss=part.in_loss), part.in_loss
