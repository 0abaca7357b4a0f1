"""Floating-point operations of a training step, counted from the shapes of its batch.

The count covers the matrix products of a step without recomputation: all forward products, backward products to inputs
that need a gradient, and backward products to weights that are trained. Attention counts two products forward and five
backward because a fused backward recomputes the scores (Dao, arXiv 2307.08691). Other recomputation, norms, rotary
embeddings and similar operations are not counted. A product of [m, k] and [k, n] has 2mkn operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from arc_ds.batch.packing import PackedBatch
from arc_ds.config.schema import TrainedParts
from arc_ds.data.loading.estimates import WorkRates
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.encoder import group_ends
from arc_ds.model.frozen_decoder import DecoderSizes
from arc_ds.model.spec import CompressorSpec

ALL_TRAINED = TrainedParts(trained_layers=None, train_embeddings=True, train_memory=True, lora_rank=0)


class Operations(NamedTuple):
    """Number of operations.

    linear: products with weights.
    attention: attention scores and weighted sums of values.
    """

    linear: int = 0
    attention: int = 0

    @property
    def total(self) -> int:
        """Sum of linear and attention operations."""
        return self.linear + self.attention


@dataclass(frozen=True, kw_only=True)
class StepFlops:
    """Operations of one micro-batch. `bridge` and `head` include forward and backward."""

    encoder_forward: Operations
    encoder_backward: Operations
    bridge: int
    decoder_forward: Operations
    decoder_backward: Operations
    head: int

    @property
    def total(self) -> int:
        """Sum of all operations."""
        parts = (self.encoder_forward, self.encoder_backward, self.decoder_forward, self.decoder_backward)
        return sum(part.total for part in parts) + self.bridge + self.head


class _LayerRows(NamedTuple):
    """Number of rows that one layer processes.

    queries: rows of queries and outputs.
    keys: rows of keys and values.
    ffn: rows of the FFN.
    pairs: query-key pairs in attention.
    """

    queries: int
    keys: int
    ffn: int
    pairs: int

    def work(self, config: BackboneConfig) -> Operations:
        """Operations of the layer's forward."""
        linear = sum(rows * width * size for rows, width, size in self._linears(config))
        return Operations(2 * linear, 4 * self.pairs * config.num_heads * config.head_dim)

    def adapter_work(self, config: BackboneConfig, rank: int) -> Operations:
        """Operations of the forward of the layer's low-rank adapters."""
        return Operations(2 * rank * sum(rows * (width + size) for rows, width, size in self._linears(config)))

    def _linears(self, config: BackboneConfig) -> list[tuple[int, int, int]]:
        """Rows and both widths of each linear: queries and output, keys and values, FFN."""
        attention = [(self.queries, config.num_heads), (self.keys, config.num_kv_heads)] * 2
        sizes = [(rows, heads * config.head_dim) for rows, heads in attention] + [(self.ffn, config.ffn_size)] * 3
        return [(rows, config.hidden_size, size) for rows, size in sizes]


def count_flops(
    batch: PackedBatch,
    spec: CompressorSpec,
    decoder: DecoderSizes,
    trained: TrainedParts = ALL_TRAINED,
    port_idx: int = 0,
) -> StepFlops:
    """Operations of forward and backward of one micro-batch with one decoder.

    batch: must be on the host. EncodedText lengths from a batch on a GPU would synchronize with the device.
    spec: the compressor.
    decoder: sizes of the decoder. Through transformers its operations are an estimate, see `_decoder_work`.
    trained: the trained parts of the encoder.
    port_idx: index of the decoder's port, which may have adapters.
    """
    rows = _encoder_rows(batch, spec)
    decoder_forward, decoder_backward = _decoder_passes(batch, decoder, _decoder_rank(spec, port_idx))
    return StepFlops(
        encoder_forward=_encoder_forward(rows, spec, trained),
        encoder_backward=_encoder_backward(rows, spec, trained),
        bridge=3 * 2 * batch.compressed_rows.numel() * _bridge_weights(spec, decoder.hidden_size),
        decoder_forward=decoder_forward,
        decoder_backward=decoder_backward,
        head=2 * 2 * batch.num_labels * decoder.hidden_size * decoder.vocab_size,
    )


