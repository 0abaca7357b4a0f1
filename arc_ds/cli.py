"""The command line: a table of commands. A command's module is imported only when that command runs."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

from arc_ds.errors import ArcError, TrainingError
from arc_ds.launch.exit_codes import EXIT_FAILED, EXIT_USER_ERROR, exit_code_of
from arc_ds.system.packages import missing_package
from arc_ds.version import __version__


class Command(NamedTuple):
    """A command. Its module has `add_parser(subparsers)`, which sets `run=function(namespace) -> exit code`."""

    module: str
    help: str


COMMANDS = {
    "train": Command("arc_ds.commands.train", "train a config on all local devices, or as one rank of a launcher"),
    "shards": Command("arc_ds.commands.shards", "build, check, show and measure webdataset shards"),
    "plan": Command("arc_ds.commands.plan", "calculate memory, time and cost of a run before you pay for GPUs"),
    "export": Command("arc_ds.commands.export", "convert a run's checkpoint to weights that other programs can load"),
    "inspect": Command("arc_ds.commands.inspect", "say what weights are, and whether they serve as encoder or decoder"),
    "import": Command("arc_ds.commands.import_", "turn a released ARC-Encoder into a checkpoint that ARC-DS reads"),
    "compress": Command("arc_ds.commands.compress", "compress texts into vectors"),
    "generate": Command("arc_ds.commands.generate", "let a decoder continue prompts with compressed contexts"),
    "eval": Command("arc_ds.commands.eval", "evaluate systems on datasets, score, compare and report"),
    "compare": Command("arc_ds.commands.compare", "compare training runs: configs, curves, scores, speed and memory"),
    "serve": Command("arc_ds.commands.serve", "serve OpenAI's API; documents are read in compressed form"),
    "ui": Command("arc_ds.commands.ui", "open the MLflow store of a folder of runs in a browser"),
    "doctor": Command("arc_ds.commands.doctor", "check this machine and say how to fix what is missing"),
    "demo": Command("arc_ds.commands.demo", "build shards, train, resume, export and use a small ARC-Encoder"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    An `ArcError` is printed without a traceback. The exit code is 2 for a user's mistake. `train` has a code for each
    cause (`launch.exit_codes`).
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else ""
    _prepare_output()
    if name not in COMMANDS:
        _overview().parse_args(argv or ["--help"])
        return EXIT_USER_ERROR
    try:
        if name == "train":
            # `train` passes its arguments to the launcher unparsed; the ranks parse them.
            return int(import_module(COMMANDS[name].module).main(argv[1:]))
        namespace = _parse(name, argv)
        code = int(namespace.run(namespace))
        sys.stdout.flush()
        return code
    except ArcError as error:
        print(f"arc-ds {name}: {error}", file=sys.stderr)
        if name == "train":
            return exit_code_of(error)
        return EXIT_FAILED if isinstance(error, TrainingError) else EXIT_USER_ERROR
    except ModuleNotFoundError as error:
        if (missing := missing_package(error.name or "")) is None:
            raise
        print(f"arc-ds {name}: {missing}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print(f"arc-ds {name}: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        is_pipe = isinstance(error, BrokenPipeError)  # the reader closed it early (| head)
        if not is_pipe and _output_works():
            raise
        # Without the redirect Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if is_pipe:
            return 128 + signal.SIGPIPE
        print(f"arc-ds {name}: standard output cannot be written: {error.strerror or error}", file=sys.stderr)
        return EXIT_FAILED


def _prepare_output() -> None:
    """Keep output streams from ending a command: replace what they cannot encode; discard the text of closed ones.

    Standard error replaces such characters already.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="replace")


def _output_works() -> bool:
    """Whether standard output can be written after an OSError, which does not say what raised it."""
    try:
        print(flush=True)  # a flush alone would succeed, because Python has dropped the text that it could not write
    except OSError:
        return False
    return True


def _parse(name: str, argv: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments of one command. Overrides may stand between options, as for `train`."""
    parser = _parser(name)
    if name not in ("plan", "demo"):
        return parser.parse_args(argv)
    (subparsers,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    own: argparse.ArgumentParser = subparsers.choices[name]
    return own.parse_intermixed_args(argv[1:])


def _parser(name: str) -> argparse.ArgumentParser:
    """Import the module of one command and build its parser."""
    parser = argparse.ArgumentParser(prog="arc-ds")
    import_module(COMMANDS[name].module).add_parser(parser.add_subparsers(dest="command", required=True))
    return parser


def _overview() -> argparse.ArgumentParser:
    """A parser that lists all commands without importing them, for `--help` and unknown commands."""
    parser = argparse.ArgumentParser(
        prog="arc-ds", description="Train, export and use ARC-Encoders. See `arc-ds COMMAND --help`."
    )
    parser.add_argument("--version", action="version", version=f"arc-ds {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        subparsers.add_parser(name, help=command.help)
    return parser


if __name__ == "__main__":
    sys.exit(main())
