"""The systems over one decoder: documents compressed (ARC), left out, whole, truncated, or as sentences by BM25."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from itertools import accumulate, chain, pairwise
from pathlib import Path
from threading import Lock
from typing import Any, Literal, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from arc_ds.batch.segments import Marker, Segment, TokenIds
from arc_ds.config.ranges import Count, Positive
from arc_ds.config.schema import FilePath
from arc_ds.data.order.randomness import random_words
from arc_ds.data.tasks.chat import PLAIN, Layout, LayoutName, read_layout
from arc_ds.errors import ConfigError, DataError
from arc_ds.evaluation.sample import Document, EvalPrompt
from arc_ds.evaluation.systems.budget import Budget, Part, choose_sentences, chunk_ids, cut_to, rows_of_arc
from arc_ds.evaluation.systems.chat import chat_parts, end_ids
from arc_ds.evaluation.systems.kind import SystemKind, SystemSettings
from arc_ds.evaluation.systems.served import ServedReader, ServerSection, open_text_reader, open_vector_reader
from arc_ds.evaluation.systems.system import Answer, AnswerNll
from arc_ds.inference.arc import ArcModel
from arc_ds.inference.decoders import Implementation
from arc_ds.inference.generate import Sampling
from arc_ds.inference.load import check_runs_elsewhere
from arc_ds.inference.prompt import Parts, Vectors
from arc_ds.inference.reader import DecoderReader
from arc_ds.inference.vectors import model_digest
from arc_ds.inference.weight_samples import sample_digest
from arc_ds.model.frozen_decoder import TransformersSizes
from arc_ds.model.weights.hf_config import RopeScalingChoice
from arc_ds.tokenizers import check_fits

_SAMPLED_TASK = "govreport"  # of the reference's protocol
_NUM_KEPT = 4096  # token counts of texts
_ANY_NUMBER = 2**31 - 1


class DecoderSystem(ABC):
    """A system whose decoder reads the prompt, with something in place of each document.

    name: its name in results and tables.
    reader: the decoder.
    settings: seed and protocol of the evaluation.
    layout: the turns of its chat; the plain layout reads running text.
    texts_apart: see `ArcModel`.
    """

    uses_documents = True

    def __init__(
        self,
        name: str,
        reader: DecoderReader,
        settings: SystemSettings,
        *,
        layout: Layout = PLAIN,
        texts_apart: bool = False,
    ) -> None:
        self.name, self.reader, self._settings = name, reader, settings
        self._layout, self._texts_apart = layout, texts_apart
        sizes = reader.decoder.sizes
        limits = (reader.max_positions, sizes.max_positions if isinstance(sizes, TransformersSizes) else None)
        self.max_rows = min((limit for limit in limits if limit is not None), default=None)
        tokenizer = reader.needed_tokenizer()
        self._num_tokens: Callable[[str], int] = lru_cache(_NUM_KEPT)(lambda text: len(tokenizer.encode(text)))

    @abstractmethod
    def parts(self, prompt: EvalPrompt) -> list[str | Vectors]:
        """The parts of a prompt that the decoder reads: texts and vectors."""

    @abstractmethod
    def describe(self) -> Mapping[str, Any]:
        """See `System`."""

    def lengths_of_documents(self, prompt: EvalPrompt) -> dict[str, int]:
        """Counts of this system, see `Answer.lengths`."""
        return {}

    def forget(self) -> None:
        """See `KeepsWork`."""
        self.reader.forget()

    def num_rows(self, prompt: EvalPrompt) -> int:
        """See `System`."""
        return _rows_of(self._read(self.parts(prompt))[0])

    def answer(self, prompts: Sequence[EvalPrompt]) -> list[Answer]:
        """See `System`. The work on parts that all prompts share is done once and kept."""
        read = [self._read(parts)[0] for parts in self._all_parts(prompts)]
        groups: dict[tuple[tuple[str, ...], int | None], list[int]] = {}
        for idx, prompt in enumerate(prompts):
            # A sampled answer is drawn alone, so that it does not depend on its batch.
            alone = idx if self._is_sampled(prompt) else None
            groups.setdefault((prompt.stop, alone), []).append(idx)
        num_shared, found = self._most_shared(prompts), dict[int, Answer]()
        for (stop, alone), members in groups.items():
            answers = self.reader.answer_rows(
                [self.reader.rows(read[idx], idx) for idx in members],
                max_new_tokens=[prompts[idx].max_new_tokens for idx in members],
                stop=stop,
                stop_ids=end_ids(self._layout),
                sampling=None if alone is None else self._sampling(prompts[alone]),
                max_rows=_ANY_NUMBER,  # one batch, as planned
                max_shared=num_shared,
            )
            for idx, each in zip(members, answers, strict=True):
                lengths = self._lengths(prompts[idx], _rows_of(read[idx]), len(each.ids))
                found[idx] = Answer(text=each.text.strip(), raw=each.raw, stop=each.stop, lengths=lengths)
        return [found[idx] for idx in range(len(prompts))]

    def answer_nll(self, prompts: Sequence[EvalPrompt], answers: Sequence[str]) -> list[AnswerNll]:
        """See `System`. A space stands between prompt and answer, as in the answers of in-context examples."""
        both = zip(self._all_parts(prompts), answers, strict=True)
        read = [self._read(parts, f" {answer}") for parts, answer in both]
        rows = [self.reader.rows(parts, idx) for idx, (parts, _) in enumerate(read)]
        return self.reader.nll_rows(rows, [ids for _, ids in read], _ANY_NUMBER, self._most_shared(prompts))

    def _most_shared(self, prompts: Sequence[EvalPrompt]) -> int:
        return self.num_shared_rows(prompts[0]) if prompts else 0

    def num_shared_rows(self, prompt: EvalPrompt) -> int:
        """See `KeepsWork`. The reader shares at most these, which depend on no earlier call."""
        if not prompt.shared:
            return 0
        return self.num_rows(replace(prompt, sample=replace(prompt.sample, question=None), parts=prompt.shared))

    def _all_parts(self, prompts: Sequence[EvalPrompt]) -> list[list[str | Vectors]]:
        return [self.parts(prompt) for prompt in prompts]

    def _read(self, parts: list[str | Vectors], answer: str | None = None) -> tuple[Parts, TokenIds]:
        if self._layout.is_chat:
            return self.reader.read(chat_parts(parts, self._layout, self.reader.needed_tokenizer()), answer=answer)
        return self.reader.read(parts, answer=answer, texts_apart=self._texts_apart)

    def _is_sampled(self, prompt: EvalPrompt) -> bool:
        return self._settings.protocol.sample_govreport and prompt.sample.task == _SAMPLED_TASK

    def _sampling(self, prompt: EvalPrompt) -> Sampling:
        (word,) = random_words(1, self._settings.seed, "answer", prompt.sample.task, prompt.sample.id).tolist()
        return Sampling(temperature=0.7, top_p=0.8, seed=word)

    def _lengths(self, prompt: EvalPrompt, num_rows: int, num_new: int) -> dict[str, int]:
        lengths = {"prompt_rows": num_rows, "new_tokens": num_new, **self.lengths_of_documents(prompt)}
        documents = _documents(prompt)
        if documents:
            whole: list[str | Vectors] = [part.text if isinstance(part, Document) else part for part in prompt.parts]
            lengths["open_book_rows"] = _rows_of(self._read(whole)[0])
            lengths |= _counts("document_decoder_tokens", map(self._num_tokens, documents))
        return lengths

    def _description(self, kind: str, **others: Any) -> dict[str, Any]:
        chat = {"chat_template": self._layout.name}
        if isinstance(self.reader, ServedReader):
            return {"kind": kind, "decoder": self.reader.name, **self.reader.record(), **chat, **others}
        decoder = self.reader.decoder
        return {
            "kind": kind,
            "decoder": self.reader.name,
            "decoder_digest": sample_digest(decoder),
            "implementation": decoder.implementation,
            "bos": self.reader.bos,
            "dtype": str(self.reader.dtype).removeprefix("torch."),
            "device": self.reader.device.type,
            **chat,
            **others,
        }


class TextSystem(DecoderSystem):
    """A system whose decoder reads texts.

    description: kind of the system and its options, for `describe`.
    shorten: the text of a document that the decoder reads, from (document, query); None: the whole document.
    depends_on_query: whether `shorten` uses the query. Questions on one document then share no part of it.
    uses_documents: see `System`.
    """

    def __init__(
        self,
        name: str,
        reader: DecoderReader,
        settings: SystemSettings,
        *,
        description: Mapping[str, Any],
        layout: Layout = PLAIN,
        shorten: Callable[[str, str], str] | None = None,
        depends_on_query: bool = False,
        uses_documents: bool = True,
    ) -> None:
        super().__init__(name, reader, settings, layout=layout)
        self._depends_on_query = depends_on_query
        self.uses_documents = uses_documents
        self._kind = dict(description)
        self._shorten = None if shorten is None else lru_cache(_NUM_KEPT)(shorten)

    def parts(self, prompt: EvalPrompt) -> list[str | Vectors]:
        """The texts of the prompt. Raises DataError on a document in a closed-book prompt."""
        if not self.uses_documents and _documents(prompt):
            raise DataError(f"{self.name} reads no documents, but the prompt of {prompt.sample.id} has some.")
        texts = iter(self._texts(prompt))
        return [next(texts) if isinstance(part, Document) else part for part in prompt.parts]

    def num_shared_rows(self, prompt: EvalPrompt) -> int:
        """See `KeepsWork`."""
        has_own = prompt.shared and _documents(replace(prompt, parts=prompt.shared)) == _documents(prompt)
        return 0 if self._depends_on_query and has_own else super().num_shared_rows(prompt)

    def lengths_of_documents(self, prompt: EvalPrompt) -> dict[str, int]:
        """`kept_decoder_tokens`: the decoder's tokens of shortened documents."""
        if self._shorten is None:
            return {}
        return _counts("kept_decoder_tokens", map(self._num_tokens, self._texts(prompt)))

    def _texts(self, prompt: EvalPrompt) -> list[str]:
        if self._shorten is None:
            return _documents(prompt)
        return [self._shorten(text, query) for text, query in _queries(prompt)]

    def describe(self) -> Mapping[str, Any]:
        """See `System`."""
        return {**self._description(self._kind["kind"]), **self._kind}


