"""Counts the launches of a step by family: a dispatch mode that sees every operator, forward and backward.

Families of operations: products with weights; one for each folder of `arc_kernels`, for the operations that its code
runs and their gradients; operations by index (lookups, scatters, the splice); additions of gradients at branch points;
copies and casts; the rest.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

import torch
import torch.utils.checkpoint
from roofline_launches import OPERATORS, Launch, launches_of
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Phase = Literal["forward", "recompute", "backward"]

PRODUCTS, ATTENTION, CROSS_ENTROPY = "products", "attention", "cross-entropy"
BY_INDEX, ADDITIONS, COPIES, OTHER = "by index", "gradient additions", "copies and casts", "other"
FAMILY_OF_FOLDER = {
    "attention": ATTENTION,
    "cross_entropy": CROSS_ENTROPY,
    "norm": "norms",
    "swiglu": "SwiGLU",
    "rotary": "rotary",
    "pooling": "pooling",
    "splice": BY_INDEX,
}
FAMILIES = (PRODUCTS, *dict.fromkeys(FAMILY_OF_FOLDER.values()), ADDITIONS, COPIES, OTHER)
_BY_INDEX_NAMES = ("index", "gather", "scatter", "embedding")
_COPY_NAMES = ("_to_copy", "clone", "copy_", "cat", "stack")
_ENGINE = torch.autograd.graph.__file__  # calls autograd's engine
_CHECKPOINT = torch.utils.checkpoint.__file__  # runs layers again
_TORCH = os.path.dirname(torch.__file__)


@dataclass(frozen=True, kw_only=True)
class Row:
    """Launches of one kind: of equal shapes, in one phase.

    family: one of FAMILIES.
    phase: "forward", "recompute" (layers that run again in backward) or "backward".
    kernel: name of the operator, and of the kernel if the operator launches several.
    shapes: of the operator's first tensors.
    launches: their number.
    flops, bytes: of one launch.
    """

    family: str
    phase: Phase
    kernel: str
    shapes: str
    launches: int
    flops: int
    bytes: int

    def ms(self, *, tflops: float, gbps: float) -> float:
        """Milliseconds of all launches: products at the matrix rate or bytes at the bandwidth, if that is longer."""
        return self.launches * max(self.flops / tflops / 1e9, self.bytes / gbps / 1e6)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor, scale: float | None) -> Tensor:
    """`F.scaled_dot_product_attention` as a GPU runs it: on "meta" it falls back to products that write all scores."""
    bias = torch.where(attn_mask, 0.0, -torch.inf).to(q.dtype).expand(*q.shape[:3], k.shape[2])
    attend = torch.ops.aten._scaled_dot_product_efficient_attention
    return attend(q, k, v, bias, compute_log_sumexp=True, scale=scale)[0]


class StepCounter(TorchDispatchMode):
    """Counts the launches of everything that runs within it, forward and backward, by family, phase and shapes."""

    def __init__(self) -> None:
        super().__init__()
        self._rows: Counter[tuple[str, Phase, str, Launch]] = Counter()
        self._family_of_node: dict[int, str] = {}

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        launches = launches_of(func, args, kwargs or {}, result)
        caller = Caller.of(sys._getframe(1))
        family = self._family(func, caller, has_product=any(launch.flops for launch in launches))
        for launch in launches:
            self._rows[family, caller.phase, _shapes(args), launch] += 1
        return result

    def rows(self) -> tuple[Row, ...]:
        """All launches so far, in the order in which each kind first ran."""
        return tuple(
            Row(family=family, phase=phase, shapes=shapes, launches=number, **launch._asdict())
            for (family, phase, shapes, launch), number in self._rows.items()
        )

    def _family(self, func: OpOverload, caller: Caller, *, has_product: bool) -> str:
        """The family of a call's launches.

        The gradient of an operation belongs to the operation's family: forward notes the number that autograd gave to
        the operation's node, and backward looks it up.
        """
        if func.namespace == "arc_kernels":
            family = FAMILY_OF_FOLDER[OPERATORS[func._schema.name.partition("::")[2]].folder]
        elif caller.folder is not None:
            family = FAMILY_OF_FOLDER[caller.folder]
        elif caller.phase == "backward" and caller.is_engine:
            # Between two nodes autograd does nothing but add up gradients. (Within one, no formula of this step adds.)
            if func.overloadpacket in (torch.ops.aten.add, torch.ops.aten.add_):
                return ADDITIONS
            node = torch._C._current_autograd_node()
            family = self._family_of_node.get(node._sequence_nr(), OTHER)
        else:
            family = PRODUCTS if has_product else _family_by_name(func)
        if caller.phase != "backward":
            # The first operation after a node was made is the one that it was made for.
            self._family_of_node.setdefault(torch.autograd._get_sequence_nr() - 1, family)
        return family


class Caller(NamedTuple):
    """Who runs an operation.

    phase: of the step.
    folder: of `arc_kernels`, if code there runs it.
    is_engine: whether autograd's engine does so itself, not a Function's Python code.
    """

    phase: Phase
    folder: str | None
    is_engine: bool

    @staticmethod
    def of(frame: FrameType | None) -> Caller:
        """The caller of an operation by its stack, innermost frame first."""
        files = []
        while frame is not None:
            file = frame.f_code.co_filename
            if not file.startswith(_TORCH) or file in (_ENGINE, _CHECKPOINT):
                files.append(file)
            frame = frame.f_back
        # The frames outside a recomputed layer are those of the Function whose backward asked for it.
        layer = list(takewhile(lambda file: file != _CHECKPOINT, files))
        phase: Phase = "forward"
        if torch._C._current_graph_task_id() != -1:
            phase = "backward" if layer == files else "recompute"
        folder = next((found for found in map(_kernel_folder, layer) if found), None)
        return Caller(phase, folder, is_engine=files[0] == _ENGINE)


def _kernel_folder(file: str) -> str | None:
    """The folder of `arc_kernels` that a file is in; the model's angles are the rotary embedding's."""
    *_, parent, folder, name = ("", "", *Path(file).parts)
    if (folder, name) == ("model", "rope.py"):
        return "rotary"
    return folder if parent == "arc_kernels" and folder in FAMILY_OF_FOLDER else None


def _family_by_name(func: OpOverload) -> str:
    name = func._schema.name.partition("::")[2]
    if name.lstrip("_").startswith(_BY_INDEX_NAMES):
        return BY_INDEX
    return COPIES if name in _COPY_NAMES else OTHER


def _shapes(args: tuple[Any, ...], most: int = 3) -> str:
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    return " ".join("x".join(map(str, x.shape)) or "scalar" for x in tensors[:most])
