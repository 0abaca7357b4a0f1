"""Saves the progress of an unfinished build next to its shards, so that the same build can resume."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from arc_ds.shards.building.batches import Cursor, InputFile
from arc_ds.shards.building.record_maker import Counts, RecordRules
from arc_ds.shards.format import ShardInfo, SourceInfo, sha256_of_file
from arc_ds.system.files import write_whole
from arc_ds.version import __version__

logger = logging.getLogger(__name__)

_VERSION = 2
_STATE = "state.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildPlan:
    """Inputs and options of a build. Equal plans over unchanged inputs produce identical bytes."""

    files: tuple[InputFile, ...]
    rules: RecordRules
    shard_bytes: int
    tokenizer_fingerprint: str


@dataclass(slots=True, kw_only=True)
class Progress:
    """The progress of a build. It is saved at the end of each shard.

    shards: the finished shards.
    sources: the inputs that have been read completely.
    file_idx: index of the current input.
    cursor: start of the current batch of this input.
    num_records: how many records of the current batch the shards contain.
    counts: document counts of the current input, without the current batch.
    file_records: how many records of the current input the shards contain, including the current batch.
    file_tokens: how many tokens of the current input the shards contain, including the current batch.
    """

    shards: list[ShardInfo] = field(default_factory=list)
    sources: list[SourceInfo] = field(default_factory=list)
    file_idx: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    num_records: int = 0
    counts: Counts = field(default_factory=Counts)
    file_records: int = 0
    file_tokens: int = 0


class BuildFolder:
    """The hidden working folder of a build, next to the target folder. A lock lets only one build at a time use it."""

    def __init__(self, target: Path) -> None:
        self.path = target.with_name(f".{target.name}.partial")
        self.shards = self.path / "shards"

    def keep_only(self, shards: Sequence[ShardInfo]) -> None:
        """Create the folder of shards and remove everything except `shards` from it."""
        self.shards.mkdir(exist_ok=True)
        kept = {name for shard in shards for name in (shard.name, shard.index_name)}
        for path in self.shards.iterdir():
            if path.name not in kept:
                path.unlink()

    def remove(self) -> None:
        """Remove the working folder, including the saved progress."""
        shutil.rmtree(self.path)

    def save(self, plan: BuildPlan, progress: Progress) -> None:
        """Save the progress of the build with an atomic write."""
        state = {
            "version": _VERSION,
            "plan": options_as_json(plan.rules, plan.shard_bytes, plan.tokenizer_fingerprint),
            "inputs": _signatures(plan.files[: progress.file_idx + 1]),
            "checkpoint": asdict(progress),
        }
        # json.dump is many times slower, and the state of ten thousand shards takes megabytes.
        write_whole(self.path / _STATE, json.dumps(state))

    def has_progress(self) -> bool:
        """Whether a build can resume here."""
        return (self.path / _STATE).is_file()

    def load(self, plan: BuildPlan) -> Progress | None:
        """Load the progress of the same build and verify its shards' checksums; None if the build cannot resume."""
        if not self.has_progress():
            return None
        path = self.path / _STATE
        try:
            state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if state["version"] != _VERSION:
                raise ValueError("its format version is different")
            progress = _progress_of(state["checkpoint"])
            _check_same(state, plan)
            for shard in progress.shards:
                _check_whole(self.shards, shard)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning(
                "%s: the build starts from scratch, because it cannot resume an unfinished one: %s", self.path, error
            )
            path.unlink()
            return None
        return progress


def options_as_json(rules: RecordRules, shard_bytes: int, tokenizer_fingerprint: str) -> dict[str, Any]:
    """Everything that determines the bytes of shards, except the inputs."""
    return {
        "version": __version__,
        "rules": asdict(rules),
        "shard_bytes": shard_bytes,
        "tokenizer_fingerprint": tokenizer_fingerprint,
    }


def _signatures(files: Sequence[InputFile]) -> list[list[Any]]:
    return [[str(file.path.absolute()), file.name, file.num_bytes, file.mtime_ns] for file in files]


def _check_same(state: dict[str, Any], plan: BuildPlan) -> None:
    """Raise ValueError if the unfinished build differs from this one, or if an input that it read has changed."""
    old, new = state["plan"], options_as_json(plan.rules, plan.shard_bytes, plan.tokenizer_fingerprint)
    if plan.rules.on_error == "skip":
        old["rules"]["on_error"] = "skip"  # the old build has met no fault yet, so `skip` would give the same shards
    if old != new:
        raise ValueError("its options, its tokenizer or its version of ARC-DS were different")
    read = state["inputs"]
    if read != _signatures(plan.files[: len(read)]):
        raise ValueError("the inputs that it has read have changed, or different inputs were given")


def _progress_of(fields: dict[str, Any]) -> Progress:
    return Progress(
        shards=[ShardInfo(**shard) for shard in fields.pop("shards")],
        sources=[SourceInfo(**source) for source in fields.pop("sources")],
        cursor=Cursor(*fields.pop("cursor")),
        counts=Counts(**fields.pop("counts")),
        **fields,
    )


def _check_whole(folder: Path, shard: ShardInfo) -> None:
    for name, digest in ((shard.name, shard.sha256), (shard.index_name, shard.index_sha256)):
        if sha256_of_file(folder / name) != digest:
            raise ValueError(f"{name} is damaged")
