"""The report: its numbers are those of scorer and comparison, its texts are escaped, its size is bounded."""

from __future__ import annotations

import csv
import json
import math
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations

import numpy as np
import pytest
from scipy.stats import t as student

from arc_ds.cli import main
from arc_ds.errors import ConfigError, DataError
from arc_ds.evaluation.comparison import compare_systems
from arc_ds.evaluation.protocol import CLEAN
from arc_ds.evaluation.report import write_report
from arc_ds.evaluation.report.content import make_report, task_sizes
from arc_ds.evaluation.report.page import report_page
from arc_ds.evaluation.report.paper import paper_rows
from arc_ds.evaluation.report.plots import Point, difference_plots, dot_plot, scatter_plot
from arc_ds.evaluation.report.tables import (
    count_table,
    difference_table,
    nll_tables,
    notes_of,
    report_markdown,
    run_table,
    score_table,
    verdict_table,
)
from arc_ds.evaluation.results import SEEDS_NOTE, Prediction, prediction_line, read_systems
from arc_ds.evaluation.scoring import score_system
from tests.helpers.eval_results import SYSTEMS, fake_folders, fake_results

DRAWS = 300
OPEN, CLOSED, ARC4 = SYSTEMS[:3]
TASKS = {"squad": 60, "nq": 40}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return fake_folders(tmp_path_factory.mktemp("results"), SYSTEMS[:3], TASKS)


@pytest.fixture(scope="module")
def report(folders):
    return make_report(read_systems(folders), num_draws=DRAWS)


def rows_of(table):
    return [dict(zip(table.columns, row, strict=True)) for row in table.rows]


def test_scores_and_differences_are_those_of_scorer_and_comparison(folders, report):
    systems = read_systems(folders)
    for system, made in zip(systems, report.systems, strict=True):
        scores = score_system(system, DRAWS)
        assert made.by_task == scores.by_task and made.average.value == scores.average.value
    for other in systems[1:]:
        assert report.comparisons[other.name].by_task == compare_systems(systems[0], other, num_draws=DRAWS)[0].by_task
    assert report.comparisons["closed book"].by_task["squad"]["em"].value < -10  # something differs


def test_the_table_has_the_shape_of_table_1(report):
    rows = rows_of(score_table(report, with_paper=False))
    assert list(rows[0]) == ["system", "×", "NQ EM", "SQuAD EM", "Avg."]  # the paper's order, not the alphabet's
    assert [row["system"].text for row in rows] == ["open book", "closed book", "ARC4"]
    assert [row["×"].text for row in rows] == ["1", "∞", "3.89"]
    score = report.systems[2].by_task["nq"]["em"]
    assert rows[2]["NQ EM"].text.startswith(f"{score.value:.1f}")
    assert rows[2]["NQ EM"].note == f"[{score.low:.1f}, {score.high:.1f}]"


def test_an_arrow_marks_only_differences_that_hold_after_holm(report):
    for row in rows_of(score_table(report, with_paper=False))[1:]:
        for task, column in (("nq", "NQ EM"), ("squad", "SQuAD EM")):
            difference = report.comparisons[row["system"].text].by_task[task]["em"]
            assert ("▼" in row[column].text) == (difference.p_holm < 0.05 and difference.value < 0)
    assert "▼" in rows_of(score_table(report, with_paper=False))[1]["SQuAD EM"].text
    comparison = report.comparisons["closed book"]
    unsure = replace(comparison.by_task["squad"]["em"], p=0.0003, p_holm=0.06)
    comparisons = {"closed book": replace(comparison, by_task={"squad": {"em": unsure}})}
    changed = replace(report, comparisons=comparisons)
    assert "▼" not in rows_of(score_table(changed, with_paper=False))[1]["SQuAD EM"].text
    assert "p=0.060" in difference_plots(changed)


def test_lower_nll_is_marked_as_better(folders):
    made = make_report(read_systems(folders), baseline="closed book", metric="nll", num_draws=DRAWS)
    row = rows_of(score_table(made, with_paper=True))[0]
    assert "▲" in row["NQ NLL"].text and made.comparisons["open book"].by_task["nq"]["nll"].value < 0
    assert all(sample.difference > 0 for sample in made.samples if sample.score < sample.baseline_score)
    assert "paper" not in {row["system"].note for row in rows_of(score_table(made, with_paper=True))}


