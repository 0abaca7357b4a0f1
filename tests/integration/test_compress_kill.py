"""`arc-ds compress` into a set of shards is killed, and run again."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import torch

from arc_ds import ArcModel
from arc_ds.cli import main
from arc_ds.export.formats import write_export
from arc_ds.inference.vectors import read_vectors
from tests.helpers.tiny_data import write_lines
from tests.helpers.tiny_export import tiny_trained
from tests.helpers.waiting import wait_for

# `arc-ds compress` that reads no further text once a file exists.
HELD = """
import sys, time
from pathlib import Path
from arc_ds import cli
from arc_ds.commands import compress

new_texts = compress._new_texts

def held_texts(*args):
    for text in new_texts(*args):
        while Path(sys.argv[1]).exists():
            time.sleep(0.01)
        yield text

compress._new_texts = held_texts
sys.exit(cli.main(sys.argv[2:]))
"""
RECORDS = [{"id": f"r{n}", "text": f"{'The wind came from the sea. ' * (1 + n % 3)}{n}"} for n in range(150)]


def test_a_killed_run_continues_without_a_text_twice(tmp_path: Path, capsys) -> None:
    write_export(tiny_trained(tmp_path / "run"), tmp_path / "export")
    export, lines, out = tmp_path / "export", tmp_path / "x.jsonl", tmp_path / "out"
    write_lines(lines, RECORDS)
    options = ["--batch-tokens", "60", "--shard-mb", "0.006"]
    command = ["compress", "--model", str(export), "--out", str(out), *options, str(lines)]
    second = out / "vectors-00001.safetensors"
    process = subprocess.Popen([sys.executable, "-c", HELD, str(second), *command])
    wait_for(lambda: second.exists() or process.poll() is not None)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (out / ".vectors-00099.jsonl.partial-1").write_text("of a killed process")
    (out / "vectors-00099.jsonl").write_text("without its tensor")
    before = {path: path.read_bytes() for path in out.glob("vectors-*.safetensors")}
    num_before = len(read_vectors(out))
    assert 0 < num_before < len(RECORDS)
    assert main(command) == 0
    assert f"{num_before} texts were there already" in capsys.readouterr().out
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not list(out.glob(".*"))
    ids = [json.loads(line)["id"] for shard in sorted(out.glob("vectors-*.safetensors"))
           for line in shard.with_suffix(".jsonl").read_text().splitlines()]  # fmt: skip
    assert ids == [record["id"] for record in RECORDS]
    found, model = read_vectors(out), ArcModel.from_checkpoint(export, decoders=[])
    for record in (RECORDS[0], RECORDS[num_before], RECORDS[-1]):
        torch.testing.assert_close(found[record["id"]], model.compress([record["text"]])[0])
