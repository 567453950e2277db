"""HTTP/1.1 for clients that cost little: what arrives is handed on as it comes, and no task wakes for it.

No limit of its own on connections, for the sender has one; no time-outs of its own but for connecting; no redirects, no
proxies, no decompression. The bytes of a response are parsed by httptools.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Final, Protocol, cast

import httptools

CONNECT_SECONDS: Final = 10.0

Headers = dict[str, str]
"""By lower-case name; of a name that comes more than once, the last."""


class Response(Protocol):
    """Is told of a response as it comes. What it raises ends the exchange."""

    def head(self, status: int, headers: Headers) -> None: ...

    def content(self, chunk: bytes) -> None: ...


class Connections:
    """Connections to one address: one a request under way, kept open afterwards.

    Args:
        address: host:port.
    """

    def __init__(self, address: str) -> None:
        self._host, _, port = address.rpartition(":")
        self._port = int(port)
        self._address = address
        self._open: set[_Connection] = set()
        self._idle: list[_Connection] = []

    async def start(self) -> None:
        """Raises OSError when nothing listens there."""
        self._idle.append(await self._connect())

    async def post(self, path: str, headers: Mapping[str, str], body: bytes, response: Response) -> None:
        """Sends one request and waits for the end of its response; cancelling it ends the connection.

        Raises:
            OSError: there is no connection, or it broke before the response was whole.
            httptools.HttpParserError: what came is no HTTP.
        """
        fields = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"POST {path} HTTP/1.1\r\nhost: {self._address}\r\ncontent-length: {len(body)}\r\n{fields}\r\n"
        connection = self._idle.pop() if self._idle else await self._connect()
        if await connection.exchange(head.encode("latin-1") + body, response):
            self._idle.append(connection)

    def close(self) -> None:
        """Ends all connections."""
        for connection in tuple(self._open):
            connection.abort()

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                _, connection = await loop.create_connection(lambda: _Connection(self._forget), self._host, self._port)
        except TimeoutError:
            raise OSError(f"{self._address} does not answer within {CONNECT_SECONDS:.0f} s") from None
        except OSError as error:
            raise OSError(f"{self._address}: {error.strerror or error}") from error
        self._open.add(connection)
        return connection

    def _forget(self, connection: _Connection) -> None:
        self._open.discard(connection)
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)


class _Connection(asyncio.Protocol):
    """One request at a time. The methods without an underscore after `connection_lost` are httptools' callbacks."""

    def __init__(self, forget: Callable[[_Connection], None]) -> None:
        self._forget = forget
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._response: Response | None = None
        self._ended: asyncio.Future[bool] | None = None
        self._headers: Headers = {}
        self._has_head = False

    async def exchange(self, request: bytes, response: Response) -> bool:
        """Sends a request and waits for the end of its response; whether the connection can be used again."""
        assert self._transport is not None
        self._response, self._headers, self._has_head = response, {}, False
        self._ended = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            keeps_open = await self._ended
        except BaseException:
            self.abort()
            raise
        finally:
            self._response = self._ended = None
        if not keeps_open:
            self._transport.close()
        return keeps_open and not self._transport.is_closing()

    def abort(self) -> None:
        """Ends the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._ended is None or self._ended.done():
            # Nobody asked for it, or nobody is left who did.
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            self._fail(error.__context__ or error)
        except httptools.HttpParserError as error:
            self._fail(error)

    def connection_lost(self, error: Exception | None) -> None:
        self._forget(self)
        if self._ended is None or self._ended.done():
            return
        is_whole = self._has_head and not self._headers.keys() & {"content-length", "transfer-encoding"}
        if is_whole and error is None:
            self._ended.set_result(False)
        else:
            self._fail(error or ConnectionResetError("the server closed the connection"))

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        assert self._response is not None
        status = self._parser.get_status_code()
        if status >= 200:
            self._has_head = True
            self._response.head(status, self._headers)

    def on_body(self, content: bytes) -> None:
        assert self._response is not None
        self._response.content(content)

    def on_message_complete(self) -> None:
        if not self._has_head:
            self._headers = {}  # An interim response, such as 100.
        elif self._ended is not None and not self._ended.done():
            self._ended.set_result(self._parser.should_keep_alive())

    def _fail(self, error: BaseException) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(error)


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """From retry-after-ms, else from retry-after's whole seconds; None where there is neither."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        with contextlib.suppress(KeyError, ValueError):
            return float(headers[name]) / unit
    return None
