"""Tables, axes, plots and the page, from runs as objects."""

from __future__ import annotations

import csv
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from arc_ds.comparison.files import PAGE, write_files
from arc_ds.comparison.page import render_page
from arc_ds.comparison.panels import x_axes
from arc_ds.comparison.report import Options, compare_runs, make_panels, to_json
from arc_ds.comparison.summary import direction_of, parse_best, speed_and_memory, summarize
from arc_ds.comparison.svg import draw_panel
from arc_ds.errors import DataError
from arc_ds.pages.tables import Cell, Table, to_text
from tests.helpers.compared_runs import falling, make_run

NLL = "validation/llama/continuation/nll_compressed"


def sweep():
    """Two configs with three seeds each, and a single run."""
    runs = []
    for lr, start in (("0.1", 8.0), ("0.2", 5.0)):
        for seed in range(3):
            points = {"train/loss": falling(start + seed), NLL: {50: start + seed, 100: start + seed - 1}}
            runs.append(make_run(f"lr{lr}_s{seed}", points, {"lr": lr, "seed": str(seed)}))
    return [*runs, make_run("single", {"train/loss": falling(9.0, 80), NLL: {50: 9.0}}, {"lr": "0.3", "seed": "0"})]


def test_last_best_and_at_step_are_those_of_the_points() -> None:
    curve = make_run("a", {"m": {10: 3.0, 20: 1.0, 30: math.nan, 40: 2.0}}).curves["m"]
    found = summarize(curve, "min", 25)
    assert (found.last, found.best, found.at) == ((40, 2.0), (20, 1.0), (20, 1.0))
    assert summarize(curve, "max", 5) == ((40, 2.0), (10, 3.0), None)
    assert summarize(curve, None, 40).best is None


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        ("train/loss/llama/pretraining", "min"),
        (NLL, "min"),
        ("validation/llama/continuation/gap_closed", "max"),
        ("eval/squad/f1", "max"),
        ("eval/flores/bleu", "max"),
        ("speed/encoder_tokens_per_s", "max"),
        ("speed/step_s", "min"),
        ("lr/encoder", None),
        ("train/labels", None),
    ],
)
def test_the_name_of_a_metric_tells_whether_high_is_better(metric: str, direction: str | None) -> None:
    assert direction_of(metric) == direction


def test_best_takes_a_direction_and_names_the_nearest_metrics() -> None:
    metrics = ["lr/encoder", "train/loss", NLL]
    assert parse_best("lr/encoder:max", metrics) == ("lr/encoder", "max")
    assert parse_best(None, metrics) == (NLL, "min")
    with pytest.raises(DataError, match=r"no run has the metric 'train/los'\. Nearest of the 3 metrics: train/loss"):
        parse_best("train/los", metrics)


def test_runs_are_ordered_and_seeds_grouped_by_their_mean() -> None:
    comparison = compare_runs(sweep(), Options())
    assert [run.name for run in comparison.runs][:4] == ["lr0.2_s0", "lr0.2_s1", "lr0.2_s2", "lr0.1_s0"]
    assert [group.label for group in comparison.groups] == ["lr0.2 (3 seeds)", "lr0.1 (3 seeds)", "single"]
    rows = comparison.tables["groups"].rows
    assert rows[0][2].value == pytest.approx(5.0) and rows[0][2].note == "± 1" and rows[0][3].value is None
    # Welch with the degrees of freedom of the smaller group: 4.3027 * sqrt(2 / 3).
    assert rows[1][3].value == pytest.approx(3.0) and rows[1][3].note == "[-0.5131, 6.513]"
    assert (rows[2][3].value, rows[2][3].note) == (pytest.approx(4.0), "")
    first, chance, configs = comparison.verdict
    assert first.endswith("lr0.2 (3 seeds), best value 5. Next: lr0.1 (3 seeds), best value 8, which is 3 worse.")
    assert chance.startswith(
        "The 95% interval of the difference is [-0.5131, 6.513] over 3 and 3 seeds: seeds alone may"
    )
    assert configs == "Their configs differ in lr (0.2 and 0.1)."
    assert [row[2].value for row in comparison.tables["runs"].rows[:3]] == [0, 1, 2]