class ArcSystem(DecoderSystem):
    """A system whose decoder reads documents as the vectors of an ARC-Encoder.

    Vectors of the parts that prompts share are kept for the next batch, and those of a batch for its NLL.

    model: encoder and decoder.
    decoder_idx: port of the decoder.
    marker: marker after each chunk, or None.
    chunk_tokens: encoder tokens of a chunk. Longer documents are compressed in chunks, as in long-context training.
        None: each document is one chunk.
    """

    def __init__(
        self,
        name: str,
        model: ArcModel,
        settings: SystemSettings,
        *,
        layout: Layout = PLAIN,
        decoder_idx: int = 0,
        marker: Marker | None = "cont",
        chunk_tokens: int | None = None,
    ) -> None:
        super().__init__(name, model.readers[decoder_idx], settings, layout=layout, texts_apart=model.texts_apart)
        if model.encoder_tokenizer is None:
            raise ConfigError(f"{name}: the encoder has no tokenizer. Set encoder_backbone to a folder that has one.")
        model.check_port(decoder_idx, marker)
        self.model, self._marker, self._chunk_tokens = model, marker, chunk_tokens
        self._encoder_lock = Lock()  # of the threads that answer through a server
        encoder = model.encoder_tokenizer
        self._chunk_lengths: Callable[[str], list[int]] = lru_cache(_NUM_KEPT)(
            lambda text: list(map(len, chunk_ids(text, encoder, chunk_tokens)))
        )
        # Of the shared documents and of those of the last batch. Not a method, because a cycle would hold the memory.
        self._vectors = lru_cache(2)(partial(_compress, model, decoder_idx, marker, chunk_tokens))

    def forget(self) -> None:
        """See `KeepsWork`."""
        super().forget()
        self._vectors.cache_clear()

    def parts(self, prompt: EvalPrompt) -> list[str | Vectors]:
        """Texts, and vectors without values in place of documents."""
        width = self.reader.decoder.hidden_size
        value = torch.zeros(1, 1)
        return [
            Vectors(value.expand(self._num_vectors(part.text), width)) if isinstance(part, Document) else part
            for part in prompt.parts
        ]

    def lengths_of_documents(self, prompt: EvalPrompt) -> dict[str, int]:
        """Encoder tokens, vectors and markers."""
        chunks = [self._chunk_lengths(text) for text in _documents(prompt)]
        num_markers = int(self._marker is not None)
        return {
            **_counts("document_encoder_tokens", map(sum, chunks)),
            **_counts("vectors", (sum(self.model.num_vectors(num, None) for num in line) for line in chunks)),
            **_counts("markers", (num_markers * len(line) for line in chunks)),
        }

    def describe(self) -> Mapping[str, Any]:
        """See `System`."""
        return self._description(
            "arc",
            checkpoint=self._digest,
            rules=str(self.model.spec.packing),
            marker=self._marker,
            chunk_tokens=self._chunk_tokens,
        )

    @cached_property
    def _digest(self) -> str:
        return model_digest(self.model)

    def _num_vectors(self, text: str) -> int:
        return sum(self.model.num_vectors(num, self._marker) for num in self._chunk_lengths(text))

    def _all_parts(self, prompts: Sequence[EvalPrompt]) -> list[list[str | Vectors]]:
        # Shared documents are compressed apart, so that their vectors depend on no other document of the batch.
        shared = dict.fromkeys(
            part.text for prompt in prompts[:1] for part in prompt.shared if isinstance(part, Document)
        )
        others = dict.fromkeys(text for prompt in prompts for text in _documents(prompt) if text not in shared)
        with self._encoder_lock:
            found = {**self._vectors(tuple(shared)), **self._vectors(tuple(others))}
        return [
            [Vectors(found[part.text]) if isinstance(part, Document) else part for part in prompt.parts]
            for prompt in prompts
        ]