def test_the_papers_numbers_stand_only_by_their_tasks_and_metrics(report):
    rows = [row for row in rows_of(score_table(report, with_paper=True)) if row["system"].note == "paper"]
    assert [row["system"].text for row in rows] == ["open book, Llama 3.1 8B", "ARC4, Llama 3.1 8B"]
    assert (rows[1]["NQ EM"].value, rows[1]["SQuAD EM"].value) == (39.7, 74.0)
    assert rows[1]["Avg."].value is None  # the paper's average is over six tasks
    six = paper_rows(["nq", "triviaqa", "hotpotqa", "squad", "flores", "cnn"], with_average=True)
    assert [row.average for row in six] == [47.4, 48.0, 45.0, 49.2, 46.5, 43.4]
    means = [np.mean(list(row.scores.values())) for row in six[:2]]
    assert np.allclose(means, [row.average for row in six[:2]], atol=0.06)
    assert [row.scores["qmsum"] for row in paper_rows(["qmsum"], with_average=False)] == [19.8, 19.7, 17.6, 19.1]


def test_ratios_follow_the_protocol_and_leave_out_unknown_counts():
    arc = {"document_decoder_tokens": 101, "vectors": 24, "markers": 1, "prompt_rows": 55, "open_book_rows": 131}
    long = {"document_decoder_tokens": 900, "vectors": 99, "markers": 1, "prompt_rows": 130, "open_book_rows": 930}
    sizes = task_sizes([arc, long], "decoder")
    assert sizes.ratio == pytest.approx((101 / 25 + 9) / 2) and sizes.ratio_of_sums == 1001 / 125
    assert sizes.prompt_ratio == 1061 / 185 and sizes.prompt_rows == 92.5 and sizes.new_tokens is None
    last = {**arc, "last_document_encoder_tokens": 80, "last_vectors": 20}
    assert task_sizes([last], "encoder").ratio == 4 and task_sizes([last], "decoder").ratio == 101 / 25
    half = {"document_decoder_tokens": 100, "prompt_rows": 80, "open_book_rows": 130}
    closed = {"document_decoder_tokens": 100, "prompt_rows": 20, "open_book_rows": 130}
    assert task_sizes([half], "decoder").ratio == 2 and math.isinf(task_sizes([closed], "decoder").ratio)
    bare = task_sizes([{"prompt_rows": 20, "new_tokens": 3}], "encoder")
    assert math.isinf(bare.ratio) and math.isinf(bare.ratio_of_sums) and bare.prompt_ratio is None
    assert task_sizes([{}, {}], "decoder") == (None,) * 5


def test_gap_closed_is_that_of_the_nlls(report):
    nll = {system.name: system.by_task["nq"]["nll"].value for system in report.systems}
    gap = report.gap_closed["ARC4", "nq"]
    assert gap.value == (nll["closed book"] - nll["ARC4"]) / (nll["closed book"] - nll["open book"])
    assert 0.5 < gap.low < gap.value < gap.high < 1.2
    assert {name for name, _ in report.gap_closed} == {"ARC4"}
    assert [table.title for table in nll_tables(report)] == ["Answer NLL", "Gap closed"]


def test_mismatched_contexts_lower_the_floor_of_the_gap(tmp_path, folders):
    mismatched = replace(ARC4, name="mismatched", kind="mismatched", nats=3.0)
    other = fake_results(tmp_path / "mismatched", mismatched, TASKS)
    made = make_report(read_systems([*folders, str(other)]), num_draws=DRAWS)
    nll = {system.name: system.by_task["nq"]["nll"].value for system in made.systems}
    expected = (nll["mismatched"] - nll["ARC4"]) / (nll["mismatched"] - nll["open book"])
    gap = made.gap_closed["ARC4", "nq"]
    assert gap.value == expected and nll["mismatched"] < nll["closed book"]
    closed, mismatched, full, arc = (
        next(each for each in made.systems if each.name == name).draws["nq"]["nll"]
        for name in ("closed book", "mismatched", "open book", "ARC4")
    )
    floor = np.minimum(closed, mismatched)
    draws = (floor - arc) / (floor - full)
    reach = student.ppf(0.975, 7) * draws.std() * math.sqrt(8 / 7)  # 8 clusters
    assert (gap.low, gap.high) == pytest.approx((gap.value - reach, gap.value + reach), rel=1e-5)


