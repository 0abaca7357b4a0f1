"""Stop requests and the watchdog."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from arc_ds.launch.exit_codes import EXIT_STALLED
from arc_ds.launch.signals import STOP_SIGNALS, StopRequest
from arc_ds.system import activity
from arc_ds.training.watchdog import Watchdog
from tests.helpers.waiting import LIMIT_S


def test_a_signal_sets_the_flag_and_nothing_else() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.is_set()
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_signal_that_came_before_the_block_is_received_in_it() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGUSR1,))
    try:
        # Signal only this thread: a rank blocks signals before it starts threads; this process may already have some.
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        with StopRequest() as stop:
            assert stop.is_set()
        assert signal.SIGUSR1 in signal.pthread_sigmask(signal.SIG_BLOCK, ()), "not blocked while the run closes"
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGUSR1, before)


def test_a_signal_to_a_thread_of_the_loop_does_not_cut_the_closing_short() -> None:
    """Threads that start inside the block, such as autograd's for a GPU, do not block the signals."""
    program = (
        "import os, signal, threading, time\n"
        "from arc_ds.launch.signals import StopRequest, hold_stop_signals\n"
        "hold_stop_signals()\n"
        "with StopRequest():\n"
        "    threading.Thread(target=time.sleep, args=(30,), daemon=True).start()\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "time.sleep(0.3)\n"
        "os._exit(7)\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], timeout=LIMIT_S)
    assert ended.returncode == 7


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_during_the_imports_of_a_rank_does_not_kill_it(tmp_path: Path, number: signal.Signals) -> None:
    """Under an external launcher. A fake `torch` module stands for the seconds before a `StopRequest` opens."""
    (tmp_path / "torch.py").write_text(f"import os\nos.kill(os.getpid(), {int(number)})\nos._exit(7)\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]])}
    ended = subprocess.run([sys.executable, "-m", "arc_ds.train"], env=environment, timeout=LIMIT_S)
    assert ended.returncode == 7


STALLED = """
import ctypes, os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
from arc_ds.launch.heartbeat import beating
from arc_ds.launch.signals import StopRequest, hold_stop_signals
from arc_ds.system import activity
from arc_ds.training import watchdog as module

hold_stop_signals()
limit_s, grace_s, is_signalled = float(sys.argv[1]), float(sys.argv[2]), bool(sys.argv[3:])
activity.note("encoder layer 2", step=7)

def stuck_in_c():
    ctypes.CDLL(None).sleep(3600)

with beating(10.0) as heart, StopRequest() as stop:
    limits = {"limit_s": limit_s, "stop_grace_s": grace_s}
    seconds = 0.0  # on the clock of the watchdog, for which a step takes a little less than the limit
    module.time = SimpleNamespace(monotonic=lambda: seconds)
    with module.Watchdog(Path("stacks"), rank=3, heartbeat=heart, stop=stop, **limits) as watchdog:
        for _ in range(15):
            seconds += 0.9 * limit_s
            time.sleep(0.1)
            watchdog.alive()
        watchdog._alive = time.monotonic()
        module.time = time
        if is_signalled:
            os.kill(os.getpid(), signal.SIGTERM)
        stuck_in_c()
"""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("1", "300"), "no step has ended for 1 s (stall_limit_s)"),
        (("600", "1", "signal"), "a stop was requested, but no step has ended for 1 s (distributed.timeout_s)"),
    ],
)
def test_a_rank_that_is_stuck_in_c_leaves_stacks_and_ends(
    tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    """By itself after the limit, and after a stop signal, which Python cannot handle there."""
    ended = subprocess.run(
        [sys.executable, "-c", STALLED, *arguments],
        cwd=tmp_path, timeout=LIMIT_S, capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == EXIT_STALLED, ended.stderr
    assert words in ended.stderr and "stacks/stacks_rank_*.txt" in ended.stderr
    assert "step 7, encoder layer 2" in ended.stderr
    stacks = (tmp_path / "stacks" / "stacks_rank_00003.txt").read_text()
    assert stacks.startswith("step 7, encoder layer 2\n") and "in stuck_in_c" in stacks


def test_a_stop_has_its_grace_from_the_last_step_on_and_a_save_has_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activity, "now", activity.Activity(step=7, module="backward"))
    stop = StopRequest()
    watchdog = Watchdog(tmp_path, rank=0, limit_s=600.0, stop_grace_s=60.0, heartbeat=None, stop=stop)
    stop._since = time.monotonic() - 100.0
    watchdog.alive()
    assert not watchdog._is_deaf()
    watchdog._alive -= 100.0
    assert "no step has ended for 60 s" in watchdog._is_deaf()
    activity.note(activity.SAVING)
    assert not watchdog._is_deaf()
    activity.note("closing")
    stop.answer()
    assert not watchdog._is_deaf(), "the ranks stop already"


def test_a_step_is_a_stall_once_the_limit_is_over(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, rank=0, limit_s=600.0, stop_grace_s=60.0, heartbeat=None, stop=StopRequest())
    watchdog.alive()
    assert not watchdog._stalled()
    watchdog._alive -= 1000.0
    assert "no step has ended for 600 s" in watchdog._stalled()
