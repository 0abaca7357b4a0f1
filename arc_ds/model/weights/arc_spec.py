"""Convert the settings of an ARC checkpoint to a `CompressorSpec` and back."""

from __future__ import annotations

import re

from arc_ds.batch.groups import GroupRule
from arc_ds.batch.segments import Marker
from arc_ds.errors import WeightsError
from arc_ds.model.backbone_config import BackboneConfig
from arc_ds.model.pooling import STRATEGIES
from arc_ds.model.spec import CompressorSpec
from arc_ds.model.weights.arc_params import MULTI, ArcBridge, ArcEmbedder, ArcParams, ArcPooling

_REDUCTIONS = ("last", "sum", "fusion", "mean")  # the reference searches pool_type for them in this order
_METRIC = re.compile(r"metric_(\w+)$")
_METRICS = {"scalar_product": "dot"}  # the reference's name -> ours, if they differ
_PRUNE_NORM = "prune_norm"  # differs from the reference's norm pruning (its oddity 10)


def group_rule(compress_rate: int, *, merging: bool = False) -> GroupRule:
    """The grouping rule of a compress rate: -N is the factor N, 0 is one group, -1 is no pooling, +N is N groups.

    merging: whether the strategy merges or prunes by similarity. The reference then keeps n // N rows instead of
        ceil(n / N).
    """
    if compress_rate == -1:
        return GroupRule("none")
    if compress_rate < 0:
        return GroupRule("floor_factor" if merging else "factor", -compress_rate)
    return GroupRule("count", compress_rate or 1)


def compress_rate(rule: GroupRule) -> int:
    """The inverse of `group_rule`. Raises WeightsError if the reference has no rate for the rule."""
    if rule.kind == "none" or (rule.kind == "factor" and rule.value == 1):
        return -1
    if rule.kind in ("factor", "floor_factor"):
        return -rule.value
    if rule.kind == "count":
        return 0 if rule.value == 1 else rule.value
    raise WeightsError(f"the ARC format has no compress rate for the grouping {rule.kind}; use our own export format.")


def spec_of_params(params: ArcParams, backbone: BackboneConfig, num_ports: int) -> CompressorSpec:
    """Convert the settings of an ARC checkpoint to a spec.

    params: the settings of the checkpoint.
    backbone: sizes of the encoder's backbone, with all its layers.
    num_ports: number of decoders in the checkpoint.

    Raises WeightsError if the pool_type is unknown or has another meaning in ARC-DS, or if the checkpoint's width
    differs from the backbone's.
    """
    embedder, bridge = params.embedder, params.bridge
    pooling = embedder.pooling or ArcPooling(pool_type="mean", where="before")
    width = backbone.hidden_size
    if bridge is not None and bridge.in_dim != width:
        raise WeightsError(
            f"the checkpoint's bridge reads vectors of {bridge.in_dim}, but the backbone has width {width}. Use the "
            "backbone that the checkpoint was trained from."
        )
    if embedder.n_truncated_layers >= backbone.num_layers:
        raise WeightsError(
            f"the checkpoint drops {embedder.n_truncated_layers} layers, but the backbone has {backbone.num_layers}. "
            "Use the backbone that the checkpoint was trained from."
        )
    strategy = _strategy(pooling.pool_type)
    merging = strategy not in _REDUCTIONS
    rules = tuple(group_rule(rate, merging=merging) for rate in embedder.compress_rates)
    kept: dict[Marker, bool] = {"cont": embedder.cont_tok, "rec": embedder.rec_tok}
    kind = None if bridge is None else bridge.bridge_type
    out_size = width if bridge is None or kind is None else bridge.out_dim
    return CompressorSpec(
        backbone=backbone,
        num_layers=backbone.num_layers - embedder.n_truncated_layers,
        rules=() if embedder.memory_tokens else rules,
        memory_tokens=embedder.memory_tokens,
        strategy=strategy,
        pooled_queries="pooled_queries" in pooling.pool_type,
        where="between" if pooling.where == "between" else "before",
        causal=embedder.causal_embedder,
        markers=tuple(marker for marker, is_kept in kept.items() if is_kept),
        bridge="none" if kind is None else "mlp" if kind == MULTI else kind,  # type: ignore[arg-type]
        bridge_hidden_size=None if bridge is None else bridge.hidden_dim,
        decoder_sizes=(out_size,) * max(num_ports, 1),
    )


def params_of_spec(spec: CompressorSpec, *, param_dtype: str, trained_layers: int, train_embeddings: bool) -> ArcParams:
    """The settings of an ARC checkpoint for a compressor of this spec.

    param_dtype: "float32" or "bfloat16", the dtype of the tensors that will be written.
    trained_layers: number of encoder layers that were trained.
    train_embeddings: whether the embedding table was trained.

    Raises WeightsError if the format cannot represent the spec: other strategies, or several decoders with different
    widths or with another bridge than mlp.
    """
    several = len(spec.decoder_sizes) > 1
    if several and (len(set(spec.decoder_sizes)) > 1 or spec.bridge != "mlp"):
        raise WeightsError(
            f"the ARC format holds several decoders only with mlp bridges of one width; this compressor has "
            f"{spec.bridge} bridges to {spec.decoder_sizes}. Use our own export format."
        )
    width = spec.backbone.hidden_size
    bridge = ArcBridge(
        bridge_type=MULTI if several else None if spec.bridge == "none" else spec.bridge,
        in_dim=width,
        out_dim=spec.decoder_sizes[0],
        hidden_dim=spec.bridge_hidden_size,
    )
    return ArcParams(
        param_dtype=param_dtype,
        embedder=ArcEmbedder(
            n_truncated_layers=spec.backbone.num_layers - spec.num_layers,
            pooling=ArcPooling(pool_type=_pool_type(spec), where=spec.where),
            memory_tokens=spec.memory_tokens,
            rec_tok="rec" in spec.markers,
            cont_tok="cont" in spec.markers,
            compress_rates=tuple(compress_rate(rule) for rule in spec.rules) if not spec.memory_tokens else (),
            trained_layers=trained_layers,
            causal_embedder=spec.causal,
            train_embedding_mtx=train_embeddings,
        ),
        bridge=bridge,
    )


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
        found = [name] if name in STRATEGIES else []
    else:
        found = [reduction for reduction in _REDUCTIONS if reduction in pool_type]
    if not found:
        raise WeightsError(
            f"`pool_type` is {pool_type!r}; expected a name with {', '.join(_REDUCTIONS)}, or metric_ and a similarity "
            "measure. Set it in params.json to the one that the checkpoint was trained with."
        )
    return found[0]


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
