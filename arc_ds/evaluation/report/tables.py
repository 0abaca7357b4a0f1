"""The tables of a report, and its Markdown and CSV."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields

from arc_ds.config.load import flatten_tree
from arc_ds.evaluation.comparison import Difference
from arc_ds.evaluation.metrics import metrics_of, signature
from arc_ds.evaluation.report.content import GapClosed, Report, Sizes
from arc_ds.evaluation.report.paper import PaperRow, paper_rows
from arc_ds.evaluation.results import SEEDS_NOTE
from arc_ds.evaluation.scoring import Score, SystemScores, is_bleu_lowercase
from arc_ds.evaluation.tables import (
    DIFFERENCE_COLUMNS,
    count_cell,
    difference_cells,
    digits_of,
    metric_table,
    plain_cell,
)
from arc_ds.evaluation.task import Metric
from arc_ds.pages.tables import EMPTY, Cell, Table, markdown_text, text_cell, to_markdown

AVERAGE = "Avg."
SIGNIFICANT = 0.05
_MAX_NAMES = 6
TITLES = {
    "nq": "NQ",
    "triviaqa": "TriviaQA",
    "hotpotqa": "HotpotQA",
    "squad": "SQuAD",
    "squad2": "SQuAD 2.0",
    "flores": "FLORES",
    "cnn": "CNN/DailyMail",
    "xsum": "XSum",
    "narrativeqa": "NarrativeQA",
    "qasper": "Qasper",
    "govreport": "GovReport",
    "qmsum": "QMSum",
}
METRICS: dict[Metric, str] = {
    "em": "EM",
    "f1": "F1",
    "substring": "substring",
    "approx_em": "approx. EM",
    "rouge_l": "ROUGE-L",
    "bleu": "BLEU",
    "bleu_other_case": "BLEU, other case",
    "chrf": "chrF",
    "nll": "NLL",
}
_SCORE_FIELDS = ("value", "low", "high", "stderr", "seed_sd", "n", "num_clusters")
# Keys of run.json that have a table of their own, or too much content.
_OTHER_TABLES = ("config", "systems", "samples", "skipped", "shortened", "prompts")


def task_title(report: Report, task: str) -> str:
    """A task with its headline metric: "SQuAD EM"."""
    return f"{TITLES.get(task, task)} {METRICS[report.headline(task)]}"


def group_of(report: Report, name: str) -> int:
    """The place of a system, which decides its colour."""
    return [system.name for system in report.systems].index(name)


def notes_of(report: Report) -> list[str]:
    """Sentences on the limits of the comparison, and the skipped samples."""
    skipped = [
        f"{system.name}: {count} of {TITLES.get(task, task)} ({reason})"
        for system in report.systems
        for reason, by in system.results.seeds[0].skipped.items()
        for task, count in by.items()
        if count and task in report.tasks
    ]
    return [
        *report.notes,
        *([SEEDS_NOTE] if any(len(system.results.seeds) > 1 for system in report.systems) else []),
        *([f"Scores leave out skipped samples: {'; '.join(skipped)}."] if skipped else []),
    ]


def _system_cell(report: Report, name: str) -> Cell:
    note = "≠ other questions, data or protocol" if name in report.different else ""
    return text_cell(name, note, group_of(report, name))


def verdict_table(report: Report) -> Table:
    """The numbers that decide between systems: difference, cost, and tasks in which the difference is clear."""
    rows = []
    for name, comparison in report.comparisons.items():
        by_sign: dict[int, list[str]] = {1: [], -1: [], 0: []}
        for task, metrics in comparison.by_task.items():
            sign = _clear_sign(report.headline(task), metrics.get(report.headline(task)))
            by_sign[sign].append(TITLES.get(task, task))
        found = comparison.average or next(iter(next(iter(comparison.by_task.values())).values()))
        _, _, value, _, _, _, detectable, *_ = difference_cells(found, digits_of(report.headline(report.tasks[0])) + 1)
        system = report.systems[group_of(report, name)]
        sizes = (_ratio_cell(report.mean_size(system, "ratio")), plain_cell(report.mean_size(system, "prompt_rows"), 0))
        tasks = (text_cell(_listed(by_sign[1])), text_cell(_listed(by_sign[-1])), count_cell(len(by_sign[0])))
        rows.append((_system_cell(report, name), value, detectable, *sizes, *tasks))
    columns = ("system", "difference", "detectable", "×", "prompt rows", "better in", "worse in", "not clear")
    caption = (
        f"Each system minus {report.baseline} on the same questions, in {unit_of(report.headline(report.tasks[0]))}: "
        "the mean over their common tasks, with its 95% interval. A task counts as better or worse if p < "
        f"{SIGNIFICANT} after Holm's adjustment, and as not clear otherwise. Fewer than 80% of such experiments find a "
        "difference smaller than “detectable”."
    )
    return Table("verdict", "In short", columns, tuple(rows), caption)


def _listed(names: Sequence[str]) -> str:
    """A number and the first names: "2: NQ, SQuAD"."""
    more = ", …" if len(names) > _MAX_NAMES else ""
    return f"{len(names)}: {', '.join(names[:_MAX_NAMES])}{more}" if names else ""


def _clear_sign(metric: Metric, difference: Difference | None) -> int:
    """1 if a system is better than the baseline after Holm's adjustment, -1 if it is worse, and else 0."""
    if difference is None or difference.p_holm is None or not difference.p_holm < SIGNIFICANT:
        return 0
    return 1 if (difference.value > 0) != (metric == "nll") else -1