def work_rates(
    spec: CompressorSpec, decoder: DecoderSizes, trained: TrainedParts = ALL_TRAINED, port_idx: int = 0
) -> WorkRates:
    """Operations that one token, row and query-key pair of a sample add to a step with one decoder.

    The rates are used to distribute samples over ranks before they are built. They ignore bridge and head, and they
    assume that every row attends to half of its sequence and has a gradient.
    """
    token, pair = _LayerRows(1, 1, 1, 0), _LayerRows(0, 0, 0, 1)
    of_token, of_pair = (
        _sum([_encoder_forward(rows, spec, trained), _encoder_backward(rows, spec, trained)])
        for rows in ([each] * spec.num_layers for each in (token, pair))
    )
    row, attending = _decoder_work(token, decoder), _decoder_work(pair, decoder)
    rank = _decoder_rank(spec, port_idx)
    adapters = _adapter_passes(token, decoder, rank)
    suffix_row = row.linear + _backward(row, trains=False).linear + sum(each.linear for each in adapters)
    return WorkRates(
        encoder_token=of_token.linear,
        encoder_pair=of_pair.attention / (2 if spec.causal else 1),
        prefix_row=suffix_row if rank else row.linear,
        suffix_row=suffix_row,
        decoder_pair=(attending.attention + _backward(attending, trains=False).attention) / 2,
    )


def _encoder_rows(batch: PackedBatch, spec: CompressorSpec) -> list[_LayerRows]:
    """Rows of each encoder layer, as in `Encoder.forward`."""
    cu_seqlens = batch.encoder_cu_seqlens
    num_rows = batch.encoder_positions.numel()
    windows = [spec.backbone.window_of(idx) if spec.causal else None for idx in range(spec.num_layers)]
    num_plain = spec.num_layers - len(batch.levels)
    pairs = {window: _pairs(cu_seqlens, window, causal=spec.causal) for window in set(windows)}
    layers = [_LayerRows(num_rows, num_rows, num_rows, pairs[window]) for window in windows[:num_plain]]
    for level, window in zip(batch.levels, windows[num_plain:], strict=True):
        num_groups = level.positions.numel()
        if spec.where != "before":
            num_ffn_rows = num_groups if spec.where == "between" else num_rows
            layers.append(_LayerRows(num_rows, num_rows, num_ffn_rows, _pairs(cu_seqlens, window, causal=spec.causal)))
        elif not spec.pooled_queries:
            seen_by_all = _pairs(level.cu_seqlens, window, causal=spec.causal)
            layers.append(_LayerRows(num_groups, num_groups, num_groups, seen_by_all))
        else:
            seen = group_ends(cu_seqlens, level) if spec.causal else _lengths(cu_seqlens) * _lengths(level.cu_seqlens)
            seen = seen if window is None else seen.clamp(max=window)
            layers.append(_LayerRows(num_groups, num_rows, num_groups, int(seen.sum())))
        cu_seqlens, num_rows = level.cu_seqlens, num_groups
    return layers


def _encoder_forward(layers: list[_LayerRows], spec: CompressorSpec, trained: TrainedParts) -> Operations:
    """Forward operations of all encoder layers, with their adapters."""
    rank = trained["lora_rank"]
    return _sum(
        [work for rows in layers for work in (rows.work(spec.backbone), rows.adapter_work(spec.backbone, rank))]
    )


def _encoder_backward(layers: list[_LayerRows], spec: CompressorSpec, trained: TrainedParts) -> Operations:
    """Backward operations of the encoder layers that a gradient reaches."""
    num_trained, rank = trained["trained_layers"], trained["lora_rank"]
    first_trained = 0 if num_trained is None else max(len(layers) - num_trained, 0)
    trains_memory = trained["train_memory"] and spec.memory_tokens > 0
    reaches_below = trained["train_embeddings"] or trains_memory or rank > 0
    works = []
    for idx, rows in enumerate(layers):
        if reaches_below or idx >= first_trained:
            works.append(_backward(rows.work(spec.backbone), trains=idx >= first_trained))
            works.append(_backward(rows.adapter_work(spec.backbone, rank), trains=True))
    return _sum(works)