def _compress(
    model: ArcModel, decoder_idx: int, marker: Marker | None, chunk_tokens: int | None, texts: tuple[str, ...]
) -> dict[str, Tensor]:
    """The vectors of each text, [m, D]."""
    encoder = model.encoder_tokenizer
    assert encoder is not None
    chunks = [chunk_ids(text, encoder, chunk_tokens) for text in texts]
    vectors = model.compress(list(chain(*chunks)), decoder_idx, marker)
    ends = list(accumulate(map(len, chunks), initial=0))
    return {text: torch.cat(vectors[start:end]) for text, (start, end) in zip(texts, pairwise(ends), strict=True)}


def _documents(prompt: EvalPrompt) -> list[str]:
    return [part.text for part in prompt.parts if isinstance(part, Document)]


def _queries(prompt: EvalPrompt) -> list[tuple[str, str]]:
    """Each document with what is asked about it: the sample's question, or else the text up to the next document."""
    found: list[list[str]] = []
    for part in prompt.parts:
        if isinstance(part, Document):
            found.append([part.text, ""])
        elif found:
            found[-1][1] += part
    if found and prompt.sample.question:
        found[-1][1] = prompt.sample.question
    return [(text, query) for text, query in found]


def _counts(name: str, values: Any) -> dict[str, int]:
    """The sum of a count over all documents, and that of the sample's own document, the last one."""
    counts = list(values)
    return {name: sum(counts), f"last_{name}": counts[-1]} if counts else {}


