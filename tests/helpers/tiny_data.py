"""Small generated tokenizers and shards, so tests of the data pipeline need no downloads."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arc_ds.shards.building.writer import build_shards
from arc_ds.shards.reader import ShardSet

WORDS = ["the ", "of ", "tower ", "a ", "lamp", "Each ", "block ", "stone", " sea", "wind ", "\n\n", ". "]
TEXT = (
    "The lighthouse was built of grey stone. Each block was marked, so that the tower could be taken down again.\n\n"
    "Wind came from the sea; the lamp held. Nobody asked why “grey” — it was the colour of the island, 北 and été. "
)


def write_tiktoken(path: Path, more: Sequence[bytes] = ()) -> Path:
    """Write a tiktoken file with 256 bytes and all prefixes of a few words, so that merges can build each word.

    more: further tokens.
    """
    tokens = [bytes([byte]) for byte in range(256)]
    for word in WORDS:
        raw = word.encode()
        tokens += [raw[:end] for end in range(2, len(raw) + 1) if raw[:end] not in tokens]
    tokens += more
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % rank for rank, t in enumerate(tokens)))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of the files in a folder by their names."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def write_json_tokenizer(folder: Path, *, bos: bool = True) -> Path:
    """Write a byte-level BPE tokenizer.json with 340 tokens and its tokenizer_config.json to a folder."""
    import tokenizers

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT] * 3, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": bos}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_tekken(folder: Path) -> Path:
    """Write a tekken.json with 20 special tokens, all bytes and all prefixes of a few words to a folder."""
    lines = write_tiktoken(folder / "ranks").read_text().splitlines()
    (folder / "ranks").unlink()
    vocab = [{"rank": rank, "token_bytes": line.split()[0]} for rank, line in enumerate(lines)]
    sizes = {"default_vocab_size": 20 + len(vocab), "default_num_special_tokens": 20}
    spec = {"config": {"pattern": r" ?\p{L}+|.|\s+", **sizes}, "vocab": vocab}
    (folder / "tekken.json").write_text(json.dumps(spec))
    return folder


def swap_letters(folder: Path) -> Path:
    """Swap the ids of "e" and "t" in a folder's tokenizer.json: another tokenizer of the same size."""
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    vocab = spec["model"]["vocab"]
    vocab["e"], vocab["t"] = vocab["t"], vocab["e"]
    path.write_text(json.dumps(spec))
    return folder


def write_tokenizer_without(folder: Path, byte: int) -> Path:
    """Like `write_json_tokenizer`, but without a token for one control character (< 33), which it drops from texts."""
    path = write_json_tokenizer(folder) / "tokenizer.json"
    settings = json.loads(path.read_text())
    del settings["model"]["vocab"][chr(256 + byte)]  # its character in the byte-level alphabet
    path.write_text(json.dumps(settings))
    return folder


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    """Write a JSONL file. A record that is a str is written as it is."""
    lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def numbered_texts(count: int, *, sentences: int = 6) -> list[str]:
    """Different texts. Every sentence of a text contains the number of the text."""
    return [
        "".join(f"Tower {idx} of the sea has block {row}. " for row in range(1 + (idx * 7) % sentences))
        for idx in range(count)
    ]


def write_shards(
    folder: Path, tokenizer: Path, texts: list[str], *, max_tokens: int = 512, shard_bytes: int = 1 << 13
) -> ShardSet:
    """Write shards of a few records each, one record per text."""
    source = folder.with_suffix(".jsonl")
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    build_shards([source], folder, tokenizer, max_tokens=max_tokens, min_tokens=2, shard_bytes=shard_bytes)
    return ShardSet(folder)