def _decoder_rank(spec: CompressorSpec, port_idx: int) -> int:
    """Rank of the adapters of a decoder; 0 for none."""
    lora = spec.adapters_of(port_idx)
    return 0 if lora is None else lora.rank


def _adapter_passes(rows: _LayerRows, decoder: DecoderSizes, rank: int) -> tuple[Operations, Operations]:
    """Operations of the forward and backward of the adapters of all decoder layers."""
    if not isinstance(decoder, BackboneConfig):
        return Operations(), Operations()
    forward = _sum([rows.adapter_work(decoder, rank)] * decoder.num_layers)
    return forward, _backward(forward, trains=True)


def _decoder_passes(batch: PackedBatch, decoder: DecoderSizes, rank: int) -> tuple[Operations, Operations]:
    """Operations of the forward and backward of all decoder layers.

    Through transformers, and with adapters, all rows have a gradient.

    rank: of the adapters; 0 for none.
    """
    if not isinstance(decoder, BackboneConfig):
        forward = _decoder_work(_decoder_rows(batch, None)[0], decoder)
        return forward, _backward(forward, trains=False)
    windows = [decoder.window_of(idx) for idx in range(decoder.num_layers)]
    rows = {window: _decoder_rows(batch, window) for window in set(windows)}
    everything, suffix = (_sum([rows[window][part].work(decoder) for window in windows]) for part in (0, 1))
    if not rank:
        return everything, _backward(suffix, trains=False)
    forward, backward = _adapter_passes(_decoder_rows(batch, None)[0], decoder, rank)
    return _sum([everything, forward]), _sum([_backward(everything, trains=False), backward])


def _decoder_rows(batch: PackedBatch, window: int | None) -> tuple[_LayerRows, _LayerRows]:
    """Rows of a decoder layer with this window: all rows, and only the rows with a gradient."""
    num_rows, pairs = batch.num_decoder_rows, _pairs(batch.decoder_cu_seqlens, window, causal=True)
    everything = _LayerRows(num_rows, num_rows, num_rows, pairs)
    if batch.prefix is None:
        return everything, everything
    num_suffix = batch.prefix.suffix_rows.numel()
    suffix_pairs = pairs - _pairs(batch.prefix.prefix_cu_seqlens, window, causal=True)
    return everything, _LayerRows(num_suffix, num_suffix, num_suffix, suffix_pairs)


def _decoder_work(rows: _LayerRows, decoder: DecoderSizes) -> Operations:
    """Operations of the forward of all decoder layers.

    For a decoder of transformers it is an estimate: each row multiplies all parameters of the layers, and state-space
    layers count their parameters only. It is good enough to distribute samples over ranks.
    """
    if isinstance(decoder, BackboneConfig):
        return _sum([rows.work(decoder)] * decoder.num_layers)
    return Operations(2 * decoder.layer_parameters * rows.ffn, 4 * rows.pairs * decoder.attention_size)


def _bridge_weights(spec: CompressorSpec, out_size: int) -> int:
    in_size = spec.backbone.hidden_size
    if spec.bridge == "none":
        return 0
    if spec.bridge == "linear":
        return in_size * out_size
    return (spec.bridge_hidden_size or out_size) * (in_size + out_size)


def _backward(forward: Operations, *, trains: bool) -> Operations:
    return Operations(forward.linear * (2 if trains else 1), forward.attention * 5 // 2)


def _sum(works: list[Operations]) -> Operations:
    return Operations(sum(work.linear for work in works), sum(work.attention for work in works))


def _lengths(cu_seqlens: Tensor) -> Tensor:
    return (cu_seqlens[1:] - cu_seqlens[:-1]).long()


def _pairs(cu_seqlens: Tensor, window: int | None = None, *, causal: bool) -> int:
    """Number of query-key pairs in attention within segments.

    window: number of keys that a query sees at most, only if `causal`; None for all.
    """
    lengths = _lengths(cu_seqlens)
    if not causal:
        return int((lengths * lengths).sum())
    hidden = lengths.new_zeros(()) if window is None else (lengths - window).clamp(min=0)
    return int((lengths * (lengths + 1) // 2 - hidden * (hidden + 1) // 2).sum())
