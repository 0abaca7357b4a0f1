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

from arc_ds.launch.signals import STOP_SIGNALS, StopRequest
from arc_ds.training.watchdog import Watchdog

ROOT = Path(__file__).resolve().parents[3]


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
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, timeout=60)
    assert ended.returncode == 7


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_during_the_imports_of_a_rank_does_not_kill_it(tmp_path: Path, number: signal.Signals) -> None:
    """Under an external launcher. A fake `torch` module stands for the seconds before a `StopRequest` opens."""
    (tmp_path / "torch.py").write_text(f"import os\nos.kill(os.getpid(), {int(number)})\nos._exit(7)\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    ended = subprocess.run([sys.executable, "-m", "arc_ds.train"], env=environment, cwd=ROOT, timeout=60)
    assert ended.returncode == 7


def test_a_stall_leaves_the_stacks_and_progress_does_not(tmp_path: Path) -> None:
    with Watchdog(tmp_path / "stacks", rank=3, limit_s=0.25) as watchdog:
        for _ in range(4):
            time.sleep(0.1)
            watchdog.alive()
        assert watchdog.path.read_text() == ""
        time.sleep(0.4)
    text = (tmp_path / "stacks" / "stacks_rank_00003.txt").read_text()
    assert "Timeout" in text and "test_a_stall_leaves_the_stacks" in text
    watchdog.alive()
