"""The comparison as one HTML page that needs neither a server nor other files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from arc_ds.comparison.panels import Panel
from arc_ds.comparison.report import FEW_RUNS, MAX_COLOURS, Comparison
from arc_ds.comparison.svg import draw_panel
from arc_ds.comparison.tables import to_html
from arc_ds.pages.frame import common_style, notes_html, sorting_script
from arc_ds.pages.tables import Table
from arc_ds.version import __version__

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
        + (f" in {len(groups)} groups of seeds" if len(groups) < len(runs) else "")
        + f", {len(comparison.metrics)} metrics, x-axis: {comparison.x_label}"
    )
    # The table of many runs has the first differing keys already.
    is_many = len(runs) > FEW_RUNS
    before = ["runs", "groups", *([] if is_many else ["config"])]
    after = [*(["config"] if is_many else []), "last", "best", "at", "speed", "environment"]
    shown_after = [tables[name] for name in after if name in tables]
    evaluation = [*([tables["evaluation"]] if "evaluation" in tables else []), *extra]
    anchors = [*(tables[name] for name in before if name in tables)]
    links = [(each.name, each.title) for each in anchors] + [("evaluation", "Evaluation")] * bool(evaluation)
    links += [("curves", "Curves"), *((each.name, each.title) for each in shown_after)]
    return "".join(
        (
            f'<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width">'
            f"<title>{escape(title)}</title><style>{common_style()}{_text('page.css')}{_colours(comparison)}</style></head>",
            f'<body class="{"many" if len(groups) > MAX_COLOURS else ""}"><h1>{escape(title)}</h1>',
            f"<div class=sub>{escape(head)}. ARC-DS {__version__}</div><nav>",
            *(f'<a href="#{name}">{escape(text)}</a>' for name, text in links),
            f"</nav>{notes_html(comparison.notes)}",
            *(_section(each) for each in anchors),
            "" if "config" in tables else "<h2>Config differences</h2><p>The configs of the runs are equal.</p>",
            "<h2 id=evaluation>Evaluation</h2>" if evaluation else "",
            *((f"<h3>{escape(each.title)}</h3>" if each in extra else "") + to_html(each) for each in evaluation),
            _curves(comparison, panels),
            *(_section(each) for each in shown_after),
            _sources(comparison),
            f"<p class=cap>Made by <code>{escape(command)}</code></p><div id=tip></div>",
            f"<script>{sorting_script()}{_text('page.js')}</script></body></html>\n",
        )
    )


def _text(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _colours(comparison: Comparison) -> str:
    """The colour of each group. If there are more groups than colours, the best ones have one; the others are grey."""
    num = min(len(comparison.groups), MAX_COLOURS)
    rules = [f".g{place}{{--c:var(--p{place})}}" for place in range(num)]
    # Later colours are also dashed, so that lines differ without colour.
    rules += [
        f".many .line.g{place}{{opacity:1;stroke-width:1.5}}.many .band.g{place}{{opacity:.12}}" for place in range(num)
    ]
    return "".join(rules) + "".join(f".line.g{place}{{stroke-dasharray:{dash}}}" for place, dash in _dashes(num))


def _dashes(num: int) -> Iterator[tuple[int, str]]:
    for place in range(4, num):
        yield place, ("7 3", "3 2", "9 2 2 2", "1.5 2.5")[place - 4]


def _section(table: Table) -> str:
    return f'<h2 id="{table.name}">{escape(table.title)}</h2>{to_html(table)}'


def _curves(comparison: Comparison, panels: Sequence[Panel]) -> str:
    """The legend, and the plots by the first part of the metric's name."""
    shown = comparison.groups[:MAX_COLOURS]
    legend = [
        f'<span data-g="{place}"><i class="sw g{place}"></i>{escape(_labelled(comparison, place))}</span>'
        for place in range(len(shown))
    ]
    if len(comparison.groups) > len(shown):
        legend.append(
            f"<span><i class=sw></i>{len(comparison.groups) - len(shown)} others (click one in a table)</span>"
        )
    legend.append(
        '<input id=filter type=search placeholder="show plots whose name has …" aria-label="filter of plots">'
    )
    parts = ["<h2 id=curves>Curves</h2>"]
    if any(len(group.members) > 1 for group in comparison.groups):
        parts.append(
            "<p class=cap>Runs that differ in the seed only are drawn as mean and band of one standard deviation.</p>"
        )
    if len(comparison.groups) > len(shown):
        metric, direction = comparison.best
        parts.append(f"<p class=cap>The {len(shown)} best by {escape(metric)} ({direction}) have colours.</p>")
    parts.append(f"<div class=legend>{''.join(legend)}</div>")
    drawn = [panel for panel in panels if panel.series]
    main = set(comparison.metrics[: comparison.num_main])
    sections = groupby(drawn, key=lambda panel: "" if panel.metric in main else panel.metric.partition("/")[0])
    for section, members in sections:
        parts.append(f"<h3>{escape(section)}</h3><div class=grid-of>{''.join(map(_figure, members))}</div>")
    if len(drawn) < len(panels):
        names = ", ".join(panel.metric for panel in panels if not panel.series)
        parts.append(f"<p class=cap>Without a finite value: {escape(names)}</p>")
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
    metric = panel.metric
    details = ", ".join(filter(None, (panel.unit, "logarithmic" if panel.is_log else "")))
    details = escape(". ".join(filter(None, (details, panel.note)))) or "&nbsp;"
    return (
        f'<figure data-m="{escape(metric)}"><figcaption>{escape(metric)}<br><small>{details}</small>'
        f"</figcaption>{draw_panel(panel)}</figure>"
    )


def _sources(comparison: Comparison) -> str:
    rows = "".join(
        f"<tr><td class=t>{escape(run.name)}</td><td class=t><code>{escape(run.source)}</code></td></tr>"
        for run in comparison.runs
    )
    return f"<h2>Sources</h2><div class=scroll><table><tbody>{rows}</tbody></table></div>"
