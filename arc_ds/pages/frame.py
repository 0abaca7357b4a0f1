"""The frame of an HTML page that needs neither a server nor other files."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from arc_ds.version import __version__

NUM_COLOURS = 8
_HERE = Path(__file__).parent


def render_page(
    title: str, subtitle: str, sections: Sequence[tuple[str, str]], *, style: str = "", script: str = ""
) -> str:
    """A page: heading, links to its sections, and the sections. Tables of the class `sortable` sort by a click.

    title, subtitle: plain texts.
    sections: heading and HTML of each.
    style: further CSS. The class `g3` has the colour of the group 3; colours repeat after `NUM_COLOURS` groups.
    script: further JavaScript.
    """
    places = [f"s{number}" for number in range(len(sections))]
    links = "".join(f'<a href="#{place}">{escape(name)}</a>' for place, (name, _) in zip(places, sections, strict=True))
    body = "".join(
        f"<section><h2 id={place}>{escape(name)}</h2>{content}</section>"
        for place, (name, content) in zip(places, sections, strict=True)
    )
    style, script = common_style() + style, sorting_script() + script
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{style}</style></head><body>"
        f"<h1>{escape(title)}</h1><div class=sub>{escape(subtitle)} · ARC-DS {__version__}</div><nav>{links}</nav>"
        f"{body}<script>{script}</script></body></html>\n"
    )


def common_style() -> str:
    """CSS of all pages."""
    return (_HERE / "page.css").read_text("utf-8")


def sorting_script() -> str:
    """JavaScript that sorts a table of the class `sortable` by a click on the head of a column."""
    return (_HERE / "sort.js").read_text("utf-8")


def colours(num_groups: int) -> str:
    """CSS of the colours of groups."""
    return "".join(f".g{group}{{--c:var(--p{group % NUM_COLOURS})}}" for group in range(num_groups))


def notes_html(notes: Sequence[str]) -> str:
    """A box with sentences; nothing if there are none."""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f"<div class=notes><ul>{items}</ul></div>" if notes else ""
