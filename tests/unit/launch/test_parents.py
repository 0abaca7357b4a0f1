"""A process with launchers above it gets a stop signal when one of them dies."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from arc_ds.launch import parents
from arc_ds.launch.parents import is_launcher

# Prints its number when it watches, and later the signal that it got.
_RANK = """
import os, signal, sys
from arc_ds.launch.parents import stop_with_launchers
from arc_ds.launch.signals import STOP_SIGNALS, hold_stop_signals
hold_stop_signals()
stop_with_launchers()
print("watching", flush=True)
print(signal.sigwait(STOP_SIGNALS).name, flush=True)
"""
# Starts the next program and waits for it, whatever happens above.
_MIDDLE = """
import subprocess, sys
subprocess.run(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("python -u -m deepspeed.launcher.launch --world_info=x train.py", True),
        ("/venv/bin/python3 /venv/bin/deepspeed --hostfile hosts --module m", True),
        ("python /venv/bin/torchrun -m m", True),
        ("python -m torch.distributed.run -m m", True),
        ("/bin/bash -c deepspeed", False),
        ("python -m pytest deepspeed", False),
        ("vim deepspeed.py", False),
        ("python -m", False),
        ("", False),
    ],
)
def test_launchers_are_known_by_their_command_lines(command: str, expected: bool) -> None:
    assert is_launcher(command.split(" ")) is expected


@pytest.mark.parametrize("name", ["deepspeed", "torchrun"])
def test_the_death_of_a_launcher_further_above_stops_a_rank(tmp_path: Path, name: str) -> None:
    """The process between them goes on, like DeepSpeed's launcher of one host."""
    launcher = tmp_path / name
    launcher.write_text(_MIDDLE)
    command = [sys.executable, launcher, sys.executable, "-c", _MIDDLE, sys.executable, "-c", _RANK]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "watching\n"
    process.send_signal(signal.SIGKILL)
    assert process.stdout.read() == "SIGTERM\n"
    process.wait()


def test_a_kernel_without_pidfd_notices_the_end_of_a_launcher_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_pid: int) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", refuse)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert parents._wait_for_first([os.getpid(), ended.pid]) == ended.pid


def test_a_rank_can_print_after_the_reader_of_its_output_has_ended() -> None:
    program = "from arc_ds.launch.parents import _drop_broken_output as drop\ndrop()\nprint('saved', flush=True)"
    read_end, write_end = os.pipe()
    os.close(read_end)
    ended = subprocess.run([sys.executable, "-c", program], stdout=write_end)
    os.close(write_end)
    assert ended.returncode == 0
