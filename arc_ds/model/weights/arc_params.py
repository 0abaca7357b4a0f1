"""Typed `params.json` of an ARC checkpoint, with the reference's field names and order.

Unknown keys are kept and written back, so a round trip loses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from arc_ds.errors import WeightsError
from arc_ds.model.weights.fields import Fields

MULTI = "multi_module"
BRIDGE_TYPES = ("mlp", "linear", "rms", MULTI, None)


@dataclass(frozen=True, kw_only=True)
class ArcPooling:
    """The pooling settings.

    pool_type: matched by substring: last, sum, mean or fusion, pooled_queries, metric_*.
    where: "before" the attention or "between" attention and feed-forward.
    extra: keys that this version does not know.
    """

    pool_type: str
    where: str
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ArcEmbedder:
    """The encoder settings.

    compress_rates: one rate per pooled layer. -N pools by the factor N, 0 pools to one group, -1 does not pool, +N
        pools to N groups.
    extra: keys that this version does not know.
    """

    n_truncated_layers: int
    pooling: ArcPooling | None
    memory_tokens: int
    rec_tok: bool
    cont_tok: bool
    compress_rates: tuple[int, ...]
    trained_layers: int
    causal_embedder: bool
    train_embedding_mtx: bool
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ArcBridge:
    """The bridge settings.

    bridge_type: None for no bridge.
    hidden_dim: None for out_dim.
    extra: keys that this version does not know.
    """

    bridge_type: str | None
    in_dim: int
    out_dim: int
    hidden_dim: int | None
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ArcParams:
    """The whole `params.json`.

    param_dtype: dtype of the stored weights, "float32", "bfloat16", ...
    extra: keys that this version does not know.
    """

    param_dtype: str
    embedder: ArcEmbedder
    bridge: ArcBridge | None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The text of the file."""
        plain = {
            "param_dtype": self.param_dtype,
            "embedder_params": _plain_embedder(self.embedder),
            "bridge_module": None if self.bridge is None else _plain_bridge(self.bridge),
            **self.extra,
        }
        return json.dumps(plain, indent=4)

    @staticmethod
    def of(fields: Fields) -> ArcParams:
        """Parse the fields of a file. Raises WeightsError on a missing field or a wrong type."""
        embedder = fields.get("embedder_params")
        if not isinstance(embedder, dict):
            raise fields.wrong("embedder_params", "an object", embedder)
        bridge = fields.get("bridge_module")
        if bridge is not None and not isinstance(bridge, dict):
            raise fields.wrong("bridge_module", "an object or null", bridge)
        return ArcParams(
            param_dtype=str(fields.get("param_dtype", "float32")),
            embedder=_embedder(Fields(embedder, f"{fields.where}: embedder_params")),
            bridge=None if bridge is None else _bridge(Fields(bridge, f"{fields.where}: bridge_module")),
            extra=_others(fields, "param_dtype", "embedder_params", "bridge_module"),
        )


def _embedder(fields: Fields) -> ArcEmbedder:
    rates = fields.get("compress_rates")
    if not isinstance(rates, list) or any(isinstance(r, bool) or not isinstance(r, int) for r in rates):
        raise fields.wrong("compress_rates", "a list of whole numbers", rates)
    pooling = fields.get("pooling_module")
    if pooling is not None and not isinstance(pooling, dict):
        raise fields.wrong("pooling_module", "an object or null", pooling)
    return ArcEmbedder(
        n_truncated_layers=_count(fields, "n_truncated_layers"),
        pooling=None if pooling is None else _pooling(Fields(pooling, f"{fields.where}: pooling_module")),
        memory_tokens=_count(fields, "memory_tokens", 0),
        rec_tok=fields.flag("rec_tok", False),
        cont_tok=fields.flag("cont_tok", False),
        compress_rates=tuple(rates),
        trained_layers=_count(fields, "trained_layers", 0),
        causal_embedder=fields.flag("causal_embedder", False),
        train_embedding_mtx=fields.flag("train_embedding_mtx", False),
        extra=_others(
            fields,
            *("n_truncated_layers", "pooling_module", "memory_tokens", "rec_tok", "cont_tok", "compress_rates"),
            *("trained_layers", "causal_embedder", "train_embedding_mtx"),
        ),
    )


def _pooling(fields: Fields) -> ArcPooling:
    pool_type, where = fields.get("pool_type"), fields.get("where", "before")
    if not isinstance(pool_type, str):
        raise fields.wrong("pool_type", "a name such as mean_pooled_queries", pool_type)
    return ArcPooling(pool_type=pool_type, where=str(where), extra=_others(fields, "pool_type", "where"))


def _bridge(fields: Fields) -> ArcBridge:
    kind = fields.get("bridge_type")
    if kind not in BRIDGE_TYPES:
        names = ", ".join(str(k) for k in BRIDGE_TYPES)
        raise WeightsError(f"{fields.where}: `bridge_type` is {kind!r}; expected one of {names}.")
    return ArcBridge(
        bridge_type=kind,
        in_dim=fields.integer("in_dim"),
        out_dim=fields.integer("out_dim"),
        hidden_dim=None if fields.get("hidden_dim") is None else fields.integer("hidden_dim"),
        extra=_others(fields, "bridge_type", "in_dim", "out_dim", "hidden_dim"),
    )


def _count(fields: Fields, key: str, default: int | None = None) -> int:
    """A whole number of at least 0."""
    value = fields.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise fields.wrong(key, "a whole number of at least 0", value)
    return value


def _others(fields: Fields, *known: str) -> dict[str, Any]:
    return {key: value for key, value in fields.values.items() if key not in known}


def _plain_embedder(embedder: ArcEmbedder) -> dict[str, Any]:
    pooling = embedder.pooling
    return {
        "n_truncated_layers": embedder.n_truncated_layers,
        "pooling_module": None
        if pooling is None
        else {"pool_type": pooling.pool_type, "where": pooling.where, **pooling.extra},
        "memory_tokens": embedder.memory_tokens,
        "rec_tok": embedder.rec_tok,
        "cont_tok": embedder.cont_tok,
        "compress_rates": list(embedder.compress_rates),
        "trained_layers": embedder.trained_layers,
        "causal_embedder": embedder.causal_embedder,
        "train_embedding_mtx": embedder.train_embedding_mtx,
        **embedder.extra,
    }


def _plain_bridge(bridge: ArcBridge) -> dict[str, Any]:
    return {
        "bridge_type": bridge.bridge_type,
        "in_dim": bridge.in_dim,
        "out_dim": bridge.out_dim,
        "hidden_dim": bridge.hidden_dim,
        **bridge.extra,
    }
