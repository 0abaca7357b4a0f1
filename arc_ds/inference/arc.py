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
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from arc_ds.batch.packing import num_outputs, pack
from arc_ds.batch.segments import Marker, Sample, Segment, TokenIds
from arc_ds.errors import ConfigError, DataError, TokenizerError
from arc_ds.inference.generate import Sampling, whole_number
from arc_ds.inference.load import (
    add_adapters_of_ports,
    check_runs_elsewhere,
    load_compressor,
    load_encoder_tokenizer,
    open_arc_folder,
    open_trained_decoders,
)
from arc_ds.inference.prompt import Context, Parts, Prompt, Vectors, with_vectors
from arc_ds.inference.reader import (
    Answer,
    DecoderReader,
    Nll,
    check_ids,
    check_is_list,
    check_same_number,
    reader_of,
)
from arc_ds.inference.rows import MAX_ROWS, pack_rows, row_batches
from arc_ds.model.compressor import Compressor
from arc_ds.model.frozen_decoder import FrozenDecoder
from arc_ds.model.pooling import group_rules
from arc_ds.model.spec import CompressorSpec
from arc_ds.model.weights import use_memory_tokens
from arc_ds.system.device import usable_device
from arc_ds.system.user_files import check_encodable
from arc_ds.tokenizers import Tokenizer

logger = logging.getLogger(__name__)

# Longest context of a run with the default sizes, for checkpoints that do not record theirs.
_DEFAULT_CONTEXT_TOKENS = 2048


DecoderParts = Literal["all", "embedding"]


__all__ = ["Answer", "ArcModel", "Context", "Nll", "Prompt", "Vectors"]


