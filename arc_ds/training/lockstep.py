"""Ranks that run partitioned modules different numbers of times.

ZeRO-3 gathers a module's weights from all ranks at every pass, so all ranks must run the same modules in the same
order. In an evaluation they do not: answers end at different lengths, and the last batches may be missing on some ranks
(DeepSpeed #8262 is the hang). Here a rank asks for a turn before each pass. All ranks then run the lowest-numbered
module that a rank waits for: those that wait for it on their own input, the others on one token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from arc_ds.batch.packing import PackedBatch, PoolingSpec, pack
from arc_ds.batch.segments import Sample, Segment
from arc_ds.errors import ArcError
from arc_ds.model.compressor import Compressor
from arc_ds.model.frozen_decoder import DecoderSizes, FrozenDecoder

_STOP = -1


class EvaluationStopped(Exception):
    """At least one rank received a stop request. All ranks raise this at the same turn."""


class Lockstep:
    """A block in which modules run in turns. Collective: every rank enters and leaves it.

    A rank that leaves it first takes part in the passes of the others. An ArcError of one rank does not stop the
    others; share it after the block (`dist.raise_together`).

    compressor: the trained modules, partitioned.
    packing: the encoder's pooling.
    decoders: the frozen decoders. Only partitioned ones need turns.
    partitioned: for each decoder, whether it is.
    device: of the messages.
    before_pass: called before each pass of a module on this rank. Returns whether this rank received a stop request.
    """

    def __init__(
        self,
        compressor: Compressor,
        packing: PoolingSpec,
        decoders: Sequence[FrozenDecoder],
        *,
        partitioned: Sequence[bool],
        device: torch.device,
        before_pass: Callable[[], bool] = lambda: False,
    ) -> None:
        self._device = device
        self._before_pass = before_pass
        context = pack([Sample("idle", (Segment.context([0], None),))], packing).to(device)
        text = pack([Sample("idle", (Segment.text([0]),))], PoolingSpec(())).to(device)
        self._idle: list[Callable[[], Any]] = [partial(compressor.forward, context, 0)]
        self.compressor: Compressor = _CompressorInTurns(self, compressor)  # type: ignore[assignment]
        self.decoders: list[FrozenDecoder] = []
        for decoder, is_partitioned in zip(decoders, partitioned, strict=True):
            if is_partitioned:
                self.decoders.append(_DecoderInTurns(self, len(self._idle), decoder))
                self._idle.append(partial(decoder.prefill, text, None, 1))
            else:
                self.decoders.append(decoder)

    def __enter__(self) -> Lockstep:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is None or isinstance(error, ArcError):
            self.turn(len(self._idle))

    def turn(self, module_idx: int) -> None:
        """Run the modules that other ranks wait for, until this rank's is the next one.

        Raises EvaluationStopped on all ranks if one of them received a stop request.

        module_idx: 0 for the compressor, then the partitioned decoders; one more waits for the end of all ranks.
        """
        while True:
            mine = _STOP if self._before_pass() else module_idx
            message = torch.tensor(mine, device=self._device)
            torch_dist.all_reduce(message, op=torch_dist.ReduceOp.MIN)
            lowest = int(message)
            if lowest == _STOP:
                raise EvaluationStopped
            if lowest == module_idx:
                return
            with torch.no_grad():
                self._idle[lowest]()


class _CompressorInTurns(nn.Module):
    """The compressor, which takes a turn before each pass. It is no child module, so `ArcModel` cannot freeze it."""

    def __init__(self, lockstep: Lockstep, module: Compressor) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.empty(0, device=lockstep._device))  # tells `ArcModel` the device
        self._lockstep, self._inner = lockstep, (module,)

    @property
    def ports(self) -> nn.ModuleList:
        """The compressor's own."""
        return self._inner[0].ports

    def forward(self, batch: PackedBatch, decoder_idx: int = 0) -> Tensor:
        # Not through the module's own hooks: its forward pre-hook would start a new step of ZeRO-3's trace.
        self._lockstep.turn(0)
        return self._inner[0].forward(batch, decoder_idx)


class _DecoderInTurns(FrozenDecoder):
    """A partitioned decoder that takes a turn before each pass. All passes run the same modules in the same order."""

    def __init__(self, lockstep: Lockstep, module_idx: int, module: FrozenDecoder) -> None:
        super().__init__()
        first = next(module.parameters())
        self.anchor = nn.Parameter(torch.empty(0, device=lockstep._device, dtype=first.dtype), requires_grad=False)
        self._inner = (module,)  # not a child
        self._turn = partial(lockstep.turn, module_idx)
        self.implementation = module.implementation  # type: ignore[misc]

    @property
    def sizes(self) -> DecoderSizes:
        return self._inner[0].sizes

    @property
    def layer_types(self) -> tuple[type[nn.Module], ...]:
        return self._inner[0].layer_types

    @property
    def cache_row_bytes(self) -> int:
        return self._inner[0].cache_row_bytes

    def forward(self, batch: PackedBatch, z_ZD: Tensor | None) -> Tensor:
        self._turn()
        return self._inner[0].forward(batch, z_ZD)

    def logits(self, batch: PackedBatch, z_ZD: Tensor | None, rows: Tensor) -> Tensor:
        self._turn()
        return self._inner[0].logits(batch, z_ZD, rows)

    def embed(self, batch: PackedBatch, z_ZD: Tensor | None) -> Tensor:
        raise NotImplementedError("it would gather the embedding table alone")

    def prefill(
        self,
        batch: PackedBatch,
        z_ZD: Tensor | None,
        max_new_tokens: int,
        shared: Any = None,
        max_len: int | None = None,
    ) -> tuple[Tensor, Any]:
        self._turn()
        return self._inner[0].prefill(batch, z_ZD, max_new_tokens, shared, max_len)

    def advance(self, ids_B: Tensor, state: Any) -> Tensor:
        self._turn()
        return self._inner[0].advance(ids_B, state)

    def keep(self, state: Any, sequences: Tensor) -> bool:
        return self._inner[0].keep(state, sequences)
