"""Information in the vectors of a held-out passage: its NLL in four settings, token by token, with colours."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from arc_ds.batch.segments import Segment
from arc_ds.inference.arc import ArcModel
from arc_ds.tokenizers.base import spell

LIKELY = 0.5
_GREEN, _DIM, _END = "\x1b[1;32m", "\x1b[2m", "\x1b[0m"


@dataclass(frozen=True, kw_only=True)
class PassageNll:
    """The decoder's NLL of a passage in four settings.

    tokens: text of each token.
    nll: NLL in nats of each token except the first, [N - 1], by decoder input ("nothing", "another's vectors",
        "its vectors", "its text").
    """

    tokens: list[str]
    nll: dict[str, Tensor]

    @property
    def learned(self) -> list[bool]:
        """For each token, whether its probability is at least 0.5 with the vectors and below 0.5 without context."""
        with_vectors, without = (self.nll[name].neg().exp() for name in ("its vectors", "nothing"))
        return [False, *((with_vectors >= LIKELY) & (without < LIKELY)).tolist()]

    def line(self, *, colour: bool) -> str:
        """The passage with learned tokens in green, or in [brackets] if `colour` is False."""
        words = []
        for token, is_learned in zip(self.tokens, self.learned, strict=True):
            if colour:
                words.append(f"{_GREEN if is_learned else _DIM}{token}{_END}")
            else:
                words.append(f"[{token}]" if is_learned and token.strip() else token)
        return "".join(words).strip()


def score_passage(model: ArcModel, passage: str, other: str) -> PassageNll:
    """Score a passage with no context, with another passage's vectors, with its own vectors, and with its text.

    model: an export with its tokenizers and one decoder.
    passage: text of at least two decoder tokens.
    other: another passage.
    """
    encoder, decoder = model.encoder_tokenizer, model.decoder_tokenizers[0]
    assert encoder is not None and decoder is not None, "an export carries its tokenizer"
    ids = decoder.encode(passage)
    begin = [Segment.text([decoder.bos_id])] if model.readers[0].bos and decoder.bos_id is not None else []
    given = {
        "nothing": [],
        "another's vectors": [Segment.context(encoder.encode(other), "rec")],
        "its vectors": [Segment.context(encoder.encode(passage), "rec")],
        "its text": [Segment.text(ids)],
    }
    logits = model.logits([[*begin, *before, Segment.text(ids)] for before in given.values()])
    target = torch.tensor(ids[1:])
    nll = {
        name: F.cross_entropy(rows[-len(ids) : -1].cpu(), target, reduction="none")
        for name, rows in zip(given, logits, strict=True)
    }
    return PassageNll(tokens=spell(decoder, [[idx] for idx in ids]), nll=nll)
