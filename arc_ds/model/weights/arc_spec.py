"""Convert the settings of an ARC checkpoint to a `CompressorSpec` and back."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from arc_ds.batch.groups import GroupRule
from arc_ds.batch.segments import Marker
from arc_ds.errors import WeightsError
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.bridge import BridgeKind
from arc_ds.model.pooling import STRATEGIES, group_rules
from arc_ds.model.spec import CompressorSpec
from arc_ds.model.weights.arc_format import MULTI
from arc_ds.model.weights.fields import Fields

_REDUCTIONS = ("last", "sum", "fusion", "mean")  # the reference searches pool_type for them in this order
_METRIC = re.compile(r"metric_(\w+)$")
_METRICS = {"scalar_product": "dot"}  # the reference's name -> ours, if they differ
_BRIDGES: Mapping[str | None, BridgeKind] = {"mlp": "mlp", "linear": "linear", "rms": "rms", MULTI: "mlp", None: "none"}
_PRUNE_NORM = "prune_norm"  # differs from the reference's norm pruning (its oddity 10)


def group_rule(compress_rate: int, strategy: str = "mean") -> GroupRule:
    """The grouping rule of a compress rate: -N is the factor N, 0 is one group, -1 is no pooling, +N is N groups."""
    if compress_rate == -1:
        return GroupRule("none")
    if compress_rate < 0:
        return group_rules(strategy, [-compress_rate])[0]
    return GroupRule("count", compress_rate or 1)


def compress_rate(rule: GroupRule) -> int:
    """The inverse of `group_rule`."""
    if rule.kind == "count":
        return 0 if rule.value == 1 else rule.value
    return -1 if rule.kind == "none" else -rule.value


def spec_of_params(params: Fields, backbone: BackboneConfig, num_ports: int) -> CompressorSpec:
    """Convert the settings of an ARC checkpoint to a spec.

    params: `params.json` of the checkpoint.
    backbone: sizes of the encoder's backbone, with all its layers.
    num_ports: number of decoders in the checkpoint.

    Raises WeightsError if a setting is missing or of the wrong type, if the pool_type is unknown or has another meaning
    in ARC-DS, or if the checkpoint's width differs from the backbone's.
    """
    embedder, bridge = params.object("embedder_params"), params.object("bridge_module", {})
    pooling = embedder.object("pooling_module", {"pool_type": "mean"})
    pool_type, rates = pooling.get("pool_type"), embedder.get("compress_rates")
    if not isinstance(pool_type, str):
        raise pooling.wrong("pool_type", "a name such as mean_pooled_queries", pool_type)
    if not isinstance(rates, list) or any(isinstance(r, bool) or not isinstance(r, int) for r in rates):
        raise embedder.wrong("compress_rates", "a list of whole numbers", rates)
    kind, width = bridge.get("bridge_type"), backbone.hidden_size
    if kind not in list(_BRIDGES):
        names = ", ".join(str(k) for k in _BRIDGES)
        raise WeightsError(f"{bridge.where}: `bridge_type` is {kind!r}; expected one of {names}.")
    if bridge.values and bridge.integer("in_dim") != width:
        raise WeightsError(
            f"the checkpoint's bridge reads vectors of {bridge.get('in_dim')}, but the backbone has width {width}. Use "
            "the backbone that the checkpoint was trained from."
        )
    num_dropped = embedder.integer("n_truncated_layers", minimum=0)
    if num_dropped >= backbone.num_layers:
        raise WeightsError(
            f"the checkpoint drops {num_dropped} layers, but the backbone has {backbone.num_layers}. "
            "Use the backbone that the checkpoint was trained from."
        )
    strategy = _strategy(pool_type)
    memory_tokens = embedder.integer("memory_tokens", 0, minimum=0)
    kept: dict[Marker, bool] = {"cont": embedder.flag("cont_tok", False), "rec": embedder.flag("rec_tok", False)}
    return CompressorSpec(
        backbone=backbone,
        num_layers=backbone.num_layers - num_dropped,
        rules=() if memory_tokens else tuple(group_rule(rate, strategy) for rate in rates),
        memory_tokens=memory_tokens,
        strategy=strategy,
        pooled_queries="pooled_queries" in pool_type,
        where="between" if pooling.get("where") == "between" else "before",
        causal=embedder.flag("causal_embedder", False),
        markers=tuple(marker for marker, is_kept in kept.items() if is_kept),
        bridge=_BRIDGES[kind],
        bridge_hidden_size=None if bridge.get("hidden_dim") is None else bridge.integer("hidden_dim"),
        bridge_shared=num_ports > 1 and kind not in (MULTI, None),
        decoder_sizes=(width if kind is None else bridge.integer("out_dim"),) * max(num_ports, 1),
    )


def params_of_spec(spec: CompressorSpec, param_dtype: str) -> dict[str, Any]:
    """The content of `params.json` for a compressor of this spec, with the reference's keys in the reference's order.

    param_dtype: "float32" or "bfloat16", the dtype of the tensors that will be written.

    Raises WeightsError if the format cannot represent the spec: other strategies, pooling after the layer, a bridge
    with GELU, several decoders with different widths, or a linear or rms bridge for each of several decoders.
    """
    if spec.where == "after" or spec.bridge == "mlp_gelu" or spec.adapters:
        raise WeightsError(
            "the ARC format has no pooling after the layer, no bridge with GELU and no adapters of decoders. Use our "
            "own export format."
        )
    bridge_type: str | None = None if spec.bridge == "none" else spec.bridge
    if len(spec.decoder_sizes) > 1 and bridge_type is not None and not spec.bridge_shared:
        if len(set(spec.decoder_sizes)) > 1 or spec.bridge != "mlp":
            raise WeightsError(
                f"the ARC format holds several decoders only with mlp bridges of one width or with one bridge for all; "
                f"this compressor has {spec.bridge} bridges to {spec.decoder_sizes}. Use our own export format."
            )
        bridge_type = MULTI
    return {
        "param_dtype": param_dtype,
        "embedder_params": {
            "n_truncated_layers": spec.backbone.num_layers - spec.num_layers,
            "pooling_module": {"pool_type": _pool_type(spec), "where": spec.where},
            "memory_tokens": spec.memory_tokens,
            "rec_tok": "rec" in spec.markers,
            "cont_tok": "cont" in spec.markers,
            "compress_rates": [] if spec.memory_tokens else [compress_rate(rule) for rule in spec.rules],
            "trained_layers": spec.num_layers,
            "causal_embedder": spec.causal,
            "train_embedding_mtx": True,
        },
        "bridge_module": {
            "bridge_type": bridge_type,
            "in_dim": spec.backbone.hidden_size,
            "out_dim": spec.decoder_sizes[0],
            "hidden_dim": spec.bridge_hidden_size,
        },
    }


def _strategy(pool_type: str) -> str:
    """Our name for the strategy of a pool_type."""
    if match := _METRIC.search(pool_type):
        metric = match.group(1)
        if metric == "pruning_norm":
            raise WeightsError(
                f"`pool_type` is {pool_type!r}: the reference keeps the rows of smallest norm, sorted by norm, but "
                f"ARC-DS keeps those of largest norm in their original order ({_PRUNE_NORM}). "
                "Use a checkpoint trained with another pooling."
            )
        name = f"{'prune' if 'pruning' in pool_type else 'similarity'}_{_METRICS.get(metric, metric)}"
    else:
        name = next((reduction for reduction in _REDUCTIONS if reduction in pool_type), "")
    if name not in STRATEGIES:
        raise WeightsError(
            f"`pool_type` is {pool_type!r}; expected a name with {', '.join(_REDUCTIONS)}, or metric_ and a similarity "
            "measure. Set it in params.json to the one that the checkpoint was trained with."
        )
    return name


def _pool_type(spec: CompressorSpec) -> str:
    """The reference's name for a spec's strategy. The reference reads modifiers only before `metric_`."""
    pooled_queries = spec.pooled_queries and not spec.memory_tokens
    if spec.strategy in _REDUCTIONS:
        return spec.strategy + ("_pooled_queries" if pooled_queries else "")
    prefix = "pooled_queries_" if pooled_queries else ""
    if spec.strategy == _PRUNE_NORM:
        raise WeightsError(
            f"pruning by norm in the ARC format keeps the rows of smallest norm, sorted by norm; {_PRUNE_NORM} keeps "
            "the largest in their original order. Use our own export format."
        )
    kind, _, metric = spec.strategy.partition("_")
    if kind not in ("similarity", "prune"):
        raise WeightsError(f"the ARC format has no pooling called {spec.strategy}; use our own export format.")
    theirs = {ours: name for name, ours in _METRICS.items()}.get(metric, metric or "cosine")
    return f"{prefix}{'pruning_' if kind == 'prune' else ''}metric_{theirs}"
