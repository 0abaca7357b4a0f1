"""A frozen decoder that `transformers` computes, for families that our packed transformer does not compute.

The model's own code makes embeddings, layers, head and the scalings of its logits. This module lays out the rows,
splices the compressed vectors, and makes logits only at the rows that need them.

A batch is read packed or padded. Packed: all sequences in one row of the model's batch, with positions that restart,
from which transformers derives a mask. Padded: one row for each sequence, with padding after it, which causal models do
not see. State-space layers read on across packed sequences, so `find_reading` tests each model.

Shape letters: N text tokens, Z compressed vectors, R rows, L labels, D width, V vocabulary, B sequences, T rows of the
longest sequence.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from arc_ds.batch.packing import PackedBatch, PoolingSpec, pack
from arc_ds.batch.segments import Sample, Segment
from arc_ds.errors import WeightsError
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.frozen_decoder import DecoderSizes, FrozenDecoder, TransformersSizes, sequences_of_rows

_PROBE_LENGTHS = (5, 9, 7)
_CACHES = ("past_key_values", "cache_params", "state")  # names of the argument and of the output
_SAME = 1e-6


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How a model reads batches.

    is_packed: whether the sequences of a batch are packed; otherwise they are padded.
    embedding_multiplier: factor of token embeddings that the model applies outside its embedding module, and only to
        ids. Rows given as embeddings need it before.
    ignores_padding: whether the model gives the same logits after a prompt with padding before it. If not, it cannot
        generate from prompts of different lengths at once.
    reason: reason for packing or padding, for the log.
    """

    is_packed: bool = False
    ignores_padding: bool = True
    embedding_multiplier: float = 1.0
    reason: str = "not tested"


@dataclass
class Generation:
    """The state of a generation.

    cache_name: argument of the model's forward that takes the cache.
    cache: the model's own cache.
    mask_BT: 1 for rows, 0 for the padding before them, int64 [B, T].
    lengths_B: number of rows of each sequence so far, int64 [B].
    """

    cache_name: str
    cache: Any
    mask_BT: Tensor
    lengths_B: Tensor


