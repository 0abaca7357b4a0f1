"""The message when ranks differ names the value, the ranks and their hosts."""

from __future__ import annotations

from importlib import metadata

import pytest

from arc_ds.errors import ConfigError
from arc_ds.system import dist
from arc_ds.training.same_on_ranks import check_same, software


def _check(monkeypatch: pytest.MonkeyPatch, *ranks: tuple[str, dict[str, object]]) -> None:
    gathered = [(host, {name: str(value) for name, value in values.items()}) for host, values in ranks]
    monkeypatch.setattr(dist, "gather_objects", lambda _mine: gathered)
    check_same({}, "Install it.")


def test_equal_ranks_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    _check(monkeypatch, ("a", {"torch": "2"}), ("b", {"torch": "2"}))


def test_each_value_has_its_ranks_and_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    two, one = {"torch": "2", "seed": 1}, {"torch": "1", "seed": 1}
    ranks = [("a", two), ("a", two), ("b", one), ("b", one), ("c", one)]
    with pytest.raises(ConfigError, match=r"torch: 1 \(ranks 2-3 on b, rank 4 on c\), but 2 \(ranks 0-1 on a\)\. Ins"):
        _check(monkeypatch, *ranks)


def test_a_value_that_one_rank_lacks_is_a_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"NCCL_ALGO: nothing \(rank 1 on b\), but Ring \(rank 0 on a\)\. Ins"):
        _check(monkeypatch, ("a", {"NCCL_ALGO": "Ring"}), ("b", {}))


def test_settings_of_collectives_count_unless_they_name_a_hosts_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    before = software()
    assert before["torch"] == metadata.version("torch")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth7")
    monkeypatch.setenv("HOME", "/elsewhere")
    assert software() == before
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    monkeypatch.setenv("TORCH_NCCL_BLOCKING_WAIT", "1")
    assert software() == before | {"NCCL_ALGO": "Ring", "TORCH_NCCL_BLOCKING_WAIT": "1"}
