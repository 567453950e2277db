"""The contents of files on disk: one file each, by its id.

A content is written beside, made durable and then renamed, so that a name that is there is whole and survives a power
cut. What has no row in the store belongs to an act that was cut off before it was acknowledged: `sweep` removes it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Container
from pathlib import Path
from typing import IO, Final
from uuid import uuid4

PARTIAL: Final = ".partial"

_ID: Final = re.compile(r"file-[0-9a-f]{32}")


class FileFolder:
    """A folder of contents."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def begin(self, file_id: str) -> PartialFile:
        """A content that is not there until it is kept."""
        return PartialFile(self._path(file_id))

    def open(self, file_id: str) -> IO[bytes]:
        """Opens a content to read it.

        Raises:
            FileNotFoundError: it was removed.
        """
        return self._path(file_id).open("rb")

    def remove(self, file_id: str) -> None:
        """Removes a content; one that is gone is no fault."""
        self._path(file_id).unlink(missing_ok=True)

    def sweep(self, known: Container[str]) -> int:
        """Removes everything that is not a known file's; answers how much. Nothing may be written meanwhile."""
        leftovers = [path for path in self._directory.iterdir() if path.name not in known]
        for path in leftovers:
            path.unlink()
        return len(leftovers)

    def _path(self, file_id: str) -> Path:
        assert _ID.fullmatch(file_id), file_id
        return self._directory / file_id


class PartialFile:
    """A content that is being written; it must be kept or dropped."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(path.name + PARTIAL)
        self._file = self._partial.open("wb")
        self.byte_count = 0

    def write(self, data: bytes) -> None:
        """Appends."""
        self._file.write(data)
        self.byte_count += len(data)

    def keep(self) -> None:
        """Makes the content durable under its name."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._partial.rename(self._path)
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def drop(self) -> None:
        """Leaves nothing behind of what was not kept."""
        self._file.close()
        self._partial.unlink(missing_ok=True)


def new_file_id() -> str:
    """An id that no other file has and nobody guesses."""
    return f"file-{uuid4().hex}"
