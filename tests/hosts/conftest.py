"""Two hosts, shared by the tests of a file. They need root."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.hosts import Host, make_hosts, missing


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Host, ...]]:
    """Two hosts (`tests/helpers/hosts.py`). A test that kills or cuts one restores it."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    with make_hosts(tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture(autouse=True)
def _end_what_a_failed_test_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "hosts" in request.fixturenames:
        for host in request.getfixturevalue("hosts"):
            host.kill_processes()
            host.restore()
