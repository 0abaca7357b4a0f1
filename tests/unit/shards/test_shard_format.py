"""The manifest: readable versions, coverage of the fingerprint, and passage counts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest

from arc_ds.errors import DataError
from arc_ds.shards.format import Manifest, ShardInfo, parse_manifest

DIGEST = hashlib.sha256(b"").hexdigest()
TOKENIZER = "ab" * 32


def shard(name: str, *, samples: int = 3, tokens: int = 90, **fields: Any) -> ShardInfo:
    return ShardInfo(
        name=f"{name}.tar", samples=samples, tokens=tokens, bytes=10, sha256=DIGEST, index_sha256=DIGEST, **fields
    )


def manifest(*shards: ShardInfo) -> Manifest:
    return Manifest(
        samples=sum(one.samples for one in shards),
        tokens=sum(one.tokens for one in shards),
        max_tokens=768,
        min_tokens=16,
        tokenizer_fingerprint=TOKENIZER,
        shards=shards,
        sources=(),
        kind="fine_tuning",
    )


PLAIN = manifest(shard("a"), shard("b", location="/elsewhere/b.tar"))
COUNTED = manifest(
    shard("a", passage_tokens={"10": 50, "2": 20}), shard("b", location="b", passage_tokens={"10": 7, "1": 5})
)


def as_version_2(made: Manifest) -> bytes:
    """A manifest of version 2, which has no passage counts."""
    spec = json.loads(made.to_json())
    for one in spec["shards"]:
        del one["passage_tokens"]
    return (json.dumps(spec | {"version": 2}, indent=1, sort_keys=True) + "\n").encode()


def test_a_manifest_comes_back() -> None:
    assert parse_manifest(COUNTED.to_json().encode(), "here") == COUNTED


def test_manifests_without_counts_are_read_and_name_the_same_records() -> None:
    """Otherwise a run could not resume on rebuilt shards."""
    old = parse_manifest(as_version_2(COUNTED), "here")
    assert old.passage_tokens == {}
    assert [one.name for one in old.shards] == ["a.tar", "b.tar"]
    assert old.fingerprint == COUNTED.fingerprint == PLAIN.fingerprint


def test_the_fingerprint_is_that_of_the_first_manifests() -> None:
    here = replace(PLAIN, shards=tuple(replace(one, location=None) for one in PLAIN.shards))
    assert PLAIN.fingerprint == hashlib.sha256(as_version_2(here)).hexdigest()
    assert PLAIN.fingerprint == "bd2578ac493908b775dc75e9b69e716479a3bf49a76ee84f9ede0f949ef4805a"
    assert replace(PLAIN, tokens=181).fingerprint != PLAIN.fingerprint


def test_passages_are_counted_over_all_shards_or_not_at_all() -> None:
    assert list(COUNTED.passage_tokens.items()) == [(1, 5), (2, 20), (10, 57)]
    empty = shard("c", samples=0, tokens=0)
    assert manifest(*COUNTED.shards, empty).passage_tokens == COUNTED.passage_tokens
    assert manifest(*COUNTED.shards, shard("c")).passage_tokens == {}


@pytest.mark.parametrize(
    "counts", [{"0": 5}, {"ten": 5}, {"1": "5"}, {"1": True}, {"1": 91}, {"1": -1, "2": 5}, {"-1": 5}, [5], 5, None]
)
def test_counts_that_are_none_are_a_damaged_manifest(counts: object) -> None:
    spec = json.loads(COUNTED.to_json())
    spec["shards"][0]["passage_tokens"] = counts
    with pytest.raises(DataError, match="here: damaged"):
        parse_manifest(json.dumps(spec).encode(), "here")
