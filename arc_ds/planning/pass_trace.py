"""Forward and backward of one micro-batch on the meta device: memory, matrix products and bytes moved.

The real modules run on tensors without values, in about a second at the paper's size. A dispatch mode sees every
operation. It follows each tensor from its allocation to its release, so the peak contains what autograd keeps and what
operations need in between. With Triton installed, the functions of `arc_kernels` run as on a GPU: their operators have
shapes for "meta", and what their autograd functions save is what a GPU keeps (`kernels/arc_kernels/*/autograd.py`).

Parameters and their gradients are not counted here. ZeRO-3 partitions the ones, and reduces and frees the others as
soon as they are computed (`zero.py`).
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

import arc_kernels as ak
from arc_ds.batch.packing import PackedBatch
from arc_ds.model.backbone import Block, Head, TokenEmbedding
from arc_ds.model.compressor import Compressor, DecoderPort, connect_adapters
from arc_ds.model.encoder import PooledBlock

ENCODER_LAYERS, POOLED_LAYERS, PORTS = "encoder layers", "pooled layers", "markers and bridge"
EMBEDDINGS, DECODER_LAYERS, LOSS = "embeddings and splice", "decoder layers", "head and loss"
WEIGHT_GRADIENTS, BACKWARD, OTHER = "weight gradients", "gradients of activations", "other"
KINDS = (
    ENCODER_LAYERS, POOLED_LAYERS, PORTS, EMBEDDINGS, DECODER_LAYERS, LOSS, BACKWARD, WEIGHT_GRADIENTS, OTHER,
)  # fmt: skip

_PRODUCTS = ("mm", "addmm", "addmm_", "bmm")
_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
# These touch only some rows of a tensor: they read rows and write the output, or read their last input and write rows.
_READ_ROWS = ("index_select", "index", "embedding", "splice")
_WRITE_ROWS = ("index_copy_", "index_put", "index_put_")


@dataclass(frozen=True, kw_only=True)
class PassTrace:
    """One micro-batch, forward and backward.

    peak: bytes at the peak, by kind.
    saved: bytes that autograd keeps at the end of forward, by kind.
    product_flops: operations of matrix products with weights, those of recomputed layers included.
    repeated_attention: attention forwards that backward repeats, as a share of those of forward.
    other_bytes: bytes that all operations without products read and write.
    num_operations: operations that launch something.
    kernels: "triton" or "reference", the implementation that was traced.
    """

    peak: Mapping[str, int]
    saved: Mapping[str, int]
    product_flops: int
    repeated_attention: float
    other_bytes: int
    num_operations: int
    kernels: str

    @property
    def peak_bytes(self) -> int:
        """Bytes at the peak."""
        return sum(self.peak.values())


def trace_pass(
    compressor: Compressor,
    decoder: nn.Module,
    batch: PackedBatch,
    decoder_idx: int = 0,
    *,
    kernels: str | None = None,
) -> PassTrace:
    """Trace one micro-batch.

    compressor: with `requires_grad` as in the run. Its gradients are dropped.
    decoder: frozen.
    batch: on the device of the modules ("meta"; a test uses the CPU).
    decoder_idx: index of the decoder's port.
    kernels: "triton" or "reference"; None for those of a GPU if Triton is installed, else plain torch's.
    """
    kernels = kernels or ("triton" if find_spec("triton") else "reference")
    tracker = _Tracker([*compressor.parameters(), *decoder.parameters()], batch_tensors(batch))
    with ExitStack() as stack:
        stack.enter_context(ak.use(kernels))  # type: ignore[arg-type]
        for handle in (*_follow_modules(tracker, compressor, decoder), *drop_gradients(compressor)):
            stack.enter_context(handle)  # removes the hook
        stack.enter_context(tracker)
        connect_adapters([compressor.ports[decoder_idx]], [decoder])
        nll_L = decoder(batch, compressor(batch, decoder_idx))
        saved, forward_calls = +tracker.live, max(tracker.attention_calls, 1)
        tracker.kinds.append(BACKWARD)
        nll_L.sum().backward()
    return PassTrace(
        peak=tracker.peak,
        saved=saved,
        product_flops=tracker.product_flops,
        repeated_attention=max(tracker.attention_calls / forward_calls - 1, 0.0),
        other_bytes=tracker.other_bytes,
        num_operations=tracker.num_operations,
        kernels=kernels,
    )


def batch_tensors(batch: PackedBatch) -> list[Tensor]:
    """The tensors of a batch, those of its parts included."""
    parts: list[Any] = [batch, *batch.levels, *([batch.prefix] if batch.prefix is not None else [])]
    return _tensors([getattr(part, name) for part in parts for name in part.__dataclass_fields__])


class _Tracker(TorchDispatchMode):
    """Follows allocations and counts operations.

    kinds: stack of the kinds of memory; the last one is that of new allocations.
    """

    def __init__(self, parameters: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.kinds = [OTHER]
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.product_flops = self.attention_calls = self.other_bytes = self.num_operations = 0
        known = (x.untyped_storage()._cdata for x in (*parameters, *inputs))
        self._allocations: dict[int, weakref.ref[Any] | None] = dict.fromkeys(known)
        self._shapes = {tuple(parameter.shape) for parameter in parameters if parameter.requires_grad}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        name = func._schema.name.partition("::")[2]
        for output in outputs:
            self._follow(output)
        workspace = self._count(name, inputs, outputs, is_view=func.is_view)
        if self.live.total() + workspace > self.peak.total():
            self.peak = self.live + Counter({LOSS: workspace})
        return result

    def _follow(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self._allocations:
            return
        kind, num_bytes = self.kinds[-1], storage.nbytes()
        if kind == BACKWARD and tuple(x.shape) in self._shapes:
            kind = WEIGHT_GRADIENTS

        def forget(_: object) -> None:
            del self._allocations[key]
            self.live[kind] -= num_bytes

        self._allocations[key] = weakref.ref(storage, forget)
        self.live[kind] += num_bytes

    def _count(self, name: str, inputs: list[Tensor], outputs: list[Tensor], *, is_view: bool) -> int:
        """Count an operation, and return the bytes that it needs while it runs."""
        if is_view or name in _ALLOCATIONS or name in ("detach", "alias", "_unsafe_view"):
            return 0
        self.num_operations += 1
        if name in _PRODUCTS:
            left, right = inputs[-2:]
            self.product_flops += 2 * left.numel() * right.shape[-1]
            return 0
        self.attention_calls += name in ("attention_forward", "scaled_dot_product_attention")
        if name == "linear_cross_entropy":
            return self._count_loss(*inputs[:2])
        if name in _READ_ROWS:
            self.other_bytes += 2 * _num_bytes(outputs)
        elif name in _WRITE_ROWS:
            self.other_bytes += 2 * _num_bytes(inputs[-1:])
        else:
            self.other_bytes += _num_bytes(inputs) + _num_bytes(outputs)
        return 0

    def _count_loss(self, h_LD: Tensor, weight_VD: Tensor) -> int:
        """The fused loss: two products for each chunk of rows, and a kernel that reads its logits twice and writes them
        once."""
        from arc_kernels.cross_entropy.kernels import chunk_rows

        num_rows, vocab_size = h_LD.shape[0], weight_VD.shape[0]
        row_bytes = vocab_size * h_LD.element_size()
        self.product_flops += 2 * 2 * h_LD.numel() * vocab_size
        self.other_bytes += 3 * num_rows * row_bytes
        return min(chunk_rows(num_rows, row_bytes=row_bytes), num_rows) * row_bytes


def _follow_modules(tracker: _Tracker, compressor: Compressor, decoder: nn.Module) -> Iterator[RemovableHandle]:
    """Attribute allocations to the module that runs, also while backward recomputes it."""

    def leave(*_: object) -> None:  # a hook that returns something would replace the module's output
        tracker.kinds.pop()

    for root in (compressor, decoder):
        for module in root.modules():
            kind = _kind_of(module, is_encoder=root is compressor)
            if kind is not None:
                yield module.register_forward_pre_hook(lambda *_, kind=kind: tracker.kinds.append(kind))
                # Always, because non-reentrant checkpointing stops a recomputed layer by an exception.
                yield module.register_forward_hook(leave, always_call=True)


def _kind_of(module: nn.Module, *, is_encoder: bool) -> str | None:
    if isinstance(module, PooledBlock):
        return POOLED_LAYERS
    if isinstance(module, Block):
        return ENCODER_LAYERS if is_encoder else DECODER_LAYERS
    if isinstance(module, DecoderPort):
        return PORTS
    if isinstance(module, TokenEmbedding):
        return EMBEDDINGS
    return LOSS if isinstance(module, Head) else None


def drop_gradients(compressor: nn.Module) -> list[RemovableHandle]:
    """Drop each gradient when it is complete, as ZeRO-3 does once it has copied it to its bucket."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    return [p.register_post_accumulate_grad_hook(drop) for p in compressor.parameters() if p.requires_grad]


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _num_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)
