"""The token cache gives the same encodings as the tokenizer. A cache that does not match is reported and unused."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arc_ds.cli import main
from arc_ds.errors import DataError, StorageError
from arc_ds.shards import check
from arc_ds.shards.building.writer import build_shards
from arc_ds.shards.check import check_token_caches
from arc_ds.shards.index import index_shards
from arc_ds.shards.reader import ShardSet
from arc_ds.shards.tar_index import RecordForm
from arc_ds.shards.token_cache import writer as token_cache_writer
from arc_ds.shards.token_cache.cache import KnownText, KnownTexts, open_token_cache, with_known
from arc_ds.shards.token_cache.files import cache_name, origin_of, texts_of
from arc_ds.shards.token_cache.writer import build_token_caches
from arc_ds.tokenizers import Encoding, Tokenizer, load_tokenizer
from arc_ds.tokenizers.tiktoken_file import RankTokenizer
from tests.helpers.tiny_data import TEXT, write_json_tokenizer, write_shards

TEXTS = [TEXT, "plain words", "  two  spaces ", "北京\n\n été 🚲", "A " * 90, "\x00 odd"]


@pytest.fixture
def shards(tmp_path: Path, tokenizer_path: Path) -> ShardSet:
    return write_shards(tmp_path / "shards", tokenizer_path, TEXTS * 4, shard_bytes=1 << 12)


def assert_known(shards: ShardSet, tokenizer: Tokenizer, *, may_lack: bool = False) -> None:
    cache = open_token_cache(shards, tokenizer)
    assert cache is not None
    for idx in range(len(shards)):
        record = shards.record(idx)
        known = cache.known(idx, record)
        assert may_lack or {each.text for each in known} == set(texts_of(record))
        for text, encoding in known:
            direct = tokenizer.encode_with_ends(text)
            assert np.array_equal(encoding.ids, direct.ids)
            assert np.array_equal(encoding.ends, direct.ends)


def test_cached_encodings_are_the_tokenizer_s(tmp_path: Path, shards: ShardSet, tokenizer_path: Path) -> None:
    json_path = write_json_tokenizer(tmp_path / "json")
    assert len(shards.manifest.shards) > 2
    first, second = build_token_caches(shards.folder, [tokenizer_path, json_path])
    assert first.records == second.records == len(shards)
    assert first.left_out == second.left_out == 0
    for path in (tokenizer_path, json_path):
        assert_known(shards, load_tokenizer(path))
    assert check_token_caches(shards.folder, shards.manifest) == []


def test_every_text_of_a_fine_tuning_record_is_known(tmp_path: Path, tokenizer_path: Path) -> None:
    records = [
        {"passages": ["The tower.", "A lamp, 北."], "question": "What?", "answer": ["the tower", "stone"]},
        {"passage": "One passage.", "instruction": "Translate.", "answer": "été"},
    ]
    source = tmp_path / "qa.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    build_shards([source], tmp_path / "qa", tokenizer_path, kind="fine_tuning")
    shards = ShardSet(tmp_path / "qa")
    build_token_caches(shards.folder, [tokenizer_path])
    assert texts_of(records[0]) == ("The tower.", "A lamp, 北.", "What?", "the tower", "stone")
    assert_known(shards, load_tokenizer(tokenizer_path))


def test_known_texts_are_not_tokenised_and_others_are(shards: ShardSet, tokenizer_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    text = TEXTS[0]
    wrong = tokenizer.encode_with_ends("other words")
    knowing = KnownTexts(tokenizer, [KnownText(text, wrong)])
    assert isinstance(knowing, Tokenizer)
    assert knowing.encode_with_ends(text) is wrong
    assert knowing.encode_batch([text, "plain"]) == [wrong.ids.tolist(), tokenizer.encode("plain")]
    assert knowing.decode(knowing.encode("plain words")) == "plain words"
    assert knowing.fingerprint == tokenizer.fingerprint
    assert with_known(tokenizer, None, [0], [shards.record(0)]) is tokenizer


def warnings_of(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)


def change_index(**changes: object) -> Callable[[Path], object]:
    """A function that changes fields of a `cache.json`."""
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_first_shard(path: Path) -> None:
    spec = json.loads(path.read_text())
    next(iter(spec["shards"].values()))["records"] += 1
    path.write_text(json.dumps(spec))


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("shard-000000.ids", lambda path: path.write_bytes(path.read_bytes()[:-4]), "bytes, expected"),
        ("shard-000000.texts", Path.unlink, "is missing"),
        ("cache.json", lambda path: path.write_text("{"), "damaged"),
        ("cache.json", change_index(shards={}), "unfinished"),
        ("cache.json", change_first_shard, "stale"),
        ("cache.json", change_index(fingerprint="0" * 64), "belongs to the tokenizer"),
    ],
)
def test_a_cache_that_does_not_fit_is_named_unused_and_made_again(
    shards: ShardSet,
    tokenizer_path: Path,
    caplog: pytest.LogCaptureFixture,
    name: str,
    damage: Callable[[Path], object],
    message: str,
) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    (made,) = build_token_caches(shards.folder, [tokenizer_path])
    damage(made.folder / name)
    assert open_token_cache(shards, tokenizer) is None
    assert message in warnings_of(caplog) and "arc-ds shards tokenize" in warnings_of(caplog)
    if "belongs" not in message:
        assert check_token_caches(shards.folder, shards.manifest)
    build_token_caches(shards.folder, [tokenizer_path])
    assert_known(shards, tokenizer)
    assert check_token_caches(shards.folder, shards.manifest) == []


def test_tars_that_were_indexed_by_another_field_make_a_cache_stale(
    tmp_path: Path, tokenizer_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The tar is unchanged, and so are the numbers of characters."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for key, letter in enumerate("abcde"):
            payload = json.dumps({"raw": f"the {letter} of stone", "content": f"a tower, {letter} sea"}).encode()
            info = tarfile.TarInfo(f"{key}.json")
            info.size = len(payload)
            tar.addfile(info, io.BytesIO(payload))
    index_shards([folder], tokenizer_path, form=RecordForm(text_field="raw"))
    build_token_caches(folder, [tokenizer_path])
    index_shards([folder], tokenizer_path, form=RecordForm(text_field="content"), overwrite=True)
    shards = ShardSet(folder)
    assert open_token_cache(shards, load_tokenizer(tokenizer_path)) is None
    assert "indexed again" in warnings_of(caplog)
    (fault,) = check_token_caches(folder, shards.manifest)
    assert "stale" in fault.what and "tokenize again" in fault.what
    (made,) = build_token_caches(folder, [tokenizer_path])
    assert made.made == 1
    assert_known(shards, load_tokenizer(tokenizer_path))


def test_all_that_decides_the_texts_of_a_shard_is_part_of_their_origin(shards: ShardSet) -> None:
    manifest, shard = shards.manifest, shards.manifest.shards[0]
    origins = {
        origin_of(manifest, shard),
        origin_of(replace(manifest, text_field="content"), shard),
        origin_of(replace(manifest, kind="fine_tuning"), shard),
        origin_of(manifest, replace(shard, member="txt")),
        origin_of(manifest, replace(shard, sha256="0" * 64)),
        origin_of(manifest, replace(shard, index_sha256="0" * 64)),
    }
    assert len(origins) == 6
    assert origin_of(manifest, replace(shard, location="elsewhere.tar")) in origins


def test_caches_of_other_tokenizers_only_are_named(
    tmp_path: Path, shards: ShardSet, tokenizer_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = load_tokenizer(write_json_tokenizer(tmp_path / "json"))
    assert open_token_cache(shards, other) is None
    assert warnings_of(caplog) == ""
    build_token_caches(shards.folder, [tokenizer_path])
    assert open_token_cache(shards, other) is None
    assert "none of the tokenizer" in warnings_of(caplog)


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 1
    path.write_bytes(raw)


def test_a_flipped_byte_of_ids_is_found_when_the_record_is_read(
    shards: ShardSet, tokenizer_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    (made,) = build_token_caches(shards.folder, [tokenizer_path])
    flip(made.folder / "shard-000000.ids", 5)
    cache = open_token_cache(shards, tokenizer)
    assert cache is not None
    assert cache.known(0, shards.record(0)) == []
    assert "checksum" in warnings_of(caplog)
    assert [each.text for each in cache.known(1, shards.record(1))] == [TEXTS[1]]
    (fault,) = check_token_caches(shards.folder, shards.manifest)
    assert fault.file.endswith("shard-000000.ids")
    (again,) = build_token_caches(shards.folder, [tokenizer_path])
    assert again.made == 1
    assert_known(shards, tokenizer)


def test_a_flipped_byte_of_the_text_table_leaves_that_shard_to_the_tokenizer(
    shards: ShardSet, tokenizer_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (made,) = build_token_caches(shards.folder, [tokenizer_path])
    flip(made.folder / "shard-000000.texts", 200)
    cache = open_token_cache(shards, load_tokenizer(tokenizer_path))
    assert cache is not None
    assert cache.known(0, shards.record(0)) == cache.known(1, shards.record(1)) == []
    assert warnings_of(caplog).count("sha256") == 1
    last = len(shards) - 1
    assert cache.known(last, shards.record(last))


def test_a_build_that_was_killed_goes_on_behind_its_finished_shards(
    shards: ShardSet, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    whole = token_cache_writer._tokenize_shard

    def stop_at_the_third(*args: object) -> object:
        calls.append(args[-1])  # type: ignore[arg-type]
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(token_cache_writer, "_tokenize_shard", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        build_token_caches(shards.folder, [tokenizer_path])
    (made,) = build_token_caches(shards.folder, [tokenizer_path])
    assert made.made == len(shards.manifest.shards) - 2
    assert calls[3:] == list(range(2, len(shards.manifest.shards)))
    assert_known(shards, load_tokenizer(tokenizer_path))


def test_two_calls_do_not_write_one_cache_at_once(
    shards: ShardSet, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = token_cache_writer._tokenize_shard

    def tokenize_in_spite_of_another(*args: object) -> object:
        if not (shards.folder / "begun").exists():
            (shards.folder / "begun").touch()
            with pytest.raises(DataError, match="another tokenize is writing .*tokens-"):
                build_token_caches(shards.folder, [tokenizer_path])
        return whole(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(token_cache_writer, "_tokenize_shard", tokenize_in_spite_of_another)
    build_token_caches(shards.folder, [tokenizer_path])
    assert (shards.folder / "begun").exists()
    assert_known(shards, load_tokenizer(tokenizer_path))
    assert check_token_caches(shards.folder, shards.manifest) == []


def test_a_folder_that_cannot_be_written_is_an_error_and_an_index_elsewhere_the_cure(
    tmp_path: Path, shards: ShardSet, tokenizer_path: Path
) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    (shards.folder / cache_name(tokenizer.fingerprint)).write_text("")
    with pytest.raises(StorageError, match=r"cannot be written: .*arc-ds shards index FOLDER --out OTHER"):
        build_token_caches(shards.folder, [tokenizer_path])
    index_shards([shards.folder], tokenizer_path, out_dir=tmp_path / "other")
    build_token_caches(tmp_path / "other", [tokenizer_path])
    other = ShardSet(tmp_path / "other")
    assert [other.record(idx)["text"] for idx in range(len(other))] == TEXTS * 4
    assert_known(other, tokenizer)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_an_error_and_the_same_call_goes_on(
    shards: ShardSet, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    tokenizer = load_tokenizer(tokenizer_path)
    synced: list[int] = []

    def full(descriptor: int) -> None:
        synced.append(descriptor)
        if len(synced) > 8:  # six for the first shard: each of its files, and the folder after each
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match=r"No space left.*run the same command again.*Finished shards are kept"):
            build_token_caches(shards.folder, [tokenizer_path], workers=workers)
    assert open_token_cache(shards, tokenizer) is None
    (made,) = build_token_caches(shards.folder, [tokenizer_path])
    assert made.made < len(shards.manifest.shards)
    assert_known(shards, tokenizer)
    assert check_token_caches(shards.folder, shards.manifest) == []


def test_caches_are_the_same_bytes_whatever_the_number_of_workers(shards: ShardSet, tokenizer_path: Path) -> None:
    (made,) = build_token_caches(shards.folder, [tokenizer_path])
    once = {path.name: path.read_bytes() for path in made.folder.iterdir()}
    for path in made.folder.iterdir():
        path.unlink()
    build_token_caches(shards.folder, [tokenizer_path], workers=2)
    assert {path.name: path.read_bytes() for path in made.folder.iterdir()} == once
    assert made.folder == shards.folder / cache_name(load_tokenizer(tokenizer_path).fingerprint)


@pytest.mark.parametrize("moment", ["find_fault", "sha256_of_file", "stray_files"])
def test_a_cache_that_vanishes_while_it_is_checked_is_a_fault_in_words(
    shards: ShardSet, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """As while `shards tokenize` or a build replaces it."""
    (made,) = build_token_caches(shards.folder, [tokenizer_path])
    module = check if moment == "stray_files" else token_cache_writer
    whole = getattr(module, moment)

    def after_removal(*args: object) -> object:
        shutil.rmtree(made.folder, ignore_errors=True)
        return whole(*args)

    monkeypatch.setattr(module, moment, after_removal)
    faults = check_token_caches(shards.folder, shards.manifest)
    assert len(faults) == len(shards.manifest.shards)
    assert all("missing" in str(fault) or "cannot be read: No such file" in str(fault) for fault in faults)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60), min_size=1))
def test_any_text_comes_out_of_the_cache_as_it_is_read(golden: Path, texts: list[str]) -> None:
    """Also the boundaries, for a byte-level tokenizer and for one that adds a leading space and hides some pieces."""
    for name in ("llama_tiny.tiktoken", "sp384.model"):
        tokenizer_path = golden / "tokenizers" / name
        with TemporaryDirectory() as folder:
            shards = write_shards(Path(folder) / "shards", tokenizer_path, [f"a {text}" for text in texts])
            build_token_caches(shards.folder, [tokenizer_path])
            assert_known(shards, load_tokenizer(tokenizer_path), may_lack=True)


def test_a_token_of_too_many_characters_is_left_out(
    tmp_path: Path, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_token(_: RankTokenizer, text: str) -> Encoding:
        return Encoding(np.zeros(1, dtype=np.int64), np.array([0, len(text)]))

    shards = write_shards(tmp_path / "shards", tokenizer_path, ["a" * length for length in (255, 256, 3)])
    monkeypatch.setattr(RankTokenizer, "encode_with_ends", one_token)
    (made,) = build_token_caches(shards.folder, [tokenizer_path])
    assert (made.left_out, made.ids) == (1, 2)
    cache = open_token_cache(shards, load_tokenizer(tokenizer_path))
    assert cache is not None
    assert [len(cache.known(idx, shards.record(idx))) for idx in range(3)] == [1, 0, 1]


def test_command_line_builds_checks_and_mends_caches(
    tmp_path: Path, tokenizer_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out, other = tmp_path / "in.jsonl", str(tmp_path / "out"), write_json_tokenizer(tmp_path / "json")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    common = ["--out", out, "--tokenizer", str(tokenizer_path), "--min-tokens", "2", "--workers", "1"]
    assert main(["shards", "build", str(source), *common, "--cache-tokens", str(tokenizer_path)]) == 0
    assert main(["shards", "tokenize", out, "--tokenizer", str(other), "--workers", "1"]) == 0
    assert capsys.readouterr().out.count(" ids of ") == 2
    assert main(["shards", "check", out, "--workers", "1"]) == 0
    for path in (tokenizer_path, other):
        assert_known(ShardSet(out), load_tokenizer(path))
    flip(next((Path(out) / cache_name(load_tokenizer(other).fingerprint)).glob("*.ids")), 3)
    capsys.readouterr()
    assert main(["shards", "check", out, "--workers", "1"]) == 1
    assert "tokenize again" in capsys.readouterr().out
    assert main(["shards", "tokenize", out, "--tokenizer", str(other), "--workers", "1"]) == 0
    assert main(["shards", "check", out, "--workers", "1"]) == 0


def test_a_lock_that_another_user_left_behind_keeps_nobody_out(
    shards: ShardSet, tokenizer_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (made,) = build_token_caches(shards.folder, [tokenizer_path])
    (made.folder / "lock").touch()
    opened = Path.open

    def refuse_writing(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        if path.name == "lock" and mode != "rb":
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, mode, *args, **options)

    monkeypatch.setattr(Path, "open", refuse_writing)
    (again,) = build_token_caches(shards.folder, [tokenizer_path])
    assert (made.made, again.made) == (len(shards.manifest.shards), 0)
