"""Tables, ticks and the frame of pages."""

from __future__ import annotations

import csv
import io
import math

import pytest

from arc_ds.pages.axes import log_ticks, nice_ticks, number, tick_texts
from arc_ds.pages.frame import NUM_COLOURS, colours, render_page
from arc_ds.pages.tables import EMPTY, Cell, Table, markdown_text, text_cell, to_csv, to_html, to_markdown

HOSTILE = '<b>&"a"|\n'
TABLE = Table(
    "t",
    "Title",
    ("name", "score"),
    (
        (text_cell(HOSTILE, "<b>", group=3), Cell("0.3", 1 / 3, "[0.1, 0.5]")),
        (text_cell("b"), EMPTY),
        (text_cell("c"), Cell("∞", math.inf)),
        (text_cell("d"), Cell("-∞", -math.inf)),
    ),
)


def test_csv_keeps_whole_values_and_hostile_texts():
    rows = list(csv.reader(io.StringIO(to_csv(TABLE))))
    assert rows[1] == [HOSTILE, str(1 / 3)] and float(rows[1][1]) == 1 / 3
    assert rows[2:] == [["b", ""], ["c", "inf"], ["d", "-inf"]]


def test_markdown_rows_have_one_line_and_numbers_align_right():
    lines = to_markdown(TABLE).splitlines()
    assert lines[1] == "| --- | ---: |"
    assert lines[2] == '| &lt;b>&amp;"a"\\| &lt;b> | 0.3 [0.1, 0.5] |'
    assert markdown_text("*a* `b`\n# [c](d) [1, 2]") == "\\*a\\* \\`b\\` # [c\\](d) [1, 2]"


def test_html_escapes_texts_and_sorts_by_whole_values():
    html = to_html(TABLE)
    assert "<b>" not in html and "&lt;b&gt;&amp;" in html
    # JavaScript reads neither "inf" nor "∞".
    assert f'data-v="{1 / 3}"' in html and 'data-v="Infinity"' in html and 'data-v="-Infinity"' in html
    assert (
        '<tr data-g="3">' in html
        and '<i class="sw g3">' in html
        and '<th scope="col" class=t>name' in html
        and '<th scope="col">score' in html
    )


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 96.1), (0.0012, 0.0019), (40, 40.3), (-1e6, 1e6)])
def test_ticks_are_few_round_and_inside(low, high):
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 7 and all(low <= tick <= high for tick in ticks)
    step = (ticks[1] - ticks[0]) / 10 ** math.floor(math.log10(ticks[1] - ticks[0]) + 1e-9)
    assert round(step, 6) in (1, 2, 5)


def test_log_ticks_fit_any_range():
    assert log_ticks(8, 2100) == [10, 20, 50, 100, 200, 500, 1000, 2000]
    assert log_ticks(220, 260) == [220, 230, 240, 250, 260]
    assert log_ticks(1e-3, 1) == [0.001, 0.01, 0.1, 1]
    assert log_ticks(1e-307, 1e307)[1] == 1e-246


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (57570.0, "57.57k"),
        (0.00012345, "0.0001234"),
        (2000.0, "2000"),
        (3e9, "3G"),
        (9999.6, "10k"),
        (999999.0, "1M"),
        (math.nan, "nan"),
    ],
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_texts_of_ticks_tell_them_apart():
    assert tick_texts([40.0, 60.0]) == ["40", "60"]
    assert tick_texts([100000.0, 100002.0]) == ["100k", "100.002k"]
    assert tick_texts([31.20001, 31.20002]) == ["31.20001", "31.20002"]


def test_a_page_needs_no_other_file_and_escapes_titles():
    sections = [("One <i>", "<p>1</p>")]
    page = render_page("A & B <i>", "sub", sections, notes=["<i>note"], style=colours(NUM_COLOURS + 1))
    assert (
        "<i>" not in page
        and "One &lt;i&gt;" in page
        and "<li>&lt;i&gt;note</li>" in page
        and page.count("<section>") == 1
    )
    assert "http" not in page and "src=" not in page and "<link" not in page
    assert f".g{NUM_COLOURS}{{--c:var(--p0)}}" in page
    assert "class=notes" not in render_page("A", "sub", sections)
