"""The scripts of both pages in a browser, if one is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest

from arc_ds.comparison.page import render_page
from arc_ds.comparison.report import Options, compare_runs, make_panels
from arc_ds.evaluation.report.content import make_report
from arc_ds.evaluation.report.page import report_page
from arc_ds.evaluation.results import read_systems
from tests.helpers.compared_runs import falling, make_run
from tests.helpers.eval_results import SYSTEMS, fake_folders

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
ACTIONS = Path(__file__).with_name("browser_actions.js")
REPORT_ERRORS = "<script>onerror = (message) => parent.found.errors.push(message)</script>"


@pytest.mark.skipif(BROWSER is None, reason="needs chromium or chrome")
def test_scripts_sort_filter_and_highlight_by_mouse_and_keyboard(tmp_path):
    report = make_report(read_systems(fake_folders(tmp_path, SYSTEMS[:3], {"nq": 40, "squad": 40})), num_draws=100)
    points = [{"train/loss": falling(3.0 + n), "train/grad_norm": falling(2.0)} for n in range(11)]
    points.append({"train/grad_norm": falling(2.0)})
    names = [f"r{n}{'x' * 70}" for n in range(12)]
    runs = [make_run(name, each, {"lr": str(n)}) for n, (name, each) in enumerate(zip(names, points, strict=True))]
    comparison = compare_runs(runs, Options())
    pages = {
        "report": report_page(report, with_paper=True),
        "comparison": render_page(comparison, make_panels(comparison), title="Runs", command="arc-ds compare"),
    }
    frames = "".join(
        f'<iframe id={name} width=600 height=900 srcdoc="{escape(REPORT_ERRORS + page)}"></iframe>'
        for name, page in pages.items()
    )
    harness = tmp_path / "harness.html"
    harness.write_text(f"<pre id=found></pre><script>{ACTIONS.read_text('utf-8')}</script>{frames}", "utf-8")
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
    command = [str(BROWSER), *options, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", harness.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    match = re.search(r"<pre id=\"found\">(.*?)</pre>", dom, re.DOTALL)
    assert match is not None
    found = json.loads(unescape(match[1]))
    assert found["errors"] == []
    for name in pages:
        here = found[name]
        assert here["requests"] == 0 and here["sideways"] <= 0  # no other file, and no sideways scrolling at 600 px
        up, down = (list(filter("–".__ne__, here[order])) for order in ("up", "down"))
        assert up == down[::-1] and up != down
    assert found["report"]["names"] == ["ARC4", "closed book"]
    assert found["comparison"]["names"] == names  # r10 comes after r9
    here = found["report"]
    num_better = sum(sample.difference > 0 for sample in report.samples)
    assert here["all"] == f"{len(report.samples)} shown"
    assert here["better"] == [f"{num_better} shown", num_better]
    here = found["comparison"]
    assert here["up"][-1] == here["down"][-1] == "–" and here["first_column"] < 260
    assert here["stops"] == 12 and here["plots"] == ["train/grad_norm"]
    assert here["pinned"] == ["on", True, "true"] and here["unpinned"] is False
    assert here["tip"] == f"{names[10]}: 8.28 at 10"  # 1 + 12 exp(-0.5), to a tenth of a pixel
