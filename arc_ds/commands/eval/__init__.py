"""`arc-ds eval …`: one module per subcommand.

A subcommand is a module of this package with `HELP`, `add_arguments(parser)` and `run(namespace) -> exit code`. To
register it, add its name to `SUBCOMMANDS`. The command has no underscore at the end: `import_` is `arc-ds eval import`.
"""

from __future__ import annotations

import argparse
from importlib import import_module

SUBCOMMANDS: tuple[str, ...] = (
    "run",
    "score",
    "compare",
    "import_",
    "report",
)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command `eval` and its subcommands."""
    commands = subparsers.add_parser("eval").add_subparsers(dest="eval_command", required=True)
    for name in SUBCOMMANDS:
        module = import_module(f"{__name__}.{name}")
        parser = commands.add_parser(name.rstrip("_"), help=module.HELP)
        module.add_arguments(parser)
        parser.set_defaults(run=module.run)
