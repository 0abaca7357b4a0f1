"""Renders samples for people: contexts coloured, groups marked, targets underlined, tokens separated on request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from arc_ds.batch.groups import GroupRule, group_sizes
from arc_ds.batch.segments import Segment
from arc_ds.data.tasks import Example
from arc_ds.tokenizers import Tokenizer

Style = Literal["plain", "context", "target", "special", "special target", "note"]
_END = "\x1b[0m"
_COLOURS: dict[Style, tuple[str, str]] = {
    "plain": ("", ""),
    "context": ("\x1b[36m", _END),
    "target": ("\x1b[4m", _END),
    "special": ("\x1b[35m", _END),
    "special target": ("\x1b[4;35m", _END),
    "note": ("\x1b[2m", _END),
}
_BRACKETS: dict[Style, tuple[str, str]] = {
    "plain": ("", ""),
    "context": ("⟦", "⟧"),
    "target": ("__", "__"),
    "special": ("", ""),
    "special target": ("__", "__"),
    "note": ("", ""),
}
_GROUP, _TOKEN = "│", "·"


@dataclass(frozen=True, slots=True)
class Piece:
    """Text of one style. A context, with its group and token marks, is one piece."""

    text: str
    style: Style


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Options for the rendering of samples.

    colour: use terminal colours. Without them, contexts appear in ⟦…⟧ and targets in __…__.
    groups: mark the end of each group by │, with groups formed by this rule; None: no marks.
    tokens: mark the end of each token by ·, and also show each context in the decoder's tokens.
    """

    colour: bool = False
    groups: GroupRule | None = None
    tokens: bool = False


class SampleView:
    """Renders samples as an encoder and a decoder with these tokenizers receive them."""

    def __init__(self, encoder: Tokenizer, decoder: Tokenizer, look: Look) -> None:
        self.encoder = encoder
        self.decoder = decoder
        self.look = look
        self._special_names = {idx: name for name, idx in decoder.special_ids.items()}
        for idx, name in ((decoder.bos_id, "<bos>"), (decoder.eos_id, "<eos>")):
            if idx is not None:
                self._special_names.setdefault(idx, name)

    def render(self, example: Example, title: str) -> str:
        """The sample, below a header line with its sizes and the counts of cut text."""
        sample = example.sample
        cut = [f"{count} {name.replace('_', ' ')}" for name, count in asdict(example.counts).items() if count]
        sizes = f"{sample.num_context_tokens} encoder tokens, {sample.num_text_tokens} decoder tokens"
        head = self._styled(Piece(f"── {title}: {', '.join([sample.task, sizes, *cut])} ──", "note"))
        body = "".join(self._styled(piece) for piece in self._pieces(sample.segments))
        return "\n".join([head, body, *(self._decoder_readings(example) if self.look.tokens else ()), ""])

    def _pieces(self, segments: Sequence[Segment]) -> Iterator[Piece]:
        """Yield the pieces of a sample. All tokens of the decoder are decoded as one text, skipping the contexts."""
        runs = [run for segment in segments if segment.kind == "text" for run, _ in self._runs(segment)]
        spelled = iter(spell(self.decoder, [piece for run in runs for piece in self._split(run)]))
        for segment in segments:
            if segment.kind == "context":
                marker = f"<{segment.marker}>" if segment.marker else ""
                yield Piece(self._marked(segment.ids) + marker, "context")
                continue
            for run, style in self._runs(segment):
                text = _TOKEN.join(next(spelled) for _ in self._split(run))
                yield Piece(self._special_names.get(run[0], text), style)

    def _runs(self, segment: Segment) -> list[tuple[list[int], Style]]:
        """Split the ids of a text segment into runs of one style. Each special token is its own run."""
        style: Style = "target" if segment.in_loss else "plain"
        special: Style = "special target" if segment.in_loss else "special"
        runs: list[tuple[list[int], Style]] = []
        for idx in segment.ids:
            if idx in self._special_names:
                runs.append(([idx], special))
            elif runs and runs[-1][1] == style:
                runs[-1][0].append(idx)
            else:
                runs.append(([idx], style))
        return runs

    def _split(self, run: list[int]) -> list[list[int]]:
        return [[idx] for idx in run] if self.look.tokens else [run]

    def _marked(self, ids: Sequence[int]) -> str:
        """The text of a context with its groups, and on request its tokens, marked."""
        group_starts = self._group_starts(len(ids))
        starts = range(len(ids)) if self.look.tokens else sorted(group_starts)
        pieces = [ids[start:end] for start, end in pairwise([*starts, len(ids)])]
        marks = [(_GROUP if start in group_starts else _TOKEN) if start else "" for start in starts]
        return "".join(mark + text for mark, text in zip(marks, spell(self.encoder, pieces), strict=True))

    def _group_starts(self, num_tokens: int) -> set[int]:
        if self.look.groups is None:
            return {0}
        sizes, _ = group_sizes(np.array([num_tokens]), self.look.groups)
        return {0, *np.cumsum(sizes)[:-1].tolist()}

    def _decoder_readings(self, example: Example) -> Iterator[str]:
        """Yield each context in the decoder's tokens, to print below the sample."""
        for number, text in enumerate(example.contexts, start=1):
            ids = self.decoder.encode(text)
            spelled = _TOKEN.join(spell(self.decoder, [[idx] for idx in ids]))
            note = self._styled(Piece(f"context {number} in {len(ids)} decoder tokens: ", "note"))
            yield note + self._styled(Piece(spelled, "context"))

    def _styled(self, piece: Piece) -> str:
        before, after = (_COLOURS if self.look.colour else _BRACKETS)[piece.style]
        return f"{before}{piece.text}{after}"


def spell(tokenizer: Tokenizer, pieces: Sequence[Sequence[int]]) -> list[str]:
    """Decode consecutive pieces of ids to text, so that the texts join to the text of all ids.

    If several pieces share the bytes of a character, the character belongs to the last of them.
    """
    texts: list[str] = []
    ids: list[int] = []
    done = ""
    for place, piece in enumerate(pieces):
        ids += piece
        text = tokenizer.decode(ids)
        if place < len(pieces) - 1:
            text = text.rstrip("\ufffd")
        texts.append(text[len(done) :])
        done = text if len(text) > len(done) else done
    return texts
