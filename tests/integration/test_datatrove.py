"""A datatrove pipeline that ends in our step: the shards equal a build of the filtered documents, for any tasks."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from arc_ds.errors import DataError, DiskFullError
from arc_ds.shards.building.writer import build_shards
from arc_ds.shards.check import check_shards
from arc_ds.shards.format import MANIFEST
from arc_ds.shards.reader import ShardSet
from tests.helpers.tiny_data import TEXT, contents, numbered_texts, write_lines

pytest.importorskip("datatrove", reason="needs the extra datatrove")
pyarrow = pytest.importorskip("pyarrow", reason="needs the extra shards")
pytest.importorskip("pyarrow.parquet")

from datatrove.executor.local import LocalPipelineExecutor  # noqa: E402
from datatrove.pipeline.filters import LambdaFilter  # noqa: E402
from datatrove.pipeline.readers import ParquetReader  # noqa: E402

from arc_ds.shards.building import datatrove_writer  # noqa: E402
from arc_ds.shards.building.datatrove_writer import ShardsStep  # noqa: E402

OPTIONS: dict[str, Any] = {"max_tokens": 100, "min_tokens": 4, "shard_bytes": 1 << 14}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five files in two folders. Half of their documents have the score 0."""
    folder = tmp_path_factory.mktemp("corpus")
    for number, name in enumerate(("a.parquet", "b/1.parquet", "b/2.parquet", "b.parquet", "c.parquet")):
        texts = [f"{number}: {text}{TEXT * (idx % 3)}" for idx, text in enumerate(numbered_texts(40))]
        write_rows(folder / name, [{"text": text, "score": idx % 2} for idx, text in enumerate(texts)])
    return folder


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, corpus: Path, tokenizer: Path) -> dict[str, bytes]:
    """A build of the filtered documents, in files of the same names."""
    folder = tmp_path_factory.mktemp("expected")
    for path in corpus.rglob("*.parquet"):
        kept = folder / "in" / path.relative_to(corpus).with_suffix(".jsonl")
        kept.parent.mkdir(parents=True, exist_ok=True)
        rows = pyarrow.parquet.read_table(path).to_pylist()
        write_lines(kept, [{"text": row["text"]} for row in rows if row["score"]])
    manifest = build_shards([folder / "in"], folder / "out", tokenizer, **OPTIONS)
    assert len(manifest.shards) > 3 and len(manifest.sources) == 5
    found = contents(folder / "out")
    return found | {MANIFEST: found[MANIFEST].replace(b".jsonl", b".parquet")}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def is_good(document: Any) -> bool:
    return bool(document.metadata["score"])


class StopsAt:
    """A filter that raises at a text while a file exists."""

    def __init__(self, text: str, file: Path) -> None:
        self.text = text
        self.file = file

    def __call__(self, document: Any) -> bool:
        if self.file.exists() and document.text.startswith(self.text):
            raise RuntimeError("killed")
        return is_good(document)


def run(
    corpus: Path, out: Path, tokenizer: Path, tasks: int, keep: Callable[[Any], bool] = is_good, **options: Any
) -> None:
    step = ShardsStep(out, tokenizer, **OPTIONS | options)
    pipeline = [ParquetReader(str(corpus)), LambdaFilter(keep), step]
    LocalPipelineExecutor(pipeline, tasks=tasks, workers=1, logging_dir=str(out.parent / "logs")).run()


@pytest.mark.parametrize("tasks", [1, 2, 7])
def test_the_shards_equal_a_build_of_the_filtered_documents(
    tmp_path: Path, corpus: Path, tokenizer: Path, expected: dict[str, bytes], tasks: int
) -> None:
    out = tmp_path / "out"
    run(corpus, out, tokenizer, tasks)
    assert contents(out) == expected
    assert not list(check_shards(out))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "out"]


def test_another_filter_gives_other_shards(
    tmp_path: Path, corpus: Path, tokenizer: Path, expected: dict[str, bytes]
) -> None:
    run(corpus, tmp_path / "out", tokenizer, 2, keep=lambda document: not is_good(document))
    assert contents(tmp_path / "out") != expected


