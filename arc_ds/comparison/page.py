"""The comparison as one HTML page that needs neither a server nor other files."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from arc_ds.comparison.panels import DASHES, Panel
from arc_ds.comparison.report import FEW_RUNS, Comparison
from arc_ds.comparison.svg import draw_panel
from arc_ds.pages import frame
from arc_ds.pages.frame import NUM_COLOURS
from arc_ds.pages.svg import figure
from arc_ds.pages.tables import Table, caption_html, text_cell, to_html

_HERE = Path(__file__).parent


def render_page(
    comparison: Comparison, panels: Sequence[Panel], *, title: str, command: str, extra: Sequence[Table] = ()
) -> str:
    """The page as text.

    panels: the plots, see `make_panels`.
    title: heading.
    command: the command that made the page.
    extra: further tables of evaluation results.
    """
    runs, groups, tables = comparison.runs, comparison.groups, comparison.tables
    head = (
        f"{len(runs)} run{'s' if len(runs) > 1 else ''}"
        + (f" of {len(groups)} config{'s' if len(groups) > 1 else ''}" if len(groups) < len(runs) else "")
        + f", {len(comparison.metrics)} metrics, x-axis: {comparison.x_label}"
    )
    # The table of many runs has the first differing keys already.
    is_many = len(runs) > FEW_RUNS
    before = ["runs", "groups", *([] if is_many else ["config"])]
    after = [*(["config"] if is_many else []), "last", "best", "at", "speed", "environment"]
    first, rest = (
        [(tables[name].title, to_html(tables[name])) for name in names if name in tables] for names in (before, after)
    )
    evaluation = [to_html(tables["evaluation"])] if "evaluation" in tables else []
    evaluation += [f"<h3>{escape(each.title)}</h3>{to_html(each)}" for each in extra]
    sources = Table(
        "sources", "", ("run", "source"), tuple((text_cell(run.name), text_cell(run.source)) for run in runs)
    )
    made_by = f"<p class=cap>Made by <code>{escape(command)}</code></p>"
    return frame.render_page(
        title,
        head,
        [
            ("In short", "".join(f"<p>{escape(sentence)}</p>" for sentence in comparison.verdict)),
            *first,
            *([("Evaluation", "".join(evaluation))] if evaluation else []),
            ("Curves", _curves(comparison, panels)),
            *rest,
            ("Sources", to_html(sources) + made_by),
        ],
        notes=comparison.notes,
        style=(_HERE / "page.css").read_text("utf-8") + _colours(comparison),
        script=(_HERE / "page.js").read_text("utf-8"),
        kind="many" if len(groups) > NUM_COLOURS else "",
    )


def _colours(comparison: Comparison) -> str:
    """The colour of each group. If there are more groups than colours, the best ones have one; the others are grey."""
    num = min(len(comparison.groups), NUM_COLOURS)
    rules = [
        f".many .line.g{place}{{opacity:1;stroke-width:1.5}}.many .band.g{place}{{opacity:.12}}" for place in range(num)
    ]
    dashes = [
        f".line.g{place}{{stroke-dasharray:{' '.join(map(str, dash))}}}"
        for place, dash in enumerate(DASHES[:num])
        if dash
    ]
    return "".join([frame.colours(num), *rules, *dashes])


def _curves(comparison: Comparison, panels: Sequence[Panel]) -> str:
    """The legend, and the plots by the first part of the metric's name."""
    groups = comparison.groups
    num = min(len(groups), NUM_COLOURS)
    legend = [
        f'<span role=button data-g="{place}"><i class="sw g{place}"></i>{escape(_labelled(comparison, place))}</span>'
        for place in range(num)
    ]
    legend += [f"<span><i class=sw></i>{len(groups) - num} others (click one in a table)</span>"] * (len(groups) > num)
    captions = []
    if any(len(group.members) > 1 for group in groups):
        captions.append("Runs that differ in the seed only are drawn as mean and band of one standard deviation.")
    if len(groups) > num:
        metric, direction = comparison.best
        captions.append(f"The {num} best by {metric} ({direction}) have colours.")
    parts = [
        *map(caption_html, captions),
        f"<div class=legend>{''.join(legend)}"
        '<input id=filter type=search placeholder="show plots whose name has …" aria-label="filter of plots"></div>',
    ]
    drawn = [panel for panel in panels if panel.series]
    main = set(comparison.metrics[: comparison.num_main])
    sections = groupby(drawn, key=lambda panel: "" if panel.metric in main else panel.metric.partition("/")[0])
    for section, members in sections:
        parts.append(f"<h3>{escape(section)}</h3><div class=grid-of>{''.join(map(_figure, members))}</div>")
    if len(drawn) < len(panels):
        names = ", ".join(panel.metric for panel in panels if not panel.series)
        parts.append(caption_html(f"Without a finite value: {names}"))
    return "".join(parts)


def _labelled(comparison: Comparison, place: int) -> str:
    """The label of a group; with few groups also the values in which it differs."""
    group = comparison.groups[place]
    table = comparison.tables.get("config")
    if table is None or len(comparison.groups) > 4 or len(comparison.runs) > FEW_RUNS or len(table.rows) > 2:
        return group.label
    column = 1 + group.members[0]
    pairs = [f"{row[0].text.rpartition('.')[2]} {row[column].text}" for row in table.rows if row[0].text != "seed"]
    return f"{group.label} ({', '.join(pairs)})" if pairs else group.label


def _figure(panel: Panel) -> str:
    details = ", ".join(filter(None, (panel.unit, "logarithmic" if panel.is_log else "")))
    details = escape(". ".join(filter(None, (details, panel.note)))) or "&nbsp;"
    return figure(panel.metric, draw_panel(panel), details)
