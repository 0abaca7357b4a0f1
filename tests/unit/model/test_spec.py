"""CompressorSpec: checkpoints and exports store the spec that was built, and the config accepts every strategy."""

from __future__ import annotations

import dataclasses
import json
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arc_ds.batch.groups import GroupRule
from arc_ds.config.schema import BridgeConfig, PoolingConfig, PoolingStrategy
from arc_ds.errors import WeightsError
from arc_ds.model.backbone_config import FIRST_FIELDS, RopeScaling
from arc_ds.model.bridge import BridgeKind
from arc_ds.model.encoder import Where
from arc_ds.model.pooling import STRATEGIES
from arc_ds.model.spec import LATER_FIELDS, CompressorSpec, build_compressor
from tests.helpers.tiny_export import ENCODER, tiny_spec

SCALING = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=32)

backbones = st.builds(
    dataclasses.replace,
    st.just(ENCODER),
    rope_scaling=st.sampled_from([None, SCALING]),
    norm=st.sampled_from(["rms", "layer"]),
    rope_theta=st.floats(1e3, 1e6),
)
rules = st.builds(GroupRule, st.sampled_from(["factor", "count", "none", "floor_factor"]), st.integers(1, 64))
specs = st.builds(
    CompressorSpec,
    backbone=backbones,
    num_layers=st.integers(1, 2),
    rules=st.lists(rules, max_size=2).map(tuple),
    memory_tokens=st.integers(0, 9),
    strategy=st.sampled_from(list(STRATEGIES)),
    pooled_queries=st.booleans(),
    where=st.sampled_from(get_args(Where)),
    causal=st.booleans(),
    markers=st.sampled_from([("cont", "rec"), ("cont",), ("rec",), ()]),
    bridge=st.sampled_from(get_args(BridgeKind)),
    bridge_hidden_size=st.none() | st.integers(1, 99),
    bridge_shared=st.booleans(),
    decoder_sizes=st.lists(st.integers(1, 99), min_size=1, max_size=3).map(tuple),
)


@given(spec=specs)
def test_json_carries_every_field(spec: CompressorSpec) -> None:
    assert CompressorSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_a_json_of_another_version_is_refused() -> None:
    plain = tiny_spec().to_json()
    for change in (
        {"new": 1},
        {"backbone": {**plain["backbone"], "new": 1}},
        {"rules": [{"kind": "factor"}]},
        {"where": "beside"},
        {"bridge": "cubic"},
    ):
        with pytest.raises(WeightsError, match="does not match this version"):
            CompressorSpec.from_json({**plain, **change})


@pytest.mark.parametrize(
    ("section", "name"),
    [
        *(("compressor", f.name) for f in dataclasses.fields(CompressorSpec) if f.name not in LATER_FIELDS),
        *(("backbone", name) for name in FIRST_FIELDS),
    ],
)
def test_a_missing_field_is_not_filled_with_a_default(section: str, name: str) -> None:
    plain = tiny_spec().to_json()
    del (plain if section == "compressor" else plain[section])[name]
    with pytest.raises(WeightsError, match=name):
        CompressorSpec.from_json(plain)


def test_a_json_of_the_first_version_means_what_that_version_computed() -> None:
    spec = tiny_spec()
    plain = spec.to_json()
    plain["backbone"] = {name: plain["backbone"][name] for name in FIRST_FIELDS}
    plain = {name: value for name, value in plain.items() if name not in LATER_FIELDS}
    assert CompressorSpec.from_json(plain) == spec


def test_the_config_names_exactly_the_choices_that_there_are() -> None:
    assert sorted(get_args(PoolingStrategy)) == sorted(STRATEGIES)
    hints = get_type_hints(PoolingConfig), get_type_hints(BridgeConfig)
    assert (get_args(hints[0]["where"]), get_args(hints[1]["kind"])) == (get_args(Where), get_args(BridgeKind))


def test_a_compressor_is_built_as_its_spec_says() -> None:
    spec = tiny_spec(num_layers=2, rules=(GroupRule("factor", 2),) * 2, markers=("rec",), decoder_sizes=(48, 40))
    with torch.device("meta"):
        compressor = build_compressor(spec, activation_checkpointing="full")
    encoder = compressor.encoder
    assert (len(encoder.layers), encoder.num_pooled_layers, encoder.activation_checkpointing) == (2, 2, "full")
    assert [tuple(port.bridge.layer2.weight.shape) for port in compressor.ports] == [(48, 24), (40, 24)]
    assert all(port.markers == ("rec",) for port in compressor.ports)
    assert spec.packing.rules == spec.rules
    with pytest.raises(ValueError, match="equal widths"):
        build_compressor(tiny_spec(bridge="none"))
