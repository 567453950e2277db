"""The load generator's HTTP/1.1, against servers that answer byte by byte what a test says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import asynccontextmanager

import httptools
import pytest

from tidegate.bench.clients import http1

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[None, None, None]]

OK = b"HTTP/1.1 200 OK\r\nX-Request-Id: one\r\ncontent-length: 4\r\n\r\ntide"


class Kept:
    """A response as it came."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.chunks: list[bytes] = []

    def head(self, status: int, headers: http1.Headers) -> None:
        self.status, self.headers = status, headers

    def content(self, chunk: bytes) -> None:
        self.chunks.append(chunk)


class Failing(Kept):
    def content(self, chunk: bytes) -> None:
        raise LookupError(chunk)


@asynccontextmanager
async def connections(serve: Serve):
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server:
        client = http1.Connections(f"127.0.0.1:{port}")
        try:
            yield client
        finally:
            client.close()


async def read_request(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.split(b"\r\n") if line.startswith(b"content-length: "))
    return head, await reader.readexactly(int(length.partition(b" ")[2]))


async def test_a_connection_is_used_again_and_again():
    seen: list[list[tuple[bytes, bytes]]] = []

    async def serve(reader, writer):
        requests: list[tuple[bytes, bytes]] = []
        seen.append(requests)
        while True:
            requests.append(await read_request(reader))
            writer.write(OK)

    async with connections(serve) as client:
        await client.start()
        for body in (b"one", b"two"):
            await client.post("/v1/it", {"x-service-class": "batch"}, body, kept := Kept())
            assert (kept.status, b"".join(kept.chunks)) == (200, b"tide")
            assert kept.headers["x-request-id"] == "one"
    assert [[body for _, body in requests] for requests in seen] == [[b"one", b"two"]]
    head = seen[0][0][0]
    assert head.startswith(b"POST /v1/it HTTP/1.1\r\nhost: 127.0.0.1:")
    assert b"\r\nx-service-class: batch\r\n" in head


async def test_each_request_under_way_has_a_connection_of_its_own():
    count = 0
    together = asyncio.Event()

    async def serve(reader, writer):
        nonlocal count
        await read_request(reader)
        count += 1
        if count == 3:
            together.set()
        await together.wait()
        writer.write(OK)

    async with connections(serve) as client:
        await asyncio.gather(*(client.post("/", {}, b"", Kept()) for _ in range(3)))
    assert count == 3


async def test_pieces_are_handed_on_as_they_come():
    more = asyncio.Event()

    async def serve(reader, writer):
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n")
        await more.wait()
        for byte in b"3\r\ntwo\r\n0\r\n\r\n":
            writer.write(bytes([byte]))
            await asyncio.sleep(0)

    class Watching(Kept):
        def content(self, chunk: bytes) -> None:
            super().content(chunk)
            more.set()

    async with connections(serve) as client:
        await client.post("/", {}, b"", kept := Watching())
    assert kept.chunks[0] == b"one"
    assert b"".join(kept.chunks) == b"onetwo"


async def test_an_interim_response_is_passed_over():
    async def serve(reader, writer):
        await read_request(reader)
        writer.write(b"HTTP/1.1 100 Continue\r\nx-interim: yes\r\n\r\n" + OK)

    async with connections(serve) as client:
        await client.post("/", {}, b"", kept := Kept())
    assert (kept.status, b"".join(kept.chunks)) == (200, b"tide")
    assert "x-interim" not in kept.headers


@pytest.mark.parametrize("closing", ["connection: close\r\ncontent-length: 4\r\n", ""])
async def test_a_connection_that_the_server_closes_is_replaced(closing):
    count = 0

    async def serve(reader, writer):
        nonlocal count
        count += 1
        await read_request(reader)
        writer.write(f"HTTP/1.1 200 OK\r\n{closing}\r\ntide".encode())
        writer.close()

    async with connections(serve) as client:
        for _ in range(2):
            await client.post("/", {}, b"", kept := Kept())
            assert b"".join(kept.chunks) == b"tide"
    assert count == 2


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", ConnectionResetError),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\ntide", ConnectionResetError),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\ntide\r\n", ConnectionResetError),
        (b"no HTTP at all\r\n\r\n", httptools.HttpParserError),
    ],
)
async def test_half_an_answer_is_an_error(answer, error):
    async def serve(reader, writer):
        await read_request(reader)
        writer.write(answer)
        writer.close()

    async with connections(serve) as client:
        with pytest.raises(error):
            await client.post("/", {}, b"", Kept())


async def test_what_the_reader_raises_ends_the_exchange():
    async def serve(reader, writer):
        await read_request(reader)
        writer.write(OK)

    async with connections(serve) as client:
        with pytest.raises(LookupError):
            await client.post("/", {}, b"", Failing())


async def test_one_that_leaves_ends_the_connection():
    came, gone = asyncio.Event(), asyncio.Event()

    async def serve(reader, writer):
        await read_request(reader)
        came.set()
        assert not await reader.read()
        gone.set()

    async with connections(serve) as client:
        task = asyncio.create_task(client.post("/", {}, b"", Kept()))
        await came.wait()
        task.cancel()
        async with asyncio.timeout(10):
            await gone.wait()


async def test_nobody_listens():
    with pytest.raises(OSError, match=r"127\.0\.0\.1:1: "):
        await http1.Connections("127.0.0.1:1").start()
