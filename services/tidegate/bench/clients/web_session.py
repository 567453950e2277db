"""HTTP/1.1 for clients that cost little: one aiohttp session, no limit of its own on connections, no time-outs of its
own (the sender has them), no decompression, no proxies."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Final

import aiohttp

CONNECT_SECONDS: Final = 10.0

READ_BYTES: Final = 64 * 1024
"""What one stream may hold unread."""


def open_session() -> aiohttp.ClientSession:
    """A session; one connection a stream under way, kept open afterwards."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_SECONDS),
        auto_decompress=False,
        read_bufsize=READ_BYTES,
        trust_env=False,
    )


async def require_listener(address: str) -> None:
    """Raises OSError when nothing listens at host:port."""
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(host, int(port))
    except TimeoutError:
        raise OSError(f"{address} does not answer within {CONNECT_SECONDS:.0f} s") from None
    except OSError as error:
        raise OSError(f"{address}: {error.strerror or error}") from error
    writer.close()


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """From retry-after-ms, else from retry-after's whole seconds; None where there is neither."""
    for name, unit in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        with contextlib.suppress(KeyError, ValueError):
            return float(headers[name]) / unit
    return None
