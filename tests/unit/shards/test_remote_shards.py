"""Shards behind URLs: fetched once a host, whole, within the bound, tried again, and never silently wrong."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from arc_ds.cli import main
from arc_ds.data.loading.loader import make_loader
from arc_ds.data.loading.source import Source
from arc_ds.errors import ConfigError, DataError, StorageError
from arc_ds.shards.faults import check_shards
from arc_ds.shards.reader import ShardSet
from arc_ds.shards.storage.cache import ShardCache, open_cache
from arc_ds.shards.storage.remote import Retries
from arc_ds.shards.token_cache.cache import open_token_cache
from arc_ds.shards.token_cache.files import cache_name
from arc_ds.shards.token_cache.writer import build_token_caches
from arc_ds.tokenizers import Tokenizer, load_tokenizer
from tests.helpers.batches import sequences
from tests.helpers.faulty_server import FaultyServer, serve
from tests.helpers.tiny_data import numbered_texts, write_json_tokenizer, write_shards, write_tiktoken
from tests.helpers.tiny_mixture import WEIGHTS, TinyMixture

TEXTS = numbered_texts(60)
QUICK = Retries(attempts=3, first_wait_s=0.01, timeout_s=0.3)


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    folder = tmp_path_factory.mktemp("data")
    return write_shards(folder / "shards", write_tiktoken(folder / "t.model"), TEXTS)


@pytest.fixture
def server(local: ShardSet, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve(local.folder) as state:
        yield state


@pytest.fixture
def cache(tmp_path: Path) -> ShardCache:
    return ShardCache(folder=tmp_path / "cache", max_bytes=1 << 20, retries=QUICK)


def texts_of(shards: ShardSet) -> list[str]:
    return [shards.record(idx)["text"] for idx in range(len(shards))]


def kept(cache: ShardCache) -> list[Path]:
    return sorted((cache.folder / "tars").iterdir())


def test_shards_behind_a_url_are_the_local_ones(local: ShardSet, server: FaultyServer, cache: ShardCache) -> None:
    shards = ShardSet(server.url, cache=cache)
    assert shards.fingerprint == local.fingerprint
    assert not any(name.endswith(".tar") for name in server.requests), "tars are fetched on demand"
    assert texts_of(shards) == TEXTS
    assert shards.num_tokens.tolist() == local.num_tokens.tolist()
    again = ShardSet(server.url + "/", cache=cache)
    assert texts_of(again) == TEXTS
    assert {count for name, count in server.requests.items() if name != "manifest.json"} == {1}
    assert check_shards(server.url, cache=cache) == []
    kept(cache)[0].unlink()
    server.faults = {".tar": ("404", 9)}
    (fault,) = check_shards(server.url, cache=cache)
    assert "404" in fault.what, "a tar that cannot be fetched is a fault like others"


@pytest.mark.parametrize("command", ["pipe:cat {folder}", "pipe:cat {folder}/{{}} | cat"])
def test_commands_are_addresses(local: ShardSet, cache: ShardCache, command: str) -> None:
    assert texts_of(ShardSet(command.format(folder=local.folder), cache=cache)) == TEXTS


@pytest.fixture
def aws(local: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An `aws` command that knows one folder of one bucket; with a file `said` beside it, it fails with these words."""
    command, said = tmp_path / "bin" / "aws", tmp_path / "bin" / "said"
    command.parent.mkdir()
    missing = "(404) when calling the HeadObject operation: Not Found"
    command.write_text(
        "#!/bin/sh\n"
        f"echo >> '{command.parent}/calls'\n"
        f"[ -e '{said}' ] && {{ cat '{said}' >&2; exit 1; }}\n"
        f'[ "$1 $2 $5" = "s3 cp -" ] && cat "{local.folder}/${{4#s3://bucket/a folder/}}" 2>/dev/null && exit 0\n'
        f"echo 'download failed: $4 to - An error occurred {missing}' >&2; exit 1\n"
    )
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    return command