class TransformersDecoder(FrozenDecoder):
    """A frozen causal LM of `transformers`. Set `reading` to what `find_reading` finds before use.

    model: the model, whole or partitioned by ZeRO-3.
    sizes: its sizes.
    activation_checkpointing: recompute each layer in backward instead of keeping its activations.

    Raises WeightsError if the model has no layers or no head.
    """

    implementation = "transformers"

    def __init__(
        self,
        model: Any,
        sizes: TransformersSizes,
        *,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.reading = Reading()
        self._sizes = sizes
        self._rows: Tensor | None = None
        self._arguments = inspect.signature(model.forward).parameters.keys()
        self.model = model
        layers, head = layers_of(model), model.get_output_embeddings()
        if not layers or head is None:
            raise WeightsError(
                f"a {type(model).__name__} of transformers has {len(layers)} layers and "
                f"{'no' if head is None else 'a'} head; a decoder needs both. Use another decoder."
            )
        if activation_checkpointing:
            for layer in layers:
                cls = type(layer)
                layer.__class__ = type(cls.__name__, (_Recomputed, cls), {})
        self._layer_types = tuple({type(layer): None for layer in layers})
        head.register_forward_pre_hook(self._keep_rows)
        self.requires_grad_(False).eval()

    @property
    def sizes(self) -> TransformersSizes:
        return self._sizes

    @property
    def layer_types(self) -> tuple[type[nn.Module], ...]:
        return self._layer_types

    @property
    def cache_row_bytes(self) -> int:
        return self._sizes.cache_row_values * self.model.get_input_embeddings().weight.element_size()

    def forward(self, batch: PackedBatch, z_ZD: Tensor | None) -> Tensor:
        return functional.cross_entropy(self.logits(batch, z_ZD, batch.label_rows), batch.labels, reduction="none")

    def logits(self, batch: PackedBatch, z_ZD: Tensor | None, rows: Tensor) -> Tensor:
        check_length(self._sizes, batch.decoder_max_seqlen)
        x_RD = self.embed(batch, z_ZD)
        if self.reading.is_packed:
            logits, _ = self._run(x_RD[None], rows, position_ids=batch.decoder_positions[None], use_cache=False)
            return logits
        places_R = sequences_of_rows(batch) * batch.decoder_max_seqlen + batch.decoder_positions
        logits, _ = self._run(_padded(x_RD, places_R, batch), places_R[rows], use_cache=False)
        return logits

    def embed(self, batch: PackedBatch, z_ZD: Tensor | None) -> Tensor:
        x_ND = self._embed_ids(batch.decoder_ids)
        x_RD = x_ND.new_zeros(batch.num_decoder_rows, x_ND.shape[-1]).index_copy(0, batch.text_rows, x_ND)
        return x_RD if z_ZD is None else x_RD.index_copy(0, batch.compressed_rows, z_ZD.to(x_RD.dtype))

    def prefill(
        self,
        batch: PackedBatch,
        z_ZD: Tensor | None,
        max_new_tokens: int,
        shared: None = None,
        max_len: int | None = None,
    ) -> tuple[Tensor, Generation]:
        lengths_B, num_rows = batch.decoder_cu_seqlens.diff().long(), batch.decoder_max_seqlen
        num_sequences = lengths_B.numel()
        check_length(self._sizes, num_rows + max(max_new_tokens - 1, 0))  # the last token is not read
        if not self.reading.ignores_padding and num_sequences * num_rows != batch.num_decoder_rows:
            raise WeightsError(
                f"a {type(self.model).__name__} of transformers cannot generate from prompts of different lengths at "
                "once. Give it one prompt at a time."
            )
        # Padding before the rows: the last rows of all sequences stand together, as models expect in a generation.
        sequences_R, padding_B = sequences_of_rows(batch), num_rows - lengths_B
        places_R = sequences_R * num_rows + batch.decoder_positions + padding_B[sequences_R]
        positions_BT = torch.arange(num_rows, device=places_R.device) - padding_B[:, None]
        mask_BT = (positions_BT >= 0).long()
        logits_BV, output = self._run(
            _padded(self.embed(batch, z_ZD), places_R, batch),
            torch.arange(1, num_sequences + 1, device=places_R.device) * num_rows - 1,
            position_ids=positions_BT.clamp(min=0),
            attention_mask=mask_BT,
            use_cache=True,
        )
        name = next((name for name in _CACHES if getattr(output, name, None) is not None), None)
        if name is None:
            raise WeightsError(
                f"a {type(self.model).__name__} of transformers returns no cache, so it cannot generate here. Use "
                "another decoder."
            )
        return logits_BV, Generation(name, getattr(output, name), mask_BT, lengths_B)

    def advance(self, ids_B: Tensor, state: Generation) -> Tensor:
        state.mask_BT = functional.pad(state.mask_BT, (0, 1), value=1)
        has_attention = state.cache_name == "past_key_values"
        logits_BV, _ = self._run(
            self._embed_ids(ids_B)[:, None],
            torch.arange(ids_B.numel(), device=ids_B.device),
            position_ids=state.lengths_B[:, None],
            attention_mask=state.mask_BT if has_attention else None,
            use_cache=True,
            **{state.cache_name: state.cache},
        )
        state.lengths_B = state.lengths_B + 1
        return logits_BV

    def _embed_ids(self, ids_N: Tensor) -> Tensor:
        x_ND, factor = self.model.get_input_embeddings()(ids_N), self.reading.embedding_multiplier
        return x_ND if factor == 1.0 else x_ND * factor

    def _run(self, x_BTD: Tensor, rows: Tensor, **arguments: Any) -> tuple[Tensor, Any]:
        """Logits of some rows, float32 [n, V], and the model's output.

        rows: sequence * T + row in the sequence, int64 [n].
        arguments: of the model's forward; those that it lacks are left out.
        """
        known = {name: value for name, value in arguments.items() if name in self._arguments}
        self._rows = rows
        try:
            output = self.model(inputs_embeds=x_BTD, return_dict=True, **known)
        finally:
            self._rows = None
        return output.logits[0].float(), output

    def _keep_rows(self, _head: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Keep the requested rows of the head's input, as one sequence. The head then makes the logits of no others.

        `logits_to_keep` of transformers would take the same rows of every sequence, and not all models have it.
        """
        h_BTD, *others = args
        return (h_BTD if self._rows is None else h_BTD.flatten(0, 1)[self._rows][None], *others)


def check_length(sizes: DecoderSizes, num_positions: int) -> None:
    """Raise WeightsError if a sequence is longer than transformers computes it. Native decoders have no limit."""
    if isinstance(sizes, BackboneConfig) or sizes.max_positions is None:
        return
    if num_positions > sizes.max_positions:
        raise WeightsError(
            f"a {sizes.model_type} decoder computes up to {sizes.max_positions:,} positions through transformers, but "
            f"a sequence takes up to {num_positions:,}. Its embeddings of positions end there, or its rotary scaling "
            "would then depend on the other sequences of a batch. Shorten the sequences, or use another decoder. If "
            "our transformer knows the decoder, implementation: native has no such limit."
        )


class _Recomputed(nn.Module):
    """Base class that a layer gets if backward recomputes it.

    `gradient_checkpointing_enable` of transformers works only in training mode, in which dropout is active.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return super().__call__(*args, **kwargs)
        return checkpoint(super().__call__, *args, use_reentrant=False, **kwargs)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of a model: the entries of its lists of modules. Lists within a layer hold its parts."""
    found: list[nn.Module] = []
    for child in model.children():
        found += list(child.children()) if isinstance(child, nn.ModuleList) else layers_of(child)
    return found


@torch.no_grad()
def find_reading(decoder: TransformersDecoder) -> Reading:
    """Test how a whole model reads batches, on small random sequences.

    Raises WeightsError if it is not causal, or if it computes other logits from its embeddings than from the ids.
    """
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(decoder.vocab_size, (n,), generator=generator).tolist() for n in _PROBE_LENGTHS]
    reading = _reading_of_one(decoder, max(sequences, key=len))
    separate = [_probe(decoder, [ids], reading) for ids in sequences]
    lasts = torch.stack([logits[-1] for logits in separate])
    prefilled, _ = decoder.prefill(_probe_batch(decoder, sequences), None, 0)
    reading = replace(reading, ignores_padding=_distance(prefilled, lasts) <= _rounding(decoder))
    if "position_ids" not in decoder._arguments:
        return replace(reading, reason="it takes no positions")
    packed = replace(reading, is_packed=True)
    together = _probe(decoder, sequences, packed)
    first, *others = sequences
    # Other ids, because a leak may not depend on their order.
    beside_another = _probe(decoder, [[(idx + 1) % decoder.vocab_size for idx in first], *others], packed)
    # A row sees nothing of another sequence if nothing of it changes with that sequence.
    change = (together - beside_another)[len(first) :].abs().max() / together.abs().max()
    if not change <= _SAME or not _distance(together, torch.cat(separate)) <= _rounding(decoder):
        return replace(reading, reason="the logits of packed sequences depend on their neighbours")
    if decoder.model.config.get_text_config()._attn_implementation == "eager":
        return replace(reading, reason="its attention is eager and would hold scores of all pairs of packed rows")
    return replace(packed, reason="packed sequences have the logits of separate ones")


def _reading_of_one(decoder: TransformersDecoder, ids: list[int]) -> Reading:
    """The reading with the embedding multiplier that gives the model's own logits. Raises like `find_reading`."""
    model = decoder.model
    name = f"a {type(model).__name__} of transformers"
    device = model.get_input_embeddings().weight.device
    expected = model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0].float()
    for factor in (1.0, float(getattr(model.config.get_text_config(), "embedding_multiplier", 1.0))):
        reading = Reading(embedding_multiplier=factor)
        if _distance(_probe(decoder, [ids], reading), expected) <= _rounding(decoder):
            break
    else:
        raise WeightsError(
            f"{name} computes other logits from the embeddings of a text than from its ids, so it cannot read "
            "compressed vectors. Use another decoder."
        )
    half = len(ids) // 2
    if not _distance(_probe(decoder, [ids[:half]], reading), expected[:half]) <= 10 * _rounding(decoder):
        raise WeightsError(
            f"{name} computes other logits for the first half of a text if the second half follows: it is not causal. "
            "Use a causal language model as decoder."
        )
    return reading


def _probe_batch(decoder: TransformersDecoder, sequences: Sequence[list[int]]) -> PackedBatch:
    samples = [Sample("probe", (Segment.text(ids),)) for ids in sequences]
    return pack(samples, PoolingSpec(())).to(decoder.model.get_input_embeddings().weight.device)


def _probe(decoder: TransformersDecoder, sequences: Sequence[list[int]], reading: Reading) -> Tensor:
    """Logits of all rows, [R, V]. Leaves the reading with the decoder."""
    decoder.reading = reading
    batch = _probe_batch(decoder, sequences)
    return decoder.logits(batch, None, batch.text_rows)


def _distance(a: Tensor, b: Tensor) -> float:
    """Norm of the difference relative to b; NaN if a number is not finite."""
    return float((a - b).norm() / b.norm())


def _rounding(decoder: TransformersDecoder) -> float:
    """Largest distance of equal logits that are computed in another order."""
    return max(1e-5, 4 * torch.finfo(decoder.model.get_input_embeddings().weight.dtype).eps)


def _padded(x_RD: Tensor, places_R: Tensor, batch: PackedBatch) -> Tensor:
    """One row of the model's batch for each sequence, [B, T, D], with zeros elsewhere.

    places_R: sequence * T + row in the sequence, int64.
    """
    shape = (batch.decoder_cu_seqlens.numel() - 1, batch.decoder_max_seqlen)
    return x_RD.new_zeros(shape[0] * shape[1], x_RD.shape[-1]).index_copy(0, places_R, x_RD).unflatten(0, shape)
