"""`arc-ds shards convert`."""

from __future__ import annotations

import argparse
from dataclasses import fields

from arc_ds.shards.building.converters import FORMATS, ConvertOptions, convert_files
from arc_ds.system.user_paths import path_argument

_DEFAULTS = ConvertOptions()


HELP = "convert SQuAD, DROP, TriviaQA or other rows of questions to JSONL for `build --kind fine_tuning`"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the subcommand."""
    parser.add_argument(
        "format", choices=FORMATS, help="the data set; rows: any other rows with a question, its passages and answers"
    )
    parser.add_argument(
        "files",
        nargs="+",
        type=path_argument,
        metavar="FILE",
        help="original JSON files of the data set, or its rows as JSON array, JSON lines, .parquet or .arrow, or a "
        "folder of files of rows",
    )
    parser.add_argument("--out", required=True, type=path_argument, help=".jsonl file to write")
    parser.add_argument(
        "--first-answer",
        action="store_true",
        help="keep only the main answer, for training (default: all answers, for evaluation)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    trivia = parser.add_argument_group("TriviaQA")
    trivia.add_argument(
        "--evidence",
        type=path_argument,
        metavar="FOLDER",
        help="folder of its documents (default: ../evidence, relative to the folder of the file)",
    )
    trivia.add_argument(
        "--passage-words",
        type=int,
        default=_DEFAULTS.passage_words,
        help="approximate words per passage (default: %(default)s)",
    )
    trivia.add_argument(
        "--max-passages",
        type=int,
        default=_DEFAULTS.max_passages,
        help="maximum passages per question (default: %(default)s)",
    )


def run(namespace: argparse.Namespace) -> int:
    """Run the subcommand; return its exit code."""
    options = ConvertOptions(**{field.name: getattr(namespace, field.name) for field in fields(ConvertOptions)})
    done = convert_files(namespace.format, namespace.files, namespace.out, options, overwrite=namespace.overwrite)
    left_out = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in done.skipped.items()) or "none"
    print(f"{namespace.out}: {done.records} records; questions left out: {left_out}")
    return 0