def test_a_difference_beyond_the_spread_of_seeds_is_clear_and_high_values_may_be_better() -> None:
    runs = [
        make_run(f"{name}{seed}", {"eval/qa/f1": {1: value + seed / 10}}, {"lr": name, "seed": str(seed)})
        for name, value in (("a", 40.0), ("b", 50.0))
        for seed in range(4)
    ]
    comparison = compare_runs(runs, Options())
    assert "high values are better): b (4 seeds), best value 50.15" in comparison.verdict[0]
    assert comparison.tables["runs"].rows[-1][2].value == pytest.approx(10.3)  # behind the first one
    assert "is 10 worse" in comparison.verdict[0] and "seeds alone do not explain it" in comparison.verdict[1]
    only = compare_runs(runs[:1], Options()).verdict
    assert only == ("Only a0 has a value of eval/qa/f1 (high values are better): 40.",)


def test_a_seed_that_ended_early_is_in_no_mean() -> None:
    runs = [
        make_run(f"a{seed}", {"train/loss": falling(3.0 + seed, num)}, {"seed": str(seed)})
        for seed, num in enumerate((100, 100, 3))
    ]
    comparison = compare_runs([*runs, make_run("b", {"train/loss": falling(4.0)}, {"lr": "1"})], Options())
    row = comparison.tables["groups"].rows[0]
    ends = [falling(3.0 + seed)[100] for seed in range(2)]
    assert row[1].value == 2 and [row[place].value for place in (2, 4, 5)] == pytest.approx([np.mean(ends)] * 3)
    assert any("a2 ended before step 100" in note and "Means over seeds leave" in note for note in comparison.notes)
    (panel,) = make_panels(comparison)
    mean = next(one for one in panel.series if one.label == "a (3 seeds)")
    assert len(mean.x) == 100 and mean.y[-1] == pytest.approx(np.mean(ends))
    assert panel.note.endswith("1 seed is not in a mean: ended early.")


def test_seeds_without_a_common_step_are_drawn_singly_even_among_many_runs() -> None:
    runs = [make_run(f"a{n}", {"train/loss": falling(3.0), "m": {90 + n: 5.0}}, {"seed": str(n)}) for n in range(2)]
    runs += [make_run(f"b{n}", {"train/loss": falling(4.0)}, {"lr": str(n)}) for n in range(9)]
    panel = next(panel for panel in make_panels(compare_runs(runs, Options())) if panel.metric == "m")
    assert [one.label for one in panel.series] == ["a0", "a1"] and draw_panel(panel).count('class="dots') == 2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("is_log", [False, True])
def test_extreme_values_make_a_page(is_log: bool) -> None:
    points = ({1: 1e308, 2: 5e-324, 3: 1.0}, {1: -1e308, 2: math.nan, 3: math.inf}, {1: 1e-300, 2: 1e149, 3: 2.0})
    runs = [make_run(f"a{n}", {"train/loss": each}, {"seed": str(n)}) for n, each in enumerate(points)]
    runs.append(make_run("no value", {"train/loss": {1: math.nan}}, {"lr": "1"}))
    for chosen in (runs, runs[:1], runs[1:2], runs[2:]):
        comparison = compare_runs(chosen, Options(is_log=is_log))
        page = render_page(comparison, make_panels(comparison), title="", command="")
        assert not re.search(r'="[^"]*\b(nan|inf)\b', page.partition("<svg")[2].partition("</svg>")[0])


def test_a_lucky_seed_does_not_put_its_group_first() -> None:
    values = {"a": (1.0, 9.0), "b": (2.0, 3.0)}
    runs = [
        make_run(f"{name}{seed}", {"train/loss": {1: value}}, {"lr": name, "seed": str(seed)})
        for name, pair in values.items()
        for seed, value in enumerate(pair)
    ]
    assert [group.label[0] for group in compare_runs(runs, Options()).groups] == ["b", "a"]


