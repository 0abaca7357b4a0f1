"""Random numbers as pure functions of a key.

They are raw Philox output, ordered by a stable sort: both are fixed by definition, unlike the methods of numpy's
Generator, which may change between releases and would then change the order of a resumed run.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np
from numpy.typing import NDArray


def random_words(count: int, *key: int | str) -> NDArray[np.uint64]:
    """`count` random 64-bit words, a pure function of the key (seed, purpose, indices …); numpy's integers count as
    Python's."""
    plain = tuple(part if isinstance(part, str) else int(part) for part in key)
    digest = hashlib.blake2b(repr(plain).encode(), digest_size=16).digest()
    return np.random.Philox(key=np.array(struct.unpack("<2Q", digest), dtype=np.uint64)).random_raw(count)


def permutation(count: int, *key: int | str) -> NDArray[np.int64]:
    """A permutation of 0 … count - 1, int64 [count], a pure function of the key."""
    return np.argsort(random_words(count, *key), kind="stable")