def test_a_check_of_a_url_says_which_copies_it_has_read(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ARC_DS_CACHE_DIR", str(tmp_path / "kept"))
    assert main(["shards", "check", server.url, "--workers", "1"]) == 0
    assert f"all records whole (as kept in the cache {tmp_path / 'kept'})" in capsys.readouterr().out


def test_s3_is_read_by_the_aws_command(local: ShardSet, cache: ShardCache, aws: Path) -> None:
    """webdataset itself opens no s3:// address."""
    shards = ShardSet("s3://bucket/a folder", cache=cache)
    assert texts_of(shards) == TEXTS
    assert open_token_cache(shards, load_tokenizer(local.folder.parent / "t.model")) is None
    assert shards.files.fetch_beside("tokens/cache.json", max_bytes=99) is None
    aws.with_name("said").write_text("An error occurred (ExpiredToken) when calling")
    with pytest.raises(StorageError, match="ExpiredToken"):
        shards.files.fetch_beside("tokens/cache.json", max_bytes=99)


@pytest.mark.parametrize(
    ("said", "message", "calls"),
    [
        ("", r"tried once: .*\(404\)", 1),
        ("An error occurred (AccessDenied) when calling", r"tried once: .*\(AccessDenied\)", 1),
        ("Unable to locate credentials", "tried 3 times: Unable to locate credentials", 3),
        ("(404) is in the address", r"tried 3 times: .*\(404\)", 3),
        ("An error occurred (SlowDown) when calling", r"tried 3 times: .*\(SlowDown\)", 3),
        ("Could not connect to the endpoint URL", "tried 3 times: Could not connect", 3),
    ],
)
def test_what_s3_answers_is_told_and_tried_again_where_that_may_help(
    cache: ShardCache, aws: Path, said: str, message: str, calls: int
) -> None:
    if said:
        aws.with_name("said").write_text(f"download failed: {said}" if "(" in said else said)
    with pytest.raises(StorageError, match=rf"s3://bucket/other/manifest\.json cannot be fetched, {message}"):
        ShardSet("s3://bucket/other", cache=cache)
    assert len(aws.with_name("calls").read_text()) == calls


def test_a_command_that_is_not_installed_is_not_tried_again(
    cache: ShardCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match="tried once: .*exit code 127.*installed"):
        ShardSet("pipe:no-such-command", cache=cache)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(StorageError, match="tried once: the `aws` command .* is not installed"):
        ShardSet("s3://bucket/a", cache=cache)


def test_addresses_are_rewritten_as_stock_readers_do(
    server: FaultyServer, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOPEN_REWRITE", f"store://shards={server.url}")
    assert texts_of(ShardSet("store://shards", cache=cache)) == TEXTS


def test_file_urls_are_local_paths(local: ShardSet) -> None:
    shards = ShardSet(local.folder.as_uri())
    assert shards.folder == local.folder
    assert texts_of(shards) == TEXTS


@pytest.mark.parametrize("kind", ["cut", "500", "stall", "flip"])
def test_passing_faults_are_tried_again_and_counted(
    server: FaultyServer, cache: ShardCache, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.faults = {"manifest.json": (kind, 1), "000001.idx": (kind, 2), "000002.tar": (kind, 2)}  # type: ignore
    if kind == "flip":  # a manifest carries no sum of its own
        del server.faults["manifest.json"]
    assert texts_of(ShardSet(server.url, cache=cache)) == TEXTS
    warnings = [record.getMessage() for record in caplog.records if "attempt" in record.getMessage()]
    assert len(warnings) == (4 if kind == "flip" else 5)
    assert any("000002.tar: attempt 2 of 3 failed" in warning for warning in warnings)
    assert all("failed transfers in this process" in warning for warning in warnings)
    assert len(kept(cache)) == len(ShardSet(server.url, cache=cache).manifest.shards), "no partial file is left"


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("cut", r"tried 3 times: the server broke off after \d+ of \d+ bytes"),
        ("500", "tried 3 times: the server answered 500"),
        ("404", "tried once: the server answered 404"),
        ("stall", "tried 3 times: .*timed out"),
        ("flip", "tried 3 times: its sha256 is .* the manifest's"),
    ],
)
def test_lasting_faults_are_one_error_with_the_address(
    server: FaultyServer, cache: ShardCache, kind: str, message: str
) -> None:
    shards = ShardSet(server.url, cache=cache)
    server.faults = {".tar": (kind, 99)}  # type: ignore[dict-item]
    with pytest.raises(StorageError, match=rf"shard-000000\.tar cannot be fetched, {message}"):
        shards.record(0)
    assert kept(cache) == []
    server.faults = {}
    assert shards.record(0)["text"] == TEXTS[0], "the next try begins anew"


def test_a_dead_server_is_an_error_with_the_address(local: ShardSet, cache: ShardCache) -> None:
    with serve(local.folder) as server:
        url = server.url
    with pytest.raises(StorageError, match=rf"{url}/manifest\.json cannot be fetched, tried 3 times: .*refused"):
        ShardSet(url, cache=cache)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "pipe:cat /nonexistent",
            r"pipe:cat /nonexistent/manifest\.json cannot be .* its command failed \(exit code 1\)",
        ),
        ("pipe:sleep 60; echo {}", "nothing came for 0 s"),
        ("nosuch://host/shards", "tried once: webdataset cannot open such an address"),
    ],
)
def test_addresses_that_cannot_be_read_are_named(cache: ShardCache, url: str, message: str) -> None:
    begin = time.monotonic()
    with pytest.raises(StorageError, match=message):
        ShardSet(url, cache=cache)
    assert time.monotonic() - begin < 10, "a command that stands still is killed"


