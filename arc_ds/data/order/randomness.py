"""Random numbers as pure functions of a key.

They are raw Philox output, and permutations use a stable sort. Both are fixed by definition. Methods of numpy's
Generator may change between releases, which would change the order of a resumed run.
"""

from __future__ import annotations

import hashlib
import struct
import threading

import numpy as np
from numpy.typing import NDArray

_NO_WORDS = np.zeros(4, dtype=np.uint64)


class _Generator(threading.local):
    """One generator per thread. Creating a generator takes ten times as long as setting a new key."""

    def __init__(self) -> None:
        self.philox = np.random.Philox(key=0)

    def restart(self, key: NDArray[np.uint64]) -> np.random.Philox:
        """The generator at the start of a key, uint64 [2]."""
        self.philox.state = {
            "bit_generator": "Philox",
            "state": {"counter": _NO_WORDS, "key": key},
            "buffer": _NO_WORDS,
            "buffer_pos": 4,
            "has_uint32": 0,
            "uinteger": 0,
        }
        return self.philox


_generator = _Generator()


def random_words(count: int, *key: int | str) -> NDArray[np.uint64]:
    """`count` random 64-bit words, a pure function of the key (seed, purpose, indices …). numpy integers and Python
    integers give the same words."""
    plain = tuple(part if isinstance(part, str) else int(part) for part in key)
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=16).digest()
    return _generator.restart(np.array(struct.unpack("<2Q", digest), dtype=np.uint64)).random_raw(count)


def permutation(count: int, *key: int | str) -> NDArray[np.int64]:
    """A permutation of 0 … count - 1, int64 [count], a pure function of the key."""
    return np.argsort(random_words(count, *key), kind="stable")
