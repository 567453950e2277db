"""What a run is, for the process that does a part of it, and what comes back: frames of MessagePack over pipes."""

from __future__ import annotations

import asyncio
import struct
from typing import Any, Final

import msgspec

from tidegate.bench.ledger import Record, WorkerFigures
from tidegate.bench.plan import Plan
from tidegate.bench.sender import Progress, Share
from tidegate.bench.targets import Target

_LENGTH: Final = struct.Struct(">Q")


class Job(msgspec.Struct, tag="job", frozen=True):
    """One worker's part of a run. It connects, says Ready, and waits for Begin."""

    plan: Plan
    target: Target
    share: Share


class Begin(msgspec.Struct, tag="begin", frozen=True):
    """The moment of the plan's time 0, on CLOCK_MONOTONIC, which all processes of a machine share."""

    monotonic_seconds: float


class Stop(msgspec.Struct, tag="stop", frozen=True):
    """End early; Done comes all the same."""


class Ready(msgspec.Struct, tag="ready", frozen=True):
    """The worker is connected."""


class Moved(msgspec.Struct, tag="moved", frozen=True):
    """How far the worker is."""

    progress: Progress


class Done(msgspec.Struct, tag="done", frozen=True):
    """The worker's part of the ledger; it takes another job."""

    records: list[Record]
    figures: WorkerFigures


class Broken(msgspec.Struct, tag="broken", frozen=True):
    """The worker cannot do the job."""

    message: str


ToWorker = Job | Begin | Stop
FromWorker = Ready | Moved | Done | Broken

to_worker: Final[msgspec.msgpack.Decoder[ToWorker]] = msgspec.msgpack.Decoder(ToWorker)
from_worker: Final[msgspec.msgpack.Decoder[FromWorker]] = msgspec.msgpack.Decoder(FromWorker)


async def read_frame(reader: asyncio.StreamReader) -> bytes:
    """The next frame.

    Raises:
        asyncio.IncompleteReadError: the other side is gone.
    """
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    return await reader.readexactly(length)


def frame(message: Any) -> bytes:
    """A message as a frame."""
    content = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(content)) + content