def test_scores_on_different_held_out_data_are_marked_and_order_nothing() -> None:
    points = {NLL: {1: 1.0}, "train/loss": {1: 2.0}}
    runs = [make_run(name, points, {"digest.held-out": name * 36}) for name in "aab"]
    assert compare_runs(runs[:2], Options()).best[0] == NLL and compare_runs(runs[:2], Options(best=NLL)).notes == ()
    comparison = compare_runs(runs, Options())
    assert comparison.best[0] == "train/loss"
    assert "not comparable: a, a (aaaaaaaa); b (bbbbbbbb)" in comparison.notes[0]
    with pytest.raises(DataError, match=r"cannot order these runs: .* such as train/loss"):
        compare_runs(runs, Options(best=f"{NLL}:min"))
    other = make_run("other", {"train/loss": {1: 2.0}}, {"digest.held-out": "b" * 36})
    assert compare_runs([*runs[:2], other], Options()).best[0] == NLL, "it has no such score"
    unknown = make_run("old", points)
    assert compare_runs([runs[0], unknown], Options(best=NLL)).notes == ()


def test_at_equal_tokens_a_run_of_half_the_batch_size_has_done_twice_the_steps() -> None:
    def rates(tokens: float, num: int):
        every = range(1, num + 1)
        speed = {"speed/encoder_tokens_per_s": dict.fromkeys(every, tokens), "speed/step_s": dict.fromkeys(every, 1.0)}
        return {**speed, "train/loss": {step: 1000.0 - step for step in every}}

    runs = [make_run("half", rates(50.0, 90)), make_run("whole", rates(100.0, 40))]
    table = compare_runs(runs, Options(axis="tokens")).tables["equal"]
    assert table.title == "Value at equal work: 4000 encoder tokens" and table.columns == ("metric", "half", "whole")
    rows = {row[0].text: [cell.value for cell in row[1:]] for row in table.rows}
    assert rows["optimizer steps"] == [80, 40] and rows["train/loss"] == [920, 960]
    assert "equal" not in compare_runs(runs, Options()).tables


def test_the_common_step_leaves_out_runs_that_ended_early() -> None:
    runs = [make_run(name, {"train/loss": falling(3.0, num)}) for name, num in (("a", 100), ("b", 80), ("c", 3))]
    comparison = compare_runs(runs, Options())
    assert comparison.at_step == 80
    assert any(note.startswith("c ended before step 80") for note in comparison.notes)


def test_few_runs_are_columns_and_many_are_rows() -> None:
    comparison = compare_runs(sweep()[:2], Options())
    assert comparison.tables["config"].columns[0] == "key" and comparison.tables["last"].columns[0] == "metric"
    assert compare_runs(sweep(), Options()).tables["last"].columns[0] == "run"


def test_no_metric_at_all_is_an_error_and_one_run_without_is_not() -> None:
    empty = make_run("empty", {}, notes=("It has no metrics.",))
    with pytest.raises(DataError, match=r"none of the runs has a metric yet \(runs/empty\)"):
        compare_runs([empty], Options())
    comparison = compare_runs([empty, *sweep()], Options())
    assert comparison.runs[-1].name == "empty" and "empty: It has no metrics." in comparison.notes


def test_axes_add_up_work_and_leave_pauses_out() -> None:
    rates = {"speed/encoder_tokens_per_s": {10: 100.0, 20: 300.0}, "speed/step_s": {10: 2.0, 20: 1.0}}
    run = make_run("a", {**rates, "train/loss": {step: 1.0 for step in range(1, 26)}})
    (tokens,), label = x_axes([run], "tokens")
    assert label == "encoder tokens"
    at = np.interp([0, 5, 10, 20, 25], tokens.steps, tokens.values)
    assert at.tolist() == pytest.approx([0, 1000, 2000, 5000, 6500])  # 10 steps of 200, and then of 300 tokens
    (hours,), _ = x_axes([run], "time")
    assert np.interp(20, hours.steps, hours.values) == pytest.approx(30 / 3600)


