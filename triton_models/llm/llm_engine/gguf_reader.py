"""Reads a GGUF file: its metadata, and its tensors, as they are or dequantised to fp32.

Owns the header's layout (the GGUF specification, versions 2 and 3, of the ggml project); the block
formats of quantised tensors are left to the `gguf` package. Invariants: nothing is read past the
file's end, whatever its counts claim; every tensor that is listed lies wholly inside the file. The
package's own reader is not used, since it fails on a damaged file without naming the tensor, and
spends seconds on the vocabulary.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from .errors import ModelLoadError

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_SCALAR_FORMATS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_STRING, _ARRAY = 8, 9
_DIMENSION_BOUND = 4


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies, and its shape in numpy's order (the fastest dimension last)."""

    name: str
    shape: tuple[int, ...]
    quantization: GGMLQuantizationType
    offset: int
    byte_count: int


class GgufFile:
    """An open GGUF file; `metadata` holds scalars and strings, arrays only by their length.

    `strings` and `integers` read an array when it is asked for.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise ModelLoadError(f"{path}: cannot be read: {error}") from error
        self._position = 0
        self.metadata: dict[str, object] = {}
        self._string_arrays: dict[str, int] = {}
        self._scalar_arrays: dict[str, tuple[str, int]] = {}
        self.tensors: dict[str, TensorEntry] = {}
        self._read_header()

    def tensor(self, name: str, slices: tuple[slice, ...] = ()) -> np.ndarray:
        """The tensor, or its part of so many axes' slices, dequantised, fp32; little else of it is read."""
        entry = self.tensors[name]
        block_size, _ = GGML_QUANT_SIZES[entry.quantization]
        rows, columns = _spans(entry, slices)
        blocks = range(columns.start // block_size, -(-columns.stop // block_size))
        try:
            values = dequantize(self._raw(entry, rows, blocks), entry.quantization)
        except NotImplementedError as error:
            raise self._bad(f"tensor {name} is {entry.quantization.name}: not supported") from error
        first = columns.start - blocks.start * block_size
        values = values[:, first : first + len(columns)].astype(np.float32)
        return values if len(entry.shape) > 1 else values[0]

    def raw_rows(self, name: str, slices: tuple[slice, ...] = ()) -> np.ndarray | None:
        """A matrix, or a part of it, as it lies in the file, [rows, bytes] uint8; None where blocks would be torn."""
        entry = self.tensors[name]
        block_size, _ = GGML_QUANT_SIZES[entry.quantization]
        rows, columns = _spans(entry, slices)
        if columns.start % block_size or columns.stop % block_size:
            return None
        return self._raw(entry, rows, range(columns.start // block_size, columns.stop // block_size))

    def _raw(self, entry: TensorEntry, rows: range, blocks: range) -> np.ndarray:
        block_size, block_bytes = GGML_QUANT_SIZES[entry.quantization]
        raw = np.frombuffer(self._bytes, np.uint8, entry.byte_count, entry.offset)
        raw = raw.reshape(-1, entry.shape[-1] // block_size * block_bytes)
        return raw[rows.start : rows.stop, blocks.start * block_bytes : blocks.stop * block_bytes]

    def strings(self, name: str) -> list[str]:
        """The texts of an array field; ModelLoadError where there is none of this name."""
        if name not in self._string_arrays:
            raise self._bad(f"there is no field {name} that is an array of texts")
        self._position = self._string_arrays[name]
        return [self._string() for _ in range(self._scalar("<Q"))]

    def integers(self, name: str) -> list[int]:
        """The numbers of an array field; ModelLoadError where there is none of this name."""
        if name not in self._scalar_arrays:
            raise self._bad(f"there is no field {name} that is an array of numbers")
        form, self._position = self._scalar_arrays[name]
        count = self._scalar("<Q")
        return np.frombuffer(self._take(count * struct.calcsize(form)), form.replace("?", "b")).astype(int).tolist()

    def _read_header(self) -> None:
        if self._take(4) != _MAGIC:
            raise self._bad("it does not begin with GGUF")
        version = self._scalar("<I")
        if version not in _VERSIONS:
            raise self._bad(f"version {version}, expected one of {_VERSIONS}")
        tensor_count, field_count = self._scalar("<Q"), self._scalar("<Q")
        for _ in range(field_count):
            name = self._string()
            self.metadata[name] = self._value(self._scalar("<I"), name)
        listed = [self._tensor_listing() for _ in range(tensor_count)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1:
            raise self._bad(f"general.alignment is {alignment!r}, expected a positive integer")
        data_start = -(-self._position // alignment) * alignment
        for name, shape, kind, offset in listed:
            self.tensors[name] = self._entry(name, shape, kind, data_start + offset)

    def _tensor_listing(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimension_count = self._scalar("<I")
        if not 1 <= dimension_count <= _DIMENSION_BOUND:
            raise self._bad(f"tensor {name} has {dimension_count} dimensions, expected 1 to 4")
        fastest_first = [self._scalar("<Q") for _ in range(dimension_count)]
        return name, tuple(reversed(fastest_first)), self._scalar("<I"), self._scalar("<Q")

    def _entry(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> TensorEntry:
        try:
            quantization = GGMLQuantizationType(kind)
        except ValueError as error:
            raise self._bad(f"tensor {name} has type {kind}, which is not known") from error
        block_size, block_bytes = GGML_QUANT_SIZES[quantization]
        if shape[-1] % block_size:
            raise self._bad(f"tensor {name} has rows of {shape[-1]}, not a multiple of {block_size}")
        byte_count = math.prod(shape) // block_size * block_bytes
        if offset + byte_count > len(self._bytes):
            raise self._bad(
                f"truncated: tensor {name} ends at byte {offset + byte_count}, the file has {len(self._bytes)}"
            )
        return TensorEntry(name, shape, quantization, offset, byte_count)

    def _value(self, kind: int, name: str) -> object:
        if kind in _SCALAR_FORMATS:
            return self._scalar(_SCALAR_FORMATS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._bad(f"field {name} has type {kind}, which is not known")
        element_kind, start = self._scalar("<I"), self._position
        count = self._scalar("<Q")
        if element_kind in _SCALAR_FORMATS:
            self._scalar_arrays[name] = (_SCALAR_FORMATS[element_kind], start)
            self._take(count * struct.calcsize(_SCALAR_FORMATS[element_kind]))
        elif element_kind == _STRING:
            self._string_arrays[name] = start
            for _ in range(count):
                self._take(self._scalar("<Q"))
        else:
            raise self._bad(f"field {name} is an array of type {element_kind}: not supported")
        return count

    def _string(self) -> str:
        return self._take(self._scalar("<Q")).decode("utf-8", "replace")

    def _scalar(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _take(self, count: int) -> bytes:
        end = self._position + count
        if end > len(self._bytes):
            raise self._bad(f"truncated: the header wants byte {end}, the file has {len(self._bytes)}")
        taken = self._bytes[self._position : end]
        self._position = end
        return taken

    def _bad(self, what: str) -> ModelLoadError:
        return ModelLoadError(f"{self.path}: {what}")


def _spans(entry: TensorEntry, slices: tuple[slice, ...]) -> tuple[range, range]:
    """The rows and columns that the slices choose; a tensor of one axis is one row."""
    rows, columns, *_ = (*(slice(None),) * (len(entry.shape) == 1), *slices, slice(None), slice(None))
    return range(math.prod(entry.shape[:-1]))[rows], range(entry.shape[-1])[columns]
