"""Compressor: all trained modules. It maps contexts to vectors in a decoder's embedding space.

Shape letters: Z compressed vectors (groups and markers), M markers, D encoder width, E decoder width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from arc_ds.batch.packing import PackedBatch
from arc_ds.batch.segments import MARKERS, Marker
from arc_ds.model.decoder import Decoder
from arc_ds.model.decoder_adapters import DecoderAdapters, DecoderLora
from arc_ds.model.encoder import Encoder


class DecoderPort(nn.Module):
    """The modules of one decoder: the markers <Cont> and <Rec> (in encoder width), the bridge and any adapters.

    If all decoders share one bridge, the compressor has it, and the port's own bridge is the identity. In training, the
    port gives the adapters to its decoder (`connect_adapters`) before each pass of the decoder.
    """

    adapters: DecoderAdapters | None
    use_adapters: Callable[[DecoderLora, Sequence[Tensor]], None] | None

    def __init__(
        self,
        width: int,
        bridge: nn.Module,
        markers: tuple[Marker, ...] = MARKERS,
        adapters: DecoderAdapters | None = None,
    ) -> None:
        super().__init__()
        self.cont = nn.Parameter(torch.ones(1, width)) if "cont" in markers else None
        self.rec = nn.Parameter(torch.ones(1, width)) if "rec" in markers else None
        self.adapters, self.use_adapters = adapters, None  # adapters first, as in forward: the plan reads the order
        self.bridge = bridge

    @property
    def markers(self) -> tuple[Marker, ...]:
        """The markers that this port has."""
        return tuple(name for name in MARKERS if getattr(self, name) is not None)

    def forward(self, states_GD: Tensor, batch: PackedBatch | None) -> Tensor:
        """Arrange encoder outputs [G, D] and markers in reading order and apply the bridge: [Z, E].

        Without a batch the port is idle: it returns a zero scalar that depends on all of its parameters.
        """
        if batch is None:
            return self._rest(states_GD)
        if self.adapters is not None and self.use_adapters is not None:
            self.use_adapters(self.adapters.spec, self.adapters())
        num_vectors = batch.output_slots.numel() + batch.marker_slots.numel()
        z_ZD = states_GD.new_empty(num_vectors, states_GD.shape[1])
        z_ZD = z_ZD.index_put((batch.output_slots,), states_GD)
        if self.markers:
            z_ZD = z_ZD.index_put((batch.marker_slots,), self._table().to(states_GD.dtype)[batch.marker_kinds])
        return self.bridge(z_ZD)

    def _rest(self, states_GD: Tensor) -> Tensor:
        """A zero scalar that depends on every parameter of this port.

        A port that a step does not use still runs, on one detached row and multiplied by zero: under ZeRO-3 a parameter
        outside the graph would keep its previous gradient. It is called as a module, like the port in use, because all
        ranks must run modules in the same order and ZeRO-3 gathers markers only during a module's call.
        """
        sliver = states_GD[:1].detach()
        if self.markers:
            sliver = sliver + self._table().sum(0, keepdim=True).to(sliver.dtype)
        adapters = () if self.adapters is None else self.adapters()
        return sum((tensor.sum() for tensor in adapters), self.bridge(sliver).sum()) * 0.0

    def _table(self) -> Tensor:
        """Markers by kind [2, D]. A kind that this port lacks is a row of zeros, which no batch uses."""
        have = [m for m in (self.cont, self.rec) if m is not None]
        rows = [m if m is not None else torch.zeros_like(have[0]) for m in (self.cont, self.rec)]
        return torch.cat(rows)


class Compressor(nn.Module):
    """The encoder and one port per decoder.

    bridge: the bridge of all decoders; None if each port has its own. It runs once, after all ports: under ZeRO-3 a
        module that runs twice in a forward may get wrong gradients.
    """

    def __init__(self, encoder: Encoder, ports: list[DecoderPort], bridge: nn.Module | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.ports = nn.ModuleList(ports)
        self.bridge = bridge

    def forward(self, batch: PackedBatch, decoder_idx: int = 0) -> Tensor:
        """Compress all contexts of the batch into vectors [Z, E] for the decoder `decoder_idx`."""
        states_GD = self.encoder(batch)
        z_ZE, idle = None, None
        for port_idx, port in enumerate(self.ports):
            if port_idx == decoder_idx:
                z_ZE = port(states_GD, batch)
            else:
                zero = port(states_GD, None)
                idle = zero if idle is None else idle + zero
        if z_ZE is None:
            raise ValueError(f"decoder_idx is {decoder_idx}; the compressor has {len(self.ports)} ports")
        if self.bridge is not None:
            z_ZE = self.bridge(z_ZE)
        return z_ZE if idle is None else z_ZE + idle.to(z_ZE.dtype)


def connect_adapters(ports: Iterable[nn.Module], decoders: Iterable[nn.Module]) -> None:
    """Let each port that has adapters give them to its decoder before each pass."""
    for port, decoder in zip(ports, decoders, strict=True):
        if isinstance(port, DecoderPort) and port.adapters is not None:
            assert isinstance(decoder, Decoder), "only our transformer takes adapters"
            port.use_adapters = decoder.use_adapters
