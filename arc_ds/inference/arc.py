"""ArcModel: inference with a trained compressor and its frozen decoders.

model = ArcModel.from_checkpoint("exports/demo", decoders=["models/llama"])
vectors = model.compress(["A long text ..."])
texts = model.generate([["Summarise: ", Context("A long text ..."), "\\nSummary:"]])
embeds = model.prompt_embeds([["Summarise: ", Context("A long text ..."), "\\nSummary:"]])  # for other engines
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from arc_ds.batch.packing import PackedBatch, pack
from arc_ds.batch.segments import Marker, Sample, Segment, TokenIds
from arc_ds.data.tasks.chat import LayoutName
from arc_ds.errors import ConfigError, DataError, TokenizerError
from arc_ds.inference.decoder_files import find_max_positions, find_stop_ids
from arc_ds.inference.generate import MAX_NEW_TOKENS, Sampling, generate_ids, whole_number
from arc_ds.inference.load import (
    load_compressor,
    load_decoder_tokenizer,
    load_encoder_tokenizer,
    open_arc_folder,
    open_trained_decoders,
)
from arc_ds.model.compressor import Compressor
from arc_ds.model.frozen_decoder import FrozenDecoder
from arc_ds.model.pooling import group_rules
from arc_ds.model.spec import CompressorSpec
from arc_ds.model.weights import use_memory_tokens
from arc_ds.system.device import usable_device
from arc_ds.system.user_files import check_encodable
from arc_ds.tokenizers import Tokenizer, read_together

logger = logging.getLogger(__name__)

# Longest context of a run with the default sizes, for checkpoints that do not record theirs.
_DEFAULT_CONTEXT_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Context:
    """A part of a prompt that the decoder reads in compressed form.

    text: the text to compress.
    marker: marker appended to the compressed vectors, or None.
    """

    text: str
    marker: Marker | None = "cont"


Prompt = str | Context | Sequence[str | Context]
DecoderParts = Literal["all", "embedding"]


class ArcModel:
    """Compress, score and generate. Nothing here trains.

    spec: sizes and semantics of the compressor.
    compressor: the compressor with its weights.
    decoders: the frozen decoders, in the order of the ports.
    encoder_tokenizer: None if contexts come as token ids.
    decoder_tokenizers: one per decoder; None if prompts come as token ids.
    decoder_bos: for each decoder, whether text prompts begin with its begin-of-text token, as in training. The default
        is yes if its tokenizer has one.
    decoder_chat_templates: for each decoder, the layout of its chats in training (`read_layout`), if it is known.
    decoder_stop_ids: for each decoder, the ids that end a continuation of `generate`. The default is the end-of-text
        token of its tokenizer.
    decoder_max_positions: for each decoder, the longest sequence that its files state, if any. A longer one gives a
        warning.
    texts_apart: tokenize the text after a context as if it started a new text, as the reference does. Sentencepiece
        then prepends a space.
    max_context_tokens: length of the longest context in training, if it is known. A longer one is compressed, with a
        warning.
    decoder_parts: "embedding" if only the embedding tables of the decoders were loaded. Then `compress` and
        `prompt_embeds` work, and `logits` and `generate` raise ConfigError.
    """

    def __init__(
        self,
        spec: CompressorSpec,
        compressor: Compressor,
        decoders: Sequence[FrozenDecoder],
        *,
        encoder_tokenizer: Tokenizer | None = None,
        decoder_tokenizers: Sequence[Tokenizer | None] = (),
        decoder_bos: Sequence[bool] = (),
        decoder_chat_templates: Sequence[LayoutName | None] = (),
        decoder_stop_ids: Sequence[Sequence[int]] = (),
        decoder_max_positions: Sequence[int | None] = (),
        texts_apart: bool = False,
        max_context_tokens: int | None = None,
        decoder_parts: DecoderParts = "all",
    ) -> None:
        self.spec = spec
        self.compressor = compressor.eval().requires_grad_(False)
        self.decoders = list(decoders)
        self.encoder_tokenizer = encoder_tokenizer
        self.decoder_tokenizers = list(decoder_tokenizers) or [None] * len(self.decoders)
        self.decoder_bos = list(decoder_bos) or [True] * len(self.decoders)
        self.decoder_chat_templates = list(decoder_chat_templates) or [None] * len(self.decoders)
        ends = ((t.eos_id if t is not None else None) for t in self.decoder_tokenizers)
        self.decoder_stop_ids = list(decoder_stop_ids) or [() if end is None else (end,) for end in ends]
        self.decoder_max_positions = list(decoder_max_positions) or [None] * len(self.decoders)
        self.texts_apart = texts_apart
        self.max_context_tokens = max_context_tokens
        self.decoder_parts = decoder_parts
        self._named_lengths: dict[str, int] = {}  # the longest that a warning has named, by the model that reads it
        self.device = next(compressor.parameters()).device

    @staticmethod
    def from_checkpoint(
        arc_dir: str | Path,
        decoders: Sequence[str | Path],
        encoder_backbone: str | Path | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        pooling_factor: int | None = None,
        memory_tokens: int | None = None,
        *,
        decoder_parts: DecoderParts = "all",
        trust_remote_code: bool = False,
        force: bool = False,
    ) -> ArcModel:
        """Load an export of ARC-DS or a checkpoint in the reference's ARC format, and the decoders it was trained for.

        decoders: a weights folder or .gguf file for each port, in port order. The list may be shorter; `compress` alone
            needs no decoder. Decoder weights are never changed.
        encoder_backbone: folder with config and tokenizer of the encoder's backbone (weights are not needed).
            Checkpoints of the reference need it, because they do not contain these.
        pooling_factor: replaces the factor of the last pooled layer. The paper advises at most the trained factor.
        memory_tokens: use only this many of the trained memory tokens, the first ones.
        decoder_parts: "embedding" reads only the embedding table of each native decoder, for `prompt_embeds` of a
            decoder that another engine runs. One that runs through transformers is loaded whole.
        trust_remote_code: whether decoders that run through transformers may run the Python files in their folders.
        force: whether a decoder may be another model than the one of training, with its own tokenizer.

        Raises WeightsError if files are missing, tensors do not fit, a decoder's width differs from its port's, or a
        decoder is another model than the one of training.
        Raises TokenizerError if a tokenizer is damaged, or gives other ids than the one of training.
        Raises ConfigError if the pooling factor or the number of memory tokens is invalid, or if the device is not
        available.
        """
        device, paths = usable_device(device), [Path(path) for path in decoders]
        folder = open_arc_folder(Path(arc_dir), None if encoder_backbone is None else Path(encoder_backbone))
        spec, tensors = folder.spec, folder.tensors
        if pooling_factor is not None:
            spec = _with_factor(spec, pooling_factor)
        if memory_tokens is not None:
            spec = _with_memory_tokens(spec, memory_tokens)
            tensors = use_memory_tokens(tensors, memory_tokens)
        opened = open_trained_decoders(paths, folder, arc_dir, trust_remote_code=trust_remote_code, force=force)
        encoder_tokenizer = load_encoder_tokenizer(folder, arc_dir)
        decoder_tokenizers = [
            load_decoder_tokenizer(path, decoder, settings, force=force)
            for path, decoder, settings in zip(paths, opened, folder.decoders, strict=False)
        ]
        # Small files first: their faults should not show only after minutes of loading.
        stop_ids = [
            tuple(idx for idx in find_stop_ids(path, tokenizer) if idx < decoder.sizes.vocab_size)
            for path, tokenizer, decoder in zip(paths, decoder_tokenizers, opened, strict=True)
        ]
        max_positions = [find_max_positions(path) for path in paths]
        compressor = load_compressor(spec, tensors, device, dtype)
        return ArcModel(
            spec,
            compressor,
            [
                decoder.load(device, dtype) if decoder_parts == "all" else decoder.load_embedding(device, dtype)
                for decoder in opened
            ],
            encoder_tokenizer=encoder_tokenizer,
            decoder_tokenizers=decoder_tokenizers,
            decoder_bos=[settings.bos for settings in folder.decoders],
            decoder_chat_templates=[settings.chat_template for settings in folder.decoders],
            decoder_stop_ids=stop_ids,
            decoder_max_positions=max_positions,
            texts_apart=folder.texts_apart,
            max_context_tokens=folder.max_context_tokens,
            decoder_parts=decoder_parts,
        )

    @torch.no_grad()
    def compress(
        self, contexts: Sequence[str | Sequence[int]], decoder: int = 0, marker: Marker | None = "cont"
    ) -> list[Tensor]:
        """Compress each context into vectors for the decoder: a list of [m, D_decoder]; the marker, if any, is last.

        contexts: texts, or encoder token ids. A context longer than those of training gives a warning.
        decoder: index of the port. The decoder itself need not be loaded.
        marker: marker appended to each context, or None.

        Raises DataError on an empty context, a text that UTF-8 cannot encode, ids that are not whole numbers or are
        outside the vocabulary, ConfigError on a marker that the port lacks, and TokenizerError on texts if the encoder
        was loaded without a tokenizer.
        """
        _check_is_list("contexts", contexts)
        segments = [self._context(c, decoder, marker, f"context {idx}") for idx, c in enumerate(contexts)]
        samples = [Sample("compress", (segment,)) for segment in segments]
        if not samples:
            return []
        batch = self._pack(samples)
        return list(self.compressor(batch, decoder).split(batch.decoder_cu_seqlens.diff().tolist()))

    @torch.no_grad()
    def logits(self, sequences: Sequence[Sequence[Segment]], decoder: int = 0) -> list[Tensor]:
        """Next-token logits at every text token of each sequence: a list of float32 [text tokens, V].

        Adds no begin-of-text token. Raises DataError on an empty sequence or an id outside the vocabulary.
        """
        reader = self._whole_reader(decoder)
        samples = [Sample("logits", segments) for segments in _checked_sequences("sequences", sequences)]
        if not samples:
            return []
        batch = self._pack(samples, reader)
        self._warn_of_long_sequence(batch.decoder_max_seqlen, 0, decoder)
        logits_NV = reader.logits(batch, self._vectors(batch, decoder), batch.text_rows)
        return list(logits_NV.split([sample.num_text_tokens for sample in samples]))

    @torch.no_grad()
    def prompt_embeds(
        self,
        prompts: Sequence[Prompt | Sequence[Segment]],
        decoder: int = 0,
        *,
        vectors: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """The decoder's input rows of each prompt, for other engines that run the decoder: a list of [rows, D_decoder].

        A row is a token's embedding or a compressed vector, in the order in which `generate` reads them, including the
        begin-of-text token. `transformers` takes the rows as `inputs_embeds`, padded on the left, with an
        `attention_mask`; `arc_ds.serving.engines` writes requests for vLLM and SGLang.

        prompts: as for `generate`.
        vectors: see `generate_ids`.

        Raises the errors of `generate` on prompts.
        """
        _check_is_list("prompts", prompts)
        reader = self._reader(decoder)
        if not prompts:
            return []
        segments = [self.segments(prompt, decoder, f"prompt {idx}") for idx, prompt in enumerate(prompts)]
        batch = self._pack([Sample("embed", tuple(line)) for line in segments], reader)
        rows_RD = reader.embed(batch, self._vectors(batch, decoder, vectors))
        return list(rows_RD.split(batch.decoder_cu_seqlens.diff().tolist()))

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt | Sequence[Segment]],
        decoder: int = 0,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        *,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
    ) -> list[str]:
        """Continue each prompt, a mixture of text and `Context`, and return the new texts.

        A prompt starts with the decoder's begin-of-text token if its tokenizer has one. Every end of a text or a turn
        that the decoder's files name ends a continuation (`decoder_stop_ids`). Temperature 0 is greedy; otherwise
        tokens are sampled with `seed` from the smallest set whose probability reaches `top_p`. Sentencepiece drops a
        leading space of a continuation.

        stop: texts that also end a continuation, such as "\\n\\n", or names of special tokens, such as "<|im_end|>".
            They are not returned.
        stop_ids: ids of the decoder's tokenizer that also end a continuation.

        Raises TokenizerError if the decoder was loaded without a tokenizer, DataError on a prompt without tokens
        (unless the tokenizer has a begin-of-text token), and ConfigError on an invalid number or stop.
        """
        _check_is_list("prompts", prompts)
        tokenizer = self._decoder_tokenizer(decoder)
        stops = _stop_texts(stop)
        named = [tokenizer.special_ids[text] for text in stops if text in tokenizer.special_ids]
        texts = [text for text in stops if text not in tokenizer.special_ids]
        # A token has at least one byte, but the window may begin inside a character.
        window = max((len(text.encode()) for text in texts), default=0) + 4

        def has_stopped(line: list[int]) -> bool:
            return any(text in tokenizer.decode(line[-window:]) for text in texts)

        rows = range(self._reader(decoder).vocab_size)  # a tokenizer may name more tokens than the decoder has
        ends = [idx for idx in (*self.decoder_stop_ids[decoder], *named) if idx in rows]
        ids = self.generate_ids(
            [self.segments(prompt, decoder, f"prompt {idx}") for idx, prompt in enumerate(prompts)],
            decoder,
            max_new_tokens=max_new_tokens,
            stop_ids=[*ends, *self._checked_stop_ids(stop_ids, decoder)],
            sampling=Sampling(temperature=temperature, top_p=top_p, seed=seed),
            has_ended=has_stopped if texts else None,
        )
        return [_before_first(tokenizer.decode(line), texts) for line in ids]

    @torch.no_grad()
    def generate_ids(
        self,
        prompts: Sequence[Sequence[Segment]],
        decoder: int = 0,
        *,
        max_new_tokens: int = 64,
        stop_ids: Sequence[int] = (),
        sampling: Sampling | None = None,
        vectors: Sequence[Tensor] | None = None,
        has_ended: Callable[[list[int]], bool] | None = None,
    ) -> list[list[int]]:
        """`generate` on token ids: no tokenizer, no begin-of-text token, and no stops but `stop_ids` and `has_ended`.

        stop_ids: `decoder_stop_ids[decoder]` are those of `generate`.
        vectors: what `compress` gave for each context of the prompts, in reading order, [m, D_decoder] each. None
            compresses the contexts now.
        has_ended: called after every step with the new tokens of each sequence, in the order of the prompts; True ends
            the sequence.
        """
        samples = [Sample("generate", segments) for segments in _checked_sequences("prompts", prompts)]
        stop_ids = self._checked_stop_ids(stop_ids, decoder)
        reader = self._whole_reader(decoder)
        max_new_tokens = whole_number("max_new_tokens", max_new_tokens, at_least=0, at_most=MAX_NEW_TOKENS)
        if not samples:
            return []
        batch = self._pack(samples, reader)
        self._warn_of_long_sequence(batch.decoder_max_seqlen, max_new_tokens, decoder)
        return generate_ids(
            reader,
            batch,
            self._vectors(batch, decoder, vectors),
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            sampling=sampling,
            has_ended=has_ended,
        )

    def _checked_stop_ids(self, stop_ids: Sequence[int], decoder: int) -> list[int]:
        last = self._reader(decoder).vocab_size - 1
        if not isinstance(stop_ids, Iterable):
            raise ConfigError(f"stop_ids is {stop_ids!r}; expected a list of token ids, such as [2]")
        return [whole_number("a stop id", idx, at_least=0, at_most=last) for idx in stop_ids]

    def _vectors(self, batch: PackedBatch, decoder: int, given: Sequence[Tensor] | None = None) -> Tensor | None:
        """Compressed vectors of a batch's contexts; None if the batch has text only. `given`: those of each context."""
        if not batch.num_encoder_tokens:
            return None
        if given is None:
            return self.compressor(batch, decoder)
        z_ZD, expected = torch.cat(list(given)), (batch.compressed_rows.numel(), self.spec.decoder_sizes[decoder])
        if z_ZD.shape != expected:
            raise DataError(
                f"the vectors have shape {list(z_ZD.shape)}; the contexts of the prompts need {list(expected)}. Pass "
                "what `compress` gives for each context, for this decoder and with the same markers."
            )
        return z_ZD.to(self.device)

    def _reader(self, decoder: int) -> FrozenDecoder:
        if decoder not in range(len(self.decoders)):
            raise ConfigError(
                f"decoder {decoder!r} was requested, but the model was loaded with {len(self.decoders)} of its "
                f"{len(self.spec.decoder_sizes)} decoders (indices start at 0). Add its weights to `decoders`."
            )
        return self.decoders[decoder]

    def _whole_reader(self, decoder: int) -> FrozenDecoder:
        reader = self._reader(decoder)
        if self.decoder_parts != "all":
            raise ConfigError(
                "only the decoder's embedding table was loaded, so it cannot read a prompt. Load the model with "
                'decoder_parts="all", or give `prompt_embeds` to another engine.'
            )
        return reader

    def _pack(self, samples: Sequence[Sample], reader: FrozenDecoder | None = None) -> PackedBatch:
        for idx, sample in enumerate(samples):
            if not any(segment.ids for segment in sample.segments):
                raise DataError(f"sequence {idx} is empty: it needs at least one text token or context")
        self._warn_of_long_contexts(samples)
        batch = pack(samples, self.spec.packing)
        _check_ids("encoder", batch.encoder_ids, self.spec.backbone.vocab_size)
        if reader is not None:
            _check_ids("decoder", batch.decoder_ids, reader.vocab_size)
        return batch.to(self.device)

    def _warn_of_long_contexts(self, samples: Sequence[Sample]) -> None:
        lengths = (len(segment.ids) for sample in samples for segment in sample.segments if segment.kind == "context")
        longest, trained = max(lengths, default=0), self.max_context_tokens
        usual = trained or _DEFAULT_CONTEXT_TOKENS
        if self._is_news("encoder", longest, usual):
            source = "the encoder was trained on" if trained else "its training is not recorded; most runs train on"
            logger.warning(
                f"a context has {longest:,} tokens; {source} contexts of up to {usual:,}. Its vectors may lose most of "
                f"the text, and time grows with the square of the length. Cut it into contexts of at most {usual:,} "
                "tokens."
            )

    def _warn_of_long_sequence(self, rows: int, max_new_tokens: int, decoder: int) -> None:
        limit = self.decoder_max_positions[decoder]
        if limit is not None and self._is_news(f"decoder {decoder}", rows + max_new_tokens, limit):
            logger.warning(
                f"a sequence has {rows:,} tokens and vectors, and up to {max_new_tokens:,} new tokens; decoder "
                f"{decoder} was trained on at most {limit:,} positions. Its text may degrade beyond them. Shorten the "
                "prompt, compress more of it, or lower max_new_tokens."
            )

    def _is_news(self, reader: str, length: int, limit: int) -> bool:
        """Whether a length exceeds the limit of its reader, and every length that a warning has named before."""
        if length <= max(limit, self._named_lengths.get(reader, 0)):
            return False
        self._named_lengths[reader] = length
        return True

    def segments(self, prompt: Prompt | Sequence[Segment], decoder: int = 0, where: str = "a prompt") -> list[Segment]:
        """The tokens of a prompt, as `generate` reads it: with the begin-of-text token. Segments are returned as given.

        where: the prompt, for errors, which are those of `generate`.
        """
        if not isinstance(prompt, str | Context | Sequence):
            raise DataError(f"{where} is a {type(prompt).__name__}; expected a str, a Context, or a list of them")
        parts = [prompt] if isinstance(prompt, str | Context) else list(prompt)
        given = [part for part in parts if isinstance(part, Segment)]
        if given and len(given) == len(parts):
            return given
        tokenizer = self._decoder_tokenizer(decoder)
        bos = tokenizer.bos_id if self.decoder_bos[decoder] else None
        segments = [] if bos is None else [Segment.text([bos])]
        after_context = False
        for part in _join_texts(parts):
            if isinstance(part, Context):
                segments.append(self._context(part.text, decoder, part.marker, f"a context of {where}"))
            elif isinstance(part, str):
                text = check_encodable(part, where)
                (ids,) = read_together(tokenizer, [text], inside=after_context and not self.texts_apart)
                segments.append(Segment.text(ids))
            else:
                raise DataError(
                    f"a prompt consists of str and Context, or of Segment only; got a {type(part).__name__}"
                )
            after_context = isinstance(part, Context)
        return segments

    def check_port(self, decoder: int, marker: Marker | None) -> None:
        """Raise ConfigError if the compressor has no port of this index, or no such marker."""
        if decoder not in range(len(self.compressor.ports)):
            raise ConfigError(f"decoder {decoder!r} was requested; the compressor serves {len(self.compressor.ports)}")
        if marker is not None and marker not in self.spec.markers:
            have = " and ".join(self.spec.markers) or "no marker"
            raise ConfigError(f"marker is {marker!r}; this compressor has {have}: use one that it has, or None")

    def _context(self, context: str | Sequence[int], decoder: int, marker: Marker | None, where: str) -> Segment:
        self.check_port(decoder, marker)
        if not isinstance(context, str):
            try:
                ids = TokenIds(context)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
        elif self.encoder_tokenizer is None:
            raise TokenizerError(
                "the encoder has no tokenizer, so it accepts ids only: pass an encoder_backbone folder with a "
                "tokenizer to from_checkpoint"
            )
        else:
            ids = TokenIds(self.encoder_tokenizer.encode(check_encodable(context, where)))
        if not ids:
            raise DataError(f"{where} is empty, so there is nothing to compress: omit it or give it text")
        return Segment.context(ids, marker)

    def _decoder_tokenizer(self, decoder: int) -> Tokenizer:
        self._reader(decoder)
        tokenizer = self.decoder_tokenizers[decoder]
        if tokenizer is None:
            raise TokenizerError(f"decoder {decoder} was loaded without a tokenizer: add one to the decoder's folder")
        return tokenizer


