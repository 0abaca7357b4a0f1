"""Code and message of an error that ends a rank."""

from __future__ import annotations

import sys
import traceback

import torch
import torch.distributed as torch_dist

from arc_ds.errors import ArcError, words_of
from arc_ds.launch import heartbeat
from arc_ds.launch.exit_codes import EXIT_FAILED, exit_code_of
from arc_ds.system import activity, dist

# Packages whose functions call collectives.
_COLLECTIVES = ("torch.distributed", "deepspeed")
# A RuntimeError from elsewhere may also be due to a lost rank.
_SHORT_WAIT_S = 3.0


def report(error: BaseException) -> tuple[int, str]:
    """Exit code and message of the error that ends this rank. Tells the other ranks, which end with this message.

    If a collective failed because another rank is lost, this function does not return: the heartbeat's thread ends the
    process with the name of that rank.
    """
    beats = heartbeat.current()
    if isinstance(error, ArcError):
        code, message = exit_code_of(error), str(error)
    else:
        if beats is not None and isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            beats.wait_for_verdict(None if _is_of_collective(error) else _SHORT_WAIT_S)
        sys.stderr.write(f"rank {dist.rank()} failed:\n{''.join(traceback.format_exception(error))}")
        code = EXIT_FAILED
        message = f"{dist.rank_in_words()} failed at {activity.now}: {type(error).__name__}: {words_of(error)}"
    if beats is not None:
        beats.fail(code, message)
    return code, message


def _is_of_collective(error: BaseException) -> bool:
    """Whether a process group raised the error. Gloo raises plain RuntimeErrors, so the stack decides."""
    modules = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return isinstance(error, torch_dist.DistError) or bool(modules and modules[-1].startswith(_COLLECTIVES))
