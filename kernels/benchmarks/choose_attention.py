"""Times our attention against PyTorch's FlashAttention over head sizes, masks and lengths, and records their ratio.

    python kernels/benchmarks/choose_attention.py [--write] [--table FILE] [--seconds S]

Forward and backward together, bfloat16, 32 query heads on 8 kv heads, about 16,384 rows of segments of one length; the
encoder's mask (both directions), the pooled layer (one query for eight keys) and the decoder's (causal). `--write`
replaces this GPU's rows in kernels/arc_kernels/attention/measured.py, which `auto` reads, or in a copy of it that
`--table` names; commit it. The results of both sides are compared before they are timed. No shape is started after S
seconds; the table then holds the finished ones.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from bench_kernels import leaves_of, runner_of
from gpu_attention import Layer, attention_case, varlen
from gpu_checks import same_result
from gpu_timing import interleaved

from arc_kernels.attention import measured
from arc_kernels.attention.measured import Measured

ROWS = 16_384
HEAD_DIMS = (128, 64, 80)  # the most common one first
LENGTHS = (256, 1024, 4096, 16_384)
NUM_HEADS, NUM_KV_HEADS, FACTOR = 32, 8, 8
TABLE = Path(measured.__file__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. The exit code is 1 if the results of the two sides differ."""
    arguments = _parser().parse_args(argv)
    if not torch.cuda.is_available():
        print("no GPU: nothing measured")
        return 0
    ends = time.monotonic() + arguments.seconds
    results = [_measure(layer) for layer in layers() if time.monotonic() < ends]
    rows = [row for row in results if row is not None]
    if arguments.write and rows:
        others = [row for row in measured.MEASURED if row.gpu != torch.cuda.get_device_name()]
        write_table(arguments.table, [*others, *rows])
        print(f"{arguments.table.name}: {len(rows)} of {len(list(layers()))} rows of {torch.cuda.get_device_name()}")
    return 0 if len(rows) == len(results) else 1


def layers() -> Iterator[Layer]:
    """The shapes that are timed."""
    for head_dim in HEAD_DIMS:
        for length in LENGTHS:
            keys = (length,) * (ROWS // length)
            pooled = (length // FACTOR,) * len(keys)
            for name, queries, causal in (("encoder", keys, False), ("pooled", pooled, False), ("decoder", keys, True)):
                yield Layer(
                    name=name,
                    num_heads=NUM_HEADS,
                    num_kv_heads=NUM_KV_HEADS,
                    head_dim=head_dim,
                    queries=queries,
                    keys=keys,
                    causal=causal,
                )


def write_table(path: Path, rows: Sequence[Measured]) -> None:
    """Replace the last statement of measured.py, the table, by these rows."""
    head, statement, _ = path.read_text(encoding="utf-8").partition("MEASURED: tuple[Measured, ...] = ")
    if not statement:
        raise ValueError(f"{path} does not define MEASURED; restore it from the repository")
    lines = "".join(f"    {row!r},\n" for row in sorted(rows))
    path.write_text(f"{head}{statement}{f'({chr(10)}{lines})' if rows else '()'}\n", encoding="utf-8")


def _measure(layer: Layer) -> Measured | None:
    """One row of the table; None if the results of the two sides differ."""
    case = attention_case(layer)
    device = torch.device("cuda")
    inputs = leaves_of(case, device)
    ours, flash = partial(case.function, backend="triton"), partial(varlen, layer)
    shape = f"{layer.name} H={layer.head_dim} {max(layer.queries)} x {max(layer.keys)}"
    if not same_result(flash(**inputs), ours(**inputs)):
        print(f"{shape}: FlashAttention and ours differ; run bench_kernels.py --kernel attention")
        return None
    runners = [runner_of(function, inputs, case.wants_grad, "both") for function in (flash, ours)]
    theirs, own = interleaved(runners, device, budget_ms=100.0)
    ratio = theirs.median_ms / own.median_ms
    print(f"{shape}: FlashAttention takes {ratio:.2f} of our time", flush=True)
    return Measured(
        gpu=torch.cuda.get_device_name(),
        dtype="bfloat16",
        head_dim=layer.head_dim,
        causal=layer.causal,
        max_seqlen_q=max(layer.queries),
        max_seqlen_k=max(layer.keys),
        flash_over_ours=round(ratio, 3),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Which attention is faster on this GPU; see the file's docstring.")
    parser.add_argument("--write", action="store_true", help="replace this GPU's rows in the table that auto reads")
    parser.add_argument("--table", type=Path, default=TABLE, metavar="FILE", help="where (default: the table itself)")
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="S", help="for all (default: no limit)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