def test_passwords_and_signatures_are_sent_and_not_shown(server: FaultyServer, cache: ShardCache) -> None:
    host = server.url.removeprefix("http://")
    shards = ShardSet(f"http://me:s3cret@{host}?sig=hidden", cache=cache)
    assert all(headers["Authorization"] == "Basic bWU6czNjcmV0" for headers in server.headers)
    server.faults = {".tar": ("404", 99)}
    with pytest.raises(StorageError) as caught:
        shards.record(0)
    assert f"http://me:…@{host}/shard-000000.tar?…" in str(caught.value)
    assert "s3cret" not in str(caught.value) + shards.name


def test_the_bound_holds_and_the_least_recently_used_goes(
    local: ShardSet, server: FaultyServer, cache: ShardCache
) -> None:
    largest = max(shard.bytes for shard in local.manifest.shards)
    assert len(local.manifest.shards) > 5
    small = replace(cache, max_bytes=4 * largest)
    shards = ShardSet(server.url, cache=small)
    for idx in range(len(shards)):
        shards.record(idx)
        shards.record(0)  # stays in use
        assert sum(path.stat().st_size for path in kept(small)) <= small.max_bytes
    assert server.requests["shard-000000.tar"] == 1
    assert server.requests["shard-000001.tar"] == 1
    shards.record(int(shards.shard_sizes[0]))
    assert server.requests["shard-000001.tar"] == 2, "it had made room"


def test_what_is_mapped_stays_though_the_bound_is_passed(
    local: ShardSet, server: FaultyServer, cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = sorted(shard.bytes for shard in local.manifest.shards)
    small = replace(cache, max_bytes=sizes[-1])
    files = ShardSet(server.url, cache=small).files
    with files.open(files.manifest.shards[0]) as first, files.open(files.manifest.shards[1]):
        assert len(kept(small)) == 2
        assert first.read() == (local.folder / "shard-000000.tar").read_bytes()
    assert "Raise data.cache_gib" in caplog.text
    files.open(files.manifest.shards[2]).close()
    assert len(kept(small)) == 1


def _read_all(url: str, cache: ShardCache, turn: int, results: multiprocessing.Queue[object]) -> None:
    shards = ShardSet(url, cache=cache)
    order = [(idx + turn * 17) % len(shards) for idx in range(len(shards))]
    results.put(all(shards.record(idx)["text"] == TEXTS[idx] for idx in order))


@pytest.mark.parametrize("share", [1.0, 0.4])
def test_processes_that_share_a_cache_fetch_each_shard_once(
    local: ShardSet, server: FaultyServer, cache: ShardCache, share: float
) -> None:
    """Or, where the cache is too small for all, agree on what makes room, and read nothing wrong."""
    server.delay_s = 0.01
    total = sum(shard.bytes for shard in local.manifest.shards)
    cache = replace(cache, max_bytes=int(total * share), retries=replace(QUICK, timeout_s=10.0))
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[object] = context.Queue()
    workers = [context.Process(target=_read_all, args=(server.url, cache, turn, results)) for turn in range(4)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=30) for _ in workers] == [True] * 4
    for worker in workers:
        worker.join()
    tars = {name: count for name, count in server.requests.items() if name.endswith(".tar")}
    assert len(tars) == len(local.manifest.shards)
    if share == 1.0:
        assert set(tars.values()) == {1}


