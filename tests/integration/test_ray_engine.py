"""Builds on Ray: identical bytes whatever dies, errors in words, no process of Ray is left."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from arc_ds.cli import main
from arc_ds.errors import ArcError, DataError, StorageError
from arc_ds.shards.building.writer import build_shards
from arc_ds.shards.parallel import AHEAD, Engine, map_in_order, on_shared_folder
from arc_ds.shards.token_cache.writer import build_token_caches
from arc_ds.system.locks import LOCK_FILE
from tests.helpers.faulty_server import serve
from tests.helpers.tiny_data import TEXT, contents
from tests.helpers.waiting import LIMIT_S, wait_for
from tests.integration.test_shard_workers import alive, start_build

ray = pytest.importorskip("ray", reason="needs the extra ray")

from ray.cluster_utils import Cluster  # noqa: E402

from arc_ds.shards import ray_engine  # noqa: E402
from arc_ds.shards.ray_engine import map_on_ray, ray_cluster  # noqa: E402

QUICK = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 2}
OPTIONS: dict[str, Any] = {"max_tokens": 200, "min_tokens": 4, "shard_bytes": 1 << 18}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two files, each of more than one batch."""
    folder = tmp_path_factory.mktemp("in")
    for name in ("a", "b"):
        lines = (json.dumps({"text": f"{name}{idx}. {TEXT}" * (1 + idx * idx % 97)}) for idx in range(130))
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, source: Path, tokenizer: Path) -> dict[str, bytes]:
    """The files of a build without Ray."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert len(build_shards([source], out, tokenizer, **OPTIONS).shards) > 8
    return contents(out)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Cluster]:
    """A cluster with one host of two CPUs. This process is connected to it by RAY_ADDRESS."""
    hosts = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, "_system_config": QUICK}
    )
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_ADDRESS", hosts.address)
            with ray_cluster() as num_workers:
                assert num_workers == 2
                assert ray.get_runtime_context().gcs_address == hosts.address
                yield hosts
    finally:
        hosts.shutdown()


def engine_with(wrap: Callable[..., Any], *args: Any) -> Engine:
    """An engine that applies `wrap(*args, function, item)` instead of `function(item)`."""

    def engine(
        function: Callable[[Any], Any], items: Iterable[Any], num_workers: int
    ) -> Generator[tuple[Any, Any], None, None]:
        return map_on_ray(partial(wrap, *args, function), items, num_workers)

    return engine


def die_once(marker: Path, function: Callable[[Any], Any], job: Any) -> Any:
    """Kill this worker in the middle of the second input, unless the marker exists."""
    if job.file_idx == 1 and job.batch.cursor.number and not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return function(job)


def die_at_second_input(function: Callable[[Any], Any], job: Any) -> Any:
    if job.file_idx == 1 and job.batch.cursor.number:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(job)


def import_nothing(_: object) -> None:
    import a_package_that_no_host_has  # noqa: F401


def identity(item: int) -> int:
    return item


def wait_on_host(folder: Path, item: int) -> int:
    """Write the id of this task's host to a file, and wait for the file `go`."""
    (folder / str(item)).write_text(ray.get_runtime_context().get_node_id())
    wait_for((folder / "go").exists)
    return item


def descendants(pid: int) -> list[int]:
    children = [
        int(child) for task in Path(f"/proc/{pid}/task").glob("*") for child in (task / "children").read_text().split()
    ]
    return children + [below for child in children for below in descendants(child)]


def test_a_stopped_command_leaves_no_ray_and_resumes_with_the_same_bytes(
    tmp_path: Path, source: Path, tokenizer: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    out, state = tmp_path / "out", tmp_path / ".out.partial" / "state.json"
    options = ["--max-tokens", "200", "--min-tokens", "4", "--shard-mib", "0.25", "--engine", "ray"]
    command = start_build(source, out, tokenizer, *options, is_held=True)
    try:
        wait_for(lambda: state.exists() or command.poll() is not None)
        processes = descendants(command.pid)
        command.send_signal(signal.SIGINT)
        output, _ = command.communicate(timeout=LIMIT_S)
    finally:
        command.kill()
        command.wait()
    assert command.returncode == 130, output
    lines = output.splitlines()
    assert "the same command resumes the build" in lines[0] and lines[1:] == ["arc-ds shards: interrupted"], output
    assert len(processes) > 4
    wait_for(lambda: not any(alive(pid) for pid in processes))
    build_shards([source], out, tokenizer, **OPTIONS)
    assert contents(out) == whole


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1.*ray start"),
        ("127.0.0.1", "expected auto or HOST:PORT"),
        ("ray://127.0.0.1:10001", "expected auto or HOST:PORT"),
    ],
)
def test_a_wrong_address_is_an_error_at_once(address: str, message: str) -> None:
    with pytest.raises(StorageError, match=message), ray_cluster(address):
        pass