def test_a_task_that_failed_is_repeated_alone(
    tmp_path: Path, corpus: Path, tokenizer: Path, expected: dict[str, bytes]
) -> None:
    out, broken = tmp_path / "out", tmp_path / "broken"
    broken.touch()
    keep = StopsAt("3: Tower 20 ", broken)  # in the file b.parquet
    with pytest.raises(RuntimeError, match="killed"):
        run(corpus, out, tokenizer, 2, keep)
    assert not out.exists()
    finished = sorted((tmp_path / ".out.datatrove").glob("*-of-00002/part.json"))
    broken.unlink()
    with pytest.raises(DataError, match="other options.*Delete it"):
        run(corpus, out, tokenizer, 2, keep, min_tokens=5)
    assert len(finished) < 2
    run(corpus, out, tokenizer, 2, keep)
    assert contents(out) == expected


def test_a_join_that_failed_is_repeated(
    tmp_path: Path, corpus: Path, tokenizer: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(datatrove_writer, "_join", no_space)
        with pytest.raises(DiskFullError, match="out cannot be written"):
            run(corpus, out, tokenizer, 2)
    run(corpus, out, tokenizer, 2)
    assert contents(out) == expected


def test_a_fault_names_the_document_and_an_existing_folder_is_kept(
    tmp_path: Path, corpus: Path, tokenizer: Path
) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="out exists"):
        run(corpus, tmp_path / "out", tokenizer, 1)
    source = tmp_path / "in"
    write_rows(source / "a.parquet", [{"text": TEXT}, {"text": "Not this. " * 300}])
    for on_error in ("stop", "skip"):
        out = tmp_path / on_error / "out"
        step = ShardsStep(out, tokenizer, **OPTIONS, max_document_bytes=2000, on_error=on_error)
        executor = LocalPipelineExecutor([ParquetReader(str(source)), step], logging_dir=str(out.parent / "logs"))
        if on_error == "stop":
            with pytest.raises(DataError, match=r"a\.parquet \(after the filters\), line 2: "):
                executor.run()
        else:
            executor.run()
            assert ShardSet(out).manifest.skipped == {"too_large": 1}


def test_fine_tuning_records_take_their_fields_from_the_metadata(tmp_path: Path, tokenizer: Path) -> None:
    rows = [{"passage": TEXT, "question": f"Who {idx}?", "answer": "Nobody", "other": [1]} for idx in range(3)]
    write_rows(tmp_path / "in" / "a.parquet", rows)
    options: dict[str, Any] = {"kind": "fine_tuning", "shard_bytes": 1 << 14}
    step = ShardsStep(tmp_path / "out", tokenizer, text_field="passage", **options)
    reader = ParquetReader(str(tmp_path / "in"), text_key="passage")
    LocalPipelineExecutor([reader, step], logging_dir=str(tmp_path / "logs")).run()
    oracle = build_shards([tmp_path / "in"], tmp_path / "oracle", tokenizer, **options)
    written = ShardSet(tmp_path / "out").manifest
    assert written.shards == oracle.shards
    assert oracle.shards[0].passage_tokens


def test_fields_in_objects_are_those_of_a_build(tmp_path: Path, tokenizer: Path) -> None:
    """Columns of a flattened table are kept, and only the text of a pretraining document counts towards its size."""
    questions = [{"context": TEXT, "question": f"Who {idx}?", "answers.text": ["Nobody"]} for idx in range(3)]
    texts = [{"doc.body": TEXT, "doc": {"body": TEXT, "page": "x" * 4000}} for _ in range(3)]
    for kind, field, rows in (("fine_tuning", "context", questions), ("pretraining", "doc.body", texts)):
        folder = tmp_path / kind
        write_rows(folder / "in" / "a.parquet", rows)
        options: dict[str, Any] = {"kind": kind, "text_field": field, "max_document_bytes": 2000}
        reader = ParquetReader(str(folder / "in"), text_key=field)
        step = ShardsStep(folder / "out", tokenizer, **options)
        LocalPipelineExecutor([reader, step], logging_dir=str(folder / "logs")).run()
        kept = [row if kind == "fine_tuning" else {field: row[field]} for row in rows]
        oracle = build_shards([write_lines(folder / "a.jsonl", kept)], folder / "oracle", tokenizer, **options)
        assert ShardSet(folder / "out").manifest.shards == oracle.shards