def test_differing_samples_are_bounded_balanced_and_show_who_is_right(folders):
    made = make_report(read_systems(folders), max_samples=24, num_draws=DRAWS)
    assert len(made.samples) == 24
    cells = Counter((each.system, each.task, each.difference > 0) for each in made.samples)
    assert set(cells.values()) == {3}  # two systems, two tasks, two directions
    chosen, every = (
        sorted(each.id for each in found.samples if (each.system, each.task, each.difference > 0) == next(iter(cells)))
        for found in (made, make_report(read_systems(folders), num_draws=DRAWS))
    )
    assert chosen != every[:3] and set(chosen) < set(every)  # not the file's first ones
    for each in made.samples:
        assert abs(each.baseline_score - each.score) == 100
        assert (each.prediction in each.references) == (each.score == 100) == (each.difference > 0)
    counts = made.pair_counts["ARC4", "squad"]
    difference = made.comparisons["ARC4"].by_task["squad"]["em"]
    assert sum(counts) == 60 and (counts.better - counts.worse) / 60 * 100 == pytest.approx(difference.value)
    none = make_report(read_systems(folders), max_samples=0, num_draws=DRAWS)
    assert "0 of 8" in report_page(none, with_paper=False)
    row = next(r for r in rows_of(difference_table(made)) if (r["system"].text, r["task"].text) == ("ARC4", "SQuAD EM"))
    assert (row["better"].value, row["worse"].value, row["equal"].value) == counts