def test_a_port_of_another_program_is_an_error_at_once(tmp_path: Path) -> None:
    with (
        serve(tmp_path) as server,
        pytest.raises(StorageError, match="another program listens there"),
        ray_cluster(urlsplit(server.url).netloc),
    ):
        pass


def test_a_missing_ray_is_an_error_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "arc_ds.shards.ray_engine")
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["shards", "tokenize", str(tmp_path), "--tokenizer", str(tmp_path), "--engine", "ray"]) == 2
    assert "pip install 'arc-ds[ray]'" in capsys.readouterr().err


def test_a_worker_without_arc_ds_reports_what_it_lacks(tmp_path: Path) -> None:
    call = tmp_path / "call"
    call.write_bytes(ray.cloudpickle.dumps(ray_engine._call_by_value()))
    work = ("0.0.0", str(tmp_path), pickle.dumps(identity), pickle.dumps(1))
    program = f"import pickle; pickle.load(open({str(call)!r}, 'rb'))(*{work!r})"
    (tmp_path / "arc_ds.py").touch()  # hides the installed package
    for folder, message in ((tmp_path, "No module named 'arc_ds.errors'"), (Path.cwd(), "the command has 0.0.0.")):
        environment = os.environ | {"PYTHONPATH": str(folder)}
        words = [sys.executable, "-c", program]
        worker = subprocess.run(words, env=environment, cwd=tmp_path.parent, capture_output=True, text=True)
        assert worker.returncode and message in worker.stderr, worker.stderr


