"""A plan as text for a terminal, and as JSON."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

from arc_ds.planning.hardware import COPY_SHARE, GIB, GPUS, LAUNCH_S, LINK_SHARE, LINKS, MATRIX_SHARE
from arc_ds.planning.plan import Plan
from arc_ds.planning.search import Fit, SweepRow


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that `arc-ds plan` says.

    plan: plan of the config as it is.
    fit: the nearest config that fits, if the config does not; None if it fits or nothing does.
    rows: over numbers of GPUs.
    price: of an hour of one GPU, in the user's currency; None if it is not given.
    notes: the substitutes for files that do not exist.
    """

    plan: Plan
    fit: Fit | None
    rows: tuple[SweepRow, ...]
    price: float | None
    notes: tuple[str, ...]


def to_text(report: Report) -> str:
    """The report as lines of text."""
    plan = report.plan
    head = [verdict(plan, report.price), *_of_fit(report), *(f"note: {note}" for note in report.notes)]
    parts = (part(plan) for part in (_memory, _decoders, _time, _communication, _disk))
    return "\n\n".join("\n".join(lines) for lines in (head, *parts, _sweep(report.rows), _assumptions(plan)))


def verdict(plan: Plan, price: float | None = None) -> str:
    """The first line: whether it fits, and what it costs."""
    machine = plan.machine
    if not plan.fits:
        over = (plan.used_bytes - machine.usable_bytes) / GIB
        head = f"does not fit: {_gib(plan.used_bytes)} of {_gib(machine.usable_bytes)} GiB per GPU, {over:.1f} too many"
    else:
        head = f"fits: {_gib(plan.used_bytes)} of {_gib(machine.usable_bytes)} GiB per GPU"
    hosts = f" on {machine.num_hosts} hosts" if machine.num_hosts > 1 else ""
    cost = "" if price is None else f", cost {plan.gpu_hours * price:,.0f}"
    return (
        f"{head}; {machine.num_gpus} × {machine.gpu}{hosts}: {plan.time.total:.3g} s per step, {plan.hours:,.1f} h, "
        f"{plan.gpu_hours:,.0f} GPU-hours{cost}"
    )


def _of_fit(report: Report) -> Iterator[str]:
    if report.plan.fits:
        return
    if report.fit is None:
        more = [row.machine.num_gpus for row in report.rows if row.plan is not None and row.plan.fits]
        where = f"It fits on {_number(more[0], 'GPU')} of this kind. " if more else ""
        yield f"nothing fits that leaves the results as they are. {where}Larger GPUs and smaller limits in data help."
        return
    yield f"nearest that fits: {shlex.join(report.fit.overrides)}"
    yield f"  {verdict(report.fit.plan, report.price)}"


def _memory(plan: Plan) -> Iterator[str]:
    sequences, passes = _number(plan.samples, "sequence"), _number(plan.passes, "micro-batch", "es")
    yield f"memory per GPU, GiB ({sequences} in a micro-batch, {passes} per step)"
    rows = []
    for part, size in plan.memory.items():
        if size:
            rows.append((part, _gib(size)))
        if part == "activations":
            rows += [(f"  {kind}", _gib(share)) for kind, share in plan.activations.items() if share >= 0.005 * GIB]
    rows += [("sum", _gib(plan.used_bytes)), ("usable", _gib(plan.machine.usable_bytes))]
    if plan.host_bytes:
        rows.append(("host memory per GPU, offloaded", _gib(plan.host_bytes)))
    yield from _table(rows)


def _decoders(plan: Plan) -> Iterator[str]:
    yield "frozen decoders"
    yield from _table(
        [(one.name, f"{one.num_parameters / 1e9:.2f} B", one.placement, one.why) for one in plan.placed], text=(0, 2, 3)
    )


def _time(plan: Plan) -> Iterator[str]:
    time = plan.time
    yield f"time of a step, ms (model FLOPs utilisation {plan.mfu:.0%})"
    rows = [
        ("matrix products", _ms(time.products), f"{plan.traced_flops / 1e12:.1f} TFLOP per GPU"),
        ("other operations", _ms(time.other), "by their bytes"),
        ("optimizer", _ms(time.optimizer), ""),
        *([("transfers", _ms(time.transfers), "offloaded states, over PCIe")] if time.transfers else []),
        ("exposed communication", _ms(time.exposed), f"computation hides {_ms(time.hidden)} more"),
        ("sum", _ms(time.total), f"{plan.tokens / time.total:,.0f} encoder tokens/s"),
    ]
    if time.launches > time.products + time.other:
        rows.insert(2, ("launches", _ms(time.launches), "by the host; they take longer than the lines above"))
    yield from _table(rows, text=(0, 2))


def _communication(plan: Plan) -> Iterator[str]:
    if plan.machine.num_gpus == 1:
        yield "communication: none on one GPU"
        return
    yield "communication per step and GPU, sent in a ring"
    yield from _table(
        [
            (one.engine, one.op, f"{one.num_ranks} ranks", _number(one.calls, "call"), f"{one.sent_bytes / 1e9:.2f} GB")
            for one in plan.traffic
        ],
        text=(0, 1),
    )


