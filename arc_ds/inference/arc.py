"""ArcModel: inference with a trained compressor and its frozen decoders.

model = ArcModel.from_checkpoint("exports/demo", decoders=["models/llama"])
vectors = model.compress(["A long text ..."])
texts = model.generate([["Summarise: ", Context("A long text ..."), "\\nSummary:"]])
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from arc_ds.batch.packing import PackedBatch, pack
from arc_ds.batch.segments import Marker, Sample, Segment
from arc_ds.errors import ConfigError, DataError, TokenizerError
from arc_ds.inference.generate import Sampling, generate_ids
from arc_ds.inference.load import (
    load_compressor,
    load_decoder_tokenizer,
    load_encoder_tokenizer,
    open_arc_folder,
    open_trained_decoders,
)
from arc_ds.model.compressor import Compressor
from arc_ds.model.decoder import Decoder
from arc_ds.model.pooling import group_rules
from arc_ds.model.spec import CompressorSpec
from arc_ds.model.weights import load_backbone
from arc_ds.system.device import usable_device
from arc_ds.tokenizers import Tokenizer, read_together


@dataclass(frozen=True, slots=True)
class Context:
    """A part of a prompt that the decoder reads in compressed form.

    text: the text to compress.
    marker: marker appended to the compressed vectors, or None.
    """

    text: str
    marker: Marker | None = "cont"


Prompt = str | Context | Sequence[str | Context]


class ArcModel:
    """Compress, score and generate. Nothing here trains.

    spec: sizes and semantics of the compressor.
    compressor: the compressor with its weights.
    decoders: the frozen decoders, in the order of the ports.
    encoder_tokenizer: None if contexts come as token ids.
    decoder_tokenizers: one per decoder; None if prompts come as token ids.
    decoder_bos: for each decoder, whether text prompts begin with its begin-of-text token, as in training. The default
        is yes if its tokenizer has one.
    texts_apart: tokenize the text after a context as if it started a new text, as the reference does. Sentencepiece
        then prepends a space.
    """

    def __init__(
        self,
        spec: CompressorSpec,
        compressor: Compressor,
        decoders: Sequence[Decoder],
        *,
        encoder_tokenizer: Tokenizer | None = None,
        decoder_tokenizers: Sequence[Tokenizer | None] = (),
        decoder_bos: Sequence[bool] = (),
        texts_apart: bool = False,
    ) -> None:
        self.spec = spec
        self.compressor = compressor.eval().requires_grad_(False)
        self.decoders = list(decoders)
        self.encoder_tokenizer = encoder_tokenizer
        self.decoder_tokenizers = list(decoder_tokenizers) or [None] * len(self.decoders)
        self.decoder_bos = list(decoder_bos) or [True] * len(self.decoders)
        self.texts_apart = texts_apart
        self.device = next(compressor.parameters()).device

    @staticmethod
    def from_checkpoint(
        arc_dir: str | Path,
        decoders: Sequence[str | Path],
        encoder_backbone: str | Path | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        pooling_factor: int | None = None,
    ) -> ArcModel:
        """Load an export of ARC-DS or a checkpoint in the reference's ARC format, and the decoders it was trained for.

        decoders: a weights folder or .gguf file for each port, in port order. The list may be shorter; `compress` alone
            needs no decoder. Decoder weights are never changed.
        encoder_backbone: folder with config and tokenizer of the encoder's backbone (weights are not needed).
            Checkpoints of the reference need it, because they do not contain these.
        pooling_factor: replaces the factor of the last pooled layer. The paper advises at most the trained factor.

        Raises WeightsError if files are missing, tensors do not fit, or a decoder's width differs from its port's.
        Raises TokenizerError if a tokenizer is damaged, or gives other ids than the one of training.
        Raises ConfigError if the pooling factor is invalid or the device is not available.
        """
        device, paths = usable_device(device), [Path(path) for path in decoders]
        folder = open_arc_folder(Path(arc_dir), None if encoder_backbone is None else Path(encoder_backbone))
        spec = folder.spec if pooling_factor is None else _with_factor(folder.spec, pooling_factor)
        opened = open_trained_decoders(paths, folder, arc_dir)
        encoder_tokenizer = load_encoder_tokenizer(folder, arc_dir)
        decoder_tokenizers = [
            load_decoder_tokenizer(path, decoder, settings)
            for path, (decoder, _), settings in zip(paths, opened, folder.decoders, strict=False)
        ]
        compressor = load_compressor(spec, folder.tensors, device, dtype)
        for decoder, tensors in opened:
            load_backbone(decoder, tensors, dtype=dtype, device=device)
        return ArcModel(
            spec,
            compressor,
            [decoder.eval() for decoder, _ in opened],
            encoder_tokenizer=encoder_tokenizer,
            decoder_tokenizers=decoder_tokenizers,
            decoder_bos=[settings.bos for settings in folder.decoders],
            texts_apart=folder.texts_apart,
        )

    @torch.no_grad()
    def compress(
        self, contexts: Sequence[str] | Sequence[Sequence[int]], decoder: int = 0, marker: Marker | None = "cont"
    ) -> list[Tensor]:
        """Compress each context into vectors for the decoder: a list of [m, D_decoder]; the marker, if any, is last.

        contexts: texts, or encoder token ids.
        decoder: index of the port. The decoder itself need not be loaded.
        marker: marker appended to each context, or None.

        Raises DataError on an empty context or an id outside the vocabulary, ConfigError on a marker that the port
        lacks, and TokenizerError on texts if the encoder was loaded without a tokenizer.
        """
        _check_is_list("contexts", contexts)
        samples = [Sample("compress", (self._context(c, decoder, marker),)) for c in contexts]
        if not samples:
            return []
        batch = self._pack(samples)
        return list(self.compressor(batch, decoder).split(batch.decoder_cu_seqlens.diff().tolist()))

    @torch.no_grad()
    def logits(self, sequences: Sequence[Sequence[Segment]], decoder: int = 0) -> list[Tensor]:
        """Next-token logits at every text token of each sequence: a list of float32 [text tokens, V].

        Adds no begin-of-text token. Raises DataError on an empty sequence or an id outside the vocabulary.
        """
        reader = self._reader(decoder)
        if not sequences:
            return []
        samples = [Sample("logits", tuple(segments)) for segments in sequences]
        batch = self._pack(samples, reader)
        logits_NV = reader.logits(batch, self._vectors(batch, decoder), batch.text_rows)
        return list(logits_NV.split([sample.num_text_tokens for sample in samples]))

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt | Sequence[Segment]],
        decoder: int = 0,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """Continue each prompt, a mixture of text and `Context`, and return the new texts.

        A prompt starts with the decoder's begin-of-text token if its tokenizer has one. The end-of-text token ends a
        continuation. Temperature 0 is greedy; otherwise tokens are sampled with `seed` from the smallest set whose
        probability reaches `top_p`. Sentencepiece drops a leading space of a continuation.

        Raises TokenizerError if the decoder was loaded without a tokenizer, DataError on a prompt without tokens
        (unless the tokenizer has a begin-of-text token), and ConfigError on an invalid number.
        """
        _check_is_list("prompts", prompts)
        tokenizer = self._decoder_tokenizer(decoder)
        stop = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        ids = self.generate_ids(
            [self._segments(prompt, decoder) for prompt in prompts],
            decoder,
            max_new_tokens=max_new_tokens,
            stop_ids=stop,
            sampling=Sampling(temperature=temperature, top_p=top_p, seed=seed),
        )
        return [tokenizer.decode(line) for line in ids]

    @torch.no_grad()
    def generate_ids(
        self,
        prompts: Sequence[Sequence[Segment]],
        decoder: int = 0,
        *,
        max_new_tokens: int = 64,
        stop_ids: Sequence[int] = (),
        sampling: Sampling | None = None,
    ) -> list[list[int]]:
        """`generate` on token ids: no tokenizer, no begin-of-text token."""
        reader = self._reader(decoder)
        if not prompts:
            return []
        batch = self._pack([Sample("generate", tuple(segments)) for segments in prompts], reader)
        return generate_ids(
            reader,
            batch,
            self._vectors(batch, decoder),
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            sampling=sampling,
        )

    def _vectors(self, batch: PackedBatch, decoder: int) -> Tensor | None:
        """Compressed vectors of a batch's contexts; None if the batch has text only."""
        return self.compressor(batch, decoder) if batch.num_encoder_tokens else None

    def _reader(self, decoder: int) -> Decoder:
        if not 0 <= decoder < len(self.decoders):
            raise ConfigError(
                f"decoder {decoder} was requested, but the model was loaded with {len(self.decoders)} of its "
                f"{len(self.spec.decoder_sizes)} decoders (indices start at 0). Add its weights to `decoders`."
            )
        return self.decoders[decoder]

    def _pack(self, samples: Sequence[Sample], reader: Decoder | None = None) -> PackedBatch:
        for idx, sample in enumerate(samples):
            if not any(segment.ids for segment in sample.segments):
                raise DataError(f"sequence {idx} is empty: it needs at least one text token or context")
        batch = pack(samples, self.spec.packing)
        _check_ids("encoder", batch.encoder_ids, self.spec.backbone.vocab_size)
        if reader is not None:
            _check_ids("decoder", batch.decoder_ids, reader.config.vocab_size)
        return batch.to(self.device)

    def _segments(self, prompt: Prompt | Sequence[Segment], decoder: int) -> list[Segment]:
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
                segments.append(self._context(part.text, decoder, part.marker))
            elif isinstance(part, str):
                (ids,) = read_together(tokenizer, [part], inside=after_context and not self.texts_apart)
                segments.append(Segment.text(ids))
            else:
                raise DataError(
                    f"a prompt consists of str and Context, or of Segment only; got a {type(part).__name__}"
                )
            after_context = isinstance(part, Context)
        return segments

    def _context(self, context: str | Sequence[int], decoder: int, marker: Marker | None) -> Segment:
        if not 0 <= decoder < len(self.compressor.ports):
            raise ConfigError(f"decoder {decoder} was requested; the compressor serves {len(self.compressor.ports)}")
        if marker is not None and marker not in self.spec.markers:
            have = " and ".join(self.spec.markers) or "no marker"
            raise ConfigError(f"marker is {marker!r}; this compressor has {have}: use one that it has, or None")
        if not isinstance(context, str):
            ids = [int(token) for token in context]
        elif self.encoder_tokenizer is None:
            raise TokenizerError(
                "the encoder has no tokenizer, so it accepts ids only: pass an encoder_backbone folder with a "
                "tokenizer to from_checkpoint"
            )
        else:
            ids = self.encoder_tokenizer.encode(context)
        if not ids:
            raise DataError("a context is empty, so there is nothing to compress: omit it or give it text")
        return Segment.context(ids, marker)

    def _decoder_tokenizer(self, decoder: int) -> Tokenizer:
        self._reader(decoder)
        tokenizer = self.decoder_tokenizers[decoder]
        if tokenizer is None:
            raise TokenizerError(f"decoder {decoder} was loaded without a tokenizer: add one to the decoder's folder")
        return tokenizer


