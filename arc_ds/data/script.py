"""A sequence as it is written, before it has tokens: words, special tokens and documents; and how a decoder reads it.

Words that stand next to each other are read as one text, so nothing of it depends on how a task put it together. A
special token ends a text: what follows is read as a new one. Words behind a document are read as the middle of a text.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np

from arc_ds.data.segments import Marker, Segment
from arc_ds.data.tokenizers import Encoding, Tokenizer

# Texts that a following text can be told from: by the second where it begins with white space, else by the first.
_ANCHORS = ("\n", "a")


@dataclass(frozen=True, slots=True)
class Words:
    """Text of any source; what looks like a special token in it is text.

    in_loss: whether it is to be predicted. with_context: whether it only makes sense beside the document, so that it
    goes where the document goes ("Document: ").
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
    """A context to compress: its encoder tokens, at least one, the text that they spell, and its marker."""

    ids: tuple[int, ...]
    text: str
    marker: Marker | None


Part = Words | Special | Document


@dataclass(frozen=True, slots=True)
class Rendered:
    """A script in tokens: the segments in front of the first target, and those from there on."""

    prompt: tuple[Segment, ...]
    target: tuple[Segment, ...]

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self.prompt + self.target


def render(parts: Sequence[Part], decoder: Tokenizer) -> Rendered:
    """The segments of a script.

    A space in front of a target belongs to the target, as tokenizers join it to the word behind. The first token of a
    target that stands behind a document is input only: no row predicts it.
    """
    segments: list[Segment] = []
    num_prompt: int | None = None
    after_document = False
    for kind, group in groupby(parts, key=type):
        for segment, in_target in _read_group(list(group), decoder, after_document=after_document):
            if in_target and num_prompt is None:
                num_prompt = len(segments)
            may_join = segments and num_prompt != len(segments)
            if may_join and segment.kind == segments[-1].kind == "text" and segment.in_loss == segments[-1].in_loss:
                segments[-1] = Segment.text(segments[-1].ids + segment.ids, in_loss=segment.in_loss)
            else:
                segments.append(segment)
        after_document = kind is Document
    return Rendered(tuple(segments[:num_prompt]), tuple(segments[num_prompt:]) if num_prompt is not None else ())


@dataclass(frozen=True, slots=True)
class Written:
    """The variants of a rendered script: without its documents, or with their text; always the same target."""

    parts: tuple[Part, ...]
    decoder: Tokenizer
    target: tuple[Segment, ...]

    def closed(self) -> tuple[Segment, ...]:
        """The documents left out, and the words that go with them."""
        kept = [part for part in self.parts if not (isinstance(part, Document) or _goes_with_context(part))]
        return render(kept, self.decoder).prompt + self.target

    def open(self) -> tuple[Segment, ...]:
        """The documents' text in their place, read together with the words around it."""
        texts = [Words(part.text) if isinstance(part, Document) else part for part in self.parts]
        return render(texts, self.decoder).prompt + self.target


def read_together(tokenizer: Tokenizer, texts: Sequence[str], *, inside: bool) -> list[list[int]]:
    """The ids of texts that stand one behind the other, as they read as one text.

    inside: they do not begin a text (sentencepiece would put a space in front of one that does). Where a token reaches
    from one text into the next, each is read by itself.
    """
    for anchor in _ANCHORS if inside else ("",):
        pieces = _slices(tokenizer.encode_with_ends("".join((anchor, *texts))), [anchor, *texts])
        if pieces is not None:
            return pieces[1:]
    if len(texts) == 1:
        return [tokenizer.encode(texts[0])]
    return [
        read_together(tokenizer, [text], inside=inside or place > 0)[0] if text else []
        for place, text in enumerate(texts)
    ]


def _slices(encoding: Encoding, texts: Sequence[str]) -> list[list[int]] | None:
    """The ids of each of the joined texts; None where one of them does not end with a token."""
    reached = np.maximum.accumulate(encoding.ends)
    cuts = np.cumsum([0, *(len(text) for text in texts)])
    places = np.searchsorted(reached, cuts)
    places[-1] = len(encoding.ids)
    if not np.array_equal(reached[places], cuts):
        return None
    return [encoding.ids[first:last].tolist() for first, last in pairwise(places.tolist())]


def _read_group(group: Sequence[Part], decoder: Tokenizer, *, after_document: bool) -> Iterator[tuple[Segment, bool]]:
    """Segments of parts of one kind, each with whether it belongs to a target."""
    for part in group:
        if isinstance(part, Document):
            yield Segment.context(part.ids, part.marker), False
        elif isinstance(part, Special):
            yield Segment.text(part.ids, in_loss=part.in_loss), part.in_loss
    words = [part for part in group if isinstance(part, Words) and part.text]
    if not words:
        return
    stretches = _stretches(words)
    pieces = read_together(decoder, [text for _, text in stretches], inside=after_document)
    for place, ((in_loss, _), ids) in enumerate(zip(stretches, pieces, strict=True)):
        first = 1 if in_loss and place == 0 and after_document else 0
        if first:
            yield Segment.text(ids[:first]), True
        if len(ids) > first:
            yield Segment.text(ids[first:], in_loss=in_loss), in_loss


def _stretches(words: Sequence[Words]) -> list[tuple[bool, str]]:
    """The words' text by whether it is a target; a space in front of a target is moved into it."""
    found: list[tuple[bool, str]] = []
    for in_loss, group in groupby(words, key=lambda part: part.in_loss):
        text = "".join(part.text for part in group)
        if in_loss and found and found[-1][1].endswith(" "):
            found[-1] = (False, found[-1][1][:-1])
            text = " " + text
        found.append((in_loss, text))
    return [(in_loss, text) for in_loss, text in found if text]


def _goes_with_context(part: Part) -> bool:
    return isinstance(part, Words) and part.with_context
