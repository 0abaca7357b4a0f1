"""The frame of an HTML page that needs neither a server nor other files."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from arc_ds.version import __version__

NUM_COLOURS = 8


def render_page(
    title: str,
    subtitle: str,
    sections: Sequence[tuple[str, str]],
    *,
    notes: Sequence[str] = (),
    style: str = "",
    script: str = "",
    kind: str = "",
) -> str:
    """A page: heading, links to its sections, notes, and the sections. Tables sort by a click on the head of a column.

    title, subtitle: plain texts.
    sections: heading and HTML of each.
    notes: sentences in a box above the sections.
    style: further CSS. The class `g3` has the colour of the group 3 (`colours`).
    script: further JavaScript.
    kind: CSS class of the whole page.
    """
    places = [f"s{number}" for number in range(len(sections))]
    links = "".join(f'<a href="#{place}">{escape(name)}</a>' for place, (name, _) in zip(places, sections, strict=True))
    body = "".join(
        f"<section><h2 id={place}>{escape(name)}</h2>{content}</section>"
        for place, (name, content) in zip(places, sections, strict=True)
    )
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    box = f"<div class=notes><ul>{items}</ul></div>" if notes else ""
    common_style, common_script = (
        Path(__file__).with_name(f"page.{suffix}").read_text("utf-8") for suffix in ("css", "js")
    )
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{common_style}{style}</style></head><body class='{kind}'>"
        f"<h1>{escape(title)}</h1><div class=sub>{escape(subtitle)} · ARC-DS {__version__}</div><nav>{links}</nav>"
        f"{box}{body}<script>{common_script}{script}</script></body></html>\n"
    )


def colours(num_groups: int) -> str:
    """CSS of the colours of groups. They repeat after `NUM_COLOURS` groups."""
    return "".join(f".g{group}{{--c:var(--p{group % NUM_COLOURS})}}" for group in range(num_groups))