def _with_factor(spec: CompressorSpec, factor: int) -> CompressorSpec:
    if not spec.rules:
        raise ConfigError(
            f"pooling_factor is {factor}, but only pooled layers have one; this one has {spec.memory_tokens} memory "
            "tokens instead. Omit pooling_factor."
        )
    factor = whole_number("pooling_factor", factor, at_least=1, at_most=2**31 - 1)  # row numbers are int32
    return dataclasses.replace(spec, rules=(*spec.rules[:-1], *group_rules(spec.strategy, (factor,))))


def _with_memory_tokens(spec: CompressorSpec, num: int) -> CompressorSpec:
    if not spec.memory_tokens:
        raise ConfigError(f"memory_tokens is {num}, but this encoder pools and has none. Omit memory_tokens.")
    num = whole_number("memory_tokens", num, at_least=1, at_most=spec.memory_tokens)
    return dataclasses.replace(spec, memory_tokens=num)


def _join_texts(parts: Sequence[object]) -> list[object]:
    """Join adjacent texts, because splitting a text must not change its tokens."""
    joined: list[object] = []
    for is_text, group in groupby(parts, key=lambda part: isinstance(part, str)):
        members = list(group)
        joined += ["".join(map(str, members))] if is_text else members
    return joined


def _check_is_list(what: str, given: object) -> None:
    """Raise DataError on a single text, which would be read as a list of its characters or bytes."""
    if isinstance(given, str | bytes | bytearray | Context | Segment) or not isinstance(given, Iterable):
        raise DataError(f"{what} is one {type(given).__name__}; expected a list: write [{what.removesuffix('s')}]")


