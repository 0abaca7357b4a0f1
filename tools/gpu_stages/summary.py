"""The summary in Markdown, made of the rows; it is written anew after each stage."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

CsvRow = Mapping[str, str]


def read_rows(path: Path) -> list[dict[str, str]]:
    """All rows of a file; none if it is absent."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def drop_stages(path: Path, stages: Sequence[str]) -> None:
    """Remove the rows of some stages, which are measured again."""
    kept = [row for row in read_rows(path) if row["stage"] not in stages]
    if not kept:
        path.unlink(missing_ok=True)
        return
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(kept[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)


def summarize(rows: Sequence[CsvRow]) -> str:
    """Markdown: where the rows come from, then one section for each stage that has some."""
    if not rows:
        return "not measured\n"
    first = rows[0]
    stamps = sorted({(row["date"], row["commit"], row["command"]) for row in rows})
    lines = [f"{first['gpu']}, torch {first['torch']} (CUDA {first['cuda'] or 'none'}), triton {first['triton']}, "]
    lines[0] += f"deepspeed {first['deepspeed'] or 'none'}."
    lines += ["", *(f"- {date}, commit {commit}: `{command}`" for date, commit, command in stamps), ""]
    for stage, section in _SECTIONS.items():
        if of_stage := [row for row in rows if row["stage"] == stage]:
            lines += [f"### {stage}", "", *section(of_stage), ""]
    return "\n".join(lines).rstrip() + "\n"


def _table(head: Sequence[str], lines: Iterable[Sequence[object]]) -> list[str]:
    cells = [[str(cell).replace("|", "\\|") for cell in line] for line in lines]
    return [f"| {' | '.join(line)} |" for line in ([*head], ["---"] * len(head), *cells)]


def _environment(rows: Sequence[CsvRow]) -> list[str]:
    missing = [row["metric"] for row in rows if row["value"] == "missing"]
    shown = [row for row in rows if row["subject"] != "package"]
    lines = _table(["", "value"], [(row["metric"], _value(row)) for row in shown])
    return [*lines, "", f"Missing packages: {', '.join(missing) or 'none'}."]


def _words(rows: Sequence[CsvRow]) -> list[str]:
    columns = ["subject", "case", "variant", "metric"]
    table = [(*(row[column] for column in columns), _value(row), row["note"]) for row in rows]
    return _table([*columns, "value", "note"], table)


def _fast(rows: Sequence[CsvRow]) -> list[str]:
    """One line for each kernel, shape and mode: our time, and all others as multiples of it."""
    lines = []
    for kernel, case in dict.fromkeys((row["subject"], row["case"]) for row in rows):
        of_case = [row for row in rows if (row["subject"], row["case"]) == (kernel, case)]
        for mode in ("forward", "backward", "both"):
            timed = [row for row in of_case if row["metric"] == mode]
            ours = next((row for row in timed if row["ratio"] == "1.0" and row["variant"] == "arc_kernels"), None)
            if ours:
                others = [f"{row['variant']} {float(row['ratio']):.2f}" for row in timed if row is not ours]
                share = f"{float(ours['share']):.0%}" if ours["share"] else ""
                lines.append((kernel, case, mode, _value(ours), share, "; ".join(others)))
    head = ["kernel", "shape", "mode", "ours", "of the ceiling", "others, as multiples of ours"]
    words = [row for row in rows if row["metric"] == "result"]
    return [*_table(head, lines), *(["", *_words(words)] if words else [])]


def _step(rows: Sequence[CsvRow]) -> list[str]:
    """One line for each metric, one column for each variant."""
    timed = [row for row in rows if row["metric"] != "result"]
    variants = list(dict.fromkeys(row["variant"] for row in timed))
    cells = {(row["metric"], row["variant"]): _value(row) for row in timed}
    metrics = dict.fromkeys(row["metric"] for row in timed)
    lines = [(metric, *(cells.get((metric, variant), "") for variant in variants)) for metric in metrics]
    notes = dict.fromkeys(f"{row['variant']}: {row['case']}; {row['note']}" for row in timed)
    words = [row for row in rows if row["metric"] == "result"]
    return [
        *_table(["", *variants], lines),
        *(["", *(f"- {note}" for note in notes)] if notes else []),
        *(["", *_words(words)] if words else []),
    ]


def _value(row: CsvRow) -> str:
    spread = f" ± {row['spread']}" if row["spread"] else ""
    share = f" ({float(row['share']):.1%})" if row["share"] and row["stage"] != "fast" else ""
    return f"{row['value']}{spread} {row['unit']}".strip() + share


_SECTIONS: dict[str, Callable[[Sequence[CsvRow]], list[str]]] = {
    "environment": _environment,
    "right": _words,
    "step": _step,
    "fast": _fast,
    "program": _words,
}
