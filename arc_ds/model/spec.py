"""CompressorSpec: sizes and semantics of a compressor, and its builder.

A run creates the spec from its config. Checkpoints and exports store the same spec.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from torch import nn

from arc_ds.batch.groups import GroupRule, RuleKind
from arc_ds.batch.packing import PoolingSpec
from arc_ds.batch.segments import MARKERS, Marker
from arc_ds.errors import WeightsError
from arc_ds.model.backbone import Recompute
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.bridge import BridgeKind, make_bridge
from arc_ds.model.compressor import Compressor, DecoderPort
from arc_ds.model.decoder_adapters import DecoderAdapters, DecoderLora
from arc_ds.model.encoder import Encoder, PoolingLayout, Where
from arc_ds.model.lora import add_adapters
from arc_ds.model.pooling import get_strategy

LATER_FIELDS = ("bridge_shared", "adapters")  # fields that the first version of the format lacks


@dataclass(frozen=True, kw_only=True)
class CompressorSpec:
    """Sizes and semantics of encoder, markers, bridges and adapters of decoders.

    backbone: sizes of the encoder's backbone, with all its layers.
    num_layers: number of first layers that the encoder keeps.
    rules: one grouping rule per pooled layer; empty with memory tokens.
    memory_tokens: number of memory tokens; 0 to pool.
    strategy: name of the pooling strategy, see `pooling`.
    pooled_queries: see `encoder.PoolingLayout`.
    where: see `encoder.PoolingLayout`.
    causal: whether the encoder's attention is causal.
    markers: markers of each port.
    bridge: kind of the bridges.
    bridge_shared: whether all decoders share one bridge; their widths are then equal.
    bridge_hidden_size: width inside the bridges; None for the decoder's width.
    decoder_sizes: width of each decoder, in the order of the ports.
    adapters: for each decoder, its trained adapters or None. Empty if no decoder has any.
    """

    backbone: BackboneConfig
    num_layers: int
    rules: tuple[GroupRule, ...] = (GroupRule("factor", 8),)
    memory_tokens: int = 0
    strategy: str = "mean"
    pooled_queries: bool = True
    where: Where = "before"
    causal: bool = False
    markers: tuple[Marker, ...] = MARKERS
    bridge: BridgeKind = "mlp"
    bridge_hidden_size: int | None = 2048
    bridge_shared: bool = False
    decoder_sizes: tuple[int, ...]
    adapters: tuple[DecoderLora | None, ...] = ()

    def adapters_of(self, port_idx: int) -> DecoderLora | None:
        """The adapters of a decoder; None if it has none."""
        return self.adapters[port_idx] if self.adapters else None

    def with_ports(self, ports: Iterable[tuple[int, DecoderLora | None]]) -> CompressorSpec:
        """The same compressor with other ports. ports: width and adapters of each decoder."""
        sizes, adapters = zip(*ports, strict=True)
        return dataclasses.replace(self, decoder_sizes=sizes, adapters=adapters if any(adapters) else ())

    @property
    def packing(self) -> PoolingSpec:
        """The part of this spec that packing needs."""
        return PoolingSpec(self.rules, self.memory_tokens)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a JSON file; the inverse of `from_json`."""
        plain = dataclasses.asdict(self)
        plain["rules"] = [{"kind": rule.kind, "value": rule.value} for rule in self.rules]
        if not self.adapters:  # so that earlier versions read it
            del plain["adapters"]
        return plain

    @staticmethod
    def from_json(plain: dict[str, Any]) -> CompressorSpec:
        """Read a JSON object that `to_json` returned. Raises WeightsError on a missing or unknown field or kind.

        Missing fields are not filled with defaults, because that could change the meaning of the weights. Only a field
        that the first version lacked (`LATER_FIELDS`) takes its default, which is the meaning of that version.
        """
        try:
            needed = [field.name for field in dataclasses.fields(CompressorSpec) if field.name not in LATER_FIELDS]
            values = {name: plain[name] for name in needed} | plain
            values["backbone"] = BackboneConfig.from_json(values["backbone"])
            values["rules"] = tuple(_rule(rule["kind"], rule["value"]) for rule in values["rules"])
            values["markers"] = tuple(MARKERS[MARKERS.index(marker)] for marker in values["markers"])
            values["decoder_sizes"] = tuple(int(size) for size in values["decoder_sizes"])
            values["adapters"] = tuple(each and DecoderLora.from_json(each) for each in plain.get("adapters", ()))
            if len(values["adapters"]) not in (0, len(values["decoder_sizes"])):
                raise ValueError(f"adapters of {len(values['adapters'])} of {len(values['decoder_sizes'])} decoders")
            get_strategy(values["strategy"])
            for name, kinds in (("where", Where), ("bridge", BridgeKind)):
                if values[name] not in get_args(kinds):
                    raise ValueError(f"{name} {values[name]!r} is unknown")
            return CompressorSpec(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(
                f"the description of the compressor does not match this version ({error}); export the "
                "checkpoint again with the version that can read it"
            ) from error


def _rule(kind: str, value: int) -> GroupRule:
    if kind not in get_args(RuleKind) or not isinstance(value, int) or value < 1:
        raise ValueError(f"the grouping {kind} {value} is unknown")
    return GroupRule(kind, value)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """Low-rank adapters on the linears of an encoder's layers: W x + scale * B A x, scale = alpha / rank."""

    rank: int
    scale: float


def build_compressor(
    spec: CompressorSpec, *, activation_checkpointing: Recompute = "none", lora: LoraSpec | None = None
) -> Compressor:
    """Build an uninitialised compressor on torch's default device and dtype. Raises ValueError if sizes do not fit.

    activation_checkpointing: activations of the encoder that backward recomputes.
    lora: adapters of the encoder; None for none.
    """
    layout = PoolingLayout(
        strategy=get_strategy(spec.strategy),
        num_pooled_layers=len(spec.rules),
        pooled_queries=spec.pooled_queries,
        where=spec.where,
    )
    encoder = Encoder(
        spec.backbone,
        num_layers=spec.num_layers,
        pooling=layout,
        causal=spec.causal,
        memory_tokens=spec.memory_tokens,
        activation_checkpointing=activation_checkpointing,
    )
    if lora is not None:
        add_adapters(encoder.layers, rank=lora.rank, scale=lora.scale)
    ports = [build_port(spec, port_idx) for port_idx in range(len(spec.decoder_sizes))]
    return Compressor(encoder, ports, build_bridge(spec, 0) if spec.bridge_shared else None)


def build_port(spec: CompressorSpec, port_idx: int) -> DecoderPort:
    """Build the uninitialised port of one decoder. Raises ValueError if sizes do not fit."""
    bridge = nn.Identity() if spec.bridge_shared else build_bridge(spec, port_idx)
    lora = spec.adapters_of(port_idx)
    adapters = None if lora is None else DecoderAdapters(lora)
    return DecoderPort(spec.backbone.hidden_size, bridge, spec.markers, adapters)


def build_bridge(spec: CompressorSpec, port_idx: int) -> nn.Module:
    """Build the uninitialised bridge to one decoder. Raises ValueError if sizes do not fit."""
    if spec.bridge_shared and len(set(spec.decoder_sizes)) > 1:
        raise ValueError(
            f"a shared bridge needs decoders of one width, but theirs are {', '.join(map(str, spec.decoder_sizes))}: "
            "set bridge.shared to false"
        )
    return make_bridge(spec.bridge, spec.backbone.hidden_size, spec.decoder_sizes[port_idx], spec.bridge_hidden_size)