def test_runs_without_a_common_axis_are_refused_with_their_names() -> None:
    has = {"speed/tflops_per_s": {1: 1.0}, "speed/step_s": {1: 1.0}, "train/loss": {1: 1.0}}
    runs = [make_run("new", has), make_run("old", {"train/loss": {1: 1.0}})]
    wanted = r"different x-axes: --x flops needs .*tflops_per_s.* 1 of 2 runs lack \(old\)\. Use --x step"
    with pytest.raises(DataError, match=wanted):
        compare_runs(runs, Options(axis="flops"))


def test_without_step_times_the_time_of_day_counts() -> None:
    (hours,), label = x_axes([make_run("a", {"m": {1: 0.0, 1801: 0.0}})], "time")
    assert label == "time since the first step, h" and hours.values.tolist() == [0.0, 1.0]


def test_a_band_is_one_standard_deviation_and_a_long_curve_is_thinned() -> None:
    comparison = compare_runs(sweep(), Options(metrics=("train/loss",)))
    (panel,) = make_panels(comparison)
    means = {one.label: one for one in panel.series if one.low is not None}
    band = means["lr0.2 (3 seeds)"]
    values = [falling(5.0 + seed)[10] for seed in range(3)]
    at = int(np.flatnonzero(band.x == 10)[0])
    assert band.y[at] == pytest.approx(np.mean(values))
    assert band.high is not None and band.high[at] - band.y[at] == pytest.approx(np.std(values, ddof=1))
    long = make_run("long", {"train/loss": falling(3.0, 5000)})
    (panel,) = make_panels(compare_runs([long], Options()))
    (line,) = panel.series
    assert 200 <= len(line.x) <= 240 and line.y.mean() == pytest.approx(
        np.mean(list(falling(3.0, 5000).values())), rel=1e-3
    )


def test_a_spike_does_not_flatten_the_plot_and_is_counted() -> None:
    points = {**falling(3.0), 50: 1e6, 60: math.nan}
    (panel,) = make_panels(compare_runs([make_run("a", {"train/loss": points})], Options()))
    assert panel.limits[1] < 5
    assert panel.note == "1 NaN or infinite value is not drawn. 11 drawn points are outside the shown range."


def test_log_needs_positive_values() -> None:
    run = make_run("a", {"train/loss": falling(3.0), "lr/x": {1: 0.0, 2: 1.0}, "m": {1: 1.0}})
    panels = make_panels(compare_runs([run], Options(is_log=True)))
    assert {panel.metric: panel.is_log for panel in panels} == {"train/loss": True, "lr/x": False, "m": False}


def test_speed_is_a_median_without_the_first_report_and_memory_a_peak() -> None:
    points = {
        "speed/step_s": {1: 90.0, 2: 1.0, 3: 3.0},
        "memory/peak_gib": {1: 2.0, 2: 5.0, 3: 4.0},
        "train/mfu": {1: 0.5},
    }
    assert speed_and_memory(make_run("a", points)) == {"step, s": 2.0, "peak memory, GiB": 5.0, "MFU, %": 50.0}


def test_a_batch_size_that_differs_is_noted() -> None:
    runs = [make_run(name, {"m": {1: 1.0}}, {"data.batch_size": name}) for name in "12"]
    assert any("equal steps are not equal work" in note for note in compare_runs(runs, Options()).notes)
    runs = [make_run(name, {"m": {1: 1.0}}, {"steps": name}) for name in "12"]
    assert any("other places of their learning-rate schedules" in note for note in compare_runs(runs, Options()).notes)


def test_text_tables_count_the_rows_that_they_leave_out() -> None:
    table = Table("t", "Title", ("run", "x"), tuple((Cell(f"r{n}", f"r{n}"), Cell("1", 1.0)) for n in range(5)))
    assert to_text(table, 2).splitlines() == [
        "Title",
        "  run  x",
        "  r0   1",
        "  r1   1",
        "  … 3 more rows: see --out and --json",
    ]


