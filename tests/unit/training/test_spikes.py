"""The decision whether a step is a spike."""

from __future__ import annotations

import json
import math

from arc_ds.config.schema import SkipSpikesConfig
from arc_ds.training.spikes import SpikeGuard

CONFIG = SkipSpikesConfig(loss=2.0, gradient_norm=5.0, window=4)


def _guard(*steps: tuple[float, float]) -> SpikeGuard:
    guard = SpikeGuard(CONFIG)
    for loss, norm in steps:
        assert not guard.judge("0", loss, norm)
    return guard


def test_a_spike_of_the_loss_or_of_the_norm_is_found_once_half_the_window_is_there() -> None:
    assert not _guard((3.0, 1.0)).judge("0", 99.0, 99.0)
    for loss, norm, is_spike in [(6.0, 5.0, False), (6.1, 1.0, True), (3.0, 5.1, True)]:
        assert _guard((3.0, 1.0), (3.0, 1.0)).judge("0", loss, norm) is is_spike


def test_steps_of_other_decoders_do_not_count() -> None:
    guard = _guard((3.0, 1.0), (3.0, 1.0))
    assert not guard.judge("1", 9.0, 1.0)
    assert not guard.judge("0,1", 9.0, 1.0)
    assert guard.judge("0", 9.0, 1.0)


def test_a_lasting_change_becomes_the_new_level() -> None:
    """Half a window later: a median of skipped steps is a level, not a spike."""
    guard = _guard(*[(3.0, 1.0)] * 4)
    assert [guard.judge("0", 9.0, 1.0) for _ in range(4)] == [True, True, False, False]


def test_steps_that_are_not_finite_are_left_to_deepspeed() -> None:
    guard = _guard((3.0, 1.0), (3.0, 1.0))
    assert not guard.judge("0", math.inf, 1.0) and not guard.judge("0", 3.0, math.nan)
    assert guard.judge("0", 6.1, 1.0), "and do not enter the window"


def test_a_resumed_guard_decides_like_the_old_one() -> None:
    old, new = _guard(*[(0.1 + idx / 30, 0.7 / (idx + 1)) for idx in range(4)]), SpikeGuard(CONFIG)
    old.num_skipped = 5
    new.load_json(json.loads(json.dumps(old.to_json())))
    assert new.to_json() == old.to_json() and new.num_skipped == 5
    level = 2 * (0.1 + 1.5 / 30)  # twice the median loss
    for loss in (level - 1e-9, level + 1e-9, 0.3):
        assert new.judge("0", loss, 0.1) is old.judge("0", loss, 0.1)
    SpikeGuard(CONFIG).load_json({})
