"""CEPED (Yen et al., arXiv 2402.16617): a decoder whose layers attend to the states of a small bidirectional encoder.

The encoder reads the context in chunks, each on its own. Cross-attention sees the states of all chunks of a sequence;
it has no positions, so the order of the chunks does not matter. The decoder is a plain Llama otherwise. It is a
baseline for evaluation, which nothing here trains.

Shape letters: T query rows, U encoder rows, D decoder width, E encoder width, N heads, K kv heads, H head size,
S sequences.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import arc_kernels as ak
from arc_ds.batch.groups import cumulative
from arc_ds.batch.packing import PackedBatch, PoolingSpec, pack
from arc_ds.batch.segments import Sample, Segment
from arc_ds.model.backbone import Cache, DecoderBlock, RMSNorm, Spans, Stream
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.decoder import Decoder
from arc_ds.model.encoder import Encoder, PoolingLayout
from arc_ds.model.linear import Linear
from arc_ds.model.pooling import STRATEGIES
from arc_ds.model.rope import Rope
from arc_ds.model.weights.ceped_files import CepedConfig, open_ceped_tensors, read_ceped_config
from arc_ds.model.weights.load import load_backbone


class EncodedContext(NamedTuple):
    """The encoder's states of the contexts of some sequences.

    states: states of all chunks, sequence by sequence, [U, E].
    cu_seqlens: boundaries of the sequences among the states, int32 [S + 1].
    max_seqlen: number of states of the longest context.
    """

    states: Tensor
    cu_seqlens: Tensor
    max_seqlen: int


class CrossKeys(NamedTuple):
    """The inputs of the cross-attention of one layer.

    keys: [U, K, H].
    values: [U, K, H].
    spans: the rows of each sequence among queries and keys.
    """

    keys: Tensor
    values: Tensor
    spans: Spans


class CrossAttention(nn.Module):
    """Attention of the decoder's rows to all encoder states of their sequence. It has no positions and no causal mask.

    config: sizes of the decoder, which also gives the number and size of the heads.
    context_width: width E of the encoder.
    """

    def __init__(self, config: BackboneConfig, context_width: int) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.wq = Linear(config.hidden_size, q_size)
        self.wk = Linear(context_width, kv_size)
        self.wv = Linear(context_width, kv_size)
        self.wo = Linear(q_size, config.hidden_size)

    def keys_values(self, states_UE: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of encoder states, [U, K, H] each."""
        k_UX, v_UX = self.wk(states_UE), self.wv(states_UE)
        return k_UX.unflatten(-1, (-1, self.head_dim)), v_UX.unflatten(-1, (-1, self.head_dim))

    def forward(self, x_TD: Tensor, cross: CrossKeys) -> Tensor:
        """The update of the residual stream, [T, D]."""
        q_TNH = self.wq(self.norm(x_TD)).unflatten(-1, (-1, self.head_dim))
        o_TNH = ak.attention_varlen(
            q_TNH,
            cross.keys,
            cross.values,
            cu_seqlens_q=cross.spans.cu_seqlens_q,
            cu_seqlens_k=cross.spans.cu_seqlens_k,
            max_seqlen_q=cross.spans.max_seqlen_q,
            max_seqlen_k=cross.spans.max_seqlen_k,
        )
        return self.wo(o_TNH.flatten(1))


class CepedBlock(DecoderBlock):
    """A decoder layer with cross-attention between self-attention and feed-forward."""

    def __init__(self, config: BackboneConfig, context_width: int) -> None:
        super().__init__(config)
        self.cross_attention = CrossAttention(config, context_width)

    def forward(
        self,
        x_TD: Tensor,
        update_TD: Tensor | None,
        rope: Rope,
        spans: Spans,
        cache: Cache | None = None,
        cross: CrossKeys | None = None,
    ) -> Stream:
        """Run the layer on a stream. Without `cross` it is a plain Llama layer."""
        if cross is None:
            return super().forward(x_TD, update_TD, rope, spans, cache)
        input_TD, x_TD = self._enter(x_TD, update_TD)
        x_TD = x_TD + self.attention(input_TD, input_TD, rope, rope, spans, cache)
        return self._feed(x_TD + self.cross_attention(x_TD, cross))


