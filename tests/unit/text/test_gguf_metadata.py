from __future__ import annotations

import struct
from pathlib import Path

import pytest

from tidegate.text.gguf_metadata import ModelFileError, read_metadata


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(key_count: int, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, 0, key_count)


GOOD = b"".join(
    [
        header(5),
        text("name") + struct.pack("<I", 8) + text("é"),
        text("size") + struct.pack("<II", 4, 7),
        text("on") + struct.pack("<I?", 7, True),
        text("words") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text(""),
        text("numbers") + struct.pack("<IIQ3i", 9, 5, 3, 1, -2, 3),
    ]
)


def test_reads_every_kind_of_value(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(GOOD + b"tensors that nobody reads")
    assert read_metadata(path) == {"name": "é", "size": 7, "on": True, "words": ["a", ""], "numbers": [1, -2, 3]}


@pytest.mark.parametrize("size", range(0, len(GOOD), 7))
def test_refuses_a_file_that_is_cut_anywhere(tmp_path: Path, size: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(GOOD[:size])
    with pytest.raises(ModelFileError, match=r"cut\.gguf"):
        read_metadata(path)


@pytest.mark.parametrize(
    "content",
    [
        b"GGML" + GOOD[4:],
        header(1, version=9),
        header(2**60),
        header(1) + text("a") + struct.pack("<I", 99),
        header(1) + text("a") + struct.pack("<IIQ", 9, 4, 2**62),
        header(1) + struct.pack("<Q", 2**63),
        header(1) + text("a") + struct.pack("<IQ", 8, 1) + b"\xff",
    ],
)
def test_refuses_what_is_not_gguf(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError):
        read_metadata(path)


def test_names_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="nowhere"):
        read_metadata(tmp_path / "nowhere")
