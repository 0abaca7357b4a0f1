"""Transfers: transient faults are retried, final faults are not, and errors name the reason."""

from __future__ import annotations

import errno
import gc
import multiprocessing
import sys
import time
import traceback
import weakref
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import IO

import fsspec
import pytest
from fsspec.implementations.http import HTTPFileSystem
from fsspec.registry import _registry

from arc_ds.errors import StorageError
from arc_ds.shards.reader import ShardSet
from arc_ds.shards.storage.cache import ShardCache
from arc_ds.shards.storage.remote import fetch_bytes
from arc_ds.shards.token_cache.cache import open_token_cache
from arc_ds.tokenizers import load_tokenizer
from tests.helpers.faulty_server import FaultyServer, serve
from tests.helpers.remote_shards import QUICK, TEXTS, kept, texts_of
from tests.helpers.waiting import wait_for

# A transfer that stands still fails after this time.
IMPATIENT_S = 0.5
# A command that no other process has.
STANDING = "sleep 36000.71"


@pytest.mark.parametrize("command", ["pipe:cat {folder}", "pipe:cat {folder}/{{}} | cat"])
def test_commands_are_addresses(local: ShardSet, cache: ShardCache, command: str) -> None:
    assert texts_of(ShardSet(command.format(folder=local.folder), cache=cache)) == TEXTS


def test_a_missing_command_or_package_is_named_and_not_tried_again(
    cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match="tried once: .*exit code 127.*installed"):
        ShardSet("pipe:no-such-command", cache=cache)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    with pytest.raises(StorageError, match=r"tried once: s3:// needs a package .*s3fs.* pip install '\.\[remote\]'"):
        ShardSet("s3://bucket/a", cache=cache)


class FakeS3(fsspec.AbstractFileSystem):
    """The local folder `root` under s3://; an `error` is raised instead. Packages of stores are not installed here."""

    protocol = "s3"
    root: Path
    error: Exception | None
    opened: list[str]

    def _open(self, path: str, *_: object, **__: object) -> IO[bytes]:
        self.opened.append(path)
        if self.error is not None:
            raise self.error
        return (self.root / path).open("rb")


@pytest.fixture
def s3(local: ShardSet, monkeypatch: pytest.MonkeyPatch) -> type[FakeS3]:
    FakeS3.root, FakeS3.error, FakeS3.opened = local.folder.parent, None, []
    monkeypatch.setitem(_registry, "s3", FakeS3)
    return FakeS3


def test_other_protocols_are_read_by_fsspec(s3: type[FakeS3], cache: ShardCache, local: ShardSet) -> None:
    shards = ShardSet("s3://shards", cache=cache)
    assert texts_of(shards) == TEXTS
    assert open_token_cache(shards, load_tokenizer(local.folder.parent / "t.model")) is None


class NoCredentialsError(Exception):
    """As a store's package may raise, of no base that says anything."""


class StoreError(Exception):
    """As of gcsfs (`code`) and huggingface_hub (`response`)."""

    def __init__(self, status: int, *, has_response: bool = False) -> None:
        super().__init__("s3cret")
        if has_response:
            self.response = SimpleNamespace(status_code=status)
        else:
            self.code = status


@pytest.mark.parametrize(
    ("error", "message", "is_absent"),
    [
        (FileNotFoundError("NoSuchKey"), "tried once: there is no such file", True),
        (PermissionError("Access Denied"), "tried once: PermissionError: Access Denied", True),
        (OSError(errno.EINVAL, "Bad Request"), "tried once: OSError: .*Bad Request", False),
        (OSError(errno.EBUSY, "Reduce your request rate"), "tried 3 times: OSError: .*request rate", False),
        (ConnectionResetError("by peer"), "tried 3 times: ConnectionResetError: by peer", False),
        (TimeoutError(), "tried 3 times: nothing came for", False),
        (NoCredentialsError("Unable to locate"), "tried 3 times: NoCredentialsError: Unable to locate", False),
        (StoreError(401), "tried once: the server answered 401", False),
        (StoreError(403), "tried once: the server answered 403", True),
        (StoreError(429), "tried 3 times: the server answered 429", False),
        (StoreError(503, has_response=True), "tried 3 times: the server answered 503", False),
    ],
)
def test_the_type_of_an_error_says_whether_another_attempt_may_help(
    s3: type[FakeS3], cache: ShardCache, error: Exception, message: str, is_absent: bool
) -> None:
    files = ShardSet("s3://shards", cache=cache).files
    s3.error, s3.opened = error, []
    with pytest.raises(StorageError, match=rf"s3://shards/manifest\.json cannot be fetched, {message}"):
        ShardSet("s3://shards", cache=cache)
    assert len(s3.opened) == (1 if "once" in message else 3)
    if is_absent:
        assert files.fetch_beside("tokens/cache.json", max_bytes=99) is None
    else:
        with pytest.raises(StorageError, match=message):
            files.fetch_beside("tokens/cache.json", max_bytes=99)