def score_table(report: Report, *, with_paper: bool) -> Table:
    """The table in the shape of the paper's Table 1: systems as rows, tasks as columns."""
    has_average = len(report.tasks) > 1
    rows = []
    for system in report.systems:
        scores = [_score_cell(report, system, task) for task in report.tasks]
        average = [_number_cell(system.average, digits_of(report.headline(report.tasks[0])))] if has_average else []
        rows.append(
            (_system_cell(report, system.name), _ratio_cell(report.mean_size(system, "ratio")), *scores, *average)
        )
    if with_paper:
        # The paper's scores are those of its own metrics.
        same = [task for task in report.tasks if report.headline(task) == metrics_of(task)[0]]
        found = paper_rows(same, with_average=len(same) == len(report.tasks))
        rows += [_paper_row(report, row, has_average) for row in found]
    caption = (
        f"Scores in {unit_of(report.headline(report.tasks[0]))} with 95% intervals (bootstrap over clusters). × is the "
        "compression ratio of documents, the mean over tasks."
    )
    if report.comparisons:
        caption += (
            f" ▲ and ▼: better and worse than {report.baseline} (paired test, p < {SIGNIFICANT} after Holm's "
            "adjustment over tasks)."
        )
    if with_paper:
        caption += (
            " Rows marked “paper” are published numbers (arXiv 2510.20535, Tables 1 and 3). They come without "
            "intervals, at full scale, under the reference's protocol; these results have the protocol "
            f"{protocol_names(report)}."
        )
    columns = ("system", "×", *(task_title(report, task) for task in report.tasks), *([AVERAGE] if has_average else []))
    return Table("scores", "Scores", columns, tuple(rows), caption)


def unit_of(metric: Metric) -> str:
    """The unit of a metric."""
    return "nats per token (lower is better)" if metric == "nll" else "points of 100"


def protocol_names(report: Report) -> str:
    """The names of all protocols of the results."""
    names = [file.protocol.get("name", "unknown") for system in report.systems for file in system.results.seeds]
    return ", ".join(f"“{name}”" for name in dict.fromkeys(names))


def _score_cell(report: Report, system: SystemScores, task: str) -> Cell:
    if task not in system.by_task:
        return EMPTY
    cell = _number_cell(next(iter(system.by_task[task].values())), digits_of(report.headline(task)))
    found = report.comparisons.get(system.name)
    sign = _clear_sign(report.headline(task), found.by_task.get(task, {}).get(report.headline(task)) if found else None)
    numbers = {len(each.stats[task].clusters_N) for each in report.systems if task in each.stats}
    number = f" n={len(system.stats[task].clusters_N):,}" if len(numbers) > 1 else ""
    return cell._replace(text=cell.text + ("", " ▲", " ▼")[sign], note=(cell.note + number).strip())


def _paper_row(report: Report, row: PaperRow, has_average: bool) -> tuple[Cell, ...]:
    values = [row.scores.get(task) for task in report.tasks] + ([row.average] if has_average else [])
    scores = [EMPTY if value is None else Cell(f"{value:.1f}", value) for value in values]
    return (text_cell(f"{row.system}, {row.decoder}", "paper"), _ratio_cell(row.ratio), *scores)


def _number_cell(score: Score | GapClosed | None, digits: int) -> Cell:
    if score is None or math.isnan(score.value):
        return EMPTY
    note = "" if math.isnan(score.low) else f"[{score.low:.{digits}f}, {score.high:.{digits}f}]"
    return Cell(f"{score.value:.{digits}f}", score.value, note)


def _ratio_cell(ratio: float | None) -> Cell:
    if ratio is None:
        return EMPTY
    return Cell("∞" if math.isinf(ratio) else f"{ratio:.2f}".rstrip("0").rstrip("."), ratio)


