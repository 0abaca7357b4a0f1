"""A pytest plugin: one JSON line for each test as soon as it has ended. A run that is cut off keeps its results.

`pytest -p gpu_stages.report_plugin --test-log FILE`. After a test that left the GPU in an error state the process
ends: every later test in it would fail by the same error. pytest-xdist then starts another one.
"""

from __future__ import annotations

import json
import os
from typing import Any

import pytest


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--test-log", metavar="FILE", help="append the result of each test to this file")


def pytest_configure(config: Any) -> None:
    # A worker of pytest-xdist sends its reports to the main process, which writes them.
    if (path := config.getoption("--test-log")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Log(path))


class _Log:
    def __init__(self, path: str) -> None:
        self._path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.passed:
            return
        self._write(report)

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:  # a file that cannot be imported: its tests are not there to fail
            self._write(report)

    def _write(self, report: Any) -> None:
        entry = {"test": report.nodeid, "outcome": report.outcome, "words": report.longreprtext[-4000:]}
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str, location: Any) -> None:
    del nodeid, location
    import torch

    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_available() and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
