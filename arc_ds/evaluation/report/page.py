"""The report as one HTML page that needs neither a server nor other files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from arc_ds.evaluation.report.content import Report, decoder_of
from arc_ds.evaluation.report.plots import difference_plots, score_plots, size_plots
from arc_ds.evaluation.report.samples import DifferingSample
from arc_ds.evaluation.report.tables import (
    TITLES,
    count_table,
    description_tables,
    difference_table,
    group_of,
    nll_tables,
    notes_of,
    protocol_names,
    run_table,
    score_table,
    signatures,
    verdict_table,
)
from arc_ds.evaluation.tables import metric_table
from arc_ds.pages.frame import colours, render_page
from arc_ds.pages.tables import caption_html, to_html

_HERE = Path(__file__).parent
_MAX_TEXT = 400  # characters of each text of a sample
_MAX_REFERENCES = 4
_MAX_CONFIG = 20_000


def report_page(report: Report, *, with_paper: bool) -> str:
    """The page as text.

    with_paper: whether to show the paper's numbers next to the scores.
    """
    scores = score_table(report, with_paper=with_paper)
    sections = [("In short", to_html(verdict_table(report)))] if report.comparisons else []
    sections.append(("Scores", f"<div class=scores>{to_html(scores)}</div>{score_plots(report)}"))
    if ratios := size_plots(report, "ratio", "compression ratio of documents (log scale; ∞: no document)"):
        sections.append(("Score against compression", ratios))
    if rows := size_plots(report, "prompt_rows", "decoder rows of the prompt, mean (log scale)"):
        sections.append(("Score against prompt length", rows))
    if report.comparisons:
        words = (
            f"Paired differences from {report.baseline} with 95% intervals, and p-values after Holm's adjustment over "
            "tasks."
        )
        content = caption_html(words) + difference_plots(report) + to_html(difference_table(report))
        sections += [("Differences", content), ("Samples that differ", _samples(report))]
    sections += [(table.title, to_html(table)) for table in nll_tables(report)]
    counts = count_table(report)
    sections += [
        (counts.title, to_html(counts)),
        ("All metrics", _all_metrics(report)),
        ("Provenance", _origin(report)),
    ]
    num_answers = sum(len(system.results.predictions) for system in report.systems)
    names = dict.fromkeys(filter(None, map(decoder_of, report.systems)))
    parts = [
        _plural(len(report.systems), "system"),
        _plural(len(report.tasks), "task"),
        _plural(num_answers, "answer"),
        f"protocol {protocol_names(report)}",
        *([f"decoder {', '.join(names)}"] if names else []),
        f"baseline {report.baseline}" if report.comparisons else "no system to compare with",
    ]
    return render_page(
        "Evaluation",
        " · ".join(parts),
        sections,
        notes=notes_of(report),
        style=(_HERE / "report.css").read_text("utf-8") + colours(len(report.systems)),
        script=(_HERE / "report.js").read_text("utf-8"),
    )


def _plural(num: int, noun: str) -> str:
    return f"{num:,} {noun}{'' if num == 1 else 's'}"


def _all_metrics(report: Report) -> str:
    items = "".join(f"<li>{escape(name)}: {escape(text)}</li>" for name, text in signatures(report).items())
    table = to_html(metric_table(report.systems))
    return f"<details><summary>Every metric of every system and task</summary>{table}</details><ul>{items}</ul>"


def _origin(report: Report) -> str:
    runs = {json.dumps(f.run["config"], indent=2) for s in report.systems for f in s.results.seeds if "config" in f.run}
    configs = "".join(
        f"<details><summary>Config</summary><pre>{escape(text[:_MAX_CONFIG])}</pre></details>" for text in sorted(runs)
    )
    tables = [*description_tables(report), run_table(report)]
    return "".join(f"<h3>{table.title}</h3>{to_html(table)}" for table in tables) + configs


def _samples(report: Report) -> str:
    """The differing samples, with filters."""
    num_differing = sum(counts.better + counts.worse for counts in report.pair_counts.values())
    if not num_differing:
        return "<p>No sample has different headline scores.</p>"
    names = dict.fromkeys(sample.system for sample in report.samples)
    tasks = dict.fromkeys(sample.task for sample in report.samples)
    filters = (
        _select("task", "all tasks", [(task, TITLES.get(task, task)) for task in tasks]),
        _select("system", f"all systems against {report.baseline}", [(str(group_of(report, n)), n) for n in names]),
        _select(
            "who", "whoever is better", [("0", f"{report.baseline} is better"), ("1", "the other system is better")]
        ),
    )
    shown = f"{len(report.samples):,} of {num_differing:,}"
    return (
        f"<p class=cap>{shown} pairs of answers with different headline scores: of each system, task and direction the "
        "same number if possible, the largest differences first, equal ones at random. Texts are cut at "
        f"{_MAX_TEXT} characters.</p><div class=filters>{''.join(filters)}<span id=shown></span></div>"
        f"<div id=samples>{''.join(_sample(report, sample) for sample in report.samples)}</div>"
    )


def _select(name: str, everything: str, options: Sequence[tuple[str, str]]) -> str:
    items = "".join(f'<option value="{escape(value)}">{escape(text)}</option>' for value, text in options)
    return (
        f'<select data-by="{name}" aria-label="{name}"><option value="">{escape(everything)}</option>{items}</select>'
    )


def _sample(report: Report, sample: DifferingSample) -> str:
    references = " <i>or</i> ".join(_text(each) for each in sample.references[:_MAX_REFERENCES])
    more = len(sample.references) - _MAX_REFERENCES
    base, other = group_of(report, report.baseline), group_of(report, sample.system)
    is_gain = sample.difference > 0
    question = f"<p>{_text(sample.question)}</p>" if sample.question else ""
    return (
        f'<article data-task="{escape(sample.task)}" data-system="{other}" data-who="{int(is_gain)}">'
        f"<small>{escape(TITLES.get(sample.task, sample.task))} · {_text(sample.id)}</small>{question}<dl>"
        f"<dt>reference</dt><dd>{references}{f' <i>and {more} more</i>' if more > 0 else ''}</dd>"
        f"{_answer(base, report.baseline, sample.baseline_prediction, sample.baseline_score, not is_gain)}"
        f"{_answer(other, sample.system, sample.prediction, sample.score, is_gain)}</dl></article>"
    )


def _answer(group: int, name: str, text: str, score: float, is_better: bool) -> str:
    shown = _text(text) if text.strip() else "<i>empty</i>"
    mark = "<b>✓</b> " if is_better else ""
    return f'<dt><i class="sw g{group}"></i>{escape(name)}</dt><dd>{mark}{shown} <small>{score:.1f}</small></dd>'


def _text(text: str) -> str:
    text = text.strip()
    return escape(text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…")