def difference_table(report: Report) -> Table:
    """Paired differences in the headline metrics from the baseline system."""
    rows = []
    for name, comparison in report.comparisons.items():
        system = text_cell(name, group=group_of(report, name))
        for task in (task for task in report.tasks if task in comparison.by_task):
            metric = report.headline(task)
            counts = [count_cell(count) for count in report.pair_counts[name, task]]
            cells = difference_cells(comparison.by_task[task][metric], digits_of(metric) + 1)
            rows.append((system, text_cell(task_title(report, task)), *cells, *counts))
        if comparison.average is not None:
            cells = difference_cells(comparison.average, digits_of(report.headline(report.tasks[0])) + 1)
            rows.append((system, text_cell(AVERAGE), *cells, EMPTY, EMPTY, EMPTY))
    columns = ("system", "task", report.baseline, *DIFFERENCE_COLUMNS, "better", "worse", "equal")
    caption = (
        f"System minus {report.baseline} on the same questions, in {unit_of(report.headline(report.tasks[0]))}, with "
        "95% intervals. p (Holm) is adjusted for the number of tasks, for each system by itself. “Detectable” is the "
        "difference that 80% of experiments of this size find. “Better”, “worse” and “equal” count samples."
    )
    return Table("differences", f"Differences from {report.baseline}", columns, tuple(rows), caption)


def difference_csv_table(report: Report) -> Table:
    """Paired differences in all metrics, for CSV. Tasks and metrics have the names of the result files."""
    rows = []
    for name, comparison in report.comparisons.items():
        found: list[tuple[str, str, Difference]] = [
            (task, metric, each) for task, by in comparison.by_task.items() for metric, each in by.items()
        ]
        found += [("average", "headlines", comparison.average)] if comparison.average is not None else []
        for task, metric, difference in found:
            counts = report.pair_counts.get((name, task)) if difference.p_holm is not None else None
            values = [*asdict(difference).values(), *(counts or (None, None, None))]
            rows.append(tuple(Cell("", value) for value in (report.baseline, name, task, metric, *values)))
    names = tuple(each.name for each in fields(Difference))
    columns = ("baseline", "system", "task", "metric", *names, "num_better", "num_worse", "num_equal")
    return Table("differences", f"Differences from {report.baseline}", columns, tuple(rows))


def score_csv_table(report: Report) -> Table:
    """All metrics with the sizes of prompts, for CSV. Tasks and metrics have the names of the result files."""
    rows = []
    for system in report.systems:
        for task, metrics in system.by_task.items():
            for metric, score in metrics.items():
                values = (*(getattr(score, field) for field in _SCORE_FIELDS), *report.sizes[system.name, task])
                is_headline = str(metric == system.stats[task].headline).lower()
                rows.append(tuple(Cell("", value) for value in (system.name, task, metric, is_headline, *values)))
    columns = ("system", "task", "metric", "is_headline", *_SCORE_FIELDS, *Sizes._fields)
    return Table("scores", "Scores", columns, tuple(rows))


def nll_tables(report: Report) -> list[Table]:
    """Answer NLL, and the gap closed; none if no system has answer NLLs."""
    tasks = [task for task in report.tasks if any("nll" in system.by_task.get(task, {}) for system in report.systems)]
    if not tasks:
        return []
    columns = ("system", *(TITLES.get(task, task) for task in tasks))
    nll_rows, gap_rows = [], []
    for group, system in enumerate(report.systems):
        name = text_cell(system.name, group=group)
        nll_rows.append((name, *(_number_cell(system.by_task.get(task, {}).get("nll"), 3) for task in tasks)))
        gaps = [_number_cell(report.gap_closed.get((system.name, task)), 2) for task in tasks]
        gap_rows += [(name, *gaps)] if any(gap != EMPTY for gap in gaps) else []
    caption = "Nats per token of the first reference, with 95% intervals; lower is better."
    tables = [Table("nll", "Answer NLL", columns, tuple(nll_rows), caption)]
    if gap_rows:
        caption = (
            "(b − NLL) / (b − open book), where b is the smaller NLL of closed book and, if there is one, of "
            "mismatched contexts: 1 is as good as the full text, 0 is no better than without it."
        )
        tables.append(Table("gap_closed", "Gap closed", columns, tuple(gap_rows), caption))
    return tables