def test_addresses_are_rewritten_as_stock_readers_do(
    server: FaultyServer, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOPEN_REWRITE", f"store://shards={server.url}")
    assert texts_of(ShardSet("store://shards", cache=cache)) == TEXTS


@pytest.mark.parametrize("kind", ["cut", "500", "stall", "flip"])
def test_passing_faults_are_tried_again_and_counted(
    server: FaultyServer, cache: ShardCache, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults = {"manifest.json": (kind, 1), "000001.idx": (kind, 2), "000002.tar": (kind, 2)}  # type: ignore
    attempts = 3
    if kind == "stall":  # the other transfers may be slow as well, and are tried again
        attempts = 30
        cache = replace(cache, retries=replace(QUICK, attempts=attempts, timeout_s=IMPATIENT_S))
    if kind == "flip":  # a manifest carries no sum of its own
        del server.faults["manifest.json"]
    assert texts_of(ShardSet(server.url, cache=cache)) == TEXTS
    warnings = [record.getMessage() for record in caplog.records if "attempt" in record.getMessage()]
    expected = 4 if kind == "flip" else 5
    assert len(warnings) == expected or (kind == "stall" and len(warnings) > expected)
    assert any(f"000002.tar: attempt 2 of {attempts} failed" in warning for warning in warnings)
    assert all("failed transfers in this process" in warning for warning in warnings)
    assert len(kept(cache)) == len(ShardSet(server.url, cache=cache).manifest.shards), "no partial file is left"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", "tried 3 times: .* payload is not completed"),
        ("500", "tried 3 times: the server answered 500"),
        ("429", "tried 3 times: the server answered 429"),
        ("404", "tried once: there is no such file"),
        ("401", "tried once: the server answered 401"),
        ("410", "tried once: the server answered 410"),
        ("stall", "tried 3 times: nothing came for 0 s"),
        ("flip", "tried 3 times: its sha256 is .* the manifest's"),
    ],
)
def test_lasting_faults_are_one_error_with_the_address(
    server: FaultyServer, cache: ShardCache, kind: str, message: str
) -> None:
    shards = ShardSet(server.url, cache=cache)
    if kind == "stall":  # only for transfers that stand still
        object.__setattr__(cache, "retries", replace(QUICK, timeout_s=IMPATIENT_S))
    server.faults = {".tar": (kind, 99)}  # type: ignore[dict-item]
    with pytest.raises(StorageError, match=rf"shard-000000\.tar cannot be fetched, {message}"):
        shards.record(0)
    assert kept(cache) == []
    server.faults = {}
    object.__setattr__(cache, "retries", QUICK)
    assert shards.record(0)["text"] == TEXTS[0], "the next try begins anew"


def test_a_dead_server_is_an_error_with_the_address(local: ShardSet, cache: ShardCache) -> None:
    with serve(local.folder) as server:
        url = server.url
    with pytest.raises(StorageError, match=rf"{url}/manifest\.json cannot be fetched, tried 3 times: .*Cannot connect"):
        ShardSet(url, cache=cache)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "pipe:cat /nonexistent",
            r"pipe:cat /nonexistent/manifest\.json cannot be .* its command failed \(exit code 1\)",
        ),
        (f"pipe:{STANDING}; echo {{}}", "nothing came for 0 s"),
        ("nosuch://host/shards", "tried once: expected http://, .* or pipe:COMMAND"),
        ("local:///etc", "tried once: expected http://"),
    ],
)
def test_addresses_that_cannot_be_read_are_named(cache: ShardCache, url: str, message: str) -> None:
    with pytest.raises(StorageError, match=message):
        ShardSet(url, cache=replace(cache, retries=replace(QUICK, timeout_s=IMPATIENT_S)))
    wait_for(lambda: not _is_running(STANDING), "a command that stands still is killed")


def _is_running(command: str) -> bool:
    words = command.replace(" ", "\0").encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if path.read_bytes().startswith(words):
                return True
    return False


def test_passwords_and_signatures_are_sent_and_not_shown(server: FaultyServer, cache: ShardCache) -> None:
    host = server.url.removeprefix("http://")
    shards = ShardSet(f"http://me:s3cret@{host}?sig=hidden", cache=cache)
    assert all(headers["Authorization"] == "Basic bWU6czNjcmV0" for headers in server.headers)
    with pytest.raises(StorageError, match=r"tried once: InvalidUrlClientError: http:///manifest\.json\?…\."):
        ShardSet("http://me:s3cret@?sig=hidden", cache=cache)
    for kind in ("404", "500", "cut"):
        server.faults = {".tar": (kind, 99)}
        with pytest.raises(StorageError) as caught:
            shards.record(0)
        assert f"http://me:…@{host}/shard-000000.tar?…" in str(caught.value)
        told = "".join(traceback.format_exception(caught.value)) + shards.name
        assert "s3cret" not in told and "hidden" not in told


def test_a_fork_leaves_the_connections_of_its_parent_open(server: FaultyServer) -> None:
    """fsspec closes those of a file system that is freed; in a child it takes them from the parent's event loop."""
    url = f"{server.url}/manifest.json"
    expected = fetch_bytes(url, max_bytes=1 << 20, retries=QUICK)
    time.sleep(0.1)  # until the connection is idle
    systems = [weakref.ref(system) for system in HTTPFileSystem._cache.values()]
    child = multiprocessing.get_context("fork").Process(target=_fetch_and_collect, args=(url, systems))
    child.start()
    child.join()
    assert systems and child.exitcode == 0
    assert fetch_bytes(url, max_bytes=1 << 20, retries=QUICK) == expected


def _fetch_and_collect(url: str, systems: list[weakref.ref[HTTPFileSystem]]) -> None:
    gc.collect()
    assert all(system() is not None for system in systems)
    fetch_bytes(url, max_bytes=1 << 20, retries=QUICK)


def test_a_command_that_ends_early_is_tried_again(local: ShardSet, cache: ShardCache) -> None:
    command = f"pipe:cd {local.folder}; case {{}} in *.tar) head -c 700 {{}};; *) cat {{}};; esac"
    with pytest.raises(StorageError, match=r"tried 3 times: it ended after 700 of \d+ bytes"):
        ShardSet(command, cache=cache).record(0)