def _rows_of(parts: Parts) -> int:
    return sum(len(part.ids) if isinstance(part, Segment) else len(part.vectors) for part in parts)


@dataclass(frozen=True, kw_only=True)
class DecoderSection:
    """Keys of a system whose decoder reads text."""

    decoder: FilePath
    """Weights folder or .gguf file of the decoder, with its tokenizer."""
    bos: bool = True
    """Whether prompts begin with the tokenizer's begin-of-text token, if there is one."""
    rope_scaling: RopeScalingChoice = "checkpoint"
    """Rotary scaling: the checkpoint's own, or none."""
    implementation: Implementation = "auto"
    """native: our transformer. transformers: the model's own code. auto: native if it knows the decoder."""
    chat_template: LayoutName = "none"
    """Template in whose turns the decoder reads prompts: none (running text), llama2, chatml, or tokenizer (the one in
    the decoder's files)."""
    server: ServerSection | None = None
    """A server that runs the decoder. `decoder` then needs no weights: its tokenizer and sizes are read."""

    def open(self, settings: SystemSettings) -> DecoderReader:
        """Load the decoder. Systems of one evaluation share it, unless a server runs it."""
        path, options = Path(self.decoder), (self.bos, self.rope_scaling, self.implementation)
        if self.server is not None:
            bos, scaling, implementation = options
            return open_text_reader(self.server, path, bos=bos, rope_scaling=scaling, implementation=implementation)

        def load() -> DecoderReader:
            bos, scaling, implementation = options
            reader = DecoderReader.open(
                path, settings.device, settings.dtype, bos=bos, rope_scaling=scaling, implementation=implementation
            )
            _share_decoder(reader, path)
            return reader

        return _once(("reader", path, *options, settings.device, settings.dtype), load)

    def layout(self, reader: DecoderReader) -> Layout:
        """The turns of `chat_template`. Raises TokenizerError if the tokenizer lacks a template or its tokens."""
        return _layout(self.chat_template, reader, Path(self.decoder))


