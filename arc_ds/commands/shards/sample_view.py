"""Renders samples for people: contexts coloured, groups marked, targets underlined, tokens separated on request."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from functools import cached_property
from itertools import groupby, pairwise

import numpy as np

from arc_ds.batch.groups import GroupRule, group_sizes
from arc_ds.batch.segments import Segment
from arc_ds.data.tasks import Example
from arc_ds.tokenizers import Tokenizer
from arc_ds.tokenizers.base import spell

_END = "\x1b[0m"
# The terminal's code of each style, and the brackets that replace it without colours.
_STYLES = {
    "plain": ("", "", ""),
    "context": ("\x1b[36m", "⟦", "⟧"),
    "target": ("\x1b[4m", "__", "__"),
    "special": ("\x1b[35m", "", ""),
    "special target": ("\x1b[4;35m", "__", "__"),
    "note": ("\x1b[2m", "", ""),
}
_GROUP, _TOKEN = "│", "·"


@dataclass(frozen=True)
class SampleView:
    """Renders samples as an encoder and a decoder with these tokenizers receive them.

    colour: use terminal colours. Without them, contexts appear in ⟦…⟧ and targets in __…__.
    groups: mark the end of each group by │, with groups formed by this rule; None: no marks.
    tokens: mark the end of each token by ·, and also show each context in the decoder's tokens.
    """

    encoder: Tokenizer
    decoder: Tokenizer
    _: KW_ONLY
    colour: bool = False
    groups: GroupRule | None = None
    tokens: bool = False

    @cached_property
    def _special_names(self) -> dict[int | None, str]:
        names = {self.decoder.bos_id: "<bos>", self.decoder.eos_id: "<eos>"}
        return names | {idx: name for name, idx in self.decoder.special_ids.items()}

    def render(self, example: Example, title: str) -> str:
        """The sample, below a header line with its sizes and the counts of cut text."""
        sample = example.sample
        cut = [f"{count} {name.replace('_', ' ')}" for name, count in asdict(example.counts).items() if count]
        sizes = f"{sample.num_context_tokens} encoder tokens, {sample.num_text_tokens} decoder tokens"
        head = self._styled(f"── {title}: {', '.join([sample.task, sizes, *cut])} ──", "note")
        body = "".join(self._body(sample.segments))
        return "\n".join([head, body, *(self._decoder_readings(example) if self.tokens else ()), ""])

    def _body(self, segments: Sequence[Segment]) -> Iterator[str]:
        """Yield the parts of a sample. All tokens of the decoder are decoded as one text, skipping the contexts."""
        runs = [run for segment in segments if segment.kind == "text" for run, _ in self._runs(segment)]
        spelled = iter(spell(self.decoder, [piece for run in runs for piece in self._split(run)]))
        for segment in segments:
            if segment.kind == "context":
                marker = f"<{segment.marker}>" if segment.marker else ""
                yield self._styled(self._marked(segment.ids) + marker, "context")
                continue
            for run, style in self._runs(segment):
                text = _TOKEN.join(next(spelled) for _ in self._split(run))
                yield self._styled(self._special_names.get(run[0], text), style)

    def _runs(self, segment: Segment) -> Iterator[tuple[list[int], str]]:
        """Split the ids of a text segment into runs of one style. Each special token is its own run."""
        for is_special, ids in groupby(segment.ids, self._special_names.__contains__):
            if is_special:
                yield from (([idx], "special target" if segment.in_loss else "special") for idx in ids)
            else:
                yield list(ids), "target" if segment.in_loss else "plain"

    def _split(self, run: list[int]) -> list[list[int]]:
        return [[idx] for idx in run] if self.tokens else [run]

    def _marked(self, ids: Sequence[int]) -> str:
        """The text of a context with its groups, and on request its tokens, marked."""
        group_starts = self._group_starts(len(ids))
        starts = range(len(ids)) if self.tokens else sorted(group_starts)
        pieces = [ids[start:end] for start, end in pairwise([*starts, len(ids)])]
        marks = [(_GROUP if start in group_starts else _TOKEN) if start else "" for start in starts]
        return "".join(mark + text for mark, text in zip(marks, spell(self.encoder, pieces), strict=True))

    def _group_starts(self, num_tokens: int) -> set[int]:
        if self.groups is None:
            return {0}
        sizes, _ = group_sizes(np.array([num_tokens]), self.groups)
        return {0, *np.cumsum(sizes)[:-1].tolist()}

    def _decoder_readings(self, example: Example) -> Iterator[str]:
        """Yield each context in the decoder's tokens, to print below the sample."""
        for number, text in enumerate(example.contexts, start=1):
            ids = self.decoder.encode(text)
            spelled = _TOKEN.join(spell(self.decoder, [[idx] for idx in ids]))
            note = self._styled(f"context {number} in {len(ids)} decoder tokens: ", "note")
            yield note + self._styled(spelled, "context")

    def _styled(self, text: str, style: str) -> str:
        code, before, after = _STYLES[style]
        if self.colour:
            return f"{code}{text}{_END}" if code else text
        return f"{before}{text}{after}"
