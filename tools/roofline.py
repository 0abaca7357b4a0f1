"""Roofline without a GPU: the paper's pretraining step, counted on meta tensors.

    python tools/roofline.py [--size toy] [--implementation torch|both] [--recompute] [--top 20] [--csv ROWS.csv]

Runs forward and backward of the step of `paper_step.py` on tensors without values and counts launches, matrix products
and bytes of every operation (`roofline_launches.py`), with our kernels or in plain torch. The estimated time of a
launch is that of its products at the matrix rate or that of its bytes at the copy bandwidth, if that is longer. This is
a floor: it leaves out launch overhead, wave quantisation and caches. The default rates are assumptions for an H200;
`gpu_day.py` replaces them by measured ones.

The optimizer is not run but added by formula, for one rank that holds all states and one micro-batch a step.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
import torch.nn.functional as F
from paper_step import PAPER, TOY, StepSize, build_models, make_batch
from roofline_counter import ATTENTION, CROSS_ENTROPY, FAMILIES, PRODUCTS, Row, StepCounter, fused_attention

import arc_kernels as ak
from arc_ds.planning.flops import StepFlops, Work, count_flops
from arc_ds.training.loss import micro_batch_loss

Implementation = Literal["ours", "torch"]

SIZES: Mapping[str, StepSize] = {"paper": PAPER, "toy": TOY}
H200_TFLOPS = 790.0  # of dense bfloat16 products; as other programs measured it
H200_GBPS = 4300.0  # of a copy, read and written bytes together; as other programs measured it

OPTIMIZER_BYTES = {
    "gradient copied to float32": 2 + 4,
    "norm of the gradients": 4,
    "clipping": 4 + 4,
    "AdamW: gradient read; master weight, both moments read and written": 4 + 3 * (4 + 4),
    "weight cast to bfloat16": 4 + 2,
}
"""Bytes per trained parameter. A further micro-batch adds 2 + 4 + 4: its gradient is added to the float32 one."""


@dataclass(frozen=True, kw_only=True)
class Count:
    """The launches of one step.

    rows: all launches of forward and backward.
    size, implementation, recompute: of the step.
    num_trained: parameters that the optimizer updates.
    analytic: the products as `arc_ds.planning.flops` counts them.
    """

    rows: tuple[Row, ...]
    size: StepSize
    implementation: Implementation
    recompute: bool
    num_trained: int
    analytic: StepFlops

    @property
    def launches(self) -> int:
        """Of all rows."""
        return sum(row.launches for row in self.rows)

    @property
    def flops(self) -> int:
        """Of all rows."""
        return sum(row.launches * row.flops for row in self.rows)

    @property
    def bytes(self) -> int:
        """Of all rows."""
        return sum(row.launches * row.bytes for row in self.rows)

    @property
    def bytes_outside_products(self) -> int:
        """Of all launches without a product."""
        return sum(row.launches * row.bytes for row in self.rows if not row.flops)

    @property
    def optimizer_bytes(self) -> int:
        """Of one update, by OPTIMIZER_BYTES."""
        return self.num_trained * sum(OPTIMIZER_BYTES.values())

    def ms(self, *, tflops: float, gbps: float) -> float:
        """Milliseconds of forward and backward."""
        return sum(row.ms(tflops=tflops, gbps=gbps) for row in self.rows)

    def of(self, *families: str, phases: Sequence[str] = ("forward", "recompute", "backward")) -> Count:
        """The rows of these families and phases alone."""
        rows = tuple(row for row in self.rows if row.family in families and row.phase in phases)
        return replace(self, rows=rows)


def count(size: StepSize, *, implementation: Implementation = "ours", recompute: bool = False) -> Count:
    """Forward and backward of one micro-batch, on meta tensors in bfloat16.

    size: of models and batch.
    implementation: "ours" for the kernels, "torch" for their references in plain torch.
    recompute: whether layers run again in backward.
    """
    batch = make_batch(size)
    compressor, decoder = build_models(size, device="meta", dtype=torch.bfloat16, recompute=recompute)
    on_meta, weight = batch.to("meta"), torch.ones((), device="meta")
    choice: Literal["triton", "reference"] = "triton" if implementation == "ours" else "reference"
    counter = StepCounter()
    fused = patch.object(F, "scaled_dot_product_attention", fused_attention)
    with ak.use(choice), ak.use_attention(choice), fused, counter:
        micro_batch_loss(decoder(on_meta, compressor(on_meta)), weight).backward()
    return Count(
        rows=counter.rows(),
        size=size,
        implementation=implementation,
        recompute=recompute,
        num_trained=sum(p.numel() for p in compressor.parameters() if p.requires_grad),
        analytic=count_flops(batch, size.spec, size.decoder),
    )


def table(count: Count, *, tflops: float = H200_TFLOPS, gbps: float = H200_GBPS, markdown: bool = False) -> str:
    """Families of a count with their launches, products, bytes and estimated times, totals, and a check of the count.

    tflops: rate of matrix products, 10^12 a second.
    gbps: copy bandwidth, 10^9 bytes a second.
    """
    phases = ("forward", "recompute", "backward") if count.recompute else ("forward", "backward")
    cells = [["family", "launches", "TFLOP", "GB", *(f"{phase} ms" for phase in phases), "ms"]]
    for name, part in [*((family, count.of(family)) for family in FAMILIES), ("forward and backward", count)]:
        if part.rows:
            times = [part.of(*FAMILIES, phases=(phase,)).ms(tflops=tflops, gbps=gbps) for phase in phases]
            numbers = [part.flops / 1e12, part.bytes / 1e9, *times, sum(times)]
            cells.append([name, str(part.launches), *(f"{number:.1f}" for number in numbers)])
    optimizer_ms = count.optimizer_bytes / gbps / 1e6
    step_ms = count.ms(tflops=tflops, gbps=gbps) + optimizer_ms
    no_times = [""] * len(phases)
    cells.append(["optimizer", "", "", f"{count.optimizer_bytes / 1e9:.1f}", *no_times, f"{optimizer_ms:.1f}"])
    cells.append(["step", "", "", "", *no_times, f"{step_ms:.1f}"])
    kernels = "our kernels" if count.implementation == "ours" else "plain torch"
    recomputed = ", layers recomputed" if count.recompute else ""
    title = f"{count.size}; {kernels}{recomputed}; {tflops:g} TFLOP/s, {gbps:g} GB/s"
    return "\n".join([title, "", *aligned(cells, markdown=markdown), "", *check_lines(count)])


def check_lines(count: Count) -> list[str]:
    """Bytes outside products, and the counted products next to those of `arc_ds.planning.flops`, a sentence each."""
    analytic = analytic_flops(count)
    weights = count.of(PRODUCTS, CROSS_ENTROPY, phases=("forward", "backward")).flops
    attention = count.of(ATTENTION, phases=("forward", "backward")).flops
    reason = {
        "ours": "which counts 5 products in backward; our kernels make 7.",
        "torch": "which leaves out masked pairs; plain torch multiplies them too.",
    }
    return [
        f"Launches without a product move {count.bytes_outside_products / 1e9:.1f} GB.",
        f"Products with weights: {weights / 1e12:.2f} TFLOP here, "
        f"{analytic.linear / 1e12:.2f} by arc_ds.planning.flops.",
        f"Attention: {attention / 1e12:.2f} TFLOP here, "
        f"{analytic.attention / 1e12:.2f} by arc_ds.planning.flops, {reason[count.implementation]}",
    ]


def analytic_flops(count: Count) -> Work:
    """The step's products as `arc_ds.planning.flops` counts them: with weights, and of attention."""
    flops = count.analytic
    passes = (flops.encoder_forward, flops.encoder_backward, flops.decoder_forward, flops.decoder_backward)
    linear = sum(part.linear for part in passes) + flops.bridge + flops.head
    return Work(linear, sum(part.attention for part in passes))


