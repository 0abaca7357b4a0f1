"""`arc-ds train --hostfile` over real ssh servers: environment, quoting, signals, exit codes and lost connections.

The ranks run a fake module. `test_launchers.py` has real runs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arc_ds.launch.exit_codes import EXIT_LOST_RANK, EXIT_NON_FINITE, EXIT_PREEMPTED, EXIT_USER_ERROR
from tests.helpers.hosts import Host, wait_until
from tests.helpers.sshd import is_sshd
from tests.helpers.waiting import LIMIT_S

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

PROGRAM = """
import json, sys
from arc_ds.launch.ssh import launch_on_hosts
sys.exit(launch_on_hosts("tests.hosts.fake_run", sys.argv[2:], slots=json.loads(sys.argv[1]), device_request="cpu"))
"""
NOBODY = "-1"
VALUES = {
    "FOO": "a b",
    "QUOTES": """it's "$HOME" `id` \\ ; & | * ! %n""",
    "LINES": "one\ntwo ",
    "EMPTY": "",
    "MODELS": "/a folder/größe",
}

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(ssh_hosts: tuple[Host, ...], tmp_path: Path) -> Start:
    """Start the fake run from the first host in a folder with a space."""

    def start_run(slots: dict[str, int], *arguments: str) -> subprocess.Popen[str]:
        folder = tmp_path / "a folder; of 'mine'"
        folder.mkdir()
        env = {**os.environ, **VALUES}
        env.pop("OMP_NUM_THREADS")
        command = [sys.executable, "-c", PROGRAM, json.dumps(slots), str(tmp_path), *arguments]
        return ssh_hosts[0].start(command, cwd=folder, env=env)

    return start_run


def _reports(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank_*.json"))]


def _running(hosts: tuple[Host, ...]) -> list[str]:
    return [words for host in hosts for words in host.processes().values() if not is_sshd(words)]


def test_ranks_get_environment_folder_and_arguments_unchanged_and_the_first_failure_decides(
    start: Start, ssh_hosts: tuple[Host, ...], tmp_path: Path
) -> None:
    """Three ranks on two hosts. Rank 2 fails, and the others hang as in a collective."""
    arguments = ["2", str(EXIT_NON_FINITE), "a.b=c d", "it's", 'data=[1, "two"]', ""]
    process = start({ssh_hosts[0].name: 2, ssh_hosts[1].name: 1}, *arguments)
    console, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == EXIT_NON_FINITE, console
    reports = _reports(tmp_path)
    assert [report["host"] for report in reports] == [ssh_hosts[0].name, ssh_hosts[0].name, ssh_hosts[1].name]
    for rank, report in enumerate(reports):
        assert {name: report["environment"].get(name) for name in VALUES} == VALUES
        assert report["arguments"] == [str(tmp_path), *arguments]
        assert report["folder"] == str(tmp_path / "a folder; of 'mine'")
        assert report["environment"]["RANK"] == str(rank)
        assert report["environment"]["MASTER_ADDR"] == ssh_hosts[0].name
        assert report["stdin"] == "", "a rank can read the commands of its launcher"
    assert {report["environment"]["MASTER_PORT"] for report in reports} == {reports[0]["environment"]["MASTER_PORT"]}
    assert f"{ssh_hosts[1].name} failed first, with exit code {EXIT_NON_FINITE}" in console
    assert not _running(ssh_hosts)


def _start_and_wait(start: Start, hosts: tuple[Host, ...], folder: Path) -> subprocess.Popen[str]:
    process = start({host.name: 1 for host in hosts}, NOBODY, "0")
    wait_until(lambda: len(_reports(folder)) == 2, "the start of both ranks", process)
    return process


def test_ctrl_c_reaches_the_ranks_of_all_hosts(start: Start, ssh_hosts: tuple[Host, ...], tmp_path: Path) -> None:
    process = _start_and_wait(start, ssh_hosts, tmp_path)
    process.send_signal(signal.SIGINT)
    console, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == EXIT_PREEMPTED, console
    assert sorted(path.name for path in tmp_path.glob("saved_*")) == ["saved_0", "saved_1"]
    assert f"{ssh_hosts[1].name}: rank 1 saves" in console.splitlines()
    assert "failed" not in console
    assert not _running(ssh_hosts)


def test_ranks_save_and_end_when_the_launching_process_is_killed(
    start: Start, ssh_hosts: tuple[Host, ...], tmp_path: Path
) -> None:
    process = _start_and_wait(start, ssh_hosts, tmp_path)
    process.kill()
    wait_until(lambda: not _running(ssh_hosts), "the end of all ranks")
    assert sorted(path.name for path in tmp_path.glob("saved_*")) == ["saved_0", "saved_1"]


def test_ranks_save_and_end_when_the_launching_process_falls_silent(
    start: Start, ssh_hosts: tuple[Host, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is frozen, and its connections stay open. The hosts wait for a minute; here, for seconds."""
    (patches := tmp_path / "patches").mkdir()
    (patches / "sitecustomize.py").write_text(
        "from arc_ds.launch import order\norder.BEAT_S, order.LOST_S = 0.5, 10.0\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(patches), prepend=os.pathsep)
    process = _start_and_wait(start, ssh_hosts, tmp_path)
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: len(list(tmp_path.glob("saved_*"))) == 2, "the save of both ranks")
    process.send_signal(signal.SIGCONT)
    console, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == EXIT_PREEMPTED, console
    for host in ssh_hosts:
        assert console.count(f"{host.name}: the launching process or its connection is lost") == 1, console
    assert not _running(ssh_hosts)


def test_a_killed_launcher_of_one_host_is_a_lost_host(
    start: Start, ssh_hosts: tuple[Host, ...], tmp_path: Path
) -> None:
    """Its own rank saves. The rank of the other host is ended, because it would wait for the lost one."""
    process = _start_and_wait(start, ssh_hosts, tmp_path)
    (launcher,) = [pid for pid, words in ssh_hosts[1].processes().items() if words.endswith("-m arc_ds.launch.remote")]
    os.kill(launcher, signal.SIGKILL)
    console, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == EXIT_LOST_RANK, console
    assert f"{ssh_hosts[1].name} is lost" in console
    wait_until(lambda: not _running(ssh_hosts), "the end of all ranks")
    assert (tmp_path / "saved_1").exists()


def test_a_host_that_cannot_be_reached_is_named(start: Start, ssh_hosts: tuple[Host, ...]) -> None:
    process = start({"127.0.0.1": 1}, NOBODY, "0")
    console, _ = process.communicate(timeout=LIMIT_S)
    assert process.returncode == EXIT_USER_ERROR, console
    assert "127.0.0.1 cannot be reached" in console and "Connection refused" in console
