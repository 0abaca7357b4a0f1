"""Inputs of a build: every kind is read, damage is reported, and a batch is the same if reading starts at it."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import re
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arc_ds.errors import DataError
from arc_ds.shards.building import inputs, inputs_lines, inputs_rows
from arc_ds.shards.building.batches import Batch
from arc_ds.shards.building.documents import LeftOutError, read_documents
from arc_ds.shards.building.inputs import find_inputs, read_batches

LIMIT = 1 << 20


def compress(ending: str, data: bytes) -> bytes:
    if ending.lower().endswith(".gz"):
        return gzip.compress(data)
    if ending.lower().endswith((".zst", ".zstd")):
        zstandard = pytest.importorskip("zstandard")
        half = len(data) // 2  # two frames, as written by `cat a.zst b.zst` or pzstd
        return zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    return data


def batches_of(path: Path, **wanted: object) -> list[Batch]:
    (file,) = find_inputs([path]).files
    return list(read_batches(file, **{"columns": ["text"], "max_document_bytes": LIMIT, **wanted}))


def fields_of(path: Path, max_bytes: int = LIMIT) -> list[tuple[int, object]]:
    """Number and fields of every document, or the reason of its fault."""
    (file,) = find_inputs([path]).files
    found = []
    for batch in read_batches(file, columns=["text", "more"], max_document_bytes=max_bytes):
        for number, parse in read_documents(file, batch, text_field="text", max_bytes=max_bytes):
            try:
                found.append((number, parse()))
            except LeftOutError as left_out:
                found.append((number, left_out.reason))
    return found


def write_parquet(path: Path, columns: dict[str, list], **options: object) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.table(columns), path, **options)
    return path


@pytest.mark.parametrize(
    "ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".jsonl.zstd", ".json", ".json.gz", ".Json.ZST", ".NDJSON"]
)
def test_lines_are_read_and_numbered(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(compress(ending, b'{"text": "one"}\r\n\n  \n{"text": "t\xc3\xbco", "n": 2}\n{"text": "three"}'))
    assert fields_of(path) == [(1, {"text": "one"}), (4, {"text": "tüo", "n": 2}), (5, {"text": "three"})]


@pytest.mark.parametrize("ending", [".txt", ".txt.gz", ".txt.zst"])
def test_a_text_file_is_one_document(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(compress(ending, "\ufeffFirst.\n\nSecond: é.\n".encode()))
    assert fields_of(path) == [(1, {"text": "First.\n\nSecond: é.\n"})]


def test_parquet_rows_are_read(tmp_path: Path) -> None:
    rows = {"text": ["one", None, "three"], "more": [["a", "b"], [], None], "other": [1, 2, 3]}
    path = write_parquet(tmp_path / "a.parquet", rows, row_group_size=2)
    assert fields_of(path) == [
        (1, {"text": "one", "more": ["a", "b"]}), (2, {"text": None, "more": []}), (3, {"text": "three", "more": None})
    ]  # fmt: skip


def test_byte_order_marks_in_names_and_of_empty_or_joined_files_are_dropped(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"other": [1], "\ufefftext": ["one"]})
    assert fields_of(path) == [(1, {"text": "one"})]
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff\ufeff{"\ufefftext": "one"}\n\ufeff\n\ufeff{"text": "two"}\n', encoding="utf-8")
    assert fields_of(path) == [(1, {"text": "one"}), (3, {"text": "two"})]


def test_binary_columns_are_texts_and_marks_of_other_encodings_are_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    texts = [b"one", "été".encode(), b"\xff\xd8", "six".encode("utf-16"), None]
    nested = [{"text": text, "list": [text]} for text in texts]
    rows = {"text": pyarrow.array(texts, pyarrow.binary()), "more": pyarrow.array(nested)}
    found = fields_of(write_parquet(tmp_path / "a.parquet", rows))
    assert found[:2] == [
        (number, {"text": text, "more": {"text": text, "list": [text]}}) for number, text in ((1, "one"), (2, "été"))
    ]
    assert found[2:4] == [(3, "not_utf8"), (4, "not_utf8")]


def write_arrow(path: Path, table: object, *, rows: int = 2, is_file: bool = False) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    new = pyarrow.ipc.new_file if is_file else pyarrow.ipc.new_stream
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


@pytest.mark.parametrize("is_file", [False, True], ids=["stream", "file"])
def test_arrow_rows_are_read_and_reading_may_begin_at_any_batch(
    tmp_path: Path, is_file: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    monkeypatch.setattr(inputs_rows, "BATCH_BYTES", 2000)
    texts = [f"{idx} " + "x" * 900 for idx in range(50)]
    column = pyarrow.array([*texts, None]).dictionary_encode()
    path = write_arrow(
        tmp_path / "a.arrow", pyarrow.table({"other": range(51), "text": column}), rows=20, is_file=is_file
    )
    assert fields_of(path) == [(idx + 1, {"text": text}) for idx, text in enumerate([*texts, None])]
    whole = batches_of(path)
    assert len({batch.cursor.place for batch in whole}) == 3 and any(batch.cursor.number for batch in whole)
    for start in (1, len(whole) - 1):
        assert batches_of(path, start=whole[start].cursor) == whole[start:]
    assert whole[0].position < whole[-1].position <= path.stat().st_size
    assert max(len(pickle.dumps(batch.content)) for batch in whole) < 4000, "a worker gets its own rows only"


@pytest.mark.parametrize(
    ("cut", "words"), [(8, "cut short, or joined"), (60, "cannot be read as Arrow"), (-1, "joined")]
)
def test_an_arrow_stream_that_lost_its_end_or_was_joined_is_an_error(tmp_path: Path, cut: int, words: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path = write_arrow(tmp_path / "a.arrow", pyarrow.table({"text": ["one", "two", "three"]}))
    whole = path.read_bytes()
    path.write_bytes(whole * 2 if cut < 0 else whole[:-cut])
    with pytest.raises(DataError, match=rf"a\.arrow.*{words}"):
        fields_of(path)


def test_of_a_folder_of_datasets_only_the_listed_files_are_inputs(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    train = tmp_path / "train"
    for name in ("data-00000-of-00001", "cache-0123456789abcdef"):
        write_arrow(train / f"{name}.arrow", pyarrow.table({"text": ["one"]}))
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (train / "dataset_info.json").write_text('{"features": {}}')
    names = ["dataset_dict.json", "train/cache-0123456789abcdef.arrow", "train/dataset_info.json", "train/state.json"]
    for written in (False, True):  # the cache of `load_dataset` has no state.json
        if written:
            state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_indices_files": None}
            (train / "state.json").write_text(json.dumps(state))
        found = find_inputs([tmp_path])
        assert [file.name for file in found.files] == ["train/data-00000-of-00001.arrow"]
        assert [str(path.relative_to(tmp_path)) for path in found.passed_over] == names[: 3 + written]
    write_arrow(tmp_path / "cached" / "cache-1.arrow", pyarrow.table({"text": ["one"]}))
    with pytest.raises(DataError, match="found only cache-1.arrow .* pass its path"):
        find_inputs([tmp_path / "cached"])
    assert [file.name for file in find_inputs([tmp_path / "cached" / "cache-1.arrow"]).files] == ["cache-1.arrow"]
    for change, words in (
        ({"_data_files": [{"filename": "data-00000-of-00002.arrow"}]}, "found no data-00000-of-00002.arrow"),
        ({"_indices_files": [{"filename": "indices.arrow"}]}, "an index selects some of its rows.*flatten_indices"),
    ):
        (train / "state.json").write_text(json.dumps(state | change))
        with pytest.raises(DataError, match=words):
            find_inputs([tmp_path])


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.arrow"])
def test_a_pointer_of_git_lfs_is_no_document(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    for place in (tmp_path, tmp_path / name):
        with pytest.raises(DataError, match=f"{name} is a pointer of Git LFS.*git lfs pull"):
            find_inputs([place])


@pytest.mark.parametrize(
    ("ending", "command"), [("", "iconv"), (".gz", "gzip -dc FILE | iconv"), (".zst", "zstd -dc FILE | iconv")]
)
def test_utf16_is_named_with_the_command_that_converts_it(tmp_path: Path, ending: str, command: str) -> None:
    path = tmp_path / f"a.jsonl{ending}"
    path.write_bytes(compress(ending, '{"text": "one"}\n{"text": "two"}\n'.encode("utf-16")))
    with pytest.raises(DataError, match=rf"a\.jsonl{ending} is UTF-16, .*: {re.escape(command)} -f UTF-16"):
        fields_of(path)
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(compress(ending, "One.".encode("utf-16-le")))  # without a mark: valid UTF-8 with zero bytes
    assert fields_of(path) == [(1, "not_utf8")]


@given(
    lines=st.lists(st.binary(max_size=60).map(lambda line: line.replace(b"\n", b"")), max_size=40),
    batch_bytes=st.integers(1, 200),
    max_bytes=st.integers(1, 50),
)
def test_reading_from_any_batch_on_gives_the_same(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], batch_bytes: int, max_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    lines = [b"{}", *lines]  # the first bytes tell the encoding
    path.write_bytes(b"\n".join(lines))
    (file,) = find_inputs([path]).files
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs_lines, "BATCH_BYTES", batch_bytes)
        whole = list(inputs_lines.read_line_batches(file, max_bytes, inputs.Cursor()))
        for idx, batch in enumerate(whole):
            assert list(inputs_lines.read_line_batches(file, max_bytes, batch.cursor)) == whole[idx:]
    found = [line for batch in whole for line in batch.content]
    kept = [(n, line) for n, line in enumerate(lines, start=1) if line.strip()]
    assert [line.number for line in found] == [n for n, line in kept]
    for line, (_, expected) in zip(found, kept, strict=True):
        too_long = len(expected.rstrip(b"\r")) > max_bytes
        assert line.data is None if too_long else line.data is not None and line.data.rstrip(b"\n") == expected


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst"])
def test_reading_on_in_a_compressed_file_and_in_parquet(tmp_path: Path, ending: str) -> None:
    texts = [f"{idx} " * (idx % 50) + "x" * 9000 for idx in range(400)]
    path = tmp_path / f"a{ending}"
    path.write_bytes(compress(ending, "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    whole = batches_of(path)
    assert len(whole) > 2
    assert batches_of(path, start=whole[2].cursor) == whole[2:]
    path = write_parquet(tmp_path / "a.parquet", {"text": texts}, row_group_size=150)
    whole = batches_of(path)
    assert len({batch.cursor.place for batch in whole}) == 3
    assert any(batch.cursor.number for batch in whole)
    for start in (1, len(whole) - 1):
        assert batches_of(path, start=whole[start].cursor) == whole[start:]
    assert whole[-1].position == path.stat().st_size


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "a"', "not_json"),
        (b'["text"]', "not_json"),
        (b"7", "not_json"),
        (b"[" * 100_000, "not_json"),
        (b'{"text": ' + b"9" * 5000 + b"}", "not_json"),
        (b'{"text": "\xff"}', "not_utf8"),
        (b'{"text": "' + b"x" * LIMIT + b'"}', "too_large"),
    ],
)
def test_a_bad_line_is_named_and_does_not_spoil_the_next(tmp_path: Path, line: bytes, reason: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n' + line + b'\n{"text": "three"}\n')
    assert fields_of(path) == [(1, {"text": "one"}), (2, reason), (3, {"text": "three"})]


def test_a_document_of_just_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 100)
    assert fields_of(path, max_bytes=100) == [(1, {"text": "x" * 100})]
    assert fields_of(path, max_bytes=99) == [(1, "too_large")]


def test_parquet_row_that_is_too_large_or_no_utf8_is_named(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    broken = pyarrow.array([b"one", b"\xff", b"x" * 500, b"four"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    path = write_parquet(tmp_path / "a.parquet", {"text": broken})
    found = fields_of(path, max_bytes=400)
    assert found == [(1, {"text": "one"}), (2, "not_utf8"), (3, "too_large"), (4, {"text": "four"})]


@pytest.mark.parametrize("kind", ["dictionary", "view", "list of dictionary"])
def test_a_parquet_row_is_measured_without_the_texts_of_others(tmp_path: Path, kind: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    texts = [f"{idx} " + "x" * 300 for idx in range(50)] + ["x" * 500]
    column = pyarrow.array(texts, pyarrow.string_view()) if kind == "view" else pyarrow.array(texts).dictionary_encode()
    if kind.startswith("list"):
        column = pyarrow.ListArray.from_arrays(list(range(52)), column)
    path = write_parquet(tmp_path / "a.parquet", {"text": column})
    found = fields_of(path, max_bytes=400)
    as_read = [[text] if kind.startswith("list") else text for text in texts]
    assert found == [*((idx + 1, {"text": text}) for idx, text in enumerate(as_read[:50])), (51, "too_large")]


def test_a_line_of_100_mb_is_passed_over_without_being_held(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b'\n{"text": "two"}\n')
    tracemalloc.start()
    try:
        assert fields_of(path) == [(1, "too_large"), (2, {"text": "two"})]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 * LIMIT


@pytest.mark.parametrize("ending", [".txt.gz", ".txt.zst", ".jsonl.gz", ".jsonl.zst", ".parquet"])
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_a_damaged_file_is_an_error_with_its_path(tmp_path: Path, ending: str, damage: str) -> None:
    path = tmp_path / f"a{ending}"
    texts = [f"{idx * idx} of {idx}" for idx in range(2000)]
    if ending == ".parquet":
        write_parquet(path, {"text": texts})
    else:
        path.write_bytes(compress(ending, "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    raw = bytearray(path.read_bytes())
    path.write_bytes(raw[: len(raw) * 2 // 3] if damage == "cut" else b"\x00\x01" + raw[2:-4] + b"\x00\x01\x02\x03")
    with pytest.raises(DataError, match=rf"a{ending}: cannot be read"):
        batches_of(path)


def test_missing_column_and_missing_library_are_errors_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"body": ["x"]})
    with pytest.raises(DataError, match="expected the columns text; it has body"):
        batches_of(path)
    (tmp_path / "a.txt.zst").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(DataError, match="pip install zstandard"):
        batches_of(tmp_path / "a.txt.zst")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        batches_of(path)


def test_folders_are_searched_in_order_and_nothing_is_taken_twice(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/10.jsonl", "a/1.txt.gz", "a/notes.md", "c.JSON.gz", "_SUCCESS"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = find_inputs([tmp_path])
    assert [file.name for file in found.files] == ["a/1.txt.gz", "b/10.jsonl", "b/2.txt", "c.JSON.gz"]
    assert found.passed_over == (tmp_path / "_SUCCESS", tmp_path / "a" / "notes.md")
    with pytest.raises(DataError, match=r"2\.txt is named twice"):
        find_inputs([tmp_path, tmp_path / "b" / "2.txt"])
    with pytest.raises(DataError, match="of another kind"):
        find_inputs([tmp_path / "a" / "notes.md"])
    with pytest.raises(DataError, match="no inputs"):
        find_inputs([])


def test_what_is_hidden_or_being_built_is_no_input_unless_named(tmp_path: Path) -> None:
    for name in ("1.json", "._1.json", ".shards.partial/state.json", "out/manifest.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found = find_inputs([tmp_path], without=tmp_path / "out")
    assert [file.name for file in found.files] == ["1.json"]
    assert [path.name for path in found.passed_over] == ["._1.json", ".shards.partial", "out"]
    assert [file.name for file in find_inputs([tmp_path / "._1.json"]).files] == ["._1.json"]
    assert [file.name for file in find_inputs([tmp_path / ".shards.partial"]).files] == ["state.json"]


def test_links_are_followed_but_not_round_and_round(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "in", tmp_path / "elsewhere"
    for path in (folder / "b", elsewhere / "deep"):
        path.mkdir(parents=True)
    (folder / "b" / "1.txt").write_bytes(b"")
    (elsewhere / "deep" / "2.txt").write_bytes(b"")
    for link, target in {"a": elsewhere, "round": folder, "b/up": folder, "z.txt": tmp_path / "gone.txt"}.items():
        (folder / link).symlink_to(target)
    (elsewhere / "back").symlink_to(folder)
    found = find_inputs([folder])
    assert [file.name for file in found.files] == ["a/deep/2.txt", "b/1.txt"]
    assert [str(path.relative_to(folder)) for path in found.passed_over] == ["a/back", "b/up", "round", "z.txt"]
    (folder / "c").symlink_to(elsewhere)
    with pytest.raises(DataError, match=r"in/c/deep/2\.txt is the same file as .*in/a/deep/2\.txt"):
        find_inputs([folder])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'\n[{"text": "one"}, {"text": "two"}]', r"found an array\. .*jq -c '\.\[\]'"),
        (b"[" + b"1, " * LIMIT + b"1]", "found an array"),
        (b'\xef\xbb\xbf{\n "data": []\n}\n', "found an object over several lines.*arc-ds shards convert"),
    ],
)
@pytest.mark.parametrize("ending", [".json", ".JSON.gz"])
def test_json_that_is_not_in_lines_is_named_with_the_cure(
    tmp_path: Path, ending: str, content: bytes, message: str
) -> None:
    path = tmp_path / f"a{ending}"
    path.write_bytes(compress(ending.lower(), content))
    for named in (path, tmp_path):
        with pytest.raises(DataError, match=rf"a{ending}: expected one JSON object a line, {message}"):
            find_inputs([named])
    (tmp_path / "b.jsonl").write_bytes(b"[broken\n")  # possibly one damaged line of many; the build reports it
    found = find_inputs([tmp_path])
    assert [file.name for file in found.files] == ["b.jsonl"]
    assert found.passed_over == (path,)


@pytest.mark.parametrize("content", [b"", b"\n \n", b'\xef\xbb\xbf{"text": 1}', b'{\n{"text": "two"}\n', b'{"a":\n'])
def test_lines_are_not_taken_for_other_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert [file.name for file in find_inputs([tmp_path]).files] == ["a.json"]


def test_shards_and_folders_that_cannot_be_searched_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.json", "shards/tokens-1/cache.json", "lost+found/b.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"{}")
    (tmp_path / "shards" / "manifest.json").write_text('{\n "format": "arc-ds-shards",')
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path.name != "lost+found" and access(path, mode))
    found = find_inputs([tmp_path])
    assert [file.name for file in found.files] == ["a.json"]
    assert [path.name for path in found.passed_over] == ["lost+found", "shards"]
