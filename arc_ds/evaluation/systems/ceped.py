"""CEPED as a system: its decoder reads the end of a long prompt, its encoder the text before it (arXiv 2402.16617)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from arc_ds.batch.segments import TokenIds
from arc_ds.config.ranges import Positive
from arc_ds.config.schema import FilePath
from arc_ds.data.order.randomness import random_words
from arc_ds.errors import ConfigError, DataError
from arc_ds.evaluation.sample import Document, EvalPrompt
from arc_ds.evaluation.systems.kind import SystemKind, SystemSettings
from arc_ds.evaluation.systems.system import Answer, AnswerNll
from arc_ds.inference.decoder_files import find_max_positions, find_stop_ids
from arc_ds.inference.generate import Sampling
from arc_ds.inference.reader import DecoderReader
from arc_ds.inference.weight_samples import sample_digest
from arc_ds.model.ceped import Ceped, load_ceped
from arc_ds.tokenizers import Tokenizer, check_fits, load_tokenizer, read_together

SplitRule = Literal["clean", "reference"]
_SAMPLED_TASK = "govreport"  # of the reference's protocol


class Split(NamedTuple):
    """A prompt divided between decoder and encoder.

    decoder_ids: ids that the decoder reads.
    chunks: chunks that the encoder reads, earliest text first; none if the decoder reads everything.
    """

    decoder_ids: list[int]
    chunks: list[list[int]]


@dataclass(frozen=True, kw_only=True)
class SplitSizes:
    """Sizes in tokens.

    input: the decoder's prompt and answer.
    context: largest part that the encoder reads: the text before the part of the decoder.
    chunk: a chunk of the encoder. Chunks are cut from the end, so the first one may be shorter.
    """

    input: int = 2048
    context: int = 30720
    chunk: int = 256


def split_prompt(before: str, rest: str, budget: int, sizes: SplitSizes, tokenizer: Tokenizer) -> Split:
    """Divide a prompt that exceeds the decoder's budget. A shorter one goes to the decoder whole.

    All ids are those of the whole text, and the decoder's begin with the begin-of-text token.

    before: the text up to the end of the last document. The decoder reads its end.
    rest: the text after it, which the decoder reads whole, even if it exceeds the budget.
    budget: largest number of the decoder's ids.
    """
    bos = _bos(tokenizer)
    before_ids, rest_ids = (ids.tolist() for ids in read_together(tokenizer, [before, rest], inside=False))
    first = max(len(bos) + len(before_ids) + len(rest_ids) - budget, 0)
    context = before_ids[:first][-sizes.context :]
    return Split(bos + before_ids[first:] + rest_ids, _chunks(context, sizes.chunk))


def split_prompt_as_published(before: str, rest: str, budget: int, sizes: SplitSizes, tokenizer: Tokenizer) -> Split:
    """`split_prompt` with the choices of the published code.

    If the prompt exceeds the budget, the begin-of-text token is cut off with the text, another blank line precedes
    `rest`, which is tokenized alone, and the encoder also reads the first token of the decoder. Its part is cut out as
    text and tokenized again.
    """
    whole = _bos(tokenizer) + tokenizer.encode(before + rest)
    if len(whole) <= budget:
        return Split(whole, [])
    encoding = tokenizer.encode_with_ends(before)
    before_ids, rest_ids = encoding.ids.tolist(), tokenizer.encode("\n\n" + rest)
    first = max(len(before_ids) + len(rest_ids) - budget, 0)
    end = min(first + 1, len(before_ids))
    start = max(end - sizes.context, 0)
    context = tokenizer.encode(before[int(encoding.ends[start]) : int(encoding.ends[end])])
    return Split(before_ids[first:] + rest_ids, _chunks(context, sizes.chunk))


def _bos(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def _chunks(ids: list[int], size: int) -> list[list[int]]:
    """Chunks of at most `size` ids, cut from the end."""
    ends = range(len(ids), 0, -size)
    return [ids[max(end - size, 0) : end] for end in reversed(ends)]


_SPLITS: Mapping[SplitRule, Callable[[str, str, int, SplitSizes, Tokenizer], Split]] = {
    "clean": split_prompt,
    "reference": split_prompt_as_published,
}


class CepedSystem:
    """Answers with a CEPED model.

    Prompts run one at a time: the keys and values of a context of 30,720 tokens take 16 GB in bfloat16 for the
    published model.

    model: encoder and decoder.
    reader: the model's decoder with its tokenizer, which both sides share.
    sizes: see `SplitSizes`.
    rule: "clean" for `split_prompt`, "reference" for `split_prompt_as_published`.
    settings: name of the system, seed and protocol of the evaluation.
    """

    uses_documents = True

    def __init__(
        self, model: Ceped, reader: DecoderReader, *, sizes: SplitSizes, rule: SplitRule, settings: SystemSettings
    ) -> None:
        self.name, self.model, self.reader = settings.name, model, reader
        self.sizes, self.rule = sizes, rule
        self.max_rows: int | None = sizes.input
        self._settings = settings

    def num_rows(self, prompt: EvalPrompt) -> int:
        """See `System`. A prompt exceeds `max_rows` only if the text after its documents does."""
        return len(self._split(prompt).decoder_ids)

    def answer(self, prompts: Sequence[EvalPrompt]) -> list[Answer]:
        """See `System`. Raises DataError if the text after the documents exceeds the decoder's budget."""
        return [self._answer(prompt, self._checked_split(prompt)) for prompt in prompts]

    def answer_nll(self, prompts: Sequence[EvalPrompt], answers: Sequence[str]) -> list[AnswerNll]:
        """See `System`. A space stands between prompt and answer, unless the prompt ends with white space."""
        return [
            self._answer_nll(prompt, self._checked_split(prompt), answer)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def describe(self) -> Mapping[str, Any]:
        """See `System`."""
        return {
            "kind": "ceped",
            "decoder": self.reader.name,
            "decoder_digest": sample_digest(self.model),
            "sizes": dataclasses.asdict(self.sizes),
            "split": self.rule,
            "dtype": str(self.reader.dtype).removeprefix("torch."),
            "device": self.reader.device.type,
        }

    def _split(self, prompt: EvalPrompt) -> Split:
        budget = self.sizes.input - prompt.max_new_tokens
        return _SPLITS[self.rule](*_texts(prompt), budget, self.sizes, self.reader.needed_tokenizer())

    def _checked_split(self, prompt: EvalPrompt) -> Split:
        split = self._split(prompt)
        if len(split.decoder_ids) + prompt.max_new_tokens > self.sizes.input:
            raise DataError(
                f"{self.name}: the text after the documents of {prompt.sample.id} and {prompt.max_new_tokens} new "
                f"tokens exceed input_tokens {self.sizes.input}. Raise input_tokens, or lower max_new_tokens."
            )
        return split

    def _answer(self, prompt: EvalPrompt, split: Split) -> Answer:
        (found,) = self._reader_of(split).answer_rows(
            [[TokenIds(split.decoder_ids)]],
            max_new_tokens=prompt.max_new_tokens,
            stop=prompt.stop,
            sampling=self._sampling(prompt),
        )
        lengths = {**self._lengths(prompt, split), "new_tokens": len(found.ids)}
        return Answer(text=found.text.strip(), raw=found.raw, stop=found.stop, lengths=lengths)

    def _answer_nll(self, prompt: EvalPrompt, split: Split, answer: str) -> AnswerNll:
        rows, ids = [TokenIds(split.decoder_ids)], self._answer_ids(prompt, answer)
        (nll,) = self._reader_of(split).nll_rows([rows], [ids])
        return AnswerNll(*nll)

    def _reader_of(self, split: Split) -> DecoderReader:
        """What reads a prompt. It holds the keys and values of the context."""
        if not split.chunks:
            return self.reader
        return dataclasses.replace(self.reader, decoder=self.model.decoder.reading(self.model.encode([split.chunks])))

    def _sampling(self, prompt: EvalPrompt) -> Sampling | None:
        """None: greedy. The published evaluation samples GovReport's summaries."""
        task = prompt.sample.task
        if not self._settings.protocol.sample_govreport or task != _SAMPLED_TASK:
            return None
        (seed,) = random_words(1, self._settings.seed, "answer", task, prompt.sample.id).tolist()
        return Sampling(temperature=1.0, top_p=0.95, seed=seed)

    def _answer_ids(self, prompt: EvalPrompt, answer: str) -> TokenIds:
        _, rest = _texts(prompt)
        after = answer if rest[-1:].isspace() else f" {answer}"
        _, ids = read_together(self.reader.needed_tokenizer(), [rest, after], inside=True)
        return TokenIds(ids)

    def _lengths(self, prompt: EvalPrompt, split: Split) -> dict[str, int]:
        """Counts, see `Answer.lengths`. `context_tokens`: read by the encoder."""
        tokenizer = self.reader.needed_tokenizer()
        documents = [len(tokenizer.encode(part.text)) for part in prompt.parts if isinstance(part, Document)]
        of_documents = {"document_decoder_tokens": sum(documents), "last_document_decoder_tokens": sum(documents[-1:])}
        return {
            **(of_documents if documents else {}),
            "prompt_rows": len(split.decoder_ids),
            "open_book_rows": len(_bos(tokenizer)) + len(tokenizer.encode("".join(_texts(prompt)))),
            "context_tokens": sum(map(len, split.chunks)),
        }


def _texts(prompt: EvalPrompt) -> tuple[str, str]:
    """The text up to the end of the last document, and the text after it."""
    places = [place for place, part in enumerate(prompt.parts) if isinstance(part, Document)]
    end = places[-1] + 1 if places else 0
    texts = [part.text if isinstance(part, Document) else part for part in prompt.parts]
    return "".join(texts[:end]), "".join(texts[end:])


@dataclass(frozen=True, kw_only=True)
class CepedSection:
    """Keys of `ceped`."""

    model: FilePath
    """Folder of a CEPED model with its tokenizer, in the layout of hyen/CEPED-LLaMA-2-Chat-7B."""
    input_tokens: Positive = 2048
    """Tokens of the decoder: prompt and answer."""
    context_tokens: Positive = 30720
    """Largest number of tokens that the encoder reads: those before the decoder's part. Earlier text is dropped."""
    chunk_tokens: Positive = 256
    """Tokens of a chunk of the encoder."""
    split: Literal["protocol", "clean", "reference"] = "protocol"
    """reference: divide long prompts as the published code does: no begin-of-text token, one token read by both sides,
    another blank line. clean: without these. protocol: reference if the protocol's `truncation` is."""


def build_ceped(section: CepedSection, settings: SystemSettings) -> CepedSystem:
    """Load a CEPED model. Raises WeightsError, TokenizerError and ConfigError."""
    path = Path(section.model)
    sizes = SplitSizes(input=section.input_tokens, context=section.context_tokens, chunk=section.chunk_tokens)
    limit = find_max_positions(path)
    if limit is not None and sizes.input > limit:
        raise ConfigError(
            f"{settings.name}: input_tokens is {sizes.input}, but the decoder of {path} has {limit} positions. Lower "
            "input_tokens."
        )
    tokenizer = load_tokenizer(path)
    model = _load(path, settings.device, settings.dtype)
    check_fits(tokenizer, model.config.decoder.vocab_size, f"CEPED {path}", _bos(tokenizer))
    reader = DecoderReader(
        decoder=model.decoder,
        tokenizer=tokenizer,
        stop_ids=tuple(idx for idx in find_stop_ids(path, tokenizer) if idx < model.config.decoder.vocab_size),
        max_positions=limit,
        name=path.name,
    )
    by_protocol: SplitRule = "reference" if settings.protocol.truncation == "reference" else "clean"
    rule = by_protocol if section.split == "protocol" else section.split
    return CepedSystem(model, reader, sizes=sizes, rule=rule, settings=settings)


_load = lru_cache(maxsize=1)(load_ceped)  # systems of one evaluation share it


CEPED_KIND = SystemKind(CepedSection, build_ceped)
