"""Waiting for events, with a limit that only guards against hangs. No test depends on the speed of the machine."""

from __future__ import annotations

import time
from collections.abc import Callable

# A start of the program takes ten seconds, and many times as long on a busy machine.
LIMIT_S = 900.0


def wait_for(condition: Callable[[], object], failure: str = "waited too long") -> None:
    """Return as soon as `condition()` is true. After `LIMIT_S`, fail with this message."""
    end = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < end, failure
        time.sleep(0.005)
