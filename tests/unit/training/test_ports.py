"""Which port of the starting weights a decoder continues, which ports are kept, and their order in checkpoints."""

from __future__ import annotations

import pytest

from arc_ds.config.schema import DecoderConfig
from arc_ds.errors import ConfigError
from arc_ds.training.ports import KeptPort, PortPlan, plan_ports

BOTH = (KeptPort(0, 0, "a"), KeptPort(1, 1, "b"))


def decoder(name: str, **changes: bool) -> DecoderConfig:
    return DecoderConfig(name=name, backbone="b", **changes)


def frozen(name: str) -> DecoderConfig:
    return DecoderConfig(name=name, train=False)


@pytest.mark.parametrize(
    ("decoders", "names", "sources", "places", "kept"),
    [
        # A run that starts from a backbone.
        ([decoder("a"), decoder("b")], [], (None, None), (0, 1), ()),
        # A third decoder, with the old ones listed or not.
        ([frozen("a"), frozen("b"), decoder("c")], ["a", "b"], (None,), (2,), BOTH),
        ([decoder("c", fresh_bridge=True)], ["a", "b"], (None,), (2,), BOTH),
        ([decoder("c"), frozen("b"), frozen("a")], ["a", "b"], (None,), (2,), BOTH),
        # Decoders are found by name. Ports keep their order.
        ([decoder("b")], ["a", "b"], (1,), (1,), (KeptPort(0, 0, "a"),)),
        ([decoder("b"), decoder("a")], ["a", "b"], (1, 0), (1, 0), ()),
        ([decoder("c", fresh_bridge=True), decoder("b")], ["a", "b"], (None, 1), (2, 1), (KeptPort(0, 0, "a"),)),
        # A decoder with another name continues the port at its place, as before there were names.
        ([decoder("renamed"), decoder("new")], ["a"], (0, None), (0, 1), ()),
        ([decoder("a"), decoder("b")], [None, None], (0, 1), (0, 1), ()),
        ([frozen("a"), decoder("c", fresh_bridge=True)], [None], (None,), (1,), (KeptPort(0, 0, "a"),)),
        ([decoder("c", fresh_bridge=True)], [None], (None,), (1,), (KeptPort(0, 0, "decoder0"),)),
        ([decoder("decoder0", fresh_bridge=True)], [None], (None,), (1,), (KeptPort(0, 0, "decoder0_"),)),
        # A fresh port replaces the one of the same name.
        ([decoder("a", fresh_bridge=True)], ["a", "b"], (None,), (0,), (KeptPort(1, 1, "b"),)),
    ],
)  # fmt: skip
def test_decoders_and_ports_are_matched(decoders, names, sources, places, kept) -> None:
    assert plan_ports(decoders, names, keep_unlisted=True) == PortPlan(sources=sources, places=places, kept=kept)


def test_ports_of_unlisted_decoders_are_left_out_on_request() -> None:
    plan = plan_ports([frozen("b"), decoder("c")], ["a", "b"], keep_unlisted=False)
    assert plan == PortPlan(sources=(None,), places=(1,), kept=(KeptPort(0, 1, "b"),))


@pytest.mark.parametrize(("names", "have"), [(["a", "b"], "a, b"), ([], "no ports")])
def test_a_decoder_that_is_not_trained_needs_its_port(names: list[str], have: str) -> None:
    with pytest.raises(ConfigError, match=f"train is false for bb, .*it has {have}. Correct the names"):
        plan_ports([decoder("c"), frozen("bb")], names, keep_unlisted=True)
