"""Gathers and shards of ZeRO-3 by hand. `tests/distributed/test_plan.py` compares them with DeepSpeed's."""

from __future__ import annotations

from torch import nn

from arc_ds.planning.zero import Weights, ZeroSettings, count_reductions, simulate_gathers

NO_REUSE = ZeroSettings(prefetch_bucket=0, persistence_threshold=0, max_reuse_distance=0)
SIZES = (10, 20, 30)


def _chain(*, num_frozen: int = 0) -> Weights:
    """Three modules with one parameter each, in a parent that has none."""
    layers = [nn.Linear(size, 1, bias=False) for size in SIZES]
    for layer in layers[:num_frozen]:
        layer.requires_grad_(False)
    return Weights.of(nn.Sequential(*layers))


def _gathered(weights: Weights, settings: ZeroSettings) -> list[int]:
    return [size for gather in simulate_gathers(weights, settings).sizes for size in gather]


def test_every_module_is_gathered_in_forward_and_in_backward() -> None:
    gathers = simulate_gathers(_chain(), NO_REUSE)
    assert gathers.sizes == ((10,), (20,), (30,), (30,), (20,), (10,))
    assert gathers.peak == 30
    assert gathers.elements(num_ranks=4) == 2 * (12 + 20 + 32)  # padded to a multiple of the ranks


def test_backward_gathers_nothing_before_the_first_trained_module() -> None:
    assert _gathered(_chain(num_frozen=2), NO_REUSE) == [10, 20, 30, 30]
    assert _gathered(_chain(num_frozen=3), NO_REUSE) == [10, 20, 30, 30, 20, 10]  # a frozen decoder: gradients pass


def test_a_module_that_comes_again_soon_is_kept() -> None:
    near = ZeroSettings(prefetch_bucket=0, persistence_threshold=0, max_reuse_distance=1000)
    assert _gathered(_chain(), near) == [10, 20, 30]
    assert simulate_gathers(_chain(), near).peak == sum(SIZES)


def test_a_prefetch_keeps_the_last_module_because_its_parent_comes_first_in_backward() -> None:
    ahead = ZeroSettings(prefetch_bucket=5, persistence_threshold=0, max_reuse_distance=0)
    assert _gathered(_chain(), ahead) == [10, 20, 30, 20, 10]
    flat = _chain()
    alone = flat._replace(forward=tuple(turn for turn in flat.forward if turn), backward=flat.backward[1:])
    assert _gathered(alone, ahead) != [10, 20, 30, 20, 10]


def test_the_second_copy_within_a_host_serves_all_but_the_first_gather_of_a_trained_parameter() -> None:
    gathers = simulate_gathers(_chain(num_frozen=1), NO_REUSE)
    assert gathers.sizes == ((10,), (20,), (30,), (30,), (20,))
    assert gathers.part(is_first=True).sizes == ((20,), (30,))
    assert gathers.part(is_first=False).sizes == ((10,), (30,), (20,))


def test_small_parameters_are_never_released() -> None:
    keeps_two = ZeroSettings(prefetch_bucket=0, persistence_threshold=20, max_reuse_distance=0)
    assert _gathered(_chain(), keeps_two) == [30, 30]
    assert simulate_gathers(_chain(), keeps_two).peak == sum(SIZES)


def test_a_gradient_that_does_not_fit_sends_the_bucket() -> None:
    assert [count_reductions(_chain(), bucket) for bucket in (60, 50, 30, 5)] == [1, 2, 2, 3]
    assert count_reductions(_chain(num_frozen=3), 60) == 0


def test_shards_are_padded_and_frozen_parameters_have_no_gradient() -> None:
    weights = _chain(num_frozen=1)
    assert weights.shard(4) == 3 + 5 + 8
    assert weights.shard(4, trained_only=True) == 5 + 8
    assert weights.num_trained == 50