class _Page(HTMLParser):
    """Collects addresses that a browser would fetch, and SVG elements."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.fetched += [str(values[name]) for name in ("src", "srcset", "data") if name in values]
        if tag == "link":
            self.fetched.append(str(values.get("href")))


def test_the_page_needs_no_other_file_and_escapes_names(tmp_path: Path) -> None:
    runs = [
        *sweep(),
        make_run("<b>&evil", {"train/loss": falling(4.0), "x/<i>": {1: 1.0}}, {"lr": "</script><u>", "seed": "0"}),
    ]
    comparison = compare_runs(runs, Options())
    paths = write_files(comparison, tmp_path / "out", title="A & B", command="arc-ds compare")
    text = (tmp_path / "out" / PAGE).read_text()
    page = _Page()
    page.feed(text)
    assert (
        page.fetched == [] and "http" not in text and "@import" not in text and "url(" not in text.replace("url(#", "")
    )
    assert "<b>&evil" not in text and "</script><u>" not in text and "&lt;b&gt;&amp;evil" in text
    plots = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(plots) == len(comparison.metrics)
    # A boolean attribute or one without quotes is HTML, but no XML.
    for plot in plots:
        ElementTree.fromstring(re.sub(r'(\w+)=([^"\s>]+)(?=[\s>/])', r'\1="\2"', plot))
    assert "prefers-color-scheme: dark" in text
    assert {path.name for path in paths} >= {
        "runs.csv",
        "config.csv",
        "last.csv",
        "curves.csv",
        "curves.png",
        "curves.svg",
    }
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_comparison_without_any_value_has_an_empty_picture(tmp_path: Path) -> None:
    comparison = compare_runs([make_run("a", {"train/loss": {1: math.nan}})], Options())
    (page, *_, picture, _) = write_files(comparison, tmp_path, title="", command="")
    assert "Without a finite value: train/loss" in page.read_text() and picture.name == "curves.png"


def test_csv_files_hold_whole_values(tmp_path: Path) -> None:
    run = make_run("a", {"train/loss": {1: 1 / 3}}, {"path": "/long" * 20, "size": "64", "digest": "12e456"})
    other = {"path": "x", "size": "8", "digest": "0012"}
    write_files(
        compare_runs([run, make_run("b", {"train/loss": {1: 0.5}}, other)], Options()),
        tmp_path,
        title="",
        command="",
    )
    with (tmp_path / "last.csv").open() as file:
        assert list(csv.reader(file))[1] == ["train/loss", str(1 / 3), "0.5"]
    with (tmp_path / "config.csv").open() as file:
        rows = [["digest", "12e456", "0012"], ["path", "/long" * 20, "x"], ["size", "64", "8"]]
        assert list(csv.reader(file))[1:] == rows  # a digest is no number


def test_json_has_no_nan(tmp_path: Path) -> None:
    found = to_json(compare_runs([make_run("a", {"train/loss": {1: 2.0, 2: math.nan}})], Options()))
    assert found["runs"][0]["metrics"]["train/loss"] == {
        "last": {"step": 2, "value": "nan"},
        "best": {"step": 1, "value": 2.0},
        "at": {"step": 2, "value": "nan"},
    }


def test_the_main_metrics_come_first_and_the_others_by_section() -> None:
    metrics = ("memory/a", "speed/b", "train/loss", "train/labels", NLL, "eval/squad/f1", "zzz")
    run = make_run("a", {name: {1: 1.0} for name in metrics})
    comparison = compare_runs([run], Options(best="eval/squad/f1"))
    assert comparison.metrics[: comparison.num_main] == ("eval/squad/f1", "train/loss", NLL)
    assert comparison.metrics[comparison.num_main :] == ("train/labels", "speed/b", "memory/a", "zzz")


def test_few_points_are_all_shown() -> None:
    (panel,) = make_panels(compare_runs([make_run("a", {"eval/qa/f1": {1: 5.0, 2: 50.0, 3: 51.0}})], Options()))
    assert panel.limits[0] < 5 and panel.note == ""
