"""Stop signals before training has begun, while the main thread is blocked in C code."""

from __future__ import annotations

import itertools
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from arc_ds.launch import start
from arc_ds.launch.exit_codes import EXIT_PREEMPTED
from arc_ds.launch.status import STATUS_FOLDER_VARIABLE, read_statuses
from tests.helpers.waiting import LIMIT_S, wait_for

# The first signal comes before the block, as during imports.
PROGRAM = """
import ctypes, os, signal, sys
from arc_ds.launch.signals import StopRequest, hold_stop_signals
from arc_ds.launch.start import stoppable
hold_stop_signals()
number = int(sys.argv[2])
if sys.argv[1] == "before":
    os.kill(os.getpid(), number)
with stoppable("waiting for nobody"):
    print("begun", flush=True)
    ctypes.CDLL(None).sleep(0 if sys.argv[1] == "after" else 3600)
os.kill(os.getpid(), number)
with StopRequest() as stop:
    os._exit(7 if stop.is_set() else 8)
"""


def _run(when: str, number: int, folder: Path) -> tuple[int, str]:
    environment = {**os.environ, STATUS_FOLDER_VARIABLE: str(folder), "RANK": "3"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, when, str(int(number))], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "begun\n"
    if when == "during":
        process.send_signal(number)
    _, words = process.communicate(timeout=LIMIT_S)
    return process.returncode, words


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("when", ["before", "during"])
def test_a_signal_ends_a_rank_that_waits_in_c_code(when: str, number: signal.Signals, tmp_path: Path) -> None:
    code, words = _run(when, number, tmp_path)
    assert code == EXIT_PREEMPTED and number.name in words and "waiting for nobody" in words
    assert read_statuses(tmp_path)[3].exit_code == EXIT_PREEMPTED, "the wrapper would take it for a killed rank"


def test_a_signal_after_the_block_is_left_to_the_stop_request(tmp_path: Path) -> None:
    assert _run("after", signal.SIGTERM, tmp_path) == (7, "")


def test_a_long_block_says_what_it_does(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock = itertools.count(step=25)  # seconds; the block looks at it twice to begin, and at each poll
    monkeypatch.setattr(start, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    with start.stoppable("waiting for rank 1", logging.WARNING):
        wait_for(lambda: len(caplog.records) >= 3)
    waited_s = [int(word) for word in re.findall(r"still waiting for rank 1, for (\d+) s", caplog.text)]
    assert min(later - earlier for earlier, later in itertools.pairwise([0, *waited_s])) > start._WORD_EVERY_S