class CepedDecoder(Decoder):
    """A decoder that reads encoded contexts through cross-attention in its last layers. It splices no vectors.

    Without a context it computes a plain Llama. `reading` returns a view of it with one.

    context_width: width E of the encoder.
    num_cross_layers: number of layers with cross-attention, the last ones.
    """

    _context: EncodedContext | None = None
    _keys_values: Mapping[nn.Module, tuple[Tensor, Tensor]] = MappingProxyType({})

    def __init__(self, config: BackboneConfig, *, context_width: int, num_cross_layers: int) -> None:
        super().__init__(config)
        for layer_idx in range(config.num_layers - num_cross_layers, config.num_layers):
            self.layers[layer_idx] = CepedBlock(config, context_width)
        self.requires_grad_(False)

    def reading(self, context: EncodedContext) -> CepedDecoder:
        """The same decoder, with the same weights, that reads these contexts, one for each sequence of its batches.

        The keys and values of all layers are computed here, once. In bfloat16 those of the published model take 512 KiB
        for each encoder row.
        """
        layers = [layer for layer in self.layers if isinstance(layer, CepedBlock)]
        view = copy.copy(self)
        view._context = context
        view._keys_values = {layer: layer.cross_attention.keys_values(context.states) for layer in layers}
        return view

    def _run(self, layer: nn.Module, stream: Stream, *args: Any, **kwargs: Any) -> Stream:
        if self._context is not None and isinstance(layer, CepedBlock):
            _rope, spans, *_ = args
            _states, cu_seqlens, max_seqlen = self._context
            across = Spans(spans.cu_seqlens_q, cu_seqlens, spans.max_seqlen_q, max_seqlen)
            kwargs["cross"] = CrossKeys(*self._keys_values[layer], across)
        return super()._run(layer, stream, *args, **kwargs)


class CepedEncoder(Encoder):
    """A bidirectional Llama with its final norm. It reads each chunk on its own, with positions from 0."""

    def __init__(self, config: BackboneConfig) -> None:
        no_pooling = PoolingLayout(strategy=STRATEGIES["mean"], num_pooled_layers=0)
        super().__init__(config, num_layers=config.num_layers, pooling=no_pooling)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.requires_grad_(False)

    def forward(self, batch: PackedBatch) -> Tensor:
        """States of all tokens of the batch's contexts, [U, E]."""
        return self.norm(super().forward(batch))


class Ceped(nn.Module):
    """Encoder and decoder. `load_ceped` reads one from files."""

    def __init__(self, config: CepedConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = CepedEncoder(config.encoder)
        self.decoder = CepedDecoder(
            config.decoder, context_width=config.encoder.hidden_size, num_cross_layers=config.num_cross_layers
        )

    @torch.no_grad()
    def encode(self, contexts: Sequence[Sequence[Sequence[int]]]) -> EncodedContext:
        """Encode the contexts of some sequences.

        contexts: for each sequence the chunks of its context, as ids of the encoder. Empty chunks are left out.

        Raises ValueError if a sequence has no token: its cross-attention would see nothing. Read sequences without a
        context in a batch of their own, without `reading`.
        """
        chunks = [[chunk for chunk in context if len(chunk)] for context in contexts]
        lengths = np.array([sum(map(len, context)) for context in chunks], dtype=np.int64)
        if not lengths.all():
            raise ValueError(f"sequence {int((lengths == 0).argmax())} has no context; read it in a batch without any")
        samples = [Sample("ceped", tuple(Segment.context(chunk, None) for chunk in context)) for context in chunks]
        device = self.encoder.tok_embeddings.weight.device
        states_UE = self.encoder(pack(samples, PoolingSpec(rules=())).to(device))
        cu_seqlens = torch.from_numpy(cumulative(lengths)).to(device)
        return EncodedContext(states_UE, cu_seqlens, int(lengths.max()))


def load_ceped(path: Path, device: torch.device, dtype: torch.dtype) -> Ceped:
    """Load a CEPED model from a folder in the layout of hyen/CEPED-LLaMA-2-Chat-7B, frozen.

    path: folder with config.json and safetensors files or `pytorch_model*.bin`. No pickle can run code.

    Raises WeightsError like `read_ceped_config` and `open_ceped_tensors`.
    """
    with torch.device("meta"):
        model = Ceped(read_ceped_config(path))
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    load_backbone(model, open_ceped_tensors(path, shapes), dtype=dtype, device=device, name="CEPED")
    return model.eval()
