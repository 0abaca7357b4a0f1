# mypy: allow-untyped-defs
"""Correct bfloat16 under Triton's interpreter.

The interpreter (Triton 3.9) represents bfloat16 by the integers of its bits. `tl.dot` multiplies these integers, and a
cast from float32 truncates, although a GPU rounds to nearest even. `dot` and `narrow` are plain Triton on a GPU. Under
the interpreter they compute in float32, where products of bfloat16 are exact.
"""

from __future__ import annotations

import triton
import triton.language as tl
from packaging import version

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def dot(b_a, b_b, b_acc=None):
    """b_a @ b_b, plus b_acc if given, in float32. float32 operands are not reduced to TF32."""
    if INTERPRETED and b_a.dtype == tl.bfloat16:
        return tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), b_acc, input_precision="ieee")
    else:
        return tl.dot(b_a, b_b, b_acc, input_precision="ieee")


@triton.jit
def narrow(b_x, dtype: tl.constexpr):
    """Round float32 values to the nearest value of `dtype`, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = b_x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        quiet_nan = rounded * 0 + 0x7FC0
        return tl.where(b_x == b_x, rounded, quiet_nan).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return b_x.to(dtype)


def _let_loops_run() -> None:
    """Fix loop bounds under Triton 3.5 and 3.6. Their interpreter calls `int` on one-element arrays, which NumPy 2.5
    rejects. Triton 3.7 squeezes them first."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch


if INTERPRETED.value and version.parse(triton.__version__) < version.parse("3.7"):
    _let_loops_run()
