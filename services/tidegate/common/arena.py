"""The shared-memory arena of a host: one writer puts tensors into it, and every process of the host may read them.

The region is a file of /dev/shm: a header page, a table of leases (64 bytes each), and the data. It never grows.

Who writes what: the writer (preprocess, one at a time, by a file lock) allocates and alone writes an entry's
generation, place and expiry. A reader only stores to the two words of its own lease that are the readers':
`released` and `renewed`. Both name the generation that they speak of, so a late store by somebody whose slot was
reused means nothing. Each word is stored with one aligned 8-byte store, so a process that is killed at any point
leaves a consistent region, and no lock is shared.

An entry's generation is odd while its bytes are leased and even while they are free; it only grows. The writer
makes it even before it touches the bytes and odd after it has written them; who copied bytes and finds the
generation unchanged afterwards has a whole copy. Data reach readers by way of a message about them, which orders
the stores.

`now` is `time.monotonic()` everywhere: CLOCK_MONOTONIC is one clock for all processes of a host.
"""

from __future__ import annotations

import base64
import mmap
import os
from typing import Final

import msgspec
import numpy as np
from google.protobuf.message import DecodeError

from tidegate.common.arena_extents import ALIGNMENT_BYTES, FreeExtents
from tidegate.common.arena_region import (
    ENTRY_BYTES,
    ENTRY_WORDS,
    EXPIRY,
    GENERATION,
    HEADER_BYTES,
    LARGEST_GENERATION,
    LENGTH,
    OFFSET,
    RELEASED,
    RENEWED,
    SMALLEST_REGION_BYTES,
    WORD_BYTES,
    ArenaError,
    ArenaUnavailable,
    CorruptHandle,
    ForeignHandle,
    HandleError,
    StaleHandle,
    create_region,
    host_id,
    layout_fault,
    lease_limit,
    lock_existing,
    open_to_read,
    region_path,
    unlink,
)
from tidegate.v1 import tensor_pb2

__all__ = [
    "Arena",
    "ArenaError",
    "ArenaUnavailable",
    "ArenaUsage",
    "CorruptHandle",
    "ForeignHandle",
    "HandleError",
    "StaleHandle",
    "decode_tensor_header",
    "encode_tensor_header",
    "host_id",
    "unlink",
]

RECLAIM_GRACE_SECONDS: Final = 1.0
"""A lease can be renewed until it expires, but its bytes are taken back only so much later: whoever checked just
before the expiry is finished by then."""

LONGEST_HEADER_CHARACTERS: Final = 8_192
"""The bound on an encoded tensor header, below what Envoy lets through."""

_TAG_BITS: Final = 24
_MILLISECOND_BITS: Final = 64 - _TAG_BITS
_LARGEST_NOW_SECONDS: Final = 1e9


class ArenaUsage(msgspec.Struct, frozen=True):
    """What is in use at one moment."""

    byte_count: int
    """Bytes for data, in use or not."""
    free_byte_count: int
    lease_count: int
    """Live leases."""
    lease_limit: int