def _checked_sequences(what: str, given: Sequence[Sequence[Segment]]) -> list[tuple[Segment, ...]]:
    """The sequences as tuples. Raises DataError unless each is a list of `Segment`."""
    _check_is_list(what, given)
    sequences: list[tuple[Segment, ...]] = []
    for idx, segments in enumerate(given):
        where = f"{what}[{idx}]"
        if isinstance(segments, Segment) or not isinstance(segments, Iterable):
            raise DataError(f"{where} is one {type(segments).__name__}; expected a list of Segment: write [[...]]")
        sequences.append(tuple(segments))
        if others := [part for part in sequences[-1] if not isinstance(part, Segment)]:
            raise DataError(
                f"{where} holds a {type(others[0]).__name__}; expected Segment.text(ids) and Segment.context(ids). "
                "`generate` also takes texts."
            )
    return sequences


def _stop_texts(stop: Sequence[str]) -> list[str]:
    """The texts themselves. ConfigError if they are not a list of texts of at least one character each."""
    is_list = isinstance(stop, Iterable) and not isinstance(stop, str)
    texts = list(stop) if is_list else []
    if not is_list or not all(isinstance(text, str) and text for text in texts):
        raise ConfigError(f"stop is {stop!r}; expected a list of texts that are not empty, such as ['\\n\\n']")
    return [check_encodable(text, "a stop") for text in texts]


def _before_first(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stops in it; all of it if there is none."""
    return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]


def _check_ids(what: str, ids: Tensor, vocab_size: int) -> None:
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise DataError(
            f"token ids {int(ids.min())} to {int(ids.max())} for the {what}; expected 0 to {vocab_size - 1}: use ids "
            f"of the {what}'s own tokenizer"
        )
