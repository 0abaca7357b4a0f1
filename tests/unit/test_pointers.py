"""A pointer of Git LFS in place of a file is named by every reader of users' files, with the remedy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from arc_ds.config.deepspeed import resolve_deepspeed
from arc_ds.config.load import load_config
from arc_ds.data.tasks.chat_template import render_template
from arc_ds.errors import ArcError
from arc_ds.inference.load import open_arc_folder
from arc_ds.model.weights import open_backbone, read_backbone_config
from arc_ds.model.weights.stores import PickleStore, SafetensorsStore
from arc_ds.shards.building.converters import convert_files
from arc_ds.shards.building.inputs import find_inputs
from arc_ds.shards.format import read_manifest
from arc_ds.shards.storage.remote import Retries, fetch_bytes
from arc_ds.shards.tar_index import RecordForm, index_tar
from arc_ds.shards.token_cache.files import read_cache_index
from arc_ds.system.checksums import FileEntry, find_faults
from arc_ds.tokenizers import load_tokenizer

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4976698672\n"
INPUTS = ("a.txt", "a.jsonl", "a.json", "a.txt.gz", "a.jsonl.zst", "a.parquet")
READERS: list[tuple[str, Callable[[Path], object]]] = [
    ("model.safetensors", SafetensorsStore),
    ("consolidated.00.pth", PickleStore),
    ("a.gguf", open_backbone),
    ("a.gguf", lambda path: open_backbone(path.parent)),
    ("config.json", lambda path: open_arc_folder(path.parent)),
    ("params.json", lambda path: read_backbone_config(path.parent)),
    ("tokenizer.model", load_tokenizer),
    ("tokenizer.json", lambda path: load_tokenizer(path.parent)),
    *((name, lambda path: find_inputs([path])) for name in INPUTS),
    ("a.txt", lambda path: find_inputs([path.parent])),
    ("squad.json", lambda path: convert_files("squad", [path], path.with_name("out"))),
    ("a.tar", lambda path: index_tar(path, None, RecordForm())),  # type: ignore[arg-type]  # not reached
    ("manifest.json", lambda path: read_manifest(path.parent)),
    (
        "chat_template.jinja",
        lambda path: render_template(SimpleNamespace(special_ids={}, bos_id=0, eos_id=0), path.parent),  # type: ignore[arg-type]
    ),
    ("cache.json", lambda path: read_cache_index(path.parent)),
    ("config.yaml", load_config),
    ("zero.json", lambda path: resolve_deepspeed(path, None, 1)),  # type: ignore[arg-type]  # not reached
]


@pytest.mark.parametrize(("name", "read_file"), READERS)
def test_every_reader_names_a_pointer(tmp_path: Path, name: str, read_file: Callable[[Path], object]) -> None:
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ArcError, match=f"{name} is a pointer of Git LFS.* `git lfs pull`"):
        read_file(tmp_path / name)


def test_a_url_of_a_pointer_is_named_and_not_tried_again(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_text(POINTER)
    with pytest.raises(ArcError, match="tried once: it is a pointer of Git LFS .*/resolve/ serves the file"):
        fetch_bytes(f"pipe:cat {tmp_path}/a.tar", max_bytes=1000, retries=Retries(first_wait_s=0.0))


def test_a_pointer_in_a_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "states.pt").write_text(POINTER)
    (fault,) = find_faults(tmp_path, (FileEntry(path="states.pt", size=4976698672, xxh128=""),))
    assert "a pointer of Git LFS: run `git lfs pull`" in fault
