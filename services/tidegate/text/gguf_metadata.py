"""Reads the key-value section at the head of a GGUF file, and nothing after it.

The `gguf` package walks arrays element by element into numpy views, which takes seconds for a vocabulary;
a process that only needs words should be up in a fraction of one. The layout is that of the GGUF
specification (ggml project), versions 2 and 3, little endian.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any, Final

KEY_COUNT_LIMIT: Final = 65_536
"""No real file has more than a few hundred keys; a larger count means that this is not such a file."""

_MAGIC: Final = b"GGUF"
_STRING: Final = 8
_ARRAY: Final = 9
_SCALARS: Final = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_UINT32: Final = _SCALARS[4]
_UINT64: Final = _SCALARS[10]


class ModelFileError(Exception):
    """A model's files cannot be used; the message names the file and what is wrong with it."""


def read_metadata(path: Path) -> dict[str, Any]:
    """The metadata of a GGUF file: key to int, float, bool, str or a list of one of them.

    Raises:
        ModelFileError: the file cannot be read, or is not a GGUF file of a known version.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
            return _Reader(view).metadata()
    except OSError as error:
        raise ModelFileError(f"{path}: {error.strerror or error}") from error
    except (ValueError, struct.error, UnicodeDecodeError, IndexError) as error:
        raise ModelFileError(f"{path}: is not a readable GGUF file: {error}") from error


class _Reader:
    """A position in the file's bytes."""

    def __init__(self, view: mmap.mmap) -> None:
        self._view = view
        self._offset = 0

    def metadata(self) -> dict[str, Any]:
        if self._view[:4] != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        self._offset = 4
        version = self._scalar(_UINT32)
        if version not in (2, 3):
            raise ValueError(f"version {version} is not 2 or 3")
        self._scalar(_UINT64)  # The tensors' count; the tensors come after the metadata and stay unread.
        key_count = self._scalar(_UINT64)
        if key_count > KEY_COUNT_LIMIT:
            raise ValueError(f"{key_count} keys are more than {KEY_COUNT_LIMIT}")
        return {self._string(): self._value(self._scalar(_UINT32)) for _ in range(key_count)}

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise ValueError(f"unknown value type {kind}")
        return self._scalar(_SCALARS[kind])

    def _array(self) -> list[Any]:
        kind = self._scalar(_UINT32)
        count = self._scalar(_UINT64)
        if count > len(self._view):
            raise ValueError(f"an array of {count} elements is longer than the file")
        if kind == _STRING:
            return self._strings(count)
        if kind == _ARRAY:
            return [self._array() for _ in range(count)]
        scalar = _SCALARS.get(kind)
        if scalar is None:
            raise ValueError(f"unknown array type {kind}")
        start = self._offset
        self._offset += count * scalar.size
        return list(struct.unpack_from(f"<{count}{scalar.format[1]}", self._view, start))

    def _strings(self, count: int) -> list[str]:
        """Many strings in one loop without calls: a vocabulary has tens of thousands."""
        view, offset, unpack = self._view, self._offset, _UINT64.unpack_from
        strings: list[str] = []
        for _ in range(count):
            (size,) = unpack(view, offset)
            offset += 8
            strings.append(str(view[offset : offset + size], "utf-8"))
            offset += size
        if offset > len(view):
            raise ValueError("it ends inside an array of strings")
        self._offset = offset
        return strings

    def _scalar(self, scalar: struct.Struct) -> Any:
        (value,) = scalar.unpack_from(self._view, self._offset)
        self._offset += scalar.size
        return value

    def _string(self) -> str:
        size = self._scalar(_UINT64)
        start = self._offset
        self._offset += size
        if self._offset > len(self._view):
            raise ValueError("it ends inside a string")
        return str(self._view[start : self._offset], "utf-8")