class ArcModel:
    """Compress, score and generate. Nothing here trains.

    spec: sizes and semantics of the compressor.
    compressor: the compressor with its weights.
    readers: the frozen decoders and what belongs to them, in the order of the ports.
    encoder_tokenizer: None if contexts come as token ids.
    texts_apart: tokenize the text after a context as if it started a new text, as the reference does. Sentencepiece
        then prepends a space.
    max_context_tokens: length of the longest context in training, if it is known. A longer one is compressed, with a
        warning.
    """

    def __init__(
        self,
        spec: CompressorSpec,
        compressor: Compressor,
        readers: Sequence[DecoderReader],
        *,
        encoder_tokenizer: Tokenizer | None = None,
        texts_apart: bool = False,
        max_context_tokens: int | None = None,
    ) -> None:
        self.spec = spec
        self.compressor = compressor.eval().requires_grad_(False)
        self.readers = tuple(readers)
        self.encoder_tokenizer = encoder_tokenizer
        self.texts_apart = texts_apart
        self.max_context_tokens = max_context_tokens
        self._named_length = 0  # of a context, the longest that a warning has named
        self.device = next(compressor.parameters()).device

    @property
    def decoders(self) -> list[FrozenDecoder]:
        """The frozen decoders, in the order of the ports."""
        return [reader.decoder for reader in self.readers]

    @property
    def decoder_tokenizers(self) -> list[Tokenizer | None]:
        """The tokenizer of each decoder."""
        return [reader.tokenizer for reader in self.readers]

    @property
    def decoder_stop_ids(self) -> list[tuple[int, ...]]:
        """For each decoder, the ids that end a continuation of `generate`."""
        return [reader.stop_ids or () for reader in self.readers]

    @property
    def decoder_parts(self) -> DecoderParts:
        """ "embedding" if only the embedding tables of the decoders were loaded."""
        return "all" if all(reader.is_whole for reader in self.readers) else "embedding"

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
            needs no decoder. The files are never changed. Adapters of a decoder (`decoders[].lora`) are added to its
            weights in memory.
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
            spec = with_factor(spec, pooling_factor)
        if memory_tokens is not None:
            spec = _with_memory_tokens(spec, memory_tokens)
            tensors = use_memory_tokens(tensors, memory_tokens)
        opened = open_trained_decoders(paths, folder, arc_dir, trust_remote_code=trust_remote_code, force=force)
        encoder_tokenizer = load_encoder_tokenizer(folder, arc_dir)
        is_whole = decoder_parts == "all"
        # Small files first: their faults should not show only after minutes of loading.
        readers = [
            reader_of(path, each, settings, force=force, is_whole=is_whole, name=f"decoder {idx}")
            for idx, (path, each, settings) in enumerate(zip(paths, opened, folder.decoders, strict=False))
        ]
        compressor = load_compressor(spec, tensors, device, dtype)
        loaded = [each.load(device, dtype) if is_whole else each.load_embedding(device, dtype) for each in opened]
        if is_whole:
            add_adapters_of_ports(compressor.ports, loaded)
        return ArcModel(
            spec,
            compressor,
            [reader(decoder=decoder) for reader, decoder in zip(readers, loaded, strict=True)],
            encoder_tokenizer=encoder_tokenizer,
            texts_apart=folder.texts_apart,
            max_context_tokens=folder.max_context_tokens,
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
        check_is_list("contexts", contexts)
        segments = [self._context(c, decoder, marker, f"context {idx}") for idx, c in enumerate(contexts)]
        return self._compress(segments, decoder) if segments else []

    @torch.no_grad()
    def logits(self, sequences: Sequence[Parts], decoder: int = 0) -> list[Tensor]:
        """Next-token logits at every text token of each sequence: a list of float32 [text tokens, V].

        sequences: each a list of `Segment`, and of `Vectors` in place of contexts.

        Adds no begin-of-text token. Raises DataError on an empty sequence or an id outside the vocabulary.
        """
        reader = self._whole_reader(decoder)
        checked = _checked_sequences("sequences", sequences)
        rows = self._rows(checked, decoder)
        if not rows:
            return []
        batch, z_ZD = pack_rows(rows, reader.device, reader.dtype)
        reader.warn_of_length(batch.decoder_max_seqlen, 0)
        logits_NV = reader.decoder.logits(batch, z_ZD, batch.text_rows)
        return list(logits_NV.split([sum(len(p) for p in line if isinstance(p, TokenIds)) for line in rows]))

    @torch.no_grad()
    def nll(
        self,
        prompts: Sequence[Prompt | Parts],
        answers: Sequence[str],
        decoder: int = 0,
        *,
        max_rows: int | None = None,
    ) -> list[Nll]:
        """NLL of each answer after its prompt: a list of (nats, summed over the answer's tokens; their number).

        An answer is tokenised together with the text before it, as in training. Logits are made at the rows that
        predict an answer only. An answer without tokens has the NLL 0 of 0 tokens.

        prompts: as for `generate`.
        answers: a text for each prompt; after "Answer:" it begins with a space.
        max_rows: see `generate`.

        Raises the errors of `generate` on prompts, and DataError if there is not one answer for each prompt.
        """
        check_is_list("prompts", prompts)
        check_same_number(prompts, answers)
        reader = self._whole_reader(decoder)
        read = [
            self._read(prompt, decoder, f"prompt {idx}", answer)
            for idx, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
        ]
        return reader.nll_rows(self._rows([parts for parts, _ in read], decoder), [ids for _, ids in read], max_rows)

    @torch.no_grad()
    def prompt_embeds(
        self,
        prompts: Sequence[Prompt | Parts],
        decoder: int = 0,
    ) -> list[Tensor]:
        """The decoder's input rows of each prompt, for other engines that run the decoder: a list of [rows, D_decoder].

        A row is a token's embedding or a compressed vector, in the order in which `generate` reads them, including the
        begin-of-text token. `transformers` takes the rows as `inputs_embeds`, padded on the left, with an
        `attention_mask`; `arc_ds.serving.engines` writes requests for vLLM and SGLang.

        prompts: as for `generate`.

        Raises the errors of `generate` on prompts, and ConfigError if the decoder has adapters.
        """
        check_is_list("prompts", prompts)
        reader = self._reader(decoder)
        check_runs_elsewhere(self.spec, decoder)
        if not prompts:
            return []
        rows = self._rows(self._all_parts(prompts, decoder), decoder)
        batch, z_ZD = pack_rows(rows, reader.device, reader.dtype)
        return list(reader.decoder.embed(batch, z_ZD).split(batch.decoder_cu_seqlens.diff().tolist()))

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt | Parts],
        decoder: int = 0,
        max_new_tokens: int | Sequence[int] = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        *,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
        max_rows: int | None = None,
    ) -> list[str]:
        """Continue each prompt, a mixture of text, `Context` and `Vectors`, and return the new texts.

        A prompt starts with the decoder's begin-of-text token if its tokenizer has one. Every end of a text or a turn
        that the decoder's files name ends a continuation (`decoder_stop_ids`). Temperature 0 is greedy; otherwise
        tokens are sampled with `seed` from the smallest set whose probability reaches `top_p`. Sentencepiece drops a
        leading space of a continuation.

        Equal contexts are compressed once. Rows with which all prompts begin are read once: give prompts with the same
        examples together.

        max_new_tokens: limit of every continuation, or a list with the limit of each.
        stop: texts that also end a continuation, such as "\\n\\n", or names of special tokens, such as "<|im_end|>".
            They are not returned.
        stop_ids: ids of the decoder's tokenizer that also end a continuation.
        max_rows: largest batch of the decoder: prompts times the rows of the longest one with its new tokens, without
            the rows that are read once. The default is half of the memory, and at most 16384 rows.

        Raises TokenizerError if the decoder was loaded without a tokenizer, DataError on a prompt without tokens
        (unless the tokenizer has a begin-of-text token), and ConfigError on an invalid number or stop.
        """
        sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
        answers = self.answers(
            prompts,
            decoder,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            stop_ids=stop_ids,
            max_rows=max_rows,
        )
        return [answer.text for answer in answers]

    @torch.no_grad()
    def answers(self, prompts: Sequence[Prompt | Parts], decoder: int = 0, **options: Any) -> list[Answer]:
        """`generate` with the text before it was cut, the tokens, and the reason of each end.

        options: of `DecoderReader.answer_rows`.
        """
        check_is_list("prompts", prompts)
        reader = self._reader(decoder)
        reader.needed_tokenizer()
        reader.check_whole()
        return reader.answer_rows(self._rows(self._all_parts(prompts, decoder), decoder), **options)

    @torch.no_grad()
    def generate_ids(
        self,
        prompts: Sequence[Parts],
        decoder: int = 0,
        *,
        max_new_tokens: int | Sequence[int] = 64,
        stop_ids: Sequence[int] = (),
        sampling: Sampling | None = None,
        has_ended: Callable[[int, list[int]], bool] | None = None,
    ) -> list[list[int]]:
        """`generate` on token ids: no tokenizer, no begin-of-text token, and no stops but `stop_ids` and `has_ended`.

        stop_ids: `decoder_stop_ids[decoder]` are those of `generate`.
        has_ended: called after every step with (index of a prompt, its new tokens) if it had not ended before the step;
            True ends it.
        """
        checked = _checked_sequences("prompts", prompts)
        reader = self._whole_reader(decoder)
        lines = reader.continue_rows(
            self._rows(checked, decoder),
            max_new_tokens=max_new_tokens,
            stop_ids=reader.checked_stop_ids(stop_ids),
            sampling=sampling,
            has_ended=has_ended,
        )
        return [line.ids for line in lines]

    def _rows(self, prompts: Sequence[Parts], decoder: int) -> list[list[TokenIds | Tensor]]:
        """Prompts as the decoder reads them. Equal contexts are compressed once."""
        contexts = [
            part for prompt in prompts for part in prompt if isinstance(part, Segment) and part.kind == "context"
        ]
        different = {_key(segment): segment for segment in contexts}
        found = dict(zip(different, self._compress(list(different.values()), decoder), strict=True))
        vectors = iter([found[_key(segment)] for segment in contexts])
        reader = self._reader(decoder)
        return [reader.rows(with_vectors(prompt, vectors), idx) for idx, prompt in enumerate(prompts)]

    def _compress(self, segments: Sequence[Segment], decoder: int) -> list[Tensor]:
        """The vectors of context segments, in batches of bounded size."""
        if not segments:
            return []
        lengths = [len(segment.ids) for segment in segments]
        self._warn_of_long_context(max(lengths))
        found: list[Tensor] = []
        for indices in row_batches(lengths, MAX_ROWS):
            batch = pack([Sample("compress", (segments[idx],)) for idx in indices], self.spec.packing)
            check_ids("encoder", batch.encoder_ids, self.spec.backbone.vocab_size)
            batch = batch.to(self.device)
            found += self.compressor(batch, decoder).split(batch.decoder_cu_seqlens.diff().tolist())
        return found

    def _reader(self, decoder: int) -> DecoderReader:
        if decoder not in range(len(self.readers)):
            raise ConfigError(
                f"decoder {decoder!r} was requested, but the model was loaded with {len(self.readers)} of its "
                f"{len(self.spec.decoder_sizes)} decoders (indices start at 0). Add its weights to `decoders`."
            )
        return self.readers[decoder]

    def _whole_reader(self, decoder: int) -> DecoderReader:
        reader = self._reader(decoder)
        reader.check_whole()
        return reader

    def _warn_of_long_context(self, longest: int) -> None:
        """Warn of a context beyond those of training, if no warning has named such a length before."""
        trained = self.max_context_tokens
        usual = trained or _DEFAULT_CONTEXT_TOKENS
        if longest <= max(usual, self._named_length):
            return
        self._named_length = longest
        source = "the encoder was trained on" if trained else "its training is not recorded; most runs train on"
        logger.warning(
            f"a context has {longest:,} tokens; {source} contexts of up to {usual:,}. Its vectors may lose most of "
            f"the text, and time grows with the square of the length. Cut it into contexts of at most {usual:,} "
            "tokens."
        )

    def segments(self, prompt: Prompt | Sequence[Segment], decoder: int = 0) -> list[Segment]:
        """The tokens of a prompt, as `generate` reads it: with the begin-of-text token. Segments are returned as given.

        Raises the errors of `generate`, and DataError on a prompt with `Vectors`, which has no segments.
        """
        parts, _ = self._read(prompt, decoder, "a prompt")
        segments = [part for part in parts if isinstance(part, Segment)]
        if len(segments) < len(parts):
            raise DataError("a prompt has Vectors, which have no tokens. Give their texts as Context.")
        return segments

    def _all_parts(self, prompts: Sequence[Prompt | Parts], decoder: int) -> list[list[Segment | Vectors]]:
        return [self._read(prompt, decoder, f"prompt {idx}")[0] for idx, prompt in enumerate(prompts)]

    def _read(
        self, prompt: Prompt | Parts, decoder: int, where: str, answer: str | None = None
    ) -> tuple[list[Segment | Vectors], TokenIds]:
        def compressible(part: Context) -> Segment:
            return self._context(part.text, decoder, part.marker, f"a context of {where}")

        reader = self._reader(decoder)
        return reader.read(prompt, where, answer=answer, compressible=compressible, texts_apart=self.texts_apart)

    def num_vectors(self, num_tokens: int, marker: Marker | None = "cont") -> int:
        """Number of vectors of a context of so many encoder tokens, with its marker."""
        outputs = num_outputs(np.array([num_tokens], dtype=np.int64), self.spec.packing)
        return int(outputs[0]) + (marker is not None)

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


