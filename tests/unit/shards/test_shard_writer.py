"""Building shards: every input is read, no text is lost, the bytes are deterministic, faults are reported."""

from __future__ import annotations

import errno
import gzip
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from arc_ds.errors import DataError, StorageError
from arc_ds.shards.building.writer import build_shards
from arc_ds.shards.format import Manifest
from arc_ds.shards.reader import ShardSet
from arc_ds.shards.records import MAX_RECORD_BYTES
from arc_ds.shards.tar_writer import EncodedRecord, ShardWriter
from arc_ds.tokenizers import load_tokenizer
from tests.helpers.tiny_data import TEXT, contents, numbered_texts, write_tokenizer_without


def test_every_kind_of_input_is_read_and_short_documents_counted(tmp_path: Path, tokenizer_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.txt").write_text(TEXT, encoding="utf-8")
    (source / "b.jsonl").write_text(json.dumps({"body": TEXT}) + "\n\n" + json.dumps({"body": " \n"}) + "\n")
    with gzip.open(source / "c.jsonl.gz", "wt") as file:
        file.write(json.dumps({"body": "x"}) + "\n" + json.dumps({"body": TEXT}) + "\n")
    manifest = build_shards([source], tmp_path / "out", tokenizer_path, min_tokens=4, text_field="body")
    assert [(s.name, s.documents, s.skipped) for s in manifest.sources] == [
        ("a.txt", 1, {}),
        ("b.jsonl", 2, {"empty": 1}),
        ("c.jsonl.gz", 2, {"min_tokens": 1}),
    ]
    assert manifest.samples == 3
    assert manifest.skipped == {"empty": 1, "min_tokens": 1}


def test_existing_folder_is_kept_unless_asked(tmp_path: Path, tokenizer_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text(TEXT)
    out = tmp_path / "out"
    build_shards([source], out, tokenizer_path)
    with pytest.raises(DataError, match="exists"):
        build_shards([source], out, tokenizer_path)
    source.write_text(TEXT * 2)
    build_shards([source], out, tokenizer_path, overwrite=True)
    assert ShardSet(out).record(0)["text"] == TEXT * 2
    other = tmp_path / "photos"
    other.mkdir()
    (other / "me.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match="not a folder of shards"):
        build_shards([source], other, tokenizer_path, overwrite=True)


def test_failed_build_leaves_nothing(tmp_path: Path, tokenizer_path: Path) -> None:
    good, bad = tmp_path / "a.txt", tmp_path / "b.txt"
    good.write_text(TEXT)
    bad.write_bytes(b"\xff\xfe broken")
    with pytest.raises(DataError, match=r"b\.txt.*UTF-8"):
        build_shards([good, bad], tmp_path / "out", tokenizer_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt"]


def test_inputs_without_a_record_or_missing_are_errors(tmp_path: Path, tokenizer_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(DataError, match="no record"):
        build_shards([tmp_path / "empty.txt"], tmp_path / "out", tokenizer_path)
    with pytest.raises(DataError, match="missing"):
        build_shards([tmp_path / "none.txt"], tmp_path / "out", tokenizer_path)
    with pytest.raises(DataError, match="min_tokens"):
        build_shards([tmp_path / "empty.txt"], tmp_path / "out", tokenizer_path, max_tokens=8, min_tokens=5)


def write_jsonl(path: Path, documents: list[object]) -> Path:
    path.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    return path


def test_what_a_folder_holds_beside_inputs_is_named(
    tmp_path: Path, tokenizer_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    write_jsonl(source / "a.json", [{"text": TEXT}])
    for name in ("README.md", "_SUCCESS", ".a.json.crc"):
        (source / name).write_text(TEXT)
    assert build_shards([source], tmp_path / "out", tokenizer_path).samples == 1
    assert "skipped 3 files or folders that are not inputs" in caplog.text
    assert all(str(source / name) in caplog.text for name in ("README.md", "_SUCCESS", ".a.json.crc"))


def test_an_original_file_of_a_data_set_is_refused_with_the_cure(tmp_path: Path, tokenizer_path: Path) -> None:
    (tmp_path / "b.json").write_text('{"data": [{"paragraphs": []}], "version": "1.1"}')
    with pytest.raises(DataError, match=r"b\.json, line 1: .*arc-ds shards convert"):
        build_shards([tmp_path / "b.json"], tmp_path / "out", tokenizer_path, kind="fine_tuning")


def test_a_text_inside_an_object_is_named_and_may_be_chosen(tmp_path: Path, tokenizer_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": {"body": TEXT}, "meta": {"score": 1}}])
    with pytest.raises(DataError, match=r"got an object with the fields text\.body.*--text-field"):
        build_shards([source], tmp_path / "out", tokenizer_path)
    options = {"text_field": "text.body", "quality_field": "meta.score", "min_quality": 1}
    assert build_shards([source], tmp_path / "out", tokenizer_path, **options).samples == 1
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.Table.from_pylist([{"text": {"body": "\ufeff" + TEXT}, "meta": {"score": 1}}])
    for name, columns in (("b", table), ("c", table.flatten())):
        pytest.importorskip("pyarrow.parquet").write_table(columns, tmp_path / f"{name}.parquet")
        build_shards([tmp_path / f"{name}.parquet"], tmp_path / name, tokenizer_path, **options)
        assert ShardSet(tmp_path / name).record(0) == ShardSet(tmp_path / "out").record(0)
    source = write_jsonl(tmp_path / "d.jsonl", [{"text": [TEXT]}])
    with pytest.raises(DataError, match=r"got a list of str\. Join its items into one text"):
        build_shards([source], tmp_path / "d", tokenizer_path)


def test_filters_are_counted_by_reason(tmp_path: Path, tokenizer_path: Path) -> None:
    documents = [
        {"text": TEXT, "score": 0.9},
        {"text": TEXT, "score": 0.4},
        {"text": TEXT, "score": float("nan")},
        {"text": "A lamp.", "score": 1},
        {"text": " ", "score": 1},
    ]
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    manifest = build_shards(
        [source], tmp_path / "out", tokenizer_path, min_chars=20, quality_field="score", min_quality=0.5
    )
    assert manifest.skipped == {"empty": 1, "min_chars": 1, "quality": 2}
    assert (manifest.samples, manifest.sources[0].documents) == (1, 5)


def test_faults_are_skipped_counted_and_named_where_asked(
    tmp_path: Path, tokenizer_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = [
        json.dumps({"text": TEXT, "score": 1}).encode(),
        b"{",
        b'{"text": 3, "score": 1}',
        b'{"text": "\xff", "score": 1}',
        b'{"text": "a lamp", "score": true}',
        json.dumps({"text": "x" * 3000, "score": 1}).encode(),
        b'{"text": "a lone \\ud800 surrogate", "score": 1}',
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    with caplog.at_level(logging.WARNING):
        manifest = build_shards(
            [tmp_path / "a.jsonl"],
            tmp_path / "out",
            tokenizer_path,
            on_error="skip",
            quality_field="score",
            min_quality=0,
            max_document_bytes=2000,
        )
    assert manifest.skipped == {"bad_record": 3, "not_json": 1, "not_utf8": 1, "too_large": 1}
    assert manifest.samples == 1
    for number, words in [
        (2, "expected JSON"),
        (3, "'text', got int. Fix it, or choose another field (--text-field)"),
        (5, "a number in the field 'score', got bool"),
        (6, "a document of 3025 bytes; the limit is 2000"),
        (7, "UTF-8 cannot encode"),
    ]:
        assert any(f"line {number}: " in message and words in message for message in caplog.messages)


def test_faults_are_not_named_without_end(
    tmp_path: Path, tokenizer_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arc_ds.shards.building.inputs_lines.BATCH_BYTES", 10)
    (tmp_path / "a.jsonl").write_text("{\n" * 50 + json.dumps({"text": TEXT}))
    manifest = build_shards([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer_path, on_error="skip")
    assert manifest.skipped == {"not_json": 50}
    assert [message for message in caplog.messages if "line 20:" in message]
    assert len(caplog.messages) == 21 and "further faults" in caplog.messages[-1]


QUESTION = {"passages": [TEXT, "The lamp held."], "question": "What held?", "answer": ["the lamp", "it"]}


def test_fine_tuning_records_keep_their_fields_and_are_never_cut(tmp_path: Path, tokenizer_path: Path) -> None:
    documents = [
        {**QUESTION, "id": 7},
        {"passage": TEXT * 20, "instruction": "Sum it up.", "answer": "A tower."},
        {"passages": [TEXT], "question": "Who?", "answer": " "},
        {"text": TEXT},
    ]
    source = write_jsonl(tmp_path / "a.jsonl", documents)
    manifest = build_shards(
        [source], tmp_path / "out", tokenizer_path, kind="fine_tuning", max_tokens=64, on_error="skip"
    )
    assert manifest.kind == "fine_tuning"
    assert manifest.skipped == {"bad_record": 2}
    shards = ShardSet(tmp_path / "out")
    assert [shards.record(idx) for idx in range(len(shards))] == [QUESTION, documents[1]]
    tokenizer = load_tokenizer(tokenizer_path)
    longest = max(len(tokenizer.encode(answer)) for answer in QUESTION["answer"])
    asked = len(tokenizer.encode("What held?"))
    assert shards.tokens(0) == sum(len(tokenizer.encode(text)) for text in QUESTION["passages"]) + asked + longest
    assert shards.tokens(1) > 64


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"instruction": "Text:||Do {question}"}, "'instruction', got 2 parts"),
        ({"passages": [TEXT, "\x16"]}, r"'passages', got '\\x16', which has no token"),
        ({"answer": ["it", " \x16\x16\n"]}, r"'answer', got '\\x16\\x16', which has no token"),
    ],
    ids=["prompt", "passage", "answer"],
)
def test_fine_tuning_record_that_training_would_refuse_is_a_fault(tmp_path: Path, change: dict, words: str) -> None:
    tokenizer = write_tokenizer_without(tmp_path / "tokenizer", 0x16)
    source = write_jsonl(tmp_path / "a.jsonl", [QUESTION, QUESTION | change])
    with pytest.raises(DataError, match=rf"line 2: .*{words}.* Fix or remove it\."):
        build_shards([source], tmp_path / "out", tokenizer, kind="fine_tuning")
    manifest = build_shards([source], tmp_path / "out", tokenizer, kind="fine_tuning", on_error="skip")
    assert (manifest.samples, manifest.skipped) == (1, {"bad_record": 1})


def test_fine_tuning_record_that_no_reader_would_take_is_a_fault(tmp_path: Path, tokenizer_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"passage": "x " * (MAX_RECORD_BYTES // 2), "answer": "y"}])
    with pytest.raises(DataError, match=f"the limit is {MAX_RECORD_BYTES}"):
        build_shards([source], tmp_path / "out", tokenizer_path, kind="fine_tuning")


def test_parquet_gives_the_same_records_as_jsonl(tmp_path: Path, tokenizer_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    questions = [{**QUESTION, "question": f"What held {idx}?"} for idx in range(9)]
    source = write_jsonl(tmp_path / "a.jsonl", questions)
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(questions), tmp_path / "a.parquet")
    built = [
        build_shards([path], tmp_path / f"out{path.suffix}", tokenizer_path, kind="fine_tuning", shard_bytes=3000)
        for path in (source, tmp_path / "a.parquet")
    ]
    assert len(built[0].shards) > 1
    assert built[0].shards == built[1].shards


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "fine_tuning"}, "several fields; a.txt is plain text"),
        ({"quality_field": "score", "min_quality": 1}, "has no field 'score'"),
        ({"min_quality": 1.0}, "a quality threshold needs a quality field"),
        ({"workers": 0}, "workers = 0"),
        ({"max_document_bytes": 0}, "max_document_bytes"),
    ],
)
def test_options_that_do_not_fit_are_errors(
    tmp_path: Path, tokenizer_path: Path, options: dict[str, object], message: str
) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(DataError, match=message):
        build_shards([tmp_path / "a.txt"], tmp_path / "out", tokenizer_path, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


class Killed(BaseException):
    """Stand-in for a kill: no code of ours catches it."""


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """Two files of long and short documents, so that shards end inside documents, batches and files.

    One document of each file is left out: of the first before a shard ends, of the second after the last one.
    """
    folder = tmp_path / "in"
    folder.mkdir()
    texts = [text * (1 + idx % 5) for idx, text in enumerate(numbered_texts(60))]
    first = write_jsonl(folder / "a.jsonl", [{"text": text} for text in ["x", *texts]])
    second = write_jsonl(folder / "b.jsonl", [{"text": text} for text in [*texts[::-1], "x"]])
    return [first, second]


@pytest.fixture
def build(tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Manifest]:
    """Build shards in batches of a few documents.

    kill_at: number of the record before which the build stops as if killed.
    meanwhile: called with the number of each record before it is written.
    """
    monkeypatch.setattr("arc_ds.shards.building.inputs_lines.BATCH_BYTES", 700)
    monkeypatch.setattr("os.fsync", lambda _: None)  # no power failure in this test
    write = ShardWriter.write

    def run(
        inputs: list[Path],
        out: Path,
        kill_at: int | None = None,
        meanwhile: Callable[[int], None] | None = None,
        **options: object,
    ) -> Manifest:
        def watched(self: ShardWriter, record: EncodedRecord) -> bool:
            if meanwhile is not None:
                meanwhile(self.num_records)
            if self.num_records == kill_at:
                raise Killed
            return write(self, record)

        monkeypatch.setattr(ShardWriter, "write", watched)
        settings = {"max_tokens": 64, "min_tokens": 4, "shard_bytes": 16000, **options}
        return build_shards(inputs, out, tokenizer_path, **settings)

    return run


@pytest.mark.parametrize("step", [5, 37])
def test_a_build_killed_again_and_again_gives_the_same_bytes(
    tmp_path: Path, inputs: list[Path], build: Callable[..., Manifest], step: int
) -> None:
    manifest = build(inputs, tmp_path / "whole")
    assert len(manifest.shards) > 5
    assert sum(source.cut for source in manifest.sources) > 5
    out = tmp_path / "out"
    last = manifest.shards[0].samples
    for kill_at in range(last + 1, manifest.samples, step):
        with pytest.raises(Killed):
            build(inputs, out, kill_at=kill_at)
        assert not out.exists()
    build(inputs, out)
    assert contents(out) == contents(tmp_path / "whole")
    assert not list(tmp_path.glob(".out*"))


def test_passages_are_counted_also_by_a_build_that_was_killed(
    tmp_path: Path, tokenizer_path: Path, build: Callable[..., Manifest]
) -> None:
    texts = numbered_texts(90)
    records = [
        {"passages": [text.strip()] * (1 + idx % 3), "question": "Which?", "answer": "two"}
        for idx, text in enumerate(texts)
    ]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    with pytest.raises(Killed):
        build([source], tmp_path / "out", kill_at=60, kind="fine_tuning")
    assert (tmp_path / ".out.partial" / "state.json").exists()
    manifest = build([source], tmp_path / "out", kind="fine_tuning")
    tokens = [len(load_tokenizer(tokenizer_path).encode(text.strip())) for text in texts]
    assert manifest.passage_tokens == {number: number * sum(tokens[number - 1 :: 3]) for number in (1, 2, 3)}
    build([source], tmp_path / "whole", kind="fine_tuning")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_build_into_its_own_input_folder_goes_on_and_is_replaced(
    inputs: list[Path], build: Callable[..., Manifest], caplog: pytest.LogCaptureFixture
) -> None:
    folder = inputs[0].parent
    with pytest.raises(Killed):
        build([folder], folder / "shards", kill_at=100)
    first = build([folder], folder / "shards")
    assert "resuming after" in caplog.text
    assert build([folder], folder / "shards", overwrite=True) == first


@pytest.mark.parametrize("change", ["option", "input", "shard", "state"])
def test_what_has_changed_since_is_not_built_upon(
    tmp_path: Path, inputs: list[Path], build: Callable[..., Manifest], change: str, caplog: pytest.LogCaptureFixture
) -> None:
    out, partial = tmp_path / "out", tmp_path / ".out.partial"
    with pytest.raises(Killed):
        build(inputs, out, kill_at=100)
    options = {"max_tokens": 48} if change == "option" else {}
    if change == "input":
        inputs[0].write_text(inputs[0].read_text().replace("sea", "bay"))
    if change == "shard":
        raw = bytearray((partial / "shards" / "shard-000001.tar").read_bytes())
        raw[600] ^= 1
        (partial / "shards" / "shard-000001.tar").write_bytes(raw)
    if change == "state":
        (partial / "state.json").write_text("{")
    build(inputs, out, **options)
    assert "starts from scratch" in caplog.text
    build(inputs, tmp_path / "whole", **options)
    assert contents(out) == contents(tmp_path / "whole")


def test_a_later_input_may_be_mended_before_a_build_goes_on(
    tmp_path: Path, inputs: list[Path], build: Callable[..., Manifest], caplog: pytest.LogCaptureFixture
) -> None:
    good = inputs[1].read_text()
    inputs[1].write_text("{\n" + good)
    with pytest.raises(DataError, match="line 1: expected JSON"):
        build(inputs, tmp_path / "out")
    assert "finished shards are kept" in caplog.text
    inputs[1].write_text(good)
    finished = (tmp_path / ".out.partial" / "shards" / "shard-000000.tar").stat()
    build(inputs, tmp_path / "out")
    assert "resuming after" in caplog.text
    again = (tmp_path / "out" / "shard-000000.tar").stat()
    assert (again.st_mtime_ns, again.st_ino) == (finished.st_mtime_ns, finished.st_ino), "it was not written again"
    build(inputs, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_faults_may_be_skipped_from_where_a_build_stopped(
    tmp_path: Path, inputs: list[Path], build: Callable[..., Manifest], caplog: pytest.LogCaptureFixture
) -> None:
    with inputs[0].open("a") as file:
        file.write("{\n")
    with pytest.raises(DataError, match="line 62"):
        build(inputs, tmp_path / "out")
    manifest = build(inputs, tmp_path / "out", on_error="skip")
    assert "resuming after" in caplog.text
    assert manifest.skipped == {"min_tokens": 2, "not_json": 1}


def test_an_input_that_changes_while_it_is_read_is_an_error(
    tmp_path: Path, inputs: list[Path], build: Callable[..., Manifest]
) -> None:
    def grow(record_idx: int) -> None:
        if record_idx == 5:
            inputs[0].write_text(inputs[0].read_text() + '{"text": "late"}\n')

    with pytest.raises(DataError, match=r"a\.jsonl changed while it was read"):
        build(inputs, tmp_path / "out", meanwhile=grow)


def test_a_full_disk_is_an_error_with_the_place_and_a_build_goes_on_when_it_has_room(
    tmp_path: Path, inputs: list[Path], build: Callable[..., Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(record_idx: int) -> None:
        if record_idx == 150:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StorageError, match=r"out cannot be written: .*No space left"):
        build(inputs, tmp_path / "out", meanwhile=full)
    build(inputs, tmp_path / "out")
    build(inputs, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_two_builds_of_one_folder_do_not_mix(
    tmp_path: Path, inputs: list[Path], build: Callable[..., Manifest], tokenizer_path: Path
) -> None:
    def build_too(record_idx: int) -> None:
        if record_idx == 5:
            build_shards(inputs, tmp_path / "out", tokenizer_path)

    with pytest.raises(DataError, match="another build is writing"):
        build(inputs, tmp_path / "out", meanwhile=build_too)