def _with_factor(spec: CompressorSpec, factor: int) -> CompressorSpec:
    if factor < 1 or not spec.rules:
        raise ConfigError(
            f"pooling_factor is {factor}; expected at least 1 and a compressor with pooled layers (this one has "
            f"{spec.memory_tokens} memory tokens)"
        )
    return dataclasses.replace(spec, rules=(*spec.rules[:-1], *group_rules(spec.strategy, (factor,))))


def _join_texts(parts: Sequence[object]) -> list[object]:
    """Join adjacent texts, because splitting a text must not change its tokens."""
    joined: list[object] = []
    for is_text, group in groupby(parts, key=lambda part: isinstance(part, str)):
        members = list(group)
        joined += ["".join(map(str, members))] if is_text else members
    return joined


def _check_is_list(what: str, given: object) -> None:
    """Raise DataError on a single text, which would be read as a list of its characters."""
    if isinstance(given, str | Context):
        raise DataError(f"{what} is one {type(given).__name__}; expected a list: write [{what[:-1]}]")


def _check_ids(what: str, ids: Tensor, vocab_size: int) -> None:
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
        raise DataError(
            f"token ids {int(ids.min())} to {int(ids.max())} for the {what}; expected 0 to {vocab_size - 1}: use ids "
            f"of the {what}'s own tokenizer"
        )
