"""The roofline's count against manual counts, the analytic count, and the launches of real operators."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import arc_kernels as ak
from arc_kernels._dispatch import use_triton

pytest.importorskip("triton")

TOOLS = Path(__file__).resolve().parents[3] / "tools"
META = torch.device("meta")


@pytest.fixture
def roofline(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(TOOLS)
    return importlib.import_module("roofline")


@pytest.fixture
def launches(roofline: ModuleType) -> ModuleType:
    return importlib.import_module("roofline_launches")


def _counted(roofline: ModuleType, run: Callable[[], Any]) -> list[tuple[str, int, int, int]]:
    """Kernel name, number of launches, FLOPs and bytes, by kind of launch."""
    counter = roofline.StepCounter()
    with counter:
        run()
    return [(row.kernel, row.launches, row.flops, row.bytes) for row in counter.rows()]


def _few_operations() -> None:
    x, table = torch.empty(4, 6, device=META), torch.empty(1000, 6, device=META)
    weight, rows = torch.empty(6, 5, device=META), torch.empty(3, dtype=torch.int64, device=META)
    x @ weight
    x + x
    x.view(2, 12)[1:].expand(7, 12) + 1
    x + torch.empty(6, device=META).expand(4, 6)
    table.index_select(0, rows)
    table[rows]
    x.index_put((rows,), torch.empty(3, 6, device=META))
    x.index_put_((rows,), torch.empty(3, 6, device=META), accumulate=True)
    x.add_(1).copy_(torch.empty(4, 6, device=META))


BY_HAND = [
    ("mm", 1, 2 * 4 * 6 * 5, 4 * (24 + 30 + 20)),
    ("add", 1, 0, 4 * (24 + 24)),  # one input, read once
    ("add", 1, 0, 4 * (12 + 84)),  # the twelve elements that the expanded view refers to
    ("add", 1, 0, 4 * (24 + 6 + 24)),
    ("index_select", 1, 0, 4 * (18 + 18) + 8 * 3),  # three rows of the table
    ("index", 1, 0, 4 * (18 + 18) + 8 * 3),
    ("index_put: clone", 1, 0, 4 * (24 + 24)),
    ("index_put", 1, 0, 4 * (18 + 18) + 8 * 3),
    ("index_put_", 1, 0, 4 * (18 + 2 * 18) + 8 * 3),  # read as well, because values are added to it
    ("add_", 1, 0, 4 * (24 + 24)),
    ("copy_", 1, 0, 4 * (24 + 24)),  # the target is not read
]


def test_bytes_and_products_are_those_counted_by_hand(roofline: ModuleType) -> None:
    assert _counted(roofline, _few_operations) == BY_HAND


@pytest.mark.parametrize("size", ["toy", "paper"])
def test_products_are_those_of_the_analytic_count(roofline: ModuleType, size: str) -> None:
    """Exact equality without tolerance. Attention's backward has 7 products here and 5 in the analytic count."""
    count = roofline.count(roofline.SIZES[size])
    analytic = count.analytic
    passes = (analytic.encoder_forward, analytic.encoder_backward, analytic.decoder_forward, analytic.decoder_backward)
    weights = count.of("products", "cross-entropy").flops
    assert weights == sum(part.linear for part in passes) + analytic.bridge + analytic.head
    forward, backward = (count.of("attention", phases=(phase,)).flops for phase in ("forward", "backward"))
    assert forward == passes[0].attention + passes[2].attention
    assert 5 * backward == 7 * (passes[1].attention + passes[3].attention)


def test_plain_torch_makes_the_same_products_with_more_launches_and_bytes(roofline: ModuleType) -> None:
    paper = roofline.PAPER
    encoder, decoder = replace(paper.encoder, num_layers=4), replace(paper.decoder, num_layers=2)
    size = replace(paper, encoder=encoder, decoder=decoder)
    ours, plain = (roofline.count(size, implementation=each) for each in ("ours", "torch"))
    assert ours.of("products", "cross-entropy").flops == plain.of("products", "cross-entropy").flops
    assert ours.launches < plain.launches
    assert ours.bytes < plain.bytes
    for family in ("attention", "norms", "SwiGLU", "rotary"):
        assert ours.of(family).launches < plain.of(family).launches, family
        assert ours.of(family).bytes < plain.of(family).bytes, family
        assert plain.of(family, phases=("backward",)).launches > 0, family


@pytest.mark.parametrize("implementation", ["ours", "torch"])
def test_recomputation_adds_the_forward_of_layers_once(roofline: ModuleType, implementation: str) -> None:
    """Recomputation of a layer may stop at the last tensor that backward needs, and so omit the last product."""
    kept, again = (roofline.count(roofline.TOY, implementation=implementation, recompute=r) for r in (False, True))
    analytic, sizes = kept.analytic, (roofline.TOY.encoder, roofline.TOY.decoder)
    forward = analytic.encoder_forward.linear + analytic.decoder_forward.linear
    last_products = sum(2 * 100 * 2 * each.hidden_size * each.ffn_size for each in sizes)  # at most 100 rows
    recomputed = again.of("products", phases=("recompute",)).flops
    assert forward - last_products <= recomputed <= forward
    for phase in ("forward", "backward"):
        assert again.of("products", phases=(phase,)).flops == kept.of("products", phases=(phase,)).flops
    assert kept.of(*roofline.FAMILIES, phases=("recompute",)).launches == 0