def test_a_killed_fetch_leaves_nothing_that_is_taken_for_whole(server: FaultyServer, cache: ShardCache) -> None:
    shards = ShardSet(server.url, cache=cache)
    server.faults = {".tar": ("stall", 1)}
    child = multiprocessing.get_context("fork").Process(target=shards.record, args=(0,))
    child.start()
    while not (cache.folder / "tars").is_dir() or not kept(cache):
        time.sleep(0.005)
    time.sleep(0.05)
    child.kill()
    child.join()
    assert [path.suffix for path in kept(cache)] == [".partial"]
    assert shards.record(0)["text"] == TEXTS[0]
    assert [path.suffix for path in kept(cache)] == [""]


def test_a_cached_tar_of_the_wrong_size_is_fetched_again(server: FaultyServer, cache: ShardCache) -> None:
    ShardSet(server.url, cache=cache).record(0)
    kept(cache)[0].write_bytes(b"x")
    assert ShardSet(server.url, cache=cache).record(0)["text"] == TEXTS[0]


def test_a_flipped_byte_in_the_cache_is_found_and_the_cure_is_named(server: FaultyServer, cache: ShardCache) -> None:
    ShardSet(server.url, cache=cache).record(0)
    path = kept(cache)[0]
    raw = bytearray(path.read_bytes())
    raw[530] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=rf"member 000000000\.json .*Delete {path}"):
        ShardSet(server.url, cache=cache).record(0)
    path.unlink()
    assert ShardSet(server.url, cache=cache).record(0)["text"] == TEXTS[0]


def test_a_full_disk_is_an_error_with_the_cure(
    server: FaultyServer, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = ShardSet(server.url, cache=cache)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"cannot be kept in the cache .*No space left.*lower data\.cache_gib"):
            shards.record(0)
    assert kept(cache) == []
    assert shards.record(0)["text"] == TEXTS[0]


