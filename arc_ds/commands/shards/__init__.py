"""`arc-ds shards …`: one module per subcommand.

A subcommand is a module of this package with `add_parser(commands)`, which adds its parser and sets
`run=function(namespace) -> exit code`. To register it, add its name to `SUBCOMMANDS`.
"""

from __future__ import annotations

import argparse
from importlib import import_module

SUBCOMMANDS = ("build", "check", "convert", "index", "show", "stats", "tokenize")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `shards` and its subcommands."""
    commands = subparsers.add_parser("shards").add_subparsers(dest="shards_command", required=True)
    for name in SUBCOMMANDS:
        import_module(f"{__name__}.{name}").add_parser(commands)