def test_additions_of_gradients_are_those_that_autograd_makes(roofline: ModuleType) -> None:
    class AddsItself(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] + grads[0]

    x = torch.empty(5, device=META, requires_grad=True)
    counter = roofline.StepCounter()
    with counter:
        (AddsItself.apply(x) + x.sin() + x.cos()).sum().backward()
    additions = [row for row in counter.rows() if row.family == "gradient additions"]
    assert sum(row.launches for row in additions) == 2  # of the three gradients of x
    assert {row.bytes for row in additions} == {4 * 3 * 5}
    assert sum(row.launches for row in counter.rows() if row.kernel == "add") == 2 + 2 + 1


class _RealLaunches(TorchDispatchMode):
    """Runs each operator of `arc_kernels` and compares its launches with the predicted ones."""

    def __init__(self, launches: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.launches, self.seen, self._launched = launches, set[str](), 0
        interpreter = importlib.import_module("triton.runtime.interpreter")
        launch = interpreter.GridExecutor.__call__

        def counted(*args: Any, **kwargs: Any) -> None:
            self._launched += 1
            with _disable_current_modes():  # the interpreter makes additional copies
                launch(*args, **kwargs)

        monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func.namespace != "arc_kernels":
            result = func(*args, **(kwargs or {}))
            self._launched += len(self.launches.launches_of(func, args, kwargs or {}, result))
            return result
        self._launched = 0
        with self:
            result = torch._library.custom_ops.OPDEFS[func._schema.name]._init_fn(*args)
        predicted = self.launches.launches_of(func, args, {}, result)
        assert self._launched == len(predicted), (func, predicted)
        self.seen.add(func._schema.name.partition("::")[2])
        return result


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts launches of Triton's interpreter")
def test_every_kernel_launches_as_often_as_predicted(
    roofline: ModuleType, launches: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    paper_step = importlib.import_module("paper_step")
    size = replace(roofline.TOY, decoder=replace(roofline.TOY.decoder, num_layers=1))
    compressor, decoder = paper_step.build_models(size, device="cpu", dtype=torch.bfloat16)
    batch = paper_step.make_batch(size)
    x, groups = torch.ones(4, 8, requires_grad=True), torch.tensor([0, 1, 4], dtype=torch.int32)
    with ak.use("triton"), _RealLaunches(launches, monkeypatch) as real:
        decoder(batch, compressor(batch)).sum().backward()
        ak.group_pool(x, groups, "mean", 2).square().sum().backward()
        ak.layer_norm(x, 1e-5).square().sum().backward()
        ak.rms_norm(x, torch.ones(8, requires_grad=True), 1e-5).square().sum().backward()  # float32: no cast
    assert real.seen == set(launches.OPERATORS)


def test_segments_of_different_lengths_are_refused(roofline: ModuleType) -> None:
    q, k = torch.empty(7, 2, 8, device=META), torch.empty(7, 2, 8, device=META)
    cu = torch.empty(3, dtype=torch.int32, device=META)
    sizes = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": 4, "max_seqlen_k": 4}
    with ak.use("triton"), roofline.StepCounter(), pytest.raises(ValueError, match="samples of one length"):
        ak.attention_varlen(q, k, k, **sizes)


def test_a_window_lowers_the_count_of_visible_pairs(launches: ModuleType) -> None:
    cu, q, k = torch.empty(3), torch.empty(6, 2, 8), torch.empty(10, 2, 8)
    call = {"cu_seqlens_q": cu, "max_seqlen_q": 3, "max_seqlen_k": 5, "q": q, "k": k, "k_limits": None, "causal": True}
    pairs = [launches.visible_pairs(call | {"window": window}) for window in (None, 5, 4, 1)]
    assert pairs == [2 * (3 + 4 + 5), 2 * (3 + 4 + 5), 2 * (3 + 4 + 4), 2 * 3]


def test_a_meta_tensor_takes_the_kernels_only_when_told_to() -> None:
    x = torch.empty(4, 8, device=META)
    assert not use_triton(x)
    with ak.use("triton"):
        assert use_triton(x)
        normed, total = ak.add_rms_norm(x, x, torch.empty(8, device=META), 1e-5)
    assert (normed.shape, total.shape, normed.device) == (x.shape, x.shape, META)


def test_the_command_prints_both_tables_and_writes_all_rows(
    roofline: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    assert roofline.main(["--size", "toy", "--top", "3", "--markdown", "--csv", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("| gradient additions |") == 2
    assert "our kernels" in printed and "plain torch" in printed
    num_rows = sum(len(roofline.count(roofline.TOY, implementation=each).rows) for each in ("ours", "torch"))
    assert len(path.read_text().splitlines()) == 1 + num_rows


def test_a_launch_takes_the_longer_of_products_and_bytes(roofline: ModuleType) -> None:
    row = roofline.Row(family="", phase="forward", kernel="", shapes="", launches=3, flops=2 * 10**12, bytes=10**9)
    assert row.ms(tflops=100.0, gbps=1000.0) == pytest.approx(3 * 20.0)
    assert row.ms(tflops=1000.0, gbps=100.0) == pytest.approx(3 * 10.0)
