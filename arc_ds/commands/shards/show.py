"""`arc-ds shards show`."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from typing import Any

from arc_ds.batch.groups import GroupRule
from arc_ds.commands.shards.sample_view import SampleView
from arc_ds.data.order.randomness import random_words
from arc_ds.data.tasks import TaskLimits, make_example
from arc_ds.data.tasks.chat import read_layout
from arc_ds.data.tasks.registry import all_samples, all_tasks
from arc_ds.errors import DataError
from arc_ds.shards.reader import ShardSet
from arc_ds.system.user_paths import user_path
from arc_ds.tokenizers import load_tokenizer

_LIMITS = {field.name: field.default for field in fields(TaskLimits) if type(field.default) is int}


HELP = "print samples: contexts coloured, groups marked, targets underlined"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the subcommand."""
    parser.add_argument("folder", type=user_path, metavar="FOLDER")
    parser.add_argument("--tokenizer", type=user_path, required=True, help="the encoder's tokenizer: a file or folder")
    parser.add_argument("--decoder-tokenizer", type=user_path, help="the decoder's tokenizer (default: the encoder's)")
    own = "default: continuation; few_shot for fine-tuning records"
    parser.add_argument("--task", choices=all_samples(), help=own)
    parser.add_argument(
        "--chat-template", choices=("none", "llama2", "chatml", "tokenizer"), default="none", help="default: none"
    )
    parser.add_argument(
        "--in-context-examples",
        type=int,
        default=0,
        metavar="N",
        help="number before each sample (default: %(default)s)",
    )
    parser.add_argument("--first", type=int, default=0, help="first record (default: %(default)s)")
    parser.add_argument("--num", type=int, default=3, help="records to show (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed for windows, examples, answers (default: %(default)s)"
    )
    parser.add_argument(
        "--pooling-factor", type=int, default=8, help="mark groups of this size; 0: none (default: %(default)s)"
    )
    parser.add_argument("--tokens", action="store_true", help="mark tokens, and also show contexts in decoder tokens")
    limits = parser.add_argument_group("limits, as in the data section of a config")
    for name, default in _LIMITS.items():
        option = f"--{name.replace('_', '-')}"
        limits.add_argument(option, type=int, default=default, metavar="N", help="default: %(default)s")


def run(namespace: argparse.Namespace) -> int:
    """Run the subcommand; return its exit code."""
    if namespace.pooling_factor < 0 or namespace.first < 0 or namespace.in_context_examples < 0:
        raise DataError("--pooling-factor, --first and --in-context-examples are counts: expected 0 or more.")
    source = ShardSet(namespace.folder)
    encoder = load_tokenizer(namespace.tokenizer)
    decoder = load_tokenizer(namespace.decoder_tokenizer) if namespace.decoder_tokenizer else encoder
    layout = read_layout(namespace.chat_template, decoder, namespace.decoder_tokenizer or namespace.tokenizer)
    limits = TaskLimits(**{name: getattr(namespace, name) for name in _LIMITS})
    groups = GroupRule("factor", namespace.pooling_factor) if namespace.pooling_factor else None
    view = SampleView(encoder, decoder, colour=sys.stdout.isatty(), groups=groups, tokens=namespace.tokens)
    own = next(task for task in all_tasks().values() if task.record_kinds == (source.manifest.kind,))
    task = namespace.task or own.samples[-1]
    common: dict[str, Any] = {"task": task, "encoder": encoder, "decoder": decoder, "limits": limits, "layout": layout}
    for idx in range(namespace.first, min(namespace.first + namespace.num, len(source))):
        seed = int(random_words(1, namespace.seed, "show", idx)[0])
        examples = _in_context_examples(len(source), idx, namespace.in_context_examples, seed)
        try:
            records = [source.record(record_idx) for record_idx in (idx, *examples)]
            print(view.render(make_example(records, seed=seed, **common), f"record {idx}"))
        except DataError as error:
            print(f"── record {idx} gives no sample: {error}\n")
    return 0


def _in_context_examples(num_records: int, record_idx: int, wanted: int, seed: int) -> list[int]:
    """Choose at most `wanted` distinct other records of the folder."""
    others = min(wanted, num_records - 1)
    step = seed % max(num_records - 1, 1)
    return [(record_idx + 1 + (step + place) % (num_records - 1)) % num_records for place in range(others)]