def _disk(plan: Plan) -> Iterator[str]:
    yield "disk"
    number = plan.num_checkpoints
    yield from _table(
        [
            ("trained parameters", f"{plan.num_trained / 1e9:.3f} B"),
            ("checkpoint", f"{_gib(plan.checkpoint_bytes)} GiB"),
            (_number(number, "checkpoint"), f"{_gib(number * plan.checkpoint_bytes)} GiB"),
            ("export, bfloat16", f"{_gib(2 * plan.num_parameters)} GiB"),
        ]
    )


def _sweep(rows: Sequence[SweepRow]) -> Iterator[str]:
    yield "GPUs (left: the config's batch; right: a batch that grows with the GPUs)"
    head = "GPUs hosts micro-batches GiB s/step h GPU-h scaling batch s/step scaling limit"
    table: list[tuple[str, ...]] = [tuple(head.split())]
    for row in rows:
        plan = row.plan
        left = ["–"] * 6
        if plan is not None:
            left = [
                str(plan.config.micro_batches), _gib(plan.used_bytes), f"{plan.time.total:.3f}", f"{plan.hours:,.1f}",
                f"{plan.gpu_hours:,.0f}", f"{row.efficiency:.0%}" if plan.fits else "–",
            ]  # fmt: skip
        grown = [f"{row.grown.time.total:.3f}", f"{row.grown_efficiency:.0%}"] if row.grown.fits else ["–", "–"]
        table.append(
            (str(row.machine.num_gpus), str(row.machine.num_hosts), *left, str(row.grown_batch), *grown, row.limit)
        )
    yield from _table(table, text=(11,))


def _assumptions(plan: Plan) -> Iterator[str]:
    gpu, machine = GPUS[plan.machine.gpu], plan.machine
    between = f"{LINKS[machine.interconnect]:g} GB/s per host between hosts ({machine.interconnect})"
    yield "assumptions (arc_ds/planning/README.md); times are computed, and not yet compared with a GPU"
    yield (
        f"  products at {MATRIX_SHARE:.0%} of {gpu.peak_tflops:g} TFLOP/s; other operations at {COPY_SHARE:.0%} of "
        f"{gpu.memory_gbs:g} GB/s; {LAUNCH_S * 1e6:.0f} µs of the host per launch"
    )
    yield (
        f"  {LINK_SHARE:.0%} of {gpu.link_gbs:g} GB/s per GPU within a host ({gpu.link})"
        + (f", of {between}" if machine.num_hosts > 1 else "")
        + "; gathers and reductions overlap with computation but for the first and the last"
    )
    kernels = (
        "what our Triton kernels save" if plan.kernels == "triton" else "what plain torch saves: Triton is missing"
    )
    yield f"  activations: {kernels}; not counted: validation, saving, waits for data, the first three steps"


def _table(rows: Sequence[Sequence[str]], text: Sequence[int] = (0,)) -> Iterator[str]:
    """Aligned columns: those of `text` to the left, numbers to the right."""
    widths = [max(len(row[idx]) for row in rows) for idx in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if idx in text else cell.rjust(width)
            for idx, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  " + "  ".join(cells).rstrip()


def _number(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:,.2f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}"


def to_json(report: Report) -> dict[str, Any]:
    """The report as plain values. Keys are stable: a version may add some, and removes or renames none."""
    return {
        "plan": _plan_json(report.plan, report.price),
        "nearest_fit": None
        if report.fit is None
        else {"overrides": list(report.fit.overrides), "plan": _plan_json(report.fit.plan, report.price)},
        "sweep": [
            {
                "gpus": row.machine.num_gpus,
                "hosts": row.machine.num_hosts,
                "plan": None if row.plan is None else _plan_json(row.plan, report.price),
                "scaling": row.efficiency,
                "grown_batch": row.grown_batch,
                "grown_plan": _plan_json(row.grown, report.price),
                "grown_scaling": row.grown_efficiency,
                "limit": row.limit,
            }
            for row in report.rows
        ],
        "notes": list(report.notes),
    }


def _plan_json(plan: Plan, price: float | None) -> dict[str, Any]:
    machine = plan.machine
    return {
        "fits": plan.fits,
        "machine": machine._asdict(),
        "batch_size": plan.config.data.batch_size,
        "micro_batches": plan.config.micro_batches,
        "sequences": plan.samples,
        "passes": plan.passes,
        "memory_bytes": {part: round(size) for part, size in plan.memory.items()},
        "activation_bytes": {kind: round(size) for kind, size in plan.activations.items()},
        "used_bytes": round(plan.used_bytes),
        "usable_bytes": round(machine.usable_bytes),
        "host_bytes": round(plan.host_bytes),
        "decoders": [one._asdict() for one in plan.placed],
        "collectives": [{**one._asdict(), "sent_bytes": round(one.sent_bytes)} for one in plan.traffic],
        "flops": plan.flops,
        "flops_with_recomputation": plan.traced_flops,
        "mfu": plan.mfu,
        "step_s": {**plan.time._asdict(), "total": plan.time.total},
        "tokens_per_s": plan.tokens / plan.time.total,
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
        "cost": None if price is None else plan.gpu_hours * price,
        "trained_parameters": plan.num_trained,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "checkpoints": plan.num_checkpoints,
        "kernels": plan.kernels,
    }
