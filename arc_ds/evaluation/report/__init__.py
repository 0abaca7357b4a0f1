"""The report of result files: an HTML page, Markdown and CSV.

`content.make_report` computes everything, `tables.py`, `plots.py` and `page.py` show it, and `write_report` writes the
files.
"""

from __future__ import annotations

from pathlib import Path

from arc_ds.evaluation.report.content import Report
from arc_ds.evaluation.report.page import report_page
from arc_ds.evaluation.report.tables import difference_csv_table, report_markdown, score_csv_table
from arc_ds.pages.tables import to_csv
from arc_ds.system.files import output, write_whole


def write_report(report: Report, folder: Path, *, with_paper: bool = False) -> list[Path]:
    """Write `report.html`, `report.md`, `scores.csv` and `differences.csv`; return their paths.

    folder: created if missing. Files of these names are replaced.
    with_paper: whether to show the paper's numbers next to the scores.

    Raises StorageError if the folder cannot be written.
    """
    files = {
        "report.html": report_page(report, with_paper=with_paper),
        "report.md": report_markdown(report, with_paper=with_paper),
        "scores.csv": to_csv(score_csv_table(report)),
        "differences.csv": to_csv(difference_csv_table(report)),
    }
    with output(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_whole(folder / name, content)
    return [folder / name for name in files]
