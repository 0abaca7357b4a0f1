"""CEPED as a system: its decoder reads the end of a long prompt, its encoder the text before it (arXiv 2402.16617)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from arc_ds.batch.segments import TokenIds
from arc_ds.config.ranges import Positive
from arc_ds.config.schema import PathText
from arc_ds.errors import ConfigError, DataError
from arc_ds.evaluation.sample import Document, EvalPrompt
from arc_ds.evaluation.systems.kind import SystemKind, SystemSettings
from arc_ds.evaluation.systems.system import Answer, AnswerNll
from arc_ds.inference.decoder_files import find_max_positions, find_stop_ids
from arc_ds.inference.reader import DecoderReader
from arc_ds.inference.weight_samples import sample_digest
from arc_ds.model.ceped import Ceped, load_ceped
from arc_ds.tokenizers import Tokenizer, check_fits, load_tokenizer, read_together

SplitRule = Literal["clean", "reference"]


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
    first = len(before_ids) + len(rest_ids) - budget
    if first < 0:  # only the other blank line exceeds the budget; the published code fails
        return Split(_bos(tokenizer) + before_ids + rest_ids, [])
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
    """Answers with a CEPED model, greedily.

    Prompts with a context run one at a time: the keys and values of a context of 30,720 tokens take 16 GB in bfloat16
    for the published model. Prompts without one run as a batch of a plain Llama.

    name: its name in results and tables.
    model: encoder and decoder.
    reader: the model's decoder with its tokenizer, which both sides share.
    sizes: see `SplitSizes`.
    rule: "clean" for `split_prompt`, "reference" for `split_prompt_as_published`.
    """

    uses_documents = True

    def __init__(self, name: str, model: Ceped, reader: DecoderReader, *, sizes: SplitSizes, rule: SplitRule) -> None:
        self.name, self.model, self.reader = name, model, reader
        self.sizes, self.rule = sizes, rule
        self.max_rows: int | None = sizes.input

    def num_rows(self, prompt: EvalPrompt) -> int:
        """See `System`. A prompt exceeds `max_rows` only if the text after its documents does."""
        return len(self._split(prompt).decoder_ids)

    def answer(self, prompts: Sequence[EvalPrompt]) -> list[Answer]:
        """See `System`. Raises DataError if the text after the documents exceeds the decoder's budget."""
        found: dict[int, Answer] = {}
        for places, splits, reader in self._groups(prompts):
            for stop in dict.fromkeys(prompts[place].stop for place in places):
                chosen = [idx for idx, place in enumerate(places) if prompts[place].stop == stop]
                answers = reader.answer_rows(
                    [[TokenIds(splits[idx].decoder_ids)] for idx in chosen],
                    max_new_tokens=[prompts[places[idx]].max_new_tokens for idx in chosen],
                    stop=stop,
                )
                for idx, each in zip(chosen, answers, strict=True):
                    lengths = {**self._lengths(prompts[places[idx]], splits[idx]), "new_tokens": len(each.ids)}
                    found[places[idx]] = Answer(text=each.text.strip(), raw=each.raw, stop=each.stop, lengths=lengths)
        return [found[place] for place in range(len(prompts))]

    def answer_nll(self, prompts: Sequence[EvalPrompt], answers: Sequence[str]) -> list[AnswerNll]:
        """See `System`. A space stands between prompt and answer, unless the prompt ends with white space."""
        found: dict[int, AnswerNll] = {}
        for places, splits, reader in self._groups(prompts):
            rows = [[TokenIds(split.decoder_ids)] for split in splits]
            ids = [self._answer_ids(prompts[place], answers[place]) for place in places]
            found |= {place: AnswerNll(*nll) for place, nll in zip(places, reader.nll_rows(rows, ids), strict=True)}
        return [found[place] for place in range(len(prompts))]

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

    def _groups(self, prompts: Sequence[EvalPrompt]) -> list[tuple[list[int], list[Split], DecoderReader]]:
        """Places of prompts that run together, how they are divided, and what reads them."""
        splits = [self._split(prompt) for prompt in prompts]
        for prompt, split in zip(prompts, splits, strict=True):
            if len(split.decoder_ids) + prompt.max_new_tokens > self.sizes.input:
                raise DataError(
                    f"{self.name}: the text after the documents of {prompt.sample.id} and {prompt.max_new_tokens} new "
                    f"tokens exceed input_tokens {self.sizes.input}. Raise input_tokens, or lower max_new_tokens."
                )
        plain = [place for place, split in enumerate(splits) if not split.chunks]
        groups = [(plain, [splits[place] for place in plain], self.reader)] if plain else []
        for place, split in enumerate(splits):
            if split.chunks:
                decoder = self.model.decoder.reading(self.model.encode([split.chunks]))
                groups.append(([place], [split], dataclasses.replace(self.reader, decoder=decoder)))
        return groups

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

    model: PathText
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
    model = load_ceped(path, settings.device, settings.dtype)
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
    return CepedSystem(settings.name, model, reader, sizes=sizes, rule=rule)


CEPED_KIND = SystemKind(CepedSection, build_ceped)
