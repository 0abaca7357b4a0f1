"""Hostfiles and the environment of other hosts. `tests/hosts` has real connections."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from arc_ds.commands.train import main
from arc_ds.errors import ConfigError
from arc_ds.launch.order import Place
from arc_ds.launch.ssh import _OF_HOSTS, launch_on_hosts, read_hostfile
from arc_ds.launch.wrapper import _command
from tests.helpers.waiting import LIMIT_S

EXAMPLE = Path(__file__).parents[3] / "launchers" / "hosts.example"
# It keeps the order that a host gets, and writes more lines than a pipe holds.
_SSH = """#!/bin/sh
for word; do host=$last; last=$word; done
printf "Welcome to $host"
echo "arc_ds.launch.remote has started"
read -r order
printf %s "$order" >"$ORDERS/$host"
yes "a line of a rank" | head -n 20000
"""
_LAUNCH = """
import sys
from arc_ds.launch.ssh import launch_on_hosts
sys.exit(launch_on_hosts("m", [], slots={"user@first": 1, "second": 2}))
"""


def test_the_example_is_a_hostfile() -> None:
    assert list(read_hostfile(EXAMPLE).items()) == [("node1", 8), ("node2", 8)]


def test_the_order_of_the_hosts_is_that_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("\n  user@b.c slots = 2 # the first\n#a slots=9\na\tslots=1\n")
    assert list(read_hostfile(tmp_path / "hosts").items()) == [("user@b.c", 2), ("a", 1)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a slots=1\nb\n", r"hosts:2 is `b`, expected `HOST slots=N`"),
        ("a slots=0\n", r"hosts:1 is `a slots=0`, .* at least 1"),
        ("-oProxyCommand=x slots=1\n", r"hosts:1 is"),
        ("a slots=1\na slots=1\n", r"hosts:2 lists a again"),
        ("# nobody\n", r"lists no host"),
        ("\ufeffa slots=0\n", r"hosts:1 is `a slots=0`"),
        ("me@localhost slots=1\nb slots=1\n", r"lists me@localhost first, .* Write the name by which they reach"),
        (None, r"cannot be read: No such file .*Give --hostfile a file with lines"),
    ],
)
def test_a_wrong_hostfile_is_named_with_its_line(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "hosts"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_hostfile(path)


@pytest.mark.parametrize("name", ["FOO", "MODELS", "NCCL_DEBUG", "GLOO_SOCKET_IFNAME", "PATH", "HF_HOME", "TERMINAL_X"])
def test_variables_of_the_run_are_passed(name: str) -> None:
    assert not _OF_HOSTS.fullmatch(name)


@pytest.mark.parametrize("name", ["HOME", "TMPDIR", "SSH_CONNECTION", "SLURM_JOB_ID", "CUDA_VISIBLE_DEVICES", "_"])
def test_variables_of_a_host_are_not_passed(name: str) -> None:
    assert _OF_HOSTS.fullmatch(name)


def test_deepspeeds_launcher_gets_the_place_of_the_host() -> None:
    words = _command("m", [], Place((4, 2), 1, "first", 29500), {"CUDA_VISIBLE_DEVICES": "7,5,3"})
    assert {"--node_rank=1", "--master_addr=first", "--master_port=29500"} < set(words)


def test_hostfile_and_number_of_processes_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["c.yaml", "--hostfile", "h", "--num-procs", "2"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_hosts_meet_without_the_login_name_and_output_that_nobody_reads_holds_up_none(tmp_path: Path) -> None:
    """The output of `arc-ds train --hostfile hosts | head`, for example."""
    (ssh := tmp_path / "ssh").write_text(_SSH)
    ssh.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "ORDERS": str(tmp_path)}
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        ended = subprocess.run([sys.executable, "-c", _LAUNCH], env=environment, stderr=write_end, timeout=LIMIT_S)
    finally:
        os.close(write_end)
    assert ended.returncode == 0
    places = [json.loads((tmp_path / host).read_text())["place"] for host in ("user@first", "second")]
    assert [place[:3] for place in places] == [[[1, 2], 0, "first"], [[1, 2], 1, "first"]]


def test_a_port_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_PORT", "29500x")
    with pytest.raises(ConfigError, match="MASTER_PORT is '29500x', expected the number of a free port"):
        launch_on_hosts("m", [], slots={"a": 1})
