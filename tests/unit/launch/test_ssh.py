"""Hostfiles and the environment of other hosts. `tests/hosts` has real connections."""

from __future__ import annotations

from pathlib import Path

import pytest

from arc_ds.commands.train import main
from arc_ds.errors import ConfigError
from arc_ds.launch.order import Place
from arc_ds.launch.ssh import _OF_HOSTS, read_hostfile
from arc_ds.launch.wrapper import _command

EXAMPLE = Path(__file__).resolve().parents[3] / "launchers" / "hosts.example"


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
        (None, r"cannot be read: .*Give a file with lines"),
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