def test_a_killed_worker_does_not_change_the_bytes(
    tmp_path: Path,
    source: Path,
    tokenizer: Path,
    whole: dict[str, bytes],
    hosts: Cluster,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    marker = tmp_path / "died"
    engine = engine_with(die_once, marker)
    build_shards([source], tmp_path / "out", tokenizer, **OPTIONS, workers=2, engine=engine)
    assert marker.exists()
    assert contents(tmp_path / "out") == whole
    assert "a Ray worker was lost" in caplog.text and "b.jsonl, line" in caplog.text
    assert "raylet" not in capfd.readouterr().out


def test_workers_that_always_die_end_the_build_which_resumes(
    tmp_path: Path, source: Path, tokenizer: Path, whole: dict[str, bytes], hosts: Cluster
) -> None:
    out = tmp_path / "out"
    engine = engine_with(die_at_second_input)
    with pytest.raises(
        DataError, match=r"4 Ray workers died .* documents from .*b\.jsonl, line \d+ on.*fewer --worker"
    ):
        build_shards([source], out, tokenizer, **OPTIONS, workers=2, engine=engine)
    finished = tmp_path / ".out.partial" / "shards" / "shard-000000.tar"
    written_ns = finished.stat().st_mtime_ns
    build_shards([source], out, tokenizer, **OPTIONS, workers=2, engine=map_on_ray)
    assert contents(out) == whole
    assert (out / finished.name).stat().st_mtime_ns == written_ns


def test_errors_of_a_build_are_those_of_a_local_one(tmp_path: Path, tokenizer: Path, hosts: Cluster) -> None:
    (tmp_path / "a.jsonl").write_text(f"{json.dumps({'text': TEXT})}\n{{\n[]\n")
    messages = []
    for engine in (map_in_order, map_on_ray):
        with pytest.raises(DataError) as found:
            build_shards([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer, workers=2, engine=engine)
        assert type(found.value) is DataError
        messages.append(str(found.value))
    assert messages[0] == messages[1] and "line 2: expected JSON" in messages[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_an_input_that_vanishes_ends_the_build(tmp_path: Path, source: Path, tokenizer: Path, hosts: Cluster) -> None:
    copy = tmp_path / "a.jsonl"
    copy.write_bytes((source / "a.jsonl").read_bytes())

    def engine(*args: Any) -> Generator[tuple[Any, Any], None, None]:
        for result in map_on_ray(*args):
            copy.unlink(missing_ok=True)
            yield result

    with pytest.raises(DataError, match="changed while it was read"):
        build_shards([copy], tmp_path / "out", tokenizer, **OPTIONS, workers=2, engine=engine)


def test_two_builds_into_one_folder_are_refused(tmp_path: Path, source: Path, tokenizer: Path, hosts: Cluster) -> None:
    again = partial(build_shards, [source], tmp_path / "out", tokenizer, **OPTIONS, workers=2)
    refused: list[str] = []

    def engine(*args: Any) -> Generator[tuple[Any, Any], None, None]:
        for result in map_on_ray(*args):
            if not refused:
                with pytest.raises(DataError, match="another build is writing") as found:
                    again(engine=map_on_ray)
                refused.append(str(found.value))
            yield result

    again(engine=engine)
    assert refused and (tmp_path / "out").is_dir()


def test_token_caches_are_those_of_a_local_call(
    tmp_path: Path, source: Path, tokenizer: Path, hosts: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "other"):
        build_shards([source], tmp_path / name, tokenizer, **OPTIONS)
    monkeypatch.chdir(tmp_path)  # paths may be relative to the folder of the command
    (expected,) = build_token_caches("one", [os.path.relpath(tokenizer)])
    (made,) = build_token_caches("other", [os.path.relpath(tokenizer)], workers=2, engine=map_on_ray)
    assert made.made == expected.made > 8
    assert contents(made.folder) == contents(expected.folder)


@pytest.mark.parametrize(
    ("prepare", "error", "message"),
    [
        ("version", DataError, "has ARC-DS .*; the command has 0.0.0.* every host"),
        ("package", DataError, "cannot import a package: No module named 'a_package_that_no_host_has'.*every host"),
        ("folder", StorageError, "does not see the files of this command in .*share the file system"),
    ],
)
def test_a_host_that_lacks_something_is_named(
    tmp_path: Path,
    hosts: Cluster,
    monkeypatch: pytest.MonkeyPatch,
    prepare: str,
    error: type[ArcError],
    message: str,
) -> None:
    function: Callable[[int], Any] = identity
    (tmp_path / LOCK_FILE).write_text("process 1 on this host")
    if prepare == "version":
        monkeypatch.setattr(ray_engine, "__version__", "0.0.0")
    elif prepare == "package":
        function = import_nothing
    else:
        function = on_shared_folder(tmp_path, identity)
        (tmp_path / LOCK_FILE).write_text("process 1 on another host")
    with pytest.raises(error, match=message):
        list(map_on_ray(function, [1], 1))


def test_a_lost_head_ends_the_work(hosts: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would end this process a minute after a real loss, so another address stands for it."""
    monkeypatch.setattr(ray_engine, "_CHECK_S", 0.0)
    assert len(list(map_on_ray(identity, range(3), 2))) == 3
    monkeypatch.setattr(type(ray.get_runtime_context()), "gcs_address", "127.0.0.1:1")
    with pytest.raises(StorageError, match="no Ray cluster answers at 127"):
        list(map_on_ray(identity, range(3), 2))


def test_the_number_of_items_in_flight_is_bounded(hosts: Cluster) -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for item in range(1, 41):
            taken.append(item)
            yield item

    for number, (item, result) in enumerate(map_on_ray(identity, items(), 2), start=1):
        assert item == result == number
        assert len(taken) <= number + 2 * AHEAD
    assert len(taken) == 40


def test_a_lost_host_does_not_change_the_results(
    tmp_path: Path, hosts: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    host = hosts.add_node(num_cpus=2)

    def items() -> Iterator[int]:
        yield from range(4)
        wait_for(lambda: any(path.read_text() == host.node_id for path in tmp_path.iterdir()))
        hosts.remove_node(host, allow_graceful=False)
        (tmp_path / "go").touch()
        yield 4

    results = map_on_ray(partial(wait_on_host, tmp_path), items(), 4)
    assert list(results) == [(item, item) for item in range(5)]
    assert "a Ray worker was lost" in caplog.text
