"""The interface of systems: what answers the prompts of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from arc_ds.evaluation.sample import EvalPrompt
from arc_ds.inference.generate import StopReason
from arc_ds.inference.reader import Nll as AnswerNll


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A system's answer to a prompt.

    text: the answer up to its stop, stripped.
    raw: the decoded text before it was cut.
    stop: why it ended: at a stop text, at the decoder's end of text, or at the limit of new tokens.
    lengths: counts for the record: document_decoder_tokens, document_encoder_tokens (of all documents, and with the
        prefix `last_` of the sample's own), vectors, markers, prompt_rows, open_book_rows, new_tokens. A count that
        does not apply to the system is left out.
    """

    text: str
    raw: str
    stop: StopReason
    lengths: Mapping[str, int] = field(default_factory=dict)


class System(Protocol):
    """A system answers prompts in batches. Its answers do not depend on the batch, apart from rounding.

    name: its name in results and tables.
    uses_documents: False for closed book: the prompts then have no Document line.
    max_rows: longest prompt plus answer that its decoder reads; None if there is no limit. The runner counts samples
        that exceed it, and never cuts them silently.
    """

    name: str
    uses_documents: bool
    max_rows: int | None

    def num_rows(self, prompt: EvalPrompt) -> int:
        """Decoder rows of the prompt, without the answer. The runner forms batches by it."""
        ...

    def answer(self, prompts: Sequence[EvalPrompt]) -> list[Answer]:
        """Answer each prompt, greedily unless the protocol says otherwise."""
        ...

    def answer_nll(self, prompts: Sequence[EvalPrompt], answers: Sequence[str]) -> list[AnswerNll]:
        """The NLL of an answer after each prompt."""
        ...

    def describe(self) -> Mapping[str, Any]:
        """What identifies the system in run.json: kind, checkpoint digest, decoder, factor, dtype, device."""
        ...


@runtime_checkable
class KeepsWork(Protocol):
    """A system that keeps work of one call for the next one, such as the vectors of in-context examples.

    Kept work changes no answer, not even by rounding: predictions depend on their batch alone. The runner calls
    `forget` after the last batch of the system, because kept work takes memory.
    """

    def num_shared_rows(self, prompt: EvalPrompt) -> int:
        """Decoder rows of the shared parts of a prompt, which are read and kept once."""
        ...

    def forget(self) -> None:
        """Drop all kept work."""
        ...