def with_factor(spec: CompressorSpec, factor: int) -> CompressorSpec:
    """The spec with another factor of the last pooled layer. Raises ConfigError if it cannot have one."""
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


def _key(segment: Segment) -> tuple[bytes, Marker | None]:
    """Contexts with equal keys have the same vectors."""
    return np.asarray(segment.ids, dtype=np.int64).tobytes(), segment.marker


def _checked_sequences(what: str, given: Sequence[Parts]) -> list[tuple[Segment | Vectors, ...]]:
    """The sequences as tuples. Raises DataError unless each is a list of `Segment` and `Vectors`."""
    check_is_list(what, given)
    sequences: list[tuple[Segment | Vectors, ...]] = []
    for idx, segments in enumerate(given):
        where = f"{what}[{idx}]"
        if isinstance(segments, Segment | Vectors) or not isinstance(segments, Iterable):
            raise DataError(f"{where} is one {type(segments).__name__}; expected a list of Segment: write [[...]]")
        sequences.append(tuple(segments))
        if others := [part for part in sequences[-1] if not isinstance(part, Segment | Vectors)]:
            raise DataError(
                f"{where} holds a {type(others[0]).__name__}; expected Segment.text(ids) and Segment.context(ids). "
                "`generate` also takes texts."
            )
    return sequences
