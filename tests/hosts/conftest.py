"""Two hosts, shared by the tests of a file. They need root."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.hosts import Host, make_hosts, missing
from tests.helpers.sshd import SERVER, start_sshd, write_ssh_files


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, ...]]:
    """Two hosts (`tests/helpers/hosts.py`). A test that kills or cuts one restores it."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with make_hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture(scope="module")
def _ssh_files(hosts: tuple[Host, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    if (reason := missing("ssh", "ssh-keygen", SERVER)) is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("ssh") / "files"
    write_ssh_files(folder, hosts)
    return folder


@pytest.fixture
def ssh_hosts(hosts: tuple[Host, ...], _ssh_files: Path) -> tuple[Host, ...]:
    """The hosts, each with an ssh server."""
    for host in hosts:
        start_sshd(_ssh_files, host)
    return hosts


@pytest.fixture(autouse=True)
def _end_what_a_failed_test_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "hosts" in request.fixturenames:
        for host in request.getfixturevalue("hosts"):
            host.kill_processes()
            host.restore()
