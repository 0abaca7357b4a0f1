"""Builds with real worker processes: identical bytes for any number of workers and after kill -9; none is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from arc_ds.cli import main
from arc_ds.errors import DataError
from arc_ds.shards.building.writer import build_shards
from arc_ds.shards.check import check_shards
from tests.helpers.tiny_data import TEXT, contents
from tests.helpers.waiting import LIMIT_S, wait_for

# `arc-ds` whose builds wait after their first saved state.
HELD = """
import sys, time
from arc_ds import cli
from arc_ds.shards.building.state import BuildFolder

save = BuildFolder.save

def save_and_wait(*args):
    save(*args)
    time.sleep(3600)

if __name__ == "__main__":
    BuildFolder.save = save_and_wait
    sys.exit(cli.main(sys.argv[1:]))
"""
OPTIONS = {"max_tokens": 200, "min_tokens": 4, "shard_bytes": 1 << 19}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 5 MB in several batches. Documents have between one and a few hundred records."""
    path = tmp_path_factory.mktemp("in") / "a.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for idx in range(400):
            file.write(json.dumps({"text": f"{idx}. {TEXT}" * (1 + idx * idx % 97)}) + "\n")
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, source: Path, tokenizer: Path) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    manifest = build_shards([source], out, tokenizer, **OPTIONS)
    assert len(manifest.shards) > 8
    return contents(out)


def start_build(
    source: Path, out: Path, tokenizer: Path, *options: str, is_held: bool = False
) -> subprocess.Popen[str]:
    """is_held: the build waits after its first saved state."""
    words = ["shards", "build", str(source), "--out", str(out), "--tokenizer", str(tokenizer), "--workers", "2"]
    program = ["-c", HELD] if is_held else ["-m", "arc_ds.cli"]
    command = [sys.executable, *program, *words, *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_workers_and_a_kill_do_not_change_the_bytes(
    tmp_path: Path, source: Path, tokenizer: Path, whole: dict[str, bytes]
) -> None:
    out, state = tmp_path / "out", tmp_path / ".out.partial" / "state.json"
    options = ["--max-tokens", "200", "--min-tokens", "4", "--shard-mib", "0.5"]
    builder = start_build(source, out, tokenizer, *options, is_held=True)
    try:
        wait_for(lambda: state.exists() or builder.poll() is not None)
        workers = [int(pid) for pid in Path(f"/proc/{builder.pid}/task/{builder.pid}/children").read_text().split()]
    finally:
        builder.kill()
        builder.wait()
    assert len(workers) >= 2
    assert not out.exists()
    wait_for(lambda: not any(alive(pid) for pid in workers))
    finished = (state.parent / "shards" / "shard-000000.tar").stat().st_mtime_ns
    build_shards([source], out, tokenizer, workers=2, **OPTIONS)
    assert contents(out) == whole
    assert (out / "shard-000000.tar").stat().st_mtime_ns == finished


def test_a_worker_that_dies_ends_the_build_with_the_cure(tmp_path: Path, source: Path, tokenizer: Path) -> None:
    builder = start_build(source, tmp_path / "out", tokenizer)
    children = Path(f"/proc/{builder.pid}/task/{builder.pid}/children")
    wait_for(lambda: bool(makers(children)))  # the other one may still be starting
    os.kill(makers(children)[0], signal.SIGKILL)
    words, _ = builder.communicate(timeout=LIMIT_S)
    assert builder.returncode == 2, words
    assert "a worker process died" in words and "fewer --workers" in words
    assert not (tmp_path / "out").exists()


def test_a_fault_found_by_a_worker_is_the_first_in_the_input(tmp_path: Path, source: Path, tokenizer: Path) -> None:
    lines = source.read_text().splitlines()
    bad = tmp_path / "bad.jsonl"
    bad.write_text("\n".join([*lines[:200], "{", *lines[200:300], "[]", *lines[300:]]))
    with pytest.raises(DataError, match="line 201: expected JSON"):
        build_shards([bad], tmp_path / "out", tokenizer, workers=2, max_tokens=200, shard_bytes=1 << 30)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_checking_in_parallel_finds_the_same_faults(
    tmp_path: Path, whole: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name, data in whole.items():
        (out / name).write_bytes(data)
    assert main(["shards", "check", str(out), "--workers", "2"]) == 0
    assert "all records whole" in capsys.readouterr().out
    for name, offset in (("shard-000005.tar", 600), ("shard-000002.tar", 513)):
        raw = bytearray((out / name).read_bytes())
        raw[offset] ^= 1
        (out / name).write_bytes(raw)
    (out / "stray").write_bytes(b"")
    faults = list(check_shards(out, workers=2))
    assert faults == list(check_shards(out))
    assert [fault.file for fault in faults] == ["stray", *["shard-000002.tar"] * 2, *["shard-000005.tar"] * 2]
    assert main(["shards", "check", str(out)]) == 1
    printed = capsys.readouterr().out
    assert f"{out}/shard-000002.tar at byte 512: the member's checksum" in printed
    assert f"{out}: 5 faults. Copy the damaged files again or rebuild them" in printed


def makers(children: Path) -> list[int]:
    """Processes that import this program's main module: the workers, but not multiprocessing's resource tracker."""
    pids = [int(pid) for pid in children.read_text().split()] if children.exists() else []
    return [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False