def _layout(name: LayoutName, reader: DecoderReader, path: Path) -> Layout:
    tokenizer = reader.needed_tokenizer()
    layout = read_layout(name, tokenizer, path)
    check_fits(tokenizer, reader.decoder.vocab_size, f"decoder {path}", layout.special_ids)
    return layout


# Weights take most of the memory, so systems that are alive at the same time share them.
_alive: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()
T = TypeVar("T")


def _once(key: Hashable, make: Callable[[], T]) -> T:
    """The object that an earlier call made for this key, if it is still in use; else a new one."""
    found: T | None = _alive.get(key)
    if found is None:
        found = _alive[key] = make()
    return found


def _share_decoder(reader: DecoderReader, path: Path, adapters: Path | None = None) -> None:
    """Name the reader after its file, and let it use the decoder of a system that has loaded the same one.

    adapters: the export whose adapters the decoder has; None for none.
    """
    decoder = reader.decoder
    key = ("decoder", path, adapters, decoder.implementation, decoder.sizes, reader.device, reader.dtype)
    reader.decoder, reader.name = _once(key, lambda: decoder), path.name


@dataclass(frozen=True, kw_only=True)
class CompressionSection:
    """Keys of the compression by an ARC-Encoder."""

    encoder_backbone: FilePath | None = None
    """Folder of the encoder's backbone, which checkpoints of the reference need."""
    pooling_factor: Positive | None = None
    """Replaces the factor of the last pooled layer. None: that of training."""
    marker: Literal["cont", "rec", "none"] = "cont"
    """Marker after each chunk of a document."""
    chunk_tokens: Positive | None = None
    """Encoder tokens of a chunk. Longer documents are compressed in chunks, as encoders of the task `long_context` read
    them (1024). None: each document is one chunk."""

    @property
    def own_marker(self) -> Marker | None:
        """The marker, or None."""
        return None if self.marker == "none" else self.marker


@dataclass(frozen=True, kw_only=True)
class ShortenedSection(DecoderSection, CompressionSection):
    """Keys of a system that shortens each document. Exactly one of `tokens` and `like` is set."""

    tokens: Positive | None = None
    """Decoder tokens of each document."""
    like: FilePath | None = None
    """An export or ARC checkpoint: each document gets as many tokens as its vectors and markers take rows. Give the
    other keys of the `arc` system, too (pooling_factor, marker, chunk_tokens)."""

    def budget(self, settings: SystemSettings) -> Budget:
        """The budget of each document. Raises ConfigError unless one of the two keys is set."""
        if (self.tokens is None) == (self.like is None):
            raise ConfigError(f"{settings.name}: set either `tokens` or `like`.")
        if self.like is not None:
            return rows_of_arc(
                Path(self.like),
                None if self.encoder_backbone is None else Path(self.encoder_backbone),
                self.own_marker,
                pooling_factor=self.pooling_factor,
                chunk_tokens=self.chunk_tokens,
            )
        number = self.tokens or 0
        return lambda _text: number

    def description(self) -> dict[str, Any]:
        """The budget, for `describe`."""
        if self.like is None:
            return {"tokens": self.tokens}
        keys = ("like", "pooling_factor", "marker", "chunk_tokens")
        return {key: getattr(self, key) for key in keys}


@dataclass(frozen=True, kw_only=True)
class TruncatedSection(ShortenedSection):
    """Keys of `truncated`."""

    keep: Part = "head"
    """The part of each document that is kept."""


@dataclass(frozen=True, kw_only=True)
class ArcSection(CompressionSection):
    """Keys of `arc`."""

    model: FilePath
    """An export, or a checkpoint in the ARC format."""
    decoders: tuple[FilePath, ...]
    """Weights folders or .gguf files of its decoders, in the order of the ports, up to the one that answers."""
    decoder_idx: Count = 0
    """The port and the decoder that answers."""
    chat_template: LayoutName | Literal["auto"] = "auto"
    """As of `open`. auto: that of training; none if the export records none."""
    server: ServerSection | None = None
    """A server that runs the decoder. Only the embedding tables of `decoders` are read then."""