def test_a_cache_that_cannot_be_made_is_an_error(server: FaultyServer, cache: ShardCache, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/cache: Not a directory.*Set data\.cache_dir"):
        ShardSet(server.url, cache=replace(cache, folder=tmp_path / "file" / "cache"))


def test_a_cache_smaller_than_a_shard_is_refused_at_once(server: FaultyServer, cache: ShardCache) -> None:
    with pytest.raises(ConfigError, match=r"data\.cache_gib: .* may take 1000 bytes, but shard-000000\.tar of http"):
        ShardSet(server.url, cache=replace(cache, max_bytes=1000))


def test_prefetched_shards_are_there_when_they_are_wanted(server: FaultyServer, cache: ShardCache) -> None:
    shards = ShardSet(server.url, cache=cache)
    shards.prefetch([3, 1])
    deadline = time.monotonic() + 10
    while len(cache_files := list((cache.folder / "tars").glob("*"))) < 2 or any(p.suffix for p in cache_files):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    asked = [name for name in server.requests if name.endswith(".tar")]
    assert asked == ["shard-000003.tar", "shard-000001.tar"]
    shards.record(int(shards.shard_sizes[:3].sum()))
    assert server.requests["shard-000003.tar"] == 1


def test_a_failed_prefetch_is_a_warning_and_the_reader_tries_again(
    server: FaultyServer, cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    shards = ShardSet(server.url, cache=cache)
    server.faults = {".tar": ("404", 1)}
    shards.prefetch([0])
    deadline = time.monotonic() + 10
    while "not fetched ahead" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert shards.record(0)["text"] == TEXTS[0]


def test_a_set_crosses_to_a_spawned_worker(server: FaultyServer, cache: ShardCache) -> None:
    shards = ShardSet(server.url, cache=cache)
    shards.record(0)
    shards.prefetch([1])
    copy = pickle.loads(pickle.dumps(shards))
    assert texts_of(copy) == TEXTS


def test_prefetch_of_local_shards_does_nothing(local: ShardSet, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    local.prefetch([0, 1])
    assert not caplog.records


@pytest.mark.parametrize("location", ["pipe:rm -rf /", "/etc/passwd", "../other.tar"])
def test_a_fetched_manifest_names_no_command_and_no_local_file(
    local: ShardSet, tmp_path: Path, cache: ShardCache, location: str
) -> None:
    shards = (replace(local.manifest.shards[0], location=location), *local.manifest.shards[1:])
    (tmp_path / "manifest.json").write_text(replace(local.manifest, shards=shards).to_json())
    for shard in shards:
        (tmp_path / shard.index_name).symlink_to(local.folder / shard.index_name)
    with pytest.raises(DataError, match="are not followed"):
        ShardSet(f"pipe:cat {tmp_path}", cache=cache)


def test_defaults_of_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARC_DS_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    first = open_cache()
    assert first.folder == tmp_path / "xdg" / "arc-ds" / "shards"
    assert not first.folder.exists(), "nothing is made before it is needed"
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    assert first.max_bytes == pytest.approx(free / 2, rel=0.05)
    monkeypatch.setenv("ARC_DS_CACHE_DIR", str(tmp_path / "mine"))
    assert open_cache(cache_gib=2.5) == ShardCache(folder=tmp_path / "mine", max_bytes=5 << 29)
    assert open_cache(tmp_path / "given", 1).folder == tmp_path / "given"


@pytest.fixture
def tokenizer(local: ShardSet) -> Iterator[Tokenizer]:
    """Its cache lies beside the local shards while a test runs."""
    path = local.folder.parent / "t.model"
    (made,) = build_token_caches(local.folder, [path])
    yield load_tokenizer(path)
    shutil.rmtree(made.folder)


def known_texts(shards: ShardSet, tokenizer: Tokenizer) -> list[str]:
    """The texts that the token cache knows, of all records, once it is verified that it knows them right."""
    cache = open_token_cache(shards, tokenizer)
    assert cache is not None
    known = [text for idx in range(len(shards)) for text in cache.known(idx, shards.record(idx))]
    assert all(each.encoding.ids.tolist() == tokenizer.encode(each.text) for each in known)
    return [each.text for each in known]


def test_the_token_cache_behind_a_url_is_fetched_when_needed_and_once(
    server: FaultyServer, cache: ShardCache, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    cache = replace(cache, retries=replace(QUICK, timeout_s=10.0))
    shards = ShardSet(server.url, cache=cache)
    opened = open_token_cache(shards, tokenizer)
    assert opened is not None
    assert not any(name.endswith((".ids", ".texts")) for name in server.requests), "files are fetched on demand"
    server.faults = {"000001.ids": ("flip", 1), "000002.texts": ("cut", 2), "cache.json": ("500", 1)}
    assert known_texts(shards, tokenizer) == TEXTS
    assert len([record for record in caplog.records if "failed" in record.getMessage()]) == 4
    assert known_texts(ShardSet(server.url, cache=cache), tokenizer) == TEXTS
    assert server.requests["shard-000000.ids"] == server.requests["shard-000000.texts"] == 1


def test_the_token_cache_of_a_command_s_shards_is_fetched(
    local: ShardSet, cache: ShardCache, tokenizer: Tokenizer
) -> None:
    assert known_texts(ShardSet(f"pipe:cat {local.folder}/{{}} | cat", cache=cache), tokenizer) == TEXTS


def test_where_a_url_has_no_token_cache_one_line_says_so_and_it_is_asked_once(
    local: ShardSet, server: FaultyServer, cache: ShardCache, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    tokenizer = load_tokenizer(local.folder.parent / "t.model")
    for url in (server.url, f"pipe:cat {local.folder}", f"pipe:cat {local.folder}/{{}} | cat"):
        shards = ShardSet(url, cache=cache)
        caplog.clear()
        assert open_token_cache(shards, tokenizer) is None
        (record,) = caplog.records
        assert record.levelno == logging.INFO
        assert f"no token cache is there (tokens-{tokenizer.fingerprint[:16]}/cache.json)" in record.getMessage()
    assert server.requests["cache.json"] == 1


@pytest.mark.parametrize(
    ("end", "kind", "message"), [("cache.json", "500", "tried 3 times"), (".ids", "404", "answered 404")]
)
def test_a_token_cache_that_cannot_be_fetched_is_named_and_left_unused(
    server: FaultyServer,
    cache: ShardCache,
    tokenizer: Tokenizer,
    caplog: pytest.LogCaptureFixture,
    end: str,
    kind: str,
    message: str,
) -> None:
    server.faults = {end: (kind, 99)}  # type: ignore[dict-item]
    shards = ShardSet(server.url, cache=cache)
    opened = open_token_cache(shards, tokenizer)
    assert opened is None or all(opened.known(idx, shards.record(idx)) == [] for idx in range(len(shards)))
    told = [record.getMessage() for record in caplog.records if "on the fly" in record.getMessage()]
    assert len(told) == 1 and message in told[0]
    assert "Check the address" in told[0] and "shards tokenize" not in told[0], "that would not help"
    requests = {name: count for name, count in server.requests.items() if name.endswith(".ids")}
    assert set(requests.values()) <= {1}, "each is tried once"


def test_a_token_cache_of_other_shards_or_with_damaged_sums_is_left_unused(
    server: FaultyServer, cache: ShardCache, local: ShardSet, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    index = local.folder / cache_name(tokenizer.fingerprint) / "cache.json"
    spec = json.loads(index.read_text())
    spec["shards"]["shard-000001.tar"]["origin"] = "0" * 64
    index.write_text(json.dumps(spec))
    assert open_token_cache(ShardSet(server.url, cache=cache), tokenizer) is None
    assert "stale" in caplog.text and caplog.text.rstrip().endswith("Run arc-ds shards tokenize again.")
    spec["shards"]["shard-000001.tar"]["ids_sha256"] = "../../x"
    index.write_text(json.dumps(spec))
    assert open_token_cache(ShardSet(server.url, cache=cache), tokenizer) is None
    assert "expected digests" in caplog.text


def test_a_token_cache_with_a_file_larger_than_the_bound_is_left_unused(
    local: ShardSet, cache: ShardCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = local.folder.parent / "t.model"
    long = write_shards(tmp_path / "long", path, ["xyz" * 4000], max_tokens=20_000)  # a token a character
    build_token_caches(long.folder, [path])
    shards = ShardSet(f"pipe:cat {long.folder}", cache=replace(cache, max_bytes=long.manifest.shards[0].bytes))
    assert open_token_cache(shards, load_tokenizer(path)) is None
    assert caplog.text.rstrip().endswith("a file of it has 60000 bytes, more than data.cache_gib allows. Raise it.")


def test_a_token_cache_counts_towards_the_bound(
    tmp_path: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the number of sources and tokenizers: what is mapped cannot make room."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    paths = [write_tiktoken(tmp_path / "t.model"), write_json_tokenizer(tmp_path / "json")]
    texts = [[f"{text} Of the {name}." for text in TEXTS] for name in ("lamp", "lake")]
    local = [write_shards(tmp_path / str(nth), paths[0], each, shard_bytes=1 << 12) for nth, each in enumerate(texts)]
    for shards in local:
        build_token_caches(shards.folder, paths)
    sizes = [path.stat().st_size for path in tmp_path.rglob("shard-*") if path.suffix != ".idx"]
    small = replace(cache, max_bytes=sum(sizes) // 3)
    with serve(tmp_path) as server:
        remote = [ShardSet(f"{server.url}/{shards.folder.name}", cache=small) for shards in local]
        opened = [[open_token_cache(shards, load_tokenizer(path)) for path in paths] for shards in remote]
        for idx in range(len(TEXTS)):
            for shards, caches, expected in zip(remote, opened, texts, strict=True):
                record = shards.record(idx)
                assert record["text"] == expected[idx]
                assert all(each is not None and len(each.known(idx, record)) == 1 for each in caches)
                assert sum(path.stat().st_size for path in kept(small)) <= small.max_bytes


def test_a_damaged_token_file_in_the_cache_is_found_and_the_cure_is_named(
    server: FaultyServer, cache: ShardCache, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    shards = ShardSet(server.url, cache=cache)
    known_texts(shards, tokenizer)
    (ids, _) = shards.files.beside[cache_name(tokenizer.fingerprint)]["shard-000000.tar"]
    path = cache.tar_path(ids.sha256)
    path.write_bytes(b"x" * ids.num_bytes)
    opened = open_token_cache(shards, tokenizer)
    assert opened is not None and opened.known(0, shards.record(0)) == []
    assert f"Delete {path}" in caplog.text
    path.unlink()
    assert known_texts(shards, tokenizer) == TEXTS


def test_tokenize_of_a_url_writes_where_training_looks(
    server: FaultyServer, cache: ShardCache, local: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ARC_DS_CACHE_DIR", str(cache.folder))
    path = local.folder.parent / "t.model"
    assert main(["shards", "tokenize", server.url, "--tokenizer", str(path), "--workers", "2"]) == 0
    assert known_texts(ShardSet(server.url, cache=cache), load_tokenizer(path)) == TEXTS
    assert not any(name.endswith((".json", ".ids")) for name in server.requests if name != "manifest.json")


def test_a_token_cache_is_fetched_ahead_with_its_tars(
    server: FaultyServer, cache: ShardCache, tokenizer: Tokenizer
) -> None:
    shards = ShardSet(server.url, cache=cache)
    assert open_token_cache(shards, tokenizer) is not None
    shards.prefetch([2])
    wanted = {"shard-000002.tar", "shard-000002.ids", "shard-000002.texts"}
    deadline = time.monotonic() + 10
    while not wanted <= server.requests.keys() or any(path.suffix for path in kept(cache)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(kept(cache)) == 3


class RemoteMixture(TinyMixture):
    """The sources of a mixture behind a server."""

    url: str
    cache: ShardCache

    def sources(self, weights: tuple[float, ...] = WEIGHTS) -> list[Source]:
        return [
            replace(source, shards=ShardSet(f"{self.url}/{source.shards.folder.name}", cache=self.cache))
            for source in super().sources(weights)
        ]


@pytest.mark.parametrize("has_token_caches", [False, True])
def test_batches_of_remote_sources_are_the_local_ones(
    tmp_path: Path, cache: ShardCache, monkeypatch: pytest.MonkeyPatch, has_token_caches: bool
) -> None:
    """Over workers that share a cache too small for all shards, and a server that fails now and then."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "data").mkdir()
    mixture = TinyMixture.write(tmp_path / "data")
    expected = sequences(mixture.data()[step] for step in range(8))
    for name in ("texts", "questions", "long") if has_token_caches else ():
        build_token_caches(tmp_path / "data" / name, [mixture.encoder, mixture.decoder])
    remote = RemoteMixture(tmp_path / "data")
    with serve(tmp_path / "data") as server:
        remote.url = server.url
        remote.cache = replace(cache, max_bytes=30_000, retries=replace(QUICK, attempts=6))
        data = remote.data()
        server.faults = {"0.tar": ("cut", 2), "1.tar": ("500", 3), "2.tar": ("flip", 2)}
        if has_token_caches:
            server.faults |= {"0.ids": ("cut", 2), "1.texts": ("500", 3)}
        assert sequences(make_loader(data, range(8), num_workers=2)) == expected
    assert sum(path.stat().st_size for path in mixture.folder.glob("*/*.tar")) > 30_000
    assert sum(left for _, left in server.faults.values()) == 0, "the faults happened"
