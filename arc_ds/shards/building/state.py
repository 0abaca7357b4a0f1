"""How far an unfinished build has come, kept beside its shards, so that the same build goes on there."""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from arc_ds.shards.building.batches import Cursor, InputFile
from arc_ds.shards.building.record_maker import Counts, RecordRules
from arc_ds.shards.format import ShardInfo, SourceInfo, sha256_of_file
from arc_ds.shards.locks import writing
from arc_ds.system.files import replace_folder, write_whole
from arc_ds.version import __version__

logger = logging.getLogger(__name__)

_VERSION = 2
_STATE = "state.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildPlan:
    """What a build makes of what: two builds with equal plans and unchanged inputs give the same bytes."""

    files: tuple[InputFile, ...]
    rules: RecordRules
    shard_bytes: int
    tokenizer_fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """Where a build stood when its last shard was finished.

    sources: the inputs that are done. file_idx, cursor, num_records: the shards end with so many records of the batch
    that begins at `cursor` of this input. counts, file_records, file_tokens: of this input, the batch left out of
    `counts` and counted in the others.
    """

    shards: tuple[ShardInfo, ...] = ()
    sources: tuple[SourceInfo, ...] = ()
    file_idx: int = 0
    cursor: Cursor = field(default_factory=Cursor)
    num_records: int = 0
    counts: Counts = field(default_factory=Counts)
    file_records: int = 0
    file_tokens: int = 0


class BuildFolder:
    """The hidden folder beside the target in which a build works; one build at a time."""

    def __init__(self, target: Path) -> None:
        self.path = target.with_name(f".{target.name}.partial")
        self.shards = self.path / "shards"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and keep other builds out of it. DataError where one is at work in it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with writing(self.path, "build"):
            yield

    def keep_only(self, shards: Sequence[ShardInfo]) -> None:
        """Make the folder of the shards and remove everything else from it."""
        self.shards.mkdir(exist_ok=True)
        kept = {name for shard in shards for name in (shard.name, shard.index_name)}
        for path in self.shards.iterdir():
            if path.name not in kept:
                path.unlink()

    def publish(self, target: Path) -> None:
        """Rename the finished folder of shards to `target`; a folder that is there is moved aside and removed last."""
        replace_folder(self.shards, target)
        self.remove()

    def remove(self) -> None:
        """Remove everything, and with it where the build stands."""
        shutil.rmtree(self.path)

    def save(self, plan: BuildPlan, checkpoint: Checkpoint) -> None:
        """Write where the build stands; whole or not at all."""
        state = {
            "version": _VERSION,
            "plan": _plan_as_json(plan),
            "inputs": _signatures(plan.files[: checkpoint.file_idx + 1]),
            "checkpoint": asdict(checkpoint),
        }
        # json.dump is many times slower, and ten thousand shards make megabytes.
        write_whole(self.path / _STATE, json.dumps(state))

    def load(self, plan: BuildPlan) -> Checkpoint | None:
        """Where the same build stood, its shards verified by their sums; None where there is nothing to go on from."""
        path = self.path / _STATE
        if not path.is_file():
            return None
        try:
            state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if state["version"] != _VERSION:
                raise ValueError("it is of another format")
            checkpoint = _checkpoint_of(state["checkpoint"])
            _check_same(state, plan)
            for shard in checkpoint.shards:
                _check_whole(self.shards, shard)
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s: an unfinished build is not continued but begun anew: %s", self.path, error)
            return None
        return checkpoint


def _plan_as_json(plan: BuildPlan) -> dict[str, Any]:
    return {
        "version": __version__,
        "rules": asdict(plan.rules),
        "shard_bytes": plan.shard_bytes,
        "tokenizer_fingerprint": plan.tokenizer_fingerprint,
    }


def _signatures(files: Sequence[InputFile]) -> list[list[Any]]:
    return [[str(file.path.absolute()), file.name, file.num_bytes, file.mtime_ns] for file in files]


def _check_same(state: dict[str, Any], plan: BuildPlan) -> None:
    """ValueError where the build that was begun is not this one, or an input that it has read is another now."""
    old, new = state["plan"], _plan_as_json(plan)
    if plan.rules.on_error == "skip":
        old["rules"]["on_error"] = "skip"  # what a build that stops at faults has done so far, one that skips does too
    if old != new:
        raise ValueError("its options, its tokenizer or its version of ARC-DS were others")
    read = state["inputs"]
    if read != _signatures(plan.files[: len(read)]):
        raise ValueError("the inputs that it has read have changed, or others were given")


def _checkpoint_of(fields: dict[str, Any]) -> Checkpoint:
    counts = fields.pop("counts")
    return Checkpoint(
        shards=tuple(ShardInfo(**shard) for shard in fields.pop("shards")),
        sources=tuple(SourceInfo(**source) for source in fields.pop("sources")),
        cursor=Cursor(*fields.pop("cursor")),
        counts=Counts(documents=counts["documents"], cut=counts["cut"], skipped=Counter(counts["skipped"])),
        **fields,
    )


def _check_whole(folder: Path, shard: ShardInfo) -> None:
    for name, digest in ((shard.name, shard.sha256), (shard.index_name, shard.index_sha256)):
        if sha256_of_file(folder / name) != digest:
            raise ValueError(f"{name} is damaged")
