"""The command line: one table of commands, each in a module that is imported only when its command is asked for."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from arc_ds.errors import ArcError
from arc_ds.launch.exit_codes import EXIT_USER_ERROR, exit_code_of
from arc_ds.version import __version__


class Command(NamedTuple):
    """A command. Its module has `add_parser(subparsers)`, which sets `run=function(namespace) -> exit code`."""

    module: str
    help: str


COMMANDS = {
    "train": Command("arc_ds.launch.wrapper", "train a config on all local devices, or as one rank of a launcher"),
    "shards": Command("arc_ds.commands.shards", "build, check, show and measure webdataset shards"),
    "export": Command("arc_ds.commands.export", "turn a run's checkpoint into weights that others can load"),
    "compress": Command("arc_ds.commands.generate", "compress texts into vectors"),
    "generate": Command("arc_ds.commands.generate", "let a decoder continue a prompt with compressed contexts"),
    "doctor": Command("arc_ds.commands.doctor", "show what this machine has, what is missing, and the cure"),
    "demo": Command("arc_ds.commands.demo", "build shards, train, resume, export and use a small ARC-Encoder"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    An `ArcError` is printed as one message without a traceback; a user's mistake gives exit code 2, a run that cannot
    go on gives 1.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else ""
    if name not in COMMANDS:
        _overview().parse_args(argv or ["--help"])
        return EXIT_USER_ERROR
    try:
        if name == "train":
            # `train` hands its words to the launcher as they are: the ranks parse them again.
            return int(import_module(COMMANDS[name].module).main(argv[1:]))
        namespace = _parser(name).parse_args(argv)
        code = int(namespace.run(namespace))
        sys.stdout.flush()
        return code
    except ArcError as error:
        print(f"arc-ds {name}: {error}", file=sys.stderr)
        return exit_code_of(error)
    except KeyboardInterrupt:
        print(f"arc-ds {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Who read the output has enough (| head). Python would complain again when it closes the output at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _parser(name: str) -> argparse.ArgumentParser:
    """The parser of one command, whose module is imported here."""
    parser = argparse.ArgumentParser(prog="arc-ds")
    import_module(COMMANDS[name].module).add_parser(parser.add_subparsers(dest="command", required=True))
    return parser


def _overview() -> argparse.ArgumentParser:
    """Lists the commands for `--help` and for an unknown one, without importing any of them."""
    parser = argparse.ArgumentParser(
        prog="arc-ds", description="Train, export and use ARC-Encoders. `arc-ds COMMAND --help` tells more."
    )
    parser.add_argument("--version", action="version", version=f"arc-ds {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparsers.add_parser(name, help=command.help)
    return parser


if __name__ == "__main__":
    sys.exit(main())
