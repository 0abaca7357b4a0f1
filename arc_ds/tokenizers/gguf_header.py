"""The header of a GGUF file: its metadata and the positions of its tensors.

The reader of the `gguf` package makes numpy views of every string of every list, which takes five seconds for a
vocabulary of 49k tokens, in every process. This module therefore parses the header itself. Format: the GGUF
specification of ggml (docs/gguf.md), versions 2 and 3.
"""

from __future__ import annotations

import mmap
import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

# The struct module's code of each type of number.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DEFAULT_ALIGNMENT = 32
_TOKENIZER = "tokenizer."
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


class GgufTensor(NamedTuple):
    """One tensor of the file.

    shape: in PyTorch's order.
    kind: ggml's number of the block format.
    offset: in bytes, from the start of the tensor data.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int


class GgufHeader(NamedTuple):
    """The parsed header.

    metadata: values by key.
    tensors: tensors by name.
    data_start: byte position of the tensor data.
    """

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]
    data_start: int


def gguf_parts(path: Path) -> tuple[Path, ...]:
    """All files of the GGUF model to which a file belongs, in order, whether they exist or not.

    The names of a split model end in -00001-of-00003.gguf and so on. Its first file holds the metadata.
    """
    match = _PART.fullmatch(path.name)
    if match is None:
        return (path,)
    stem, _, count = match.groups()
    parts = (path.with_name(f"{stem}-{number:05d}-of-{count}.gguf") for number in range(1, int(count) + 1))
    return tuple(parts) or (path,)


def gguf_models(folder: Path) -> list[tuple[Path, ...]]:
    """The GGUF models in a folder, each as its files (`gguf_parts`)."""
    return sorted({gguf_parts(path) for path in folder.glob("*.gguf") if path.is_file()})


def read_gguf_header(path: Path, *, with_tokenizer: bool = False) -> GgufHeader:
    """Read the header of a GGUF file. Metadata values are str, int, float, bool and lists.

    path: the file.
    with_tokenizer: whether the lists of the tokenizer are kept, which are long.
    Raises ValueError if the file is not little-endian GGUF of version 2 or 3, or ends within the header.
    """
    with path.open("rb") as file:
        if len(head := file.read(24)) < 24 or head[:4] != b"GGUF":
            raise ValueError("it does not begin with a GGUF header")
        _, version, num_tensors, num_keys = struct.unpack("<4sIQQ", head)
        if version not in (2, 3):
            raise ValueError(f"its GGUF version is {version}, expected 2 or 3")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                return _HeaderReader(data, len(head)).header(num_tensors, num_keys, with_tokenizer)
            except (struct.error, IndexError, OverflowError, MemoryError, RecursionError, UnicodeDecodeError) as error:
                raise ValueError(f"its header is damaged or cut short ({error})") from error


class _HeaderReader:
    """Reads values one after the other, from a position in the file."""

    def __init__(self, data: mmap.mmap, offset: int) -> None:
        self.data = data
        self.offset = offset

    def header(self, num_tensors: int, num_keys: int, with_tokenizer: bool) -> GgufHeader:
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key, kind = self._string(), self._scalar("I")
            if kind != _ARRAY:
                metadata[key] = self._string() if kind == _STRING else self._scalar(_code(kind))
                continue
            values = self._list()
            if key.startswith(_TOKENIZER) and with_tokenizer:
                metadata[key] = [value.decode("utf-8") if isinstance(value, bytes) else value for value in values]
            elif not key.startswith(_TOKENIZER) and not any(isinstance(value, bytes) for value in values):
                metadata[key] = values
        tensors = dict(self._tensor() for _ in range(num_tensors))
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"its general.alignment is {alignment!r}, expected a positive number")
        return GgufHeader(metadata, tensors, -(-self.offset // alignment) * alignment)

    def _tensor(self) -> tuple[str, GgufTensor]:
        name = self._string()
        sizes = [self._scalar("Q") for _ in range(self._scalar("I"))]
        shape = tuple(reversed(sizes)) or (1,)
        return name, GgufTensor(shape, self._scalar("I"), self._scalar("Q"))

    def _list(self) -> list[Any]:
        """A list of numbers, of lists, or of strings as bytes. Strings outside the tokenizer need not be UTF-8."""
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind in (_ARRAY, _STRING):
            return [self._list() if kind == _ARRAY else self._bytes() for _ in range(count)]
        return list(self._unpack(f"{count}{_code(kind)}"))

    def _string(self) -> str:
        return self._bytes().decode("utf-8")

    def _bytes(self) -> bytes:
        length = self._scalar("Q")
        raw = self.data[self.offset : self.offset + length]
        if len(raw) != length:
            raise IndexError(f"a string of {length} bytes at byte {self.offset}")
        self.offset += length
        return raw

    def _scalar(self, code: str) -> Any:
        return self._unpack(code)[0]

    def _unpack(self, codes: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + codes, self.data, self.offset)
        self.offset += struct.calcsize("<" + codes)
        return values


def _code(kind: int) -> str:
    if kind not in _SCALARS:
        raise IndexError(f"a value of unknown type {kind}")
    return _SCALARS[kind]
