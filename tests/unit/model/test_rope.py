"""Rotary angles: rules per layer and per sequence. `tests/parity/test_transformers.py` compares every scaling."""

from __future__ import annotations

import dataclasses

import torch

from arc_ds.model.backbone_config import BackboneConfig, RopeScaling
from arc_ds.model.rope import lengths_of_rows, rope_frequencies, ropes_at
from tests.helpers.tiny_models import tiny_config

POSITIONS = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4])  # two sequences, of 3 and 5 rows
CU_SEQLENS = torch.tensor([0, 3, 8], dtype=torch.int32)
LONGROPE = RopeScaling(
    kind="longrope", factor=8.0, original_max_positions=4, attention_factor=1.25,
    short_factors=(1.0, 2.0, 3.0, 4.0), long_factors=(5.0, 6.0, 7.0, 8.0),
)  # fmt: skip


def scaled(scaling: RopeScaling) -> BackboneConfig:
    return tiny_config(rope_scaling=scaling)


def test_longrope_takes_the_factors_of_each_sequence() -> None:
    config = scaled(LONGROPE)
    plain = rope_frequencies(tiny_config(), POSITIONS.device)
    lengths = lengths_of_rows(config, CU_SEQLENS, CU_SEQLENS, 8)
    rope = ropes_at(POSITIONS, config, lengths)[0]
    short, long = (torch.tensor(f) for f in (LONGROPE.short_factors, LONGROPE.long_factors))
    angles = POSITIONS[:, None] * torch.cat([(plain / short).expand(3, -1), (plain / long).expand(5, -1)])
    torch.testing.assert_close(rope.cos, 1.25 * angles.cos())
    torch.testing.assert_close(rope.sin, 1.25 * angles.sin())
    at_the_bound = rope_frequencies(config, POSITIONS.device, torch.tensor([4, 5]))
    torch.testing.assert_close(at_the_bound, torch.stack([plain / short, plain / long]))


def test_the_capacity_of_a_cache_counts_as_the_length() -> None:
    capacity = torch.tensor([0, 10, 20], dtype=torch.int32)
    assert lengths_of_rows(scaled(LONGROPE), CU_SEQLENS, capacity, 8).tolist() == [10] * 8
    assert lengths_of_rows(tiny_config(), CU_SEQLENS, capacity, 8) is None


def test_dynamic_is_plain_up_to_the_original_length() -> None:
    config = scaled(RopeScaling(kind="dynamic", factor=4.0, original_max_positions=4))
    found = rope_frequencies(config, POSITIONS.device, torch.tensor([3, 4, 5]))
    plain = rope_frequencies(tiny_config(), POSITIONS.device)
    assert torch.equal(found[0], plain) and torch.equal(found[1], plain)
    assert found[2, 0] == plain[0] and (found[2, 1:] < plain[1:]).all()


def test_dimensions_beyond_the_rotary_ones_do_not_turn_and_are_not_scaled() -> None:
    config = dataclasses.replace(scaled(LONGROPE), rotary_dim=4)
    halved = dataclasses.replace(LONGROPE, short_factors=(1.0, 2.0), long_factors=(5.0, 6.0))
    rope = ropes_at(POSITIONS, dataclasses.replace(config, rope_scaling=halved), None)[0]
    assert rope.cos.shape == (8, 4)
    assert (rope.cos[:, 2:] == 1).all() and not rope.sin[:, 2:].any()
    assert (rope.sin[1, :2] != 0).all() and rope.cos[0].tolist() == [1.25, 1.25, 1.0, 1.0]


def test_layers_without_rope_and_windowed_layers_have_their_own_rule() -> None:
    config = dataclasses.replace(
        scaled(RopeScaling(kind="linear", factor=2.0)),
        num_layers=4,
        layers_without_rope=(1,),
        window=3,
        windowed_layers=(2, 3),
        windowed_rope_scaling=False,
    )
    scaled_rope, still, windowed, other = ropes_at(POSITIONS, config, None)
    plain = ropes_at(POSITIONS, tiny_config(), None)[0]
    assert windowed is other, "layers with one rule share the angles"
    assert (still.cos == 1).all() and not still.sin.any()
    assert torch.equal(windowed.sin, plain.sin) and not torch.equal(scaled_rope.sin, plain.sin)
    assert torch.equal(scaled_rope.sin[2], plain.sin[1])


def test_queries_grow_with_the_position_beyond_the_original_length() -> None:
    rope = ropes_at(
        POSITIONS, scaled(RopeScaling(kind="yarn", factor=2.0, original_max_positions=2, query_beta=0.5)), None
    )[0]
    factors = 1.0 + 0.5 * torch.log(torch.tensor([1.0, 1.0, 2.0, 1.0, 1.0, 2.0, 2.0, 3.0]))
    torch.testing.assert_close(rope.queries[0], rope.cos * factors[:, None])
    assert rope.keys[0] is rope.cos
