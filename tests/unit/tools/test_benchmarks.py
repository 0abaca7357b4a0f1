"""The benchmarks of the data path, the export, the server and the shard tools measure what their rows say."""

from __future__ import annotations

import csv
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from arc_ds.export.formats import write_export
from tests.helpers.tiny_data import TEXT, write_tiktoken
from tests.helpers.tiny_export import tiny_trained, write_decoder

needs_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the benchmark reads /proc")


def run(monkeypatch: pytest.MonkeyPatch, name: str, *options: object) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, options)])
    assert import_module(name).main() == 0


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def test_both_ways_of_getting_ids_are_measured_without_caches_that_remain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "")  # the program sets these variables; restore them afterwards
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    (tmp_path / "text.txt").write_text(TEXT * 200)
    tokenizer, out = write_tiktoken(tmp_path / "tokenizer.model"), tmp_path / "rows.csv"
    options = ["--tokenizer", f"tiny={tokenizer}", "--text", tmp_path / "text.txt", "--out", out, "--profile"]
    sizes = ["--steps", 2, "--repeats", 2, "--batch-size", 4, "--shards", tmp_path / "shards"]
    for number in (1, 2):
        run(monkeypatch, "bench_data", *options, *sizes)
        assert [row["ids"] for row in rows(out)] == ["on the fly", "cached"] * number
    for row in rows(out):
        assert float(row["encoder_tokens_per_s"]) > float(row["records_per_s"]) > 0
        assert float(row["decoder_rows_per_s"]) > 0
    printed = capsys.readouterr().out
    assert "encoder tokens/s" in printed
    for stage in ("token cache", "tokenising", "making samples", "packing", "order and dealing"):
        assert stage in printed
    assert not list((tmp_path / "shards").glob("*/tokens-*"))


@needs_proc
def test_an_export_of_its_own_checkpoint_has_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--gb", 0.001, "--width", 32, "--world-size", 2, "--dtype", "bfloat16", "--average", 2]
    run(monkeypatch, "bench_export", *options, "--format", "arc-ds", "--csv", "rows.csv")
    (row,) = rows(tmp_path / "rows.csv")
    assert (row["world_size"], row["average"], row["largest_mb"]) == ("2", "2", "4.1")  # 64,000 x 32 in bfloat16
    exported, weights, shards = (float(row[f"{name}_mb"]) for name in ("exported", "weights", "shards"))
    assert weights / 2 <= exported < weights < shards
    assert float(row["seconds"]) > 0 and float(row["cp_export_s"]) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["rows.csv"]


def test_documents_are_read_in_three_ways_and_only_vectors_make_prompts_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_export(tiny_trained(tmp_path / "run"), tmp_path / "export")
    (tmp_path / "text.txt").write_text(TEXT * 20)
    files = ["--model", tmp_path / "export", "--decoder", write_decoder(tmp_path / "decoder")]
    sizes = ["--text", tmp_path / "text.txt", "--characters", 101, "--requests", 6, "--tokens", 3]
    run(monkeypatch, "bench_serve", *files, *sizes, "--out", tmp_path / "rows.csv")
    text, new, cached = rows(tmp_path / "rows.csv")
    assert [row["way"] for row in (text, new, cached)] == ["text", "new", "cached"]
    assert float(text["prompt_rows"]) > float(new["prompt_rows"]) == float(cached["prompt_rows"])
    assert float(text["encoder_tokens"]) == 0 < float(new["encoder_tokens"])
    assert all(float(row["requests_per_s"]) > 0 and float(row["first_token_p95_ms"]) > 0 for row in (text, new, cached))


def test_prompts_are_answered_in_five_ways_with_the_same_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "leaving" reads other prompts, so that nothing is shared."""
    write_export(tiny_trained(tmp_path / "run"), tmp_path / "export")
    (tmp_path / "text.txt").write_text(TEXT * 20)
    files = ["--model", tmp_path / "export", "--decoder", write_decoder(tmp_path / "decoder")]
    sizes = ["--text", tmp_path / "text.txt", "--characters", 101, "--samples", 5, "--batch", 3, "--limit", 4]
    run(monkeypatch, "bench_generate", *files, *sizes, "--dtype", "float64", "--out", tmp_path / "rows.csv")
    found = rows(tmp_path / "rows.csv")
    assert [row["way"] for row in found] == ["plain", "stop", "leaving", "prefix", "vectors"]
    assert all(float(row["answers_per_s"]) > 0 and row["machine"] for row in found)
    assert [row["same_answers"] for row in found if row["way"] != "leaving"] == ["1.0"] * 4
    assert float(found[0]["speedup"]) == 1.0
    assert found[0]["command"].startswith("python tools/bench_generate.py --model export --decoder decoder --text text")


def test_documents_come_from_the_speeches_if_no_text_is_given(capsys: pytest.CaptureFixture[str]) -> None:
    module = import_module("bench_rows")
    args = module.model_parser("", characters=300).parse_args(["--model", "m", "--decoder", "d"])
    documents = module.cut_documents(args, 50)
    assert len(documents) == len(set(documents)) == 50 and set(map(len, documents)) == {300}
    assert module.run(lambda _: module.cut_documents(args, 10**6), args) == 2
    assert "documents of 1000000; give a longer one" in capsys.readouterr().err


@needs_proc
def test_all_processes_of_build_and_check_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = write_tiktoken(tmp_path / "tokenizer.model")
    run(monkeypatch, "bench_shards", "--tokenizer", tokenizer, "--mb", 0.3, "--folder", tmp_path, "--workers", 1)
    build, check = csv.DictReader(capsys.readouterr().out.splitlines())
    assert (build["command"], check["command"], build["input_mb"]) == ("build", "check", "0.3")
    assert float(build["peak_mib"]) >= float(build["peak_own_mib"]) > 10
    assert float(build["seconds"]) > 0.1
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]
