"""The metadata of a GGUF file, read directly.

The `gguf` package makes numpy views of every string of every list, which takes five seconds for a vocabulary of 49k
tokens; each DataLoader worker would wait for it. The header is simple (GGUF specification, version 2 and 3).
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

from arc_ds.errors import TokenizerError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def read_gguf_metadata(path: Path, prefix: str) -> dict[str, Any]:
    """The metadata whose keys begin with `prefix`, keys without it: str, int, float, bool or lists of them.

    TokenizerError where the header is cut short or not little-endian GGUF of version 2 or 3.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            magic, version, _, num_keys = struct.unpack_from("<4sIQQ", data, 0)
            if magic != b"GGUF" or version not in (2, 3):
                raise TokenizerError(f"{path}: expected GGUF version 2 or 3, got {magic!r} version {version}.")
            return _Cursor(data, 24).metadata(num_keys, prefix)
        except (struct.error, IndexError, KeyError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{path}: its GGUF header is damaged or cut short: {error}. Copy it again.") from error


class _Cursor:
    """A place in the header that moves on as values are read."""

    def __init__(self, data: mmap.mmap, offset: int) -> None:
        self.data = data
        self.offset = offset

    def metadata(self, num_keys: int, prefix: str) -> dict[str, Any]:
        found = {}
        for _ in range(num_keys):
            key = self.string()
            value = self.value(self.scalar("I"))
            if key.startswith(prefix):
                found[key.removeprefix(prefix)] = value
        return found

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        element, length = self.scalar("I"), self.scalar("Q")
        if element in (_STRING, _ARRAY):
            return [self.value(element) for _ in range(length)]
        layout = f"<{length}{_SCALARS[element]}"
        values = struct.unpack_from(layout, self.data, self.offset)
        self.offset += struct.calcsize(layout)
        return list(values)

    def scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.offset)
        self.offset += struct.calcsize("<" + code)
        return value

    def string(self) -> str:
        length = self.scalar("Q")
        raw = self.data[self.offset : self.offset + length]
        if len(raw) != length:
            raise IndexError(f"a string of {length} bytes at {self.offset}")
        self.offset += length
        return raw.decode("utf-8")