def top(
    count: Count, number: int, *, tflops: float = H200_TFLOPS, gbps: float = H200_GBPS, markdown: bool = False
) -> str:
    """The kinds of launches that move the most bytes, without those whose products take longer than their bytes."""
    bound_by_bytes = [row for row in count.rows if row.flops / tflops / 1e9 < row.bytes / gbps / 1e6]
    largest = sorted(bound_by_bytes, key=lambda row: -row.launches * row.bytes)[:number]
    cells = [["kernel", "family", "phase", "shapes", "launches", "MB each", "GB", "ms"]]
    for row in largest:
        total, ms = row.launches * row.bytes / 1e9, row.ms(tflops=tflops, gbps=gbps)
        numbers = [str(row.launches), f"{row.bytes / 1e6:.1f}", f"{total:.2f}", f"{ms:.2f}"]
        cells.append([row.kernel, row.family, row.phase, row.shapes, *numbers])
    return "\n".join(aligned(cells, num_words=4, markdown=markdown))


def aligned(cells: Sequence[Sequence[str]], *, num_words: int = 1, markdown: bool) -> list[str]:
    """Lines of a table: `num_words` columns of words, then columns of numbers. The first line is the head."""
    rule = ["---"] * num_words + ["---:"] * (len(cells[0]) - num_words)
    if markdown:
        return ["| " + " | ".join(line) + " |" for line in [cells[0], rule, *cells[1:]]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    padded = [
        [word.ljust(width) for word, width in zip(line[:num_words], widths, strict=False)]
        + [number.rjust(width) for number, width in zip(line[num_words:], widths[num_words:], strict=True)]
        for line in cells
    ]
    return ["  ".join(line).rstrip() for line in padded]


def write_csv(path: Path, counts: Sequence[Count]) -> None:
    """All rows of all counts."""
    with path.open("w", newline="") as file:
        rows = [
            {"implementation": count.implementation, "recompute": count.recompute, **asdict(row)}
            for count in counts
            for row in count.rows
        ]
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="paper", help="of the step (default paper)")
    parser.add_argument("--implementation", choices=("ours", "torch", "both"), default="both")
    parser.add_argument("--recompute", action="store_true", help="layers keep their input alone and run again")
    parser.add_argument("--tflops", type=float, default=H200_TFLOPS, help="rate of matrix products (assumed: H200)")
    parser.add_argument("--gbps", type=float, default=H200_GBPS, help="copy bandwidth in GB/s (assumed: H200)")
    parser.add_argument("--top", type=int, default=0, help="also list this many kinds of launches by bytes")
    parser.add_argument("--csv", type=Path, help="write all rows to this file")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    options = parser.parse_args(argv)
    chosen: tuple[Implementation, ...] = ("ours", "torch")
    if options.implementation != "both":
        chosen = (options.implementation,)
    counts = [count(SIZES[options.size], implementation=each, recompute=options.recompute) for each in chosen]
    shown = {"tflops": options.tflops, "gbps": options.gbps, "markdown": options.markdown}
    for each in counts:
        print(table(each, **shown), end="\n\n")
        if options.top:
            print(top(each, options.top, **shown), end="\n\n")
    print("Optimizer, bytes per trained parameter: " + "; ".join(f"{n} {what}" for what, n in OPTIMIZER_BYTES.items()))
    if options.csv:
        write_csv(options.csv, counts)
    return 0


if __name__ == "__main__":
    sys.exit(main())
