"""Tars that others wrote: every form that webdataset reads is read, what cannot be used is named, nothing is lost."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import webdataset

from arc_ds.cli import main
from arc_ds.data.tasks import TaskLimits, make_example
from arc_ds.errors import DataError, StorageError
from arc_ds.shards.check import check_shards
from arc_ds.shards.index import index_shards
from arc_ds.shards.reader import ShardSet
from arc_ds.shards.records import MAX_RECORD_BYTES
from arc_ds.shards.storage.cache import ShardCache
from arc_ds.shards.tar_index import RecordForm
from arc_ds.shards.token_cache.writer import build_token_caches
from arc_ds.tokenizers import load_tokenizer
from tests.helpers.faulty_server import serve
from tests.helpers.tiny_data import numbered_texts, write_tiktoken

TEXTS = numbered_texts(12)
Member = tuple[str, bytes]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiktoken(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "theirs"
    made.mkdir()
    return made


def as_json(text: str, field: str = "text") -> bytes:
    return json.dumps({field: text, "n": 1}).encode()


def write_tar(path: Path, members: Sequence[Member], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, payload in members:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    return path


def texts_of(shards: ShardSet) -> list[str]:
    return [shards.record(idx)["text"] for idx in range(len(shards))]


LONG = "a-folder-with-a-name-of-many-letters/" * 4


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_any_tar_format_gives_the_records_that_webdataset_reads(tokenizer: Path, folder: Path, format: int) -> None:
    prefix = "./x/" if format == tarfile.USTAR_FORMAT else LONG
    order = [7, 2, 9, 0, 4]
    tars = []
    for part in range(2):
        members: list[Member] = []
        for idx in order:
            members.append((f"{prefix}{idx:03d}.jpg", b"\xff\xd8" * idx))
            members.append((f"{prefix}{idx:03d}.json", as_json(TEXTS[idx + part])))
            members.append((f"{prefix}{idx:03d}.seg.json", b"[]"))
        tars.append(write_tar(folder / f"{part}.tar", members, format))
    manifest = index_shards([folder], tokenizer)
    shards = ShardSet(folder)
    stream = webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False)
    expected = [json.loads(sample["json"])["text"] for sample in stream]
    assert texts_of(shards) == expected == [TEXTS[idx + part] for part in range(2) for idx in order]
    tokens = load_tokenizer(tokenizer).encode
    assert shards.num_tokens.tolist() == [len(tokens(text)) for text in expected]
    assert manifest.max_tokens == max(shards.num_tokens)
    assert manifest.skipped == {}
    assert list(check_shards(folder)) == []


def test_shards_of_the_stock_writer_are_read(tokenizer: Path, folder: Path) -> None:
    with webdataset.ShardWriter(str(folder / "%05d.tar"), maxcount=5, verbose=0) as sink:
        for idx, text in enumerate(TEXTS):
            sink.write({"__key__": f"k{idx}", "json": {"text": text}, "cls": idx})
    index_shards([folder], tokenizer)
    assert texts_of(ShardSet(folder)) == TEXTS


@pytest.mark.parametrize("member", ["txt.gz", "json.gz"])
def test_faults_of_gzip_members_are_counted_by_reason(tokenizer: Path, folder: Path, member: str) -> None:
    members = [("0", as_json(TEXTS[0])), ("1", b"\xff"), ("2", b"x" * (MAX_RECORD_BYTES + 1))]
    packed: list[Member] = [(f"{key}.{member}", gzip.compress(payload)) for key, payload in members]
    write_tar(folder / "a.tar", [*packed, (f"3.{member}", packed[0][1][:-9]), (f"4.{member}", b"no gzip")])
    manifest = index_shards([folder], tokenizer, form=RecordForm(member=member))
    assert manifest.skipped == {"not_gzip": 2, "not_utf8": 1, "too_large": 1}


@pytest.mark.parametrize("member", ["txt", "txt.gz", "json.gz", "meta.json", "article.txt"])
def test_texts_and_gzip_members_are_records(tokenizer: Path, folder: Path, member: str) -> None:
    payloads = [as_json(text) if "json" in member else text.encode() for text in TEXTS]
    if member.endswith(".gz"):
        payloads = [gzip.compress(payload) for payload in payloads]
    write_tar(folder / "a.tar", [(f"{idx}.{member}", payload) for idx, payload in enumerate(payloads)])
    index_shards([folder], tokenizer, form=RecordForm(member=member))
    assert texts_of(ShardSet(folder)) == TEXTS
    assert list(check_shards(folder)) == []


@pytest.mark.parametrize("member", ["txt", "json", "json.gz"])
def test_a_byte_order_mark_of_a_member_is_dropped_and_utf16_is_named(
    tokenizer: Path, folder: Path, member: str, caplog: pytest.LogCaptureFixture
) -> None:
    texts = ["one two", "three"]
    payloads = [as_json(text).decode() if "json" in member else text for text in texts]
    encoded = [payloads[0].encode("utf-8-sig"), payloads[1].encode(), payloads[0].encode("utf-16")]
    if member.endswith(".gz"):
        encoded = [gzip.compress(payload) for payload in encoded]
    write_tar(folder / "a.tar", [(f"{idx}.{member}", payload) for idx, payload in enumerate(encoded)])
    manifest = index_shards([folder], tokenizer, form=RecordForm(member=member))
    assert texts_of(ShardSet(folder)) == texts
    assert manifest.tokens == sum(len(load_tokenizer(tokenizer).encode(text)) for text in texts)
    assert manifest.skipped == {"not_utf8": 1}
    assert f"2.{member} at byte" in caplog.text and "is UTF-16, expected UTF-8. Convert it: tar -xOf" in caplog.text
    assert list(check_shards(folder)) == []


def test_tars_that_are_packed_or_not_downloaded_are_named(
    tokenizer: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "b.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"found b\.tar\.gz\. Decompress them"):
        index_shards([folder], tokenizer)
    write_tar(folder / "A.TAR", [("0.json", as_json(TEXTS[0]))])
    assert index_shards([folder], tokenizer).samples == 1
    assert "left out: 1 compressed tars (b.tar.gz)" in caplog.text
    (folder / "c.tar").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(DataError, match=r"c\.tar is a pointer of Git LFS"):
        index_shards([folder], tokenizer, overwrite=True)


def test_the_text_may_stand_in_another_field(tokenizer: Path, folder: Path) -> None:
    write_tar(folder / "a.tar", [(f"{idx}.json", as_json(text, "content")) for idx, text in enumerate(TEXTS)])
    index_shards([folder], tokenizer, form=RecordForm(text_field="content"))
    assert texts_of(ShardSet(folder)) == TEXTS
    nested = [(f"{idx}.json", json.dumps({"doc": {"body": text}}).encode()) for idx, text in enumerate(TEXTS)]
    write_tar(folder / "a.tar", nested)
    index_shards([folder], tokenizer, form=RecordForm(text_field="doc.body"), overwrite=True)
    assert texts_of(ShardSet(folder)) == TEXTS
    write_tar(folder / "a.tar", [(f"{idx}.json", as_json(text, "content")) for idx, text in enumerate(TEXTS)])
    with pytest.raises(DataError, match=r"For example .*got the fields \['content', 'n'\].*--text-field"):
        index_shards([folder], tokenizer, overwrite=True)


def test_fine_tuning_records_are_counted_by_all_that_is_read(tokenizer: Path, folder: Path) -> None:
    record = {"passages": ["one two", "three"], "question": "which?", "answer": ["a", "a longer answer"]}
    write_tar(folder / "a.tar", [("0.json", json.dumps(record).encode()), ("1.json", as_json("a text"))])
    manifest = index_shards([folder], tokenizer, form=RecordForm(kind="fine_tuning"))
    assert manifest.skipped == {"bad_record": 1}
    encode = load_tokenizer(tokenizer).encode
    expected = sum(len(encode(text)) for text in ("one two", "three", "which?", "a longer answer"))
    assert ShardSet(folder).tokens(0) == expected
    assert ShardSet(folder).record(0) == record
    assert manifest.passage_tokens == {2: len(encode("one two")) + len(encode("three"))}


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (RecordForm(kind="fine_tuning"), {"text": "Page 17 of a dump."}),
        (RecordForm(kind="fine_tuning"), {"text": None}),
        (RecordForm(kind="fine_tuning", text_field="body", member="json.gz"), {"body": "Page 17.", "text": 3}),
    ],
)
def test_a_text_beside_passages_is_no_record_of_pretraining(
    tokenizer: Path, folder: Path, form: RecordForm, text: dict
) -> None:
    """What a record is, its set says; a question is asked, checked and cached without a text that stands beside it."""
    record = {"passages": ["one two"], "question": "which?", "answer": "one"}
    payload = json.dumps(record | text).encode()
    payload = gzip.compress(payload) if form.member.endswith("gz") else payload
    write_tar(folder / "a.tar", [(f"{idx}.{form.member}", payload) for idx in range(2)])
    index_shards([folder], tokenizer, form=form)
    shards = ShardSet(folder)
    assert shards.record(0) == record | {key: value for key, value in text.items() if key != "text"}
    assert list(check_shards(folder)) == []
    (cached,) = build_token_caches(folder, [tokenizer])
    assert (cached.records, cached.left_out) == (2, 0)
    read = load_tokenizer(tokenizer)
    example = make_example(
        [shards.record(0)], task="long_context", seed=1, encoder=read, decoder=read, limits=TaskLimits()
    )
    assert example.contexts == ("one two",)


def test_unusable_members_are_counted_by_reason_and_named(
    tokenizer: Path, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    members: list[Member] = [
        ("0.json", as_json(TEXTS[0])),
        ("1.json", b'{"text": "cut off'),
        ("2.json", b'{"text": "\xff\xfe"}'),
        ("3.json", b'{"title": "no text"}'),
        ("4.json", b""),
        ("5.json", as_json(" \n")),
        ("6.json", b'{"text": "' + b"x" * MAX_RECORD_BYTES + b'"}'),
        ("0.json", as_json("another with a key that was there")),
        ("7.jpg", b"only a picture"),
        ("8.json", as_json(TEXTS[1])),
    ]
    tar = write_tar(folder / "a.tar", members)
    with tarfile.open(tar, "a") as file:
        link = tarfile.TarInfo("9.json")
        link.type, link.linkname = tarfile.SYMTYPE, "0.json"
        file.addfile(link)
    manifest = index_shards([folder], tokenizer)
    assert manifest.skipped == {
        "bad_record": 1, "empty": 2, "no_file": 1, "no_record": 1, "not_json": 1, "not_utf8": 1, "repeated": 1,
        "too_large": 1,
    }  # fmt: skip
    assert manifest.sources[0].documents == 10
    assert texts_of(ShardSet(folder)) == TEXTS[:2]
    for name in ("1.json", "2.json", "3.json", "4.json", "5.json", "6.json", "9.json"):
        assert f"a.tar, member {name} at byte " in caplog.text


def test_damage_in_the_middle_is_an_error_and_not_the_end(tokenizer: Path, folder: Path) -> None:
    """Stock readers take a damaged header, or a hole of zeros, for the end and lose the rest without a word."""
    tar = write_tar(folder / "a.tar", [(f"{idx}.json", as_json(text)) for idx, text in enumerate(TEXTS)])
    whole = tar.read_bytes()
    with tarfile.open(tar) as file:
        begin = file.getmembers()[5].offset

    def refused(raw: bytes, message: str) -> None:
        tar.write_bytes(raw)
        with pytest.raises(DataError, match=message):
            index_shards([folder], tokenizer)
        assert [path.name for path in folder.iterdir()] == ["a.tar"]

    refused(whole[:begin] + bytes(512) + whole[begin + 512 :], rf"a\.tar is damaged: .* at byte {begin}, more data")
    refused(whole[: begin + 148] + b"!" + whole[begin + 149 :], rf"at byte {begin}, more data follow at byte {begin}")
    refused(whole[: begin + 600], r"a\.tar is cut short: its member 5\.json should end at byte")
    refused(whole[: begin + 300], "a.tar is damaged")
    refused(gzip.compress(whole), "is compressed .gzip.*Decompress it first")
    refused(b"hello" * 1000, "cannot be read as a tar")
    refused(b"", "a.tar is empty")
    refused(bytes(10240), "hold no record")


def test_wrong_member_names_are_answered_with_those_found(tokenizer: Path, folder: Path) -> None:
    write_tar(folder / "a.tar", [("0.txt", b"text"), ("1.txt", b"text"), ("0.cls", b"3")])
    with pytest.raises(DataError, match=r"ending in \.json\. Members found: \.txt \(2\), \.cls \(1\).*--member"):
        index_shards([folder], tokenizer)


def test_an_empty_tar_among_others_is_a_shard_of_no_records(tokenizer: Path, folder: Path) -> None:
    write_tar(folder / "0.tar", [("0.json", as_json(TEXTS[0]))])
    write_tar(folder / "1.tar", [])
    write_tar(folder / "2.tar", [("0.json", as_json(TEXTS[1]))])
    assert [shard.samples for shard in index_shards([folder], tokenizer).shards] == [1, 0, 1]
    assert texts_of(ShardSet(folder)) == TEXTS[:2]
    assert list(check_shards(folder)) == []


def test_tars_stay_where_they_are_and_the_index_elsewhere(tokenizer: Path, folder: Path, tmp_path: Path) -> None:
    for part in range(3):
        place = folder / str(part)
        place.mkdir()
        write_tar(place / "data.tar", [("0.json", as_json(TEXTS[part]))])
    with pytest.raises(DataError, match="--out"):
        index_shards([folder / "{0..2}" / "data.tar"], tokenizer)
    out = tmp_path / "index"
    manifest = index_shards([folder / "{0..2}" / "data.tar"], tokenizer, out_dir=out)
    assert [shard.name for shard in manifest.shards] == ["000000-data.tar", "000001-data.tar", "000002-data.tar"]
    assert texts_of(ShardSet(out)) == TEXTS[:3]
    assert list(check_shards(out)) == []
    assert not list(folder.rglob("*.idx"))
    moved = tmp_path / "moved"
    shutil.move(folder, moved)
    again = index_shards([moved / "{0..2}" / "data.tar"], tokenizer, out_dir=tmp_path / "other")
    assert again.fingerprint == manifest.fingerprint, "the same records are the same wherever they lie"
    with pytest.raises(DataError, match="missing"):
        ShardSet(out)


def test_the_bytes_do_not_depend_on_workers(tokenizer: Path, folder: Path, tmp_path: Path) -> None:
    for part in range(3):
        write_tar(folder / f"{part}.tar", [(f"{idx}.json", as_json(text)) for idx, text in enumerate(TEXTS[part:])])
    outs = [tmp_path / "one", tmp_path / "two"]
    for workers, out in enumerate(outs, start=1):
        index_shards([folder], tokenizer, out_dir=out, workers=workers)
    names = sorted(path.name for path in outs[0].iterdir())
    assert names == ["0.idx", "1.idx", "2.idx", "manifest.json"]
    assert all((outs[0] / name).read_bytes() == (outs[1] / name).read_bytes() for name in names)


def test_tars_behind_urls_are_indexed_and_read(
    tokenizer: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in range(2):
        write_tar(folder / f"{part}.tar", [("0.json", as_json(TEXTS[part]))])
    out = tmp_path / "out"
    with serve(folder) as server:
        url = f"{server.url}/{{0..1}}.tar"
        with pytest.raises(DataError, match="--out"):
            index_shards([url], tokenizer)
        manifest = index_shards([url], tokenizer, out_dir=out)
        assert sorted(path.name for path in out.iterdir()) == ["0.idx", "1.idx", "manifest.json"]
        cache = ShardCache(folder=tmp_path / "cache", max_bytes=1 << 20)
        assert texts_of(ShardSet(out, cache=cache)) == TEXTS[:2]
        server.faults = {"1.tar": ("404", 9)}
        with pytest.raises(StorageError, match="no such file"):
            index_shards([url], tokenizer, out_dir=tmp_path / "failed")
    assert not (tmp_path / "failed").exists()
    assert index_shards([folder], tokenizer).fingerprint == manifest.fingerprint


def test_an_indexed_set_is_not_replaced_unasked(tokenizer: Path, folder: Path) -> None:
    write_tar(folder / "0.tar", [("0.json", as_json(TEXTS[0]))])
    first = index_shards([folder], tokenizer)
    with pytest.raises(DataError, match="--overwrite"):
        index_shards([folder], tokenizer)
    write_tar(folder / "0.tar", [("0.json", as_json("broken"))])
    (folder / "0.tar").write_bytes((folder / "0.tar").read_bytes()[:700])
    with pytest.raises(DataError, match="unexpected end of data. Copy it again"):
        index_shards([folder], tokenizer, overwrite=True)
    assert (folder / "manifest.json").read_text() == first.to_json(), "a failed one leaves the old"


def test_a_folder_that_cannot_be_written_and_a_full_disk_are_errors_with_the_cure(
    tokenizer: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tar(folder / "0.tar", [("0.json", as_json(TEXTS[0]))])
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"Not a directory.* cannot be written, give another .*--out FOLDER"):
        index_shards([folder], tokenizer, out_dir=tmp_path / "file" / "out")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"No space left.*give a folder of a larger disk"):
            index_shards([folder], tokenizer)
    assert [path.name for path in folder.iterdir()] == ["0.tar"], "nothing is left behind"
    assert index_shards([folder], tokenizer).samples == 1


def test_what_is_given_must_be_there_and_no_command(tokenizer: Path, folder: Path) -> None:
    with pytest.raises(DataError, match="found none"):
        index_shards([folder], tokenizer)
    with pytest.raises(DataError, match="nothing there"):
        index_shards([folder / "none.tar"], tokenizer)
    with pytest.raises(DataError, match="names no commands"):
        index_shards(["pipe:cat x.tar"], tokenizer, out_dir=folder)


def test_two_tars_that_would_share_one_index_are_named(tokenizer: Path, folder: Path, tmp_path: Path) -> None:
    tars = [write_tar(folder / name, [("0.json", as_json(TEXTS[0]))]) for name in ("data.0", "data.1")]
    for out in (None, tmp_path / "out"):
        with pytest.raises(DataError, match=r"data\.0 and .*data\.1 would share one index, data\.idx\. Rename one"):
            index_shards(tars, tokenizer, out_dir=out)
    assert sorted(path.name for path in folder.iterdir()) == ["data.0", "data.1"]


def test_the_key_of_a_damaged_record_is_that_of_its_header(tokenizer: Path, folder: Path) -> None:
    tar = write_tar(folder / "a.tar", [("x/their-key.json", as_json(TEXTS[0]))], tarfile.USTAR_FORMAT)
    index_shards([folder], tokenizer)
    raw = tar.read_bytes()
    tar.write_bytes(raw.replace(b"Tower", b"tower", 1))
    with pytest.raises(DataError, match=r"a\.tar, member x/their-key\.json at byte 512: the checksum"):
        ShardSet(folder).record(0)


def test_the_command_says_what_it_found(tokenizer: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tar(folder / "a.tar", [("0.TXT", TEXTS[0].encode()), ("1.txt", b"\xff")])
    assert main(["shards", "index", str(folder), "--tokenizer", str(tokenizer), "--member", ".txt"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("1 records in 1 tars, ")
    assert "left out: 1 not UTF-8" in out
    assert ShardSet(folder).manifest.shards[0].member == "txt"