class Arena:
    """One region, open in this process. Not for several threads at once."""

    def __init__(self, region: str, file_descriptor: int, *, writer: bool) -> None:
        self.region = region
        self._writer = writer
        self._map(file_descriptor)

    @classmethod
    def open(cls, region: str, byte_count: int) -> Arena:
        """Opens the region as its only writer: attaches to what is there, or makes it.

        Live leases of an earlier writer stay. A region of another size or layout is replaced, never resized:
        who has the old one mapped keeps it until it looks again.

        Raises:
            ArenaUnavailable: another process writes to it, or the host has not so much shared memory.
        """
        assert byte_count >= SMALLEST_REGION_BYTES, f"an arena has at least {SMALLEST_REGION_BYTES} bytes"
        byte_count -= byte_count % mmap.PAGESIZE
        path = region_path(region)
        try:
            descriptor = lock_existing(path)
            if descriptor is not None:
                if layout_fault(descriptor) is None and os.fstat(descriptor).st_size == byte_count:
                    arena = cls(region, descriptor, writer=True)
                    if arena._recover():
                        return arena
                    arena.close()
                else:
                    os.close(descriptor)
            arena = cls(region, create_region(path, byte_count), writer=True)
        except OSError as error:
            raise ArenaUnavailable(f"{path}: {byte_count} bytes of shared memory: {error.strerror}") from error
        arena._recover()
        return arena

    @classmethod
    def attach(cls, region: str) -> Arena:
        """Opens the region as a reader.

        Raises:
            ArenaUnavailable: there is none, or its header is not of this version.
        """
        return cls(region, open_to_read(region), writer=False)

    @property
    def byte_count(self) -> int:
        """The size of the whole region, header included, as Triton registers it."""
        return self._byte_count

    def write(
        self, data: bytes | memoryview, *, lease_seconds: float, now: float
    ) -> tensor_pb2.SharedMemoryHandle | None:
        """Puts bytes into the arena under a new lease; None when it is full.

        Args:
            data: at least one byte, contiguous; of a numpy array, its `data`.
        """
        assert self._writer, "only the writer allocates"
        source = memoryview(data).cast("B")
        assert len(source) > 0
        place = self._allocate(len(source))
        if place is None:
            self.reclaim(now)
            place = self._allocate(len(source))
        if place is None:
            return None
        slot, offset = place
        base = self._entry(slot)
        generation = self._words[base + GENERATION] + 1
        self._memory[offset : offset + len(source)] = source
        self._words[base + OFFSET] = offset
        self._words[base + LENGTH] = len(source)
        self._words[base + EXPIRY] = _milliseconds(now + lease_seconds)
        self._words[base + GENERATION] = generation
        return tensor_pb2.SharedMemoryHandle(
            host_id=host_id(),
            region=self.region,
            byte_offset=offset,
            byte_count=len(source),
            lease_id=generation * self._lease_limit + slot,
            generation=generation,
        )

    def read(self, handle: tensor_pb2.SharedMemoryHandle, now: float) -> bytes:
        """Copies the bytes of a handle.

        Raises:
            StaleHandle: the lease ended, or the handle does not fit the region.
            ForeignHandle: it is of another host or region.
        """
        self.verify(handle, now)
        copy = self._memory[handle.byte_offset : handle.byte_offset + handle.byte_count]
        self.verify(handle, now)
        return copy

    def verify(self, handle: tensor_pb2.SharedMemoryHandle, now: float) -> None:
        """Passes when the handle's lease is live; raises as `read` does."""
        if handle.host_id != host_id() or handle.region != self.region:
            raise ForeignHandle(f"the handle is of {handle.host_id}/{handle.region}, this is {host_id()}/{self.region}")
        if not self._is_live(handle, now) and not (self._remapped() and self._is_live(handle, now)):
            raise StaleHandle(f"lease {handle.lease_id} of region {self.region} is not live")

    def renew(self, handle: tensor_pb2.SharedMemoryHandle, lease_seconds: float, now: float) -> bool:
        """Keeps a live lease for so long from now; False when it is not live."""
        try:
            self.verify(handle, now)
        except HandleError:
            return False
        tag = handle.generation % (1 << _TAG_BITS)
        word = tag << _MILLISECOND_BITS | _milliseconds(now + lease_seconds)
        self._words[self._entry(handle.lease_id % self._lease_limit) + RENEWED] = word
        return True

    def release(self, handle: tensor_pb2.SharedMemoryHandle) -> bool:
        """Ends a lease; the writer takes the bytes back when it needs them. False when it was not live."""
        try:
            self.verify(handle, 0.0)
        except HandleError:
            return False
        self._words[self._entry(handle.lease_id % self._lease_limit) + RELEASED] = handle.generation
        return True

    def reclaim(self, now: float) -> int:
        """Takes back the bytes of leases that were released or have run out; returns how many leases."""
        assert self._writer, "only the writer reclaims"
        table = self._table
        generation = table[:, GENERATION]
        tag_matches = table[:, RENEWED] >> _MILLISECOND_BITS == generation % (1 << _TAG_BITS)
        renewed_until = np.where(tag_matches, table[:, RENEWED] % (1 << _MILLISECOND_BITS), 0)
        expiry = np.maximum(table[:, EXPIRY], renewed_until)
        ended = (table[:, RELEASED] == generation) | (expiry < _milliseconds(max(0.0, now - RECLAIM_GRACE_SECONDS)))
        slots = np.flatnonzero((generation % 2 == 1) & ended).tolist()
        for slot in slots:
            base = self._entry(slot)
            self._words[base + GENERATION] += 1
            self._extents.give(self._words[base + OFFSET], self._words[base + LENGTH])
            self._free_slots.append(slot)
        return len(slots)

    def usage(self, now: float) -> ArenaUsage:
        """What is in use, after a reclaim."""
        self.reclaim(now)
        return ArenaUsage(
            byte_count=self._byte_count - self._data_offset,
            free_byte_count=self._extents.free_byte_count,
            lease_count=self._lease_limit - len(self._free_slots),
            lease_limit=self._lease_limit,
        )

    def close(self) -> None:
        """Unmaps the region; it stays in the host's memory, with its leases."""
        del self._table
        self._words.release()
        self._memory.close()
        os.close(self._descriptor)

    def _map(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._byte_count = os.fstat(descriptor).st_size
        self._lease_limit = lease_limit(self._byte_count)
        self._data_offset = HEADER_BYTES + self._lease_limit * ENTRY_BYTES
        self._memory = mmap.mmap(descriptor, self._byte_count)
        self._words = memoryview(self._memory).cast("Q")
        table = np.frombuffer(self._memory, np.uint64, self._lease_limit * ENTRY_WORDS, HEADER_BYTES)
        self._table = table.reshape(self._lease_limit, ENTRY_WORDS)

    def _recover(self) -> bool:
        """Reads the table back into the allocator; False when its entries cannot be true."""
        self._extents = FreeExtents(self._data_offset, self._byte_count - self._byte_count % ALIGNMENT_BYTES)
        self._free_slots: list[int] = []
        for slot in range(self._lease_limit - 1, -1, -1):
            base = self._entry(slot)
            if self._words[base + GENERATION] > LARGEST_GENERATION:
                return False
            if self._words[base + GENERATION] % 2 == 0:
                self._free_slots.append(slot)
            elif self._words[base + LENGTH] == 0 or not self._extents.take_at(
                self._words[base + OFFSET], self._words[base + LENGTH]
            ):
                return False
        return True

    def _allocate(self, byte_count: int) -> tuple[int, int] | None:
        if not self._free_slots:
            return None
        offset = self._extents.take(byte_count)
        return None if offset is None else (self._free_slots.pop(), offset)

    def _entry(self, slot: int) -> int:
        return HEADER_BYTES // WORD_BYTES + slot * ENTRY_WORDS

    def _is_live(self, handle: tensor_pb2.SharedMemoryHandle, now: float) -> bool:
        """Whether all that the handle says is what its lease's entry says, and the lease runs."""
        slot = handle.lease_id % self._lease_limit
        base = self._entry(slot)
        generation, offset, length, expiry, released, renewed = self._words[base : base + 6].tolist()
        if renewed >> _MILLISECOND_BITS == generation % (1 << _TAG_BITS):
            expiry = max(expiry, renewed % (1 << _MILLISECOND_BITS))
        return (
            generation % 2 == 1
            and handle.generation == generation
            and handle.lease_id == generation * self._lease_limit + slot
            and handle.byte_offset == offset
            and handle.byte_count == length
            and self._data_offset <= offset < offset + length <= self._byte_count
            and released != generation
            and _milliseconds(now) < expiry
        )

    def _remapped(self) -> bool:
        """Maps the region anew if the writer replaced it; True when it did."""
        if self._writer:
            return False
        try:
            if os.stat(region_path(self.region)).st_ino == os.fstat(self._descriptor).st_ino:
                return False
            descriptor = open_to_read(self.region)
        except (OSError, ArenaUnavailable):
            return False
        self.close()
        self._map(descriptor)
        return True


def encode_tensor_header(tensor: tensor_pb2.Tensor) -> str:
    """The tensor as it stands in a header: serialized, base64url without padding."""
    return base64.urlsafe_b64encode(tensor.SerializeToString()).decode("ascii").rstrip("=")


def decode_tensor_header(header: str) -> tensor_pb2.Tensor:
    """The tensor of a header; raises CorruptHandle for anything that is none."""
    if len(header) > LONGEST_HEADER_CHARACTERS:
        raise CorruptHandle(f"the tensor header has {len(header)} characters, the most is {LONGEST_HEADER_CHARACTERS}")
    try:
        raw = base64.b64decode(header + "=" * (-len(header) % 4), altchars=b"-_", validate=True)
        tensor = tensor_pb2.Tensor.FromString(raw)
    except (ValueError, DecodeError) as error:
        raise CorruptHandle(f"the tensor header is no tensor: {error}") from error
    if tensor.WhichOneof("location") is None:
        raise CorruptHandle("the tensor header says no place")
    return tensor


def _milliseconds(seconds: float) -> int:
    assert 0 <= seconds < _LARGEST_NOW_SECONDS, "now is time.monotonic(), in seconds"
    return int(seconds * 1000)