def count_table(report: Report) -> Table:
    """Counts of answers, skipped samples and stop reasons, and sizes of prompts, by system and task."""
    found = []
    for group, system in enumerate(report.systems):
        file = system.results.seeds[0]
        for task, stats in system.stats.items():
            answers = [each for each in system.results.predictions if each.task == task]
            score = next(iter(system.by_task[task].values()))
            counts: dict[str, Cell] = {
                "answers": count_cell(len(answers)),
                "clusters": count_cell(score.num_clusters),
                **{f"skipped: {reason}": count_cell(by.get(task, 0)) for reason, by in file.skipped.items()},
                "shortened": count_cell(file.shortened.get(task)),
                "empty": count_cell(stats.num_empty),
            }
            stops = Counter(each.stop or "unknown" for each in answers)
            counts |= {f"stop: {stop}": count_cell(stops[stop]) for stop in ("string", "eos", "length", "unknown")}
            sizes = report.sizes[system.name, task]
            counts |= {
                "×, mean": _ratio_cell(sizes.ratio),
                "×, of sums": _ratio_cell(sizes.ratio_of_sums),
                "×, whole prompt": _ratio_cell(sizes.prompt_ratio),
                "prompt rows": plain_cell(sizes.prompt_rows, 1),
                "new tokens": plain_cell(sizes.new_tokens, 1),
            }
            found.append((text_cell(system.name, group=group), text_cell(TITLES.get(task, task)), counts))
    names = dict.fromkeys(name for _, _, counts in found for name in counts)
    shown = [name for name in names if any(counts.get(name, EMPTY).value for _, _, counts in found)]
    rows = tuple((system, task, *(counts.get(name, EMPTY) for name in shown)) for system, task, counts in found)
    caption = (
        "Skipped samples are not in the scores. × compares documents: the mean of the samples' ratios, the ratio of "
        "the sums, and for the whole prompt that of the open-book prompt over the system's. Prompt rows and new tokens "
        "are means over answers. Columns without any count are left out."
    )
    return Table("counts", "Counts and sizes", ("system", "task", *shown), rows, caption)


def run_table(report: Report) -> Table:
    """Protocol, versions and digests, each with the systems that it holds for."""
    values: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for system in report.systems:
        for file in system.results.seeds:
            known = {key: value for key, value in file.run.items() if key not in _OTHER_TABLES}
            flat = {
                "source": str(file.path),
                **flatten_tree(known or {"run.json": "none: protocol and data are unknown"}),
            }
            for key, value in flat.items():
                names = values[key][json.dumps(value) if isinstance(value, bool) else str(value)]
                names += [system.name] if system.name not in names else []
    rows = [
        (
            text_cell(key),
            text_cell(repr(value) if value != value.strip() else value),
            text_cell(_systems(report, names)),
        )
        for key, found in values.items()
        for value, names in found.items()
    ]
    return Table("runs", "Protocol, versions and digests", ("key", "value", "systems"), tuple(rows))


def _systems(report: Report, names: list[str]) -> str:
    return "all" if len(names) == len(report.systems) else ", ".join(names)


def description_tables(report: Report) -> list[Table]:
    """A table of what run.json says of each system; none if it says nothing."""
    flat = [flatten_tree(dict(system.results.seeds[0].description)) for system in report.systems]
    keys = list(dict.fromkeys(key for each in flat for key in each if key))
    rows = [
        (text_cell(system.name, group=group), *(text_cell(_scalar_text(each.get(key))) for key in keys))
        for group, (system, each) in enumerate(zip(report.systems, flat, strict=True))
    ]
    return [Table("systems", "Systems", ("system", *keys), tuple(rows))] if keys else []


def _scalar_text(value: object) -> str:
    return "" if value is None else str(value)


def signatures(report: Report) -> Mapping[str, str]:
    """The settings of the metrics."""
    metrics = dict.fromkeys(m for system in report.systems for task in system.by_task.values() for m in task)
    lowercase = is_bleu_lowercase(*(system.results for system in report.systems))
    return {METRICS[metric]: signature(metric, bleu_lowercase=lowercase) for metric in metrics}


def report_markdown(report: Report, *, with_paper: bool) -> str:
    """The report's tables as Markdown, without the samples."""
    verdict, differences = ([verdict_table(report)], [difference_table(report)]) if report.comparisons else ([], [])
    tables = [*verdict, score_table(report, with_paper=with_paper), *differences, *nll_tables(report)]
    tables += [count_table(report), metric_table(report.systems), *description_tables(report), run_table(report)]
    parts = ["# Evaluation\n", *(f"> {markdown_text(note)}\n" for note in notes_of(report))]
    for table in tables:
        parts.append(f"## {markdown_text(table.title)}\n")
        parts += [f"{markdown_text(table.caption)}\n"] if table.caption else []
        parts.append(to_markdown(table))
    parts.append("## Metrics\n")
    parts.append("".join(f"- {name}: {text}\n" for name, text in signatures(report).items()))
    return "\n".join(parts)
