"""`arc-ds compress`: texts become vectors, in one file or in a set of shards."""

from __future__ import annotations

import argparse
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from arc_ds.commands.model_options import add_model, chosen_marker, load_model
from arc_ds.commands.text_inputs import (
    STDIN,
    Faults,
    add_on_error,
    id_of,
    is_lines,
    parse_line,
    read_lines,
    read_text,
    size_of,
)
from arc_ds.errors import DataError, TokenizerError
from arc_ds.inference.arc import ArcModel
from arc_ds.inference.vectors import VectorSettings, VectorWriter, model_digest, text_digest
from arc_ds.shards.records import text_of
from arc_ds.system.files import output, write_whole
from arc_ds.system.locks import writing
from arc_ds.system.user_paths import path_argument
from arc_ds.tokenizers import Tokenizer

logger = logging.getLogger(__name__)

_TEXT_SUFFIXES = (".txt", ".md")
_TOKENIZED_TEXTS, _TOKENIZED_CHARACTERS = 256, 1 << 20  # tokenized at once, at most


class Text(NamedTuple):
    """A text to compress. num_bytes: its size in the input, for the progress bar."""

    key: str
    text: str
    num_bytes: int


@dataclass
class Counts:
    """What became of the texts of a run. Texts that an earlier run has compressed count as `earlier` only."""

    texts: int = 0
    tokens: int = 0
    vectors: int = 0
    earlier: int = 0
    empty: int = 0
    duplicates: int = 0
    too_long: int = 0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `arc-ds compress`."""
    parser = subparsers.add_parser(
        "compress",
        description="Compresses texts into vectors. No decoder is loaded. A few text files become one safetensors file "
        "(context_0, context_1, ...). Folders and JSONL files become a folder of safetensors shards with an index; "
        "the same command continues after a stop.",
    )
    add_model(parser)
    parser.add_argument(
        "texts",
        type=path_argument,
        nargs="+",
        help="text files, one context each; folders of .txt and .md files; .jsonl files with an object on each line; - "
        "reads one text from standard input",
    )
    parser.add_argument(
        "--out",
        type=path_argument,
        required=True,
        help="safetensors file to write, which must not exist; for folders, JSONL files or many texts, a folder",
    )
    parser.add_argument("--text-field", default="text", help="field of a JSONL object that holds its text")
    parser.add_argument(
        "--batch-tokens", type=int, default=16384, help="tokens compressed at once (default %(default)s)"
    )
    parser.add_argument("--shard-mb", type=float, default=256, help="size of a shard (default %(default)s)")
    add_on_error(parser)
    parser.set_defaults(run=run_compress)


def run_compress(args: argparse.Namespace) -> int:
    """Run `arc-ds compress`; return 0 on success."""
    is_set = args.out.is_dir() or any(path.is_dir() or is_lines(path) for path in args.texts)
    return _compress_into_set(args) if is_set else _compress_into_file(args)


def _compress_into_file(args: argparse.Namespace) -> int:
    from safetensors.torch import save

    if args.out.exists():
        raise DataError(f"{args.out} already exists: choose another file")
    texts = [read_text(path) for path in args.texts]
    model = load_model(args, [])
    tokens = _tokenizer(model).encode_batch(texts)
    if empty := [path for path, ids in zip(args.texts, tokens, strict=True) if not ids]:
        raise DataError(f"{empty[0]} is empty, so there is nothing to compress: leave it out")
    vectors = model.compress(tokens, decoder=args.decoder_idx, marker=chosen_marker(args.marker, model))
    with output(args.out):
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(args.out, save({f"context_{i}": v.clone() for i, v in enumerate(vectors)}))
    for path, ids, v in zip(args.texts, tokens, vectors, strict=True):
        note = " (longer than in training)" if _is_too_long(len(ids), model) else ""
        print(f"{path}: {len(ids)} tokens -> {v.shape[0]} vectors of {v.shape[1]}{note}")
    return 0


def _compress_into_set(args: argparse.Namespace) -> int:
    if args.out.suffix == ".safetensors" or (args.out.exists() and not args.out.is_dir()):
        raise DataError(f"--out is {args.out}; folders and JSONL files become a folder of shards. Give a folder.")
    if args.batch_tokens < 1 or not 0 < args.shard_mb < math.inf:
        raise DataError("--batch-tokens and --shard-mb must be positive. Leave them out for the usual sizes.")
    files = _files(args.texts)
    model = load_model(args, [])
    tokenizer, marker = _tokenizer(model), chosen_marker(args.marker, model)
    model.check_port(args.decoder_idx, marker)
    settings = VectorSettings(
        model=model_digest(model),
        decoder=args.decoder_idx,
        marker=marker,
        hidden_size=model.spec.decoder_sizes[args.decoder_idx],
    )
    counts, faults = Counts(), Faults(stops=args.on_error == "stop")
    with output(args.out), writing(args.out, "compression"):
        writer = VectorWriter(args.out, settings, shard_bytes=int(args.shard_mb * (1 << 20)))
        with tqdm(desc="compress", total=size_of(files), unit="B", unit_scale=True, disable=None) as bar:
            texts = _new_texts(_read_texts(files, args.text_field, faults), writer.earlier, counts, faults, bar)
            try:
                for batch in _batches(texts, tokenizer, args.batch_tokens, counts):
                    vectors = model.compress([ids for _, ids in batch], decoder=args.decoder_idx, marker=marker)
                    for (text, ids), z_GD in zip(batch, vectors, strict=True):
                        writer.add(text.key, z_GD.cpu(), len(ids), text_digest(text.text))
                        bar.update(text.num_bytes)
                        counts.texts += 1
                        counts.tokens += len(ids)
                        counts.vectors += len(z_GD)
                        counts.too_long += _is_too_long(len(ids), model)
                    bar.set_postfix(texts=counts.texts)
            finally:
                writer.flush()  # a fault or an interrupt loses no vectors
    _report(args.out, counts, settings.hidden_size, writer.num_shards)
    faults.report()
    return 0


def _report(out: Path, counts: Counts, hidden_size: int, num_shards: int) -> None:
    ratio = f", {counts.tokens / counts.vectors:.1f} tokens per vector" if counts.vectors else ""
    print(
        f"{out}: {counts.texts:,} texts, {counts.tokens:,} tokens -> {counts.vectors:,} vectors of {hidden_size}{ratio}"
        f"; {num_shards:,} shards; {counts.earlier:,} texts were there already"
    )
    if counts.empty:
        logger.warning("%d empty texts were left out: give them text, or remove them", counts.empty)
    if counts.duplicates:
        logger.warning(
            "%d texts were left out because an earlier text has the same id: give each record an id of its own, and "
            "name each file once",
            counts.duplicates,
        )
    if counts.too_long:
        logger.warning(
            "%d texts are longer than the contexts of training, so their vectors may lose text: cut each into several",
            counts.too_long,
        )


def _files(paths: Sequence[Path]) -> list[Path]:
    """The input files. Folders are searched for texts. Raises DataError if a path is missing or a folder holds none."""
    files: list[Path] = []
    for path in paths:
        if not path.is_dir():
            if path != STDIN and not path.is_file():
                raise DataError(f"{path} does not exist: expected a text file, a JSONL file or a folder")
            files.append(path)
            continue
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in _TEXT_SUFFIXES and file.is_file())
        visible = [file for file in found if not any(p.startswith(".") for p in file.relative_to(path).parts)]
        if not visible:
            raise DataError(
                f"{path} holds no files that end in {' or '.join(_TEXT_SUFFIXES)}: give other files by name"
            )
        files += visible
    return files


def _read_texts(files: Sequence[Path], field: str, faults: Faults) -> Iterator[Text]:
    """The texts of all files, in order. A text file's id is its path, a line's its field `id` or FILE:LINE."""
    for file in files:
        if not is_lines(file):
            try:
                yield Text(str(file), read_text(file), 0 if file == STDIN else file.stat().st_size)
            except DataError as fault:
                faults.add(fault)
            continue
        for line in read_lines(file):
            try:
                record = parse_line(line)
                given = id_of(record)
                key = f"{file}:{line.number}" if given is None else str(given)
                yield Text(key, text_of(record, field), line.num_bytes)
            except DataError as fault:
                faults.add(fault, line.where)


def _new_texts(
    texts: Iterator[Text], earlier: Mapping[str, str], counts: Counts, faults: Faults, bar: tqdm
) -> Iterator[Text]:
    """The texts that are not empty and whose ids are new.

    earlier: digest of each text of the set.
    """
    seen: set[str] = set()
    for text in texts:
        is_new = text.key not in seen
        seen.add(text.key)
        if is_new and text.key not in earlier and text.text.strip():
            yield text
            continue
        bar.update(text.num_bytes)
        if not is_new:
            counts.duplicates += 1
        elif text.key not in earlier:
            counts.empty += 1
        elif earlier[text.key] == text_digest(text.text):
            counts.earlier += 1
        else:
            faults.add(
                DataError(
                    f"the text {text.key} has changed since the set got its vectors, which are never replaced. Give "
                    "it another id, or compress the texts into another folder."
                )
            )


def _batches(
    texts: Iterator[Text], tokenizer: Tokenizer, max_tokens: int, counts: Counts
) -> Iterator[list[tuple[Text, list[int]]]]:
    """Texts and their tokens, at most `max_tokens` together. A longer text is alone."""
    batch: list[tuple[Text, list[int]]] = []
    num_tokens = 0
    for group in _groups(texts):
        for text, ids in zip(group, tokenizer.encode_batch([text.text for text in group]), strict=True):
            if not ids:
                counts.empty += 1
                continue
            if batch and num_tokens + len(ids) > max_tokens:
                yield batch
                batch, num_tokens = [], 0
            batch.append((text, ids))
            num_tokens += len(ids)
    if batch:
        yield batch


def _groups(texts: Iterator[Text]) -> Iterator[list[Text]]:
    """Texts that are tokenized at once."""
    group: list[Text] = []
    num_characters = 0
    for text in texts:
        group.append(text)
        num_characters += len(text.text)
        if len(group) == _TOKENIZED_TEXTS or num_characters >= _TOKENIZED_CHARACTERS:
            yield group
            group, num_characters = [], 0
    if group:
        yield group


def _is_too_long(num_tokens: int, model: ArcModel) -> bool:
    return model.max_context_tokens is not None and num_tokens > model.max_context_tokens


def _tokenizer(model: ArcModel) -> Tokenizer:
    if model.encoder_tokenizer is None:
        raise TokenizerError("the encoder has no tokenizer: add --encoder-backbone FOLDER, a folder that holds it")
    return model.encoder_tokenizer