class Tags(HTMLParser):
    """Names of all tags, all attributes, and the text."""

    def __init__(self, page):
        super().__init__()
        self.names, self.attributes, self.text = Counter(), [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.names[tag] += 1
        self.attributes += attrs

    def handle_data(self, data):
        self.text += data


HOSTILE = "</article></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


def write_lines(path, predictions):
    path.write_text("".join(f"{prediction_line(each)}\n" for each in predictions), encoding="utf-8")
    return str(path)


def hostile_files(root, num=6, length=0):
    """Predictions files of two systems whose every text is hostile. One is right, the other one is wrong."""
    text = f"{HOSTILE}{'x' * length}"
    files = []
    for name, given in (("a" + HOSTILE, text), ("b" + HOSTILE, "wrong " + text)):
        lines = [
            Prediction(
                id=f"{n}{HOSTILE}",
                task="qa",
                prediction=given,
                references=(text,),
                system=name,
                decoder=HOSTILE,
                stop=HOSTILE,
                others={"question": HOSTILE + "&" * length},
            )
            for n in range(num)
        ]
        files.append(write_lines(root / f"{len(files)}.jsonl", lines))
    return files


def test_hostile_texts_stay_texts(tmp_path):
    made = make_report(read_systems(hostile_files(tmp_path)), num_draws=DRAWS)
    page = report_page(made, with_paper=True)
    tags = Tags(page)
    assert tags.names["script"] == 1 and tags.names["img"] == 0 and tags.names["article"] == 6
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    assert HOSTILE in tags.text and "✓ wrong" not in tags.text and tags.text.count("✓") == 6
    outside = [value for name, value in tags.attributes if name in ("src", "href") and not value.startswith("#")]
    assert outside == [] and "@import" not in page and "url(" not in page
    markdown = report_markdown(replace(made, notes=(HOSTILE,)), with_paper=True)
    assert "<script" not in markdown and "## Differences from a&lt;/article>" in markdown


def test_the_page_of_many_long_answers_stays_small(tmp_path):
    files = hostile_files(tmp_path, num=320, length=1500)
    page = report_page(make_report(read_systems(files), num_draws=DRAWS), with_paper=False)
    assert len(page) < 2e6 and Tags(page).names["article"] == 300
    assert "300 of 320 pairs" in page


def test_one_system_has_scores_and_no_differences(folders):
    made = make_report(read_systems(folders[:1]), num_draws=DRAWS)
    page = report_page(made, with_paper=False)
    assert (
        "no system to compare with" in page
        and "Samples that differ" not in page
        and "▼" not in page.partition("<body>")[2]
    )
    assert made.comparisons == {} and made.systems[0].average is not None


def test_a_file_of_another_program_has_scores_without_sizes(tmp_path):
    lines = [json.dumps({"id": n, "task": "qa", "prediction": "x", "references": ["x"]}) for n in range(3)]
    (tmp_path / "lclm.jsonl").write_text("\n".join(lines), encoding="utf-8")
    made = make_report(read_systems([str(tmp_path / "lclm.jsonl")]), num_draws=DRAWS)
    page = report_page(made, with_paper=True)
    assert made.systems[0].name == "lclm" and "Score against" not in page and "protocol and data are unknown" in page


def test_other_protocols_and_data_are_refused_unless_forced(tmp_path, folders):
    first_only = replace(CLEAN, references="first")
    protocol = str(fake_results(tmp_path / "protocol", ARC4, TASKS, protocol=first_only))
    data = str(fake_results(tmp_path / "data", ARC4, TASKS, questions="again"))
    fewer = str(fake_results(tmp_path / "fewer", ARC4, {"squad": 50, "nq": 40}))
    for other, difference in ((protocol, "references"), (data, "again"), (fewer, "squad-00050")):
        with pytest.raises(DataError, match=re.escape(difference)) as error:
            make_report(read_systems([folders[0], other]), num_draws=DRAWS)
        assert "--force" in str(error.value)
        forced = make_report(read_systems([folders[0], other]), force=True, num_draws=DRAWS)
        assert difference in forced.notes[0] and difference in report_page(forced, with_paper=False)
        with_closed = make_report(read_systems([*folders[:2], other]), force=True, num_draws=DRAWS)
        assert not with_closed.gap_closed  # it compares scores of the same questions
        if other == protocol:
            rows = [row for row in rows_of(run_table(forced)) if row["key"].text == "protocol.references"]
            found = {row["value"].text: row["systems"].text for row in rows}
            assert found == {CLEAN.references: "open book", "first": "ARC4"}
    assert forced.comparisons["ARC4"].by_task["squad"]["em"].n == 50  # the questions that both have
    assert forced.systems[0].by_task["squad"]["em"].n == 60
    rows = rows_of(score_table(forced, with_paper=False))
    assert [row["system"].note for row in rows] == ["", "≠ other questions, data or protocol"]
    assert [row["SQuAD EM"].note.split(" n=")[1] for row in rows] == ["60", "50"]
    assert "n=" not in rows[0]["NQ EM"].note


def test_systems_differ_also_in_a_task_that_the_baseline_lacks(tmp_path, folders):
    base = str(fake_results(tmp_path / "base", replace(OPEN, name="nq only"), {"nq": 40}))
    fewer = str(fake_results(tmp_path / "fewer", ARC4, {"squad": 50, "nq": 40, "hotpotqa": 3}))
    with pytest.raises(DataError, match="squad-00050"):
        make_report(read_systems([base, folders[1], fewer]), num_draws=DRAWS)
    forced = make_report(read_systems([base, folders[1], fewer]), force=True, num_draws=DRAWS)
    assert forced.different == {"ARC4"} and "next to closed book in spite of" in forced.notes[0]
    assert forced.comparisons["ARC4"].by_task["nq"]["em"].n == 40
    assert [each.average is None for each in forced.systems] == [True, True, False]  # only one has all three tasks


def test_forcing_one_system_leaves_the_clusters_of_the_others(tmp_path, folders):
    files = [str(fake_results(tmp_path / "protocol", ARC4, TASKS, protocol=replace(CLEAN, references="first")))]
    answers = read_systems([folders[1]])[0].seeds[0].predictions
    files.append(write_lines(tmp_path / "bare.jsonl", [replace(each, cluster="", system="bare") for each in answers]))
    forced = make_report(read_systems([folders[0], *files]), force=True, num_draws=DRAWS)
    expected = make_report(read_systems(folders[:2]), num_draws=DRAWS)
    assert forced.comparisons["bare"].by_task == expected.comparisons["closed book"].by_task


def test_the_verdict_counts_clear_tasks_and_states_the_cost(report, folders):
    closed, arc = rows_of(verdict_table(report))
    average = report.comparisons["closed book"].average
    assert closed["difference"].value == average.value and closed["detectable"].value == average.detectable
    assert (closed["worse in"].text, closed["better in"].text, closed["not clear"].value) == ("1: SQuAD", "–", 1)
    assert "▼" not in rows_of(score_table(report, with_paper=False))[1]["NQ EM"].text
    assert arc["not clear"].value == 2 and (arc["×"].text, closed["×"].text) == ("3.89", "∞")
    assert arc["prompt rows"].value == report.mean_size(report.systems[2], "prompt_rows")
    made = make_report(read_systems(folders), baseline="closed book", metric="nll", num_draws=DRAWS)
    assert rows_of(verdict_table(made))[0]["better in"].text == "2: NQ, SQuAD"  # lower NLL is better


def test_skipped_samples_of_shown_tasks_are_named_above_the_scores(tmp_path, report):
    made = make_report(read_systems([str(fake_results(tmp_path, OPEN, {"hotpotqa": 4}))]), num_draws=DRAWS)
    assert notes_of(made) == ["Scores leave out skipped samples: open book: 2 of HotpotQA (too long)."]
    assert notes_of(report) == []


def test_empty_documents_and_prompts_have_no_place_on_a_logarithmic_axis(tmp_path):
    counts = ({"prompt_rows": 0}, {"document_decoder_tokens": 0, "vectors": 1, "prompt_rows": 9})
    files = [
        write_lines(
            tmp_path / f"{n}.jsonl",
            [Prediction(id=str(i), task="qa", prediction="x", references=("x",), lengths=each) for i in range(3)],
        )
        for n, each in enumerate(counts)
    ]
    page = report_page(make_report(read_systems(files), num_draws=DRAWS), with_paper=False)
    assert "Score against compression" in page and "nan" not in page.partition("<svg")[2].partition("<h2")[0]


def test_plots_of_very_many_tasks_are_folded(tmp_path):
    lines = [Prediction(id="1", task=f"qa{n}", prediction="x", references=("x",)) for n in range(14)]
    made = make_report(read_systems([write_lines(tmp_path / "many.jsonl", lines)]), num_draws=DRAWS)
    page = report_page(made, with_paper=False)
    assert "<summary>9 more plots</summary>" in page and page.count("<svg") == 15


def test_a_system_without_a_task_is_compared_in_the_others(tmp_path, folders):
    squad = str(fake_results(tmp_path / "squad", replace(ARC4, name="short"), {"squad": 60}))
    made = make_report(read_systems([folders[0], squad]), num_draws=DRAWS)
    assert list(made.comparisons["short"].by_task) == ["squad"] and made.systems[1].average is None
    row = rows_of(score_table(made, with_paper=False))[1]
    assert row["NQ EM"].text == row["Avg."].text == "–"
    nq = str(fake_results(tmp_path / "nq", replace(ARC4, name="nq"), {"nq": 40}))
    apart = make_report(read_systems([squad, nq]), num_draws=DRAWS)
    assert apart.comparisons == {} and "no task in common" in apart.notes[0]


def test_training_seeds_are_one_system(tmp_path, folders):
    seeds = []
    for seed in range(3):
        system = replace(ARC4, name=f"ARC4 of seed {seed}")
        seeds.append(str(fake_results(tmp_path / str(seed), system, TASKS)))
    made = make_report(read_systems([folders[0], ",".join(seeds)]), num_draws=DRAWS)
    assert len(made.systems) == 2 and made.systems[1].by_task["nq"]["em"].seed_sd > 0
    assert SEEDS_NOTE in notes_of(made)
    counts = rows_of(count_table(made))
    assert [row["answers"].value for row in counts] == [40, 60, 120, 180]


def test_sampled_answers_are_one_sample(tmp_path, folders):
    (arc,) = read_systems([folders[2]])
    answers = arc.seeds[0].predictions
    sampled = [*answers, *(replace(each, seed=each.seed + 1, prediction="nothing") for each in answers)]
    (tmp_path / "sampled.jsonl").write_text("".join(f"{prediction_line(each)}\n" for each in sampled))
    made = make_report(read_systems([folders[0], str(tmp_path / "sampled.jsonl")]), num_draws=DRAWS)
    first = {(each.task, each.id): each.prediction for each in answers}
    assert made.samples and all(each.prediction == first[each.task, each.id] for each in made.samples)
    assert made.systems[1].by_task["nq"]["em"].n == 40


def test_counts_of_stops_and_skipped_samples_are_shown(tmp_path):
    folder = fake_results(tmp_path / "open", OPEN, {"hotpotqa": 40})
    row = rows_of(count_table(make_report(read_systems([str(folder)]), num_draws=DRAWS)))[0]
    assert row["skipped: too long"].value == 2
    stops = [row[name].value for name in row if name.startswith("stop: ")]
    assert sum(stops) == 40 and row["empty"].value > 0 and "stop: unknown" not in row


def test_names_of_points_at_one_place_do_not_cover_each_other():
    points = [Point(f"system {n}", n, 50.0 + n / 10, 49.0, 52.0, x=4.0) for n in range(6)]
    svg = scatter_plot(points, "x", "y")
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" class=name>', svg)
    places = [(float(x), float(y)) for x, y in found]
    assert len(places) == 6 and "system 0: 50.00 [49.00, 52.00] at 4<" in svg
    assert "at ∞<" in scatter_plot([points[0]._replace(x=math.inf)], "x", "y")
    for (x, y), (other_x, other_y) in combinations(places, 2):
        assert abs(y - other_y) >= 11.9 or abs(x - other_x) > 48  # a name is 12 high and 48 wide


def test_marks_stand_at_their_values():
    values = [Point(f"s{n}", 0, value, 5, 75, x=x) for n, (x, value) in enumerate([(1, 10), (10, 30), (100, 70)])]
    circle = r'class=mark d="M([\d.]+) ([\d.]+)a'
    (x0, y0), (x1, y1), (x2, y2) = ((float(x), float(y)) for x, y in re.findall(circle, scatter_plot(values, "x", "y")))
    assert x2 - x1 == pytest.approx(x1 - x0, abs=0.2) and y0 - y2 == pytest.approx(3 * (y0 - y1), abs=0.3)
    assert x1 - x0 > 50 and y0 - y1 > 20
    (x0, y0), (x1, y1), (x2, y2) = ((float(x), float(y)) for x, y in re.findall(circle, dot_plot(values, "y")))
    assert x2 - x0 == pytest.approx(3 * (x1 - x0), abs=0.3) and y2 - y1 == y1 - y0 == 20 and x1 - x0 > 50


def test_wrong_names_and_an_empty_file_have_one_clear_error(tmp_path, folders):
    with pytest.raises(ConfigError, match=r"no system is named 'ARC5'.*closed book, ARC4"):
        make_report(read_systems(folders), baseline="ARC5", num_draws=DRAWS)
    with pytest.raises(ConfigError, match=r"has no bleu in task nq; it has em, f1"):
        make_report(read_systems(folders), metric="bleu", num_draws=DRAWS)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty\.jsonl has no lines"):
        make_report(read_systems([str(tmp_path / "empty.jsonl")]), num_draws=DRAWS)


def test_the_command_writes_page_markdown_and_csv(tmp_path, folders, capsys):
    out = tmp_path / "new" / "report"
    assert main(["eval", "report", *folders[:2], "--out", str(out), "--paper", "--tasks", "nq", "--samples", "5"]) == 0
    assert capsys.readouterr().out.split() == [
        str(out / name) for name in ("report.html", "report.md", "scores.csv", "differences.csv")
    ]
    assert Tags((out / "report.html").read_text("utf-8")).names["article"] == 5
    markdown = (out / "report.md").read_text("utf-8")
    assert "| ARC4, Llama 3.1 8B paper | 4 | 39.7 |" in markdown and "protocol.examples" in markdown
    (row,) = (
        row
        for row in csv.DictReader((out / "scores.csv").open())
        if (row["system"], row["metric"]) == ("open book", "em")
    )
    (difference,) = (row for row in csv.DictReader((out / "differences.csv").open()) if row["metric"] == "em")
    assert float(row["value"]) == float(difference["first"]) and row["is_headline"] == "true"
    assert float(difference["num_better"]) + float(difference["num_worse"]) + float(difference["num_equal"]) == 40


def test_a_second_report_replaces_the_first(tmp_path, folders):
    for systems in (folders, folders[:1]):
        write_report(make_report(read_systems(systems), num_draws=DRAWS), tmp_path)
    assert "ARC4" not in (tmp_path / "report.html").read_text("utf-8")
