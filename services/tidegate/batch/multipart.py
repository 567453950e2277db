"""An uploaded file out of a request's body, piece by piece: multipart/form-data (RFC 7578), or the file itself.

Never holds more than a piece and the small fields. The parser is python-multipart's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from tidegate.common.errors import Reason, TidegateError

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

PLAIN_TYPES: Final = frozenset({b"application/jsonl", b"application/x-ndjson"})
"""A body of these types is the file."""

FIELDS: Final = frozenset({"purpose"})
"""Beside the file."""

BOUNDARY_BYTES_LIMIT: Final = 70
"""RFC 2046."""

DEFAULT_FILENAME: Final = "batch.jsonl"
LONGEST_FILENAME: Final = 255
"""Characters."""

FIELD_BYTES_LIMIT: Final = 1024
PART_COUNT_LIMIT: Final = 16
HEADER_BYTES_LIMIT: Final = 4096
"""Of what stands beside the file."""


class Upload:
    """Takes a body and gives out the file in it.

    Args:
        write: gets the file's bytes, in order.

    Raises:
        TidegateError: the type is none of those that are taken.
    """

    def __init__(self, content_type: str, write: Callable[[bytes], object]) -> None:
        self.fields: dict[str, str] = {}
        self.filename = DEFAULT_FILENAME
        self.has_file = False
        self._write = write
        self._parts = _Parts(self)
        self._parser: MultipartParser | None = None
        kind, options = parse_options_header(content_type.encode("ascii", errors="replace"))
        boundary = options.get(b"boundary", b"")
        if kind in PLAIN_TYPES:
            self.has_file = True
            self.fields["purpose"] = "batch"
        elif kind == b"multipart/form-data" and 0 < len(boundary) <= BOUNDARY_BYTES_LIMIT:
            self._parser = MultipartParser(
                boundary,
                self._parts.callbacks(),
                max_header_count=PART_COUNT_LIMIT,
                max_header_size=HEADER_BYTES_LIMIT,
            )
        else:
            raise TidegateError(
                Reason.UNSUPPORTED_MEDIA_TYPE, "The body must be multipart/form-data with the fields purpose and file."
            )

    def feed(self, data: bytes) -> None:
        """Takes the next piece.

        Raises:
            TidegateError: it is malformed, or something beside the file is too large.
        """
        if self._parser is None:
            self._write(data)
            return
        try:
            self._parser.write(data)
        except FormParserError as error:
            raise TidegateError(Reason.INVALID_HTTP, f"The multipart body is malformed: {error}.") from error

    def finish(self) -> None:
        """Takes the end of the body.

        Raises:
            TidegateError: it ends too soon, or the fields are not those of an upload for a batch.
        """
        if self._parser is not None and not self._parts.is_complete:
            raise TidegateError(Reason.INVALID_HTTP, "The multipart body ends before its last boundary.")
        unknown = sorted(self.fields.keys() - FIELDS)
        if unknown:
            message = f"The field '{unknown[0]}' is not supported."
            raise TidegateError(Reason.UNSUPPORTED_PARAMETER, message, field=unknown[0])
        if "purpose" not in self.fields:
            raise _missing("purpose")
        if self.fields["purpose"] != "batch":
            raise TidegateError(Reason.INVALID_VALUE, "purpose must be 'batch'.", field="purpose")
        if not self.has_file:
            raise _missing("file")

    def take_file_bytes(self, data: bytes) -> None:
        """The next bytes of the file's part."""
        self._write(data)


class _Parts:
    """What the parser tells of one part after the other."""

    def __init__(self, upload: Upload) -> None:
        self.is_complete = False
        self._upload = upload
        self._count = 0
        self._name = ""
        self._is_file = False
        self._headers: dict[bytes, bytes] = {}
        self._header_name = b""
        self._header_value = b""
        self._value = b""

    def callbacks(self) -> MultipartCallbacks:
        """By the parser's names."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_text,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._end,
            "on_end": self._finished,
        }

    def _begin(self) -> None:
        self._count += 1
        if self._count > PART_COUNT_LIMIT:
            raise TidegateError(Reason.INVALID_HTTP, f"The body has more than {PART_COUNT_LIMIT} parts.")
        self._headers, self._value = {}, b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _header_text(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition"))
        self._name = options.get(b"name", b"").decode(errors="replace")
        self._is_file = self._name == "file"
        if self._is_file:
            if self._upload.has_file:
                raise TidegateError(Reason.INVALID_VALUE, "There is more than one file.", field="file")
            self._upload.has_file = True
            given = options.get(b"filename", b"").decode(errors="replace")
            self._upload.filename = given[:LONGEST_FILENAME] or DEFAULT_FILENAME

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._is_file:
            self._upload.take_file_bytes(data[start:end])
            return
        self._value += data[start:end]
        if len(self._value) > FIELD_BYTES_LIMIT:
            message = f"The field is longer than {FIELD_BYTES_LIMIT} bytes."
            raise TidegateError(Reason.INVALID_VALUE, message, field=self._name)

    def _end(self) -> None:
        if not self._is_file:
            self._upload.fields[self._name] = self._value.decode(errors="replace")

    def _finished(self) -> None:
        self.is_complete = True


def _missing(name: str) -> TidegateError:
    return TidegateError(Reason.MISSING_REQUIRED_PARAMETER, f"Missing required parameter: {name}.", field=name)