def build_arc(section: ArcSection, settings: SystemSettings) -> ArcSystem:
    """Load encoder and decoder. Raises like `ArcModel.from_checkpoint`."""
    if section.decoder_idx >= len(section.decoders):
        raise ConfigError(
            f"{settings.name}: decoder_idx is {section.decoder_idx}, but decoders lists {len(section.decoders)}. "
            "Indices start at 0."
        )
    model = ArcModel.from_checkpoint(
        section.model,
        section.decoders,
        section.encoder_backbone,
        settings.device,
        settings.dtype,
        section.pooling_factor,
        decoder_parts="all" if section.server is None else "embedding",
    )
    if section.server is not None:
        check_runs_elsewhere(model.spec, section.decoder_idx)
        readers, path = list(model.readers), Path(section.decoders[section.decoder_idx])
        readers[section.decoder_idx] = open_vector_reader(section.server, readers[section.decoder_idx], path)
        model.readers = tuple(readers)
    else:
        for idx, (reader, path) in enumerate(zip(model.readers, map(Path, section.decoders), strict=True)):
            _share_decoder(reader, path, None if model.spec.adapters_of(idx) is None else Path(section.model))
    reader, path = model.readers[section.decoder_idx], Path(section.decoders[section.decoder_idx])
    name = (reader.chat_template or "none") if section.chat_template == "auto" else section.chat_template
    # The pooling factor is data of a batch, so systems of other factors use the same weights.
    key = ("compressor", section.model, section.encoder_backbone, settings.device, settings.dtype)
    model.compressor = _once(key, lambda: model.compressor)
    return ArcSystem(
        settings.name,
        model,
        settings,
        layout=_layout(name, reader, path),
        decoder_idx=section.decoder_idx,
        marker=section.own_marker,
        chunk_tokens=section.chunk_tokens,
    )


def text_system(
    section: DecoderSection,
    settings: SystemSettings,
    reader: DecoderReader,
    description: Mapping[str, Any],
    *,
    shorten: Callable[[str, str], str] | None = None,
    depends_on_query: bool = False,
    uses_documents: bool = True,
) -> TextSystem:
    """The system of a section and its opened reader. Other arguments: see `TextSystem`."""
    return TextSystem(
        settings.name,
        reader,
        settings,
        description=description,
        layout=section.layout(reader),
        shorten=shorten,
        depends_on_query=depends_on_query,
        uses_documents=uses_documents,
    )


def build_closed(section: DecoderSection, settings: SystemSettings) -> TextSystem:
    """A decoder without documents."""
    return text_system(section, settings, section.open(settings), {"kind": "closed"}, uses_documents=False)


def build_open(section: DecoderSection, settings: SystemSettings) -> TextSystem:
    """A decoder with whole documents."""
    return text_system(section, settings, section.open(settings), {"kind": "open"})


def build_truncated(section: TruncatedSection, settings: SystemSettings) -> TextSystem:
    """A decoder with a part of each document."""
    budget, reader = section.budget(settings), section.open(settings)
    tokenizer = reader.needed_tokenizer()
    return text_system(
        section,
        settings,
        reader,
        {"kind": "truncated", "keep": section.keep, **section.description()},
        shorten=lambda text, _query: cut_to(text, budget(text), section.keep, tokenizer),
    )


def build_bm25(section: ShortenedSection, settings: SystemSettings) -> TextSystem:
    """A decoder with the sentences of each document that BM25 chooses for the question."""
    budget, reader = section.budget(settings), section.open(settings)
    tokenizer = reader.needed_tokenizer()
    return text_system(
        section,
        settings,
        reader,
        {"kind": "bm25", **section.description()},
        shorten=lambda text, query: choose_sentences(text, query, budget(text), tokenizer),
        depends_on_query=True,
    )


DECODER_KINDS = {
    "arc": SystemKind(ArcSection, build_arc),
    "closed": SystemKind(DecoderSection, build_closed),
    "open": SystemKind(DecoderSection, build_open),
    "truncated": SystemKind(TruncatedSection, build_truncated),
    "bm25": SystemKind(ShortenedSection, build_bm25),
}
