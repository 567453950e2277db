"""Answers in memory, bounded in bytes: pure decisions about what stays.

Invariants: the bytes of all entries never exceed the bound; an entry is found only by its own tenant; an entry
that is held neither expires nor is evicted before the hold ends.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final, NamedTuple

import msgspec

ENTRY_OVERHEAD_BYTES: Final = 400
"""What Python's dictionary, tuples and objects take beside an entry's own bytes, measured and rounded up."""


class AnswerId(NamedTuple):
    """Names one answer of one tenant."""

    tenant: str
    answer_key: bytes
    """32 bytes; made from model, prompt, sampling and tenant."""


class Found(NamedTuple):
    """A value, and how long it may still be kept."""

    value: bytes
    remaining_seconds: float


class _Entry(msgspec.Struct):
    tenant: str
    value: bytes
    byte_count: int
    expires_at: float
    held_until: float


class MemoryStore:
    """Values by answer id, the least recently used leaving first.

    Args:
        byte_limit: the bound on all entries, their keys and overhead included.

    `now` is any clock in seconds that does not go back.
    """

    def __init__(self, byte_limit: int) -> None:
        self._byte_limit = byte_limit
        self._entries: OrderedDict[AnswerId, _Entry] = OrderedDict()
        self.byte_count = 0
        self.evicted_count = 0
        self.expired_count = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, answer: AnswerId, now: float) -> Found | None:
        """The value, which counts as used; None when there is none or it has expired."""
        entry = self._live(answer, now)
        return None if entry is None else Found(entry.value, max(0.0, entry.expires_at - now))

    def hold(self, answer: AnswerId, until: float, now: float) -> bool:
        """Keeps the entry until then, if it is there; says whether it is."""
        entry = self._live(answer, now)
        if entry is None:
            return False
        entry.held_until = max(entry.held_until, until)
        return True

    def put(self, answer: AnswerId, value: bytes, time_to_live_seconds: float, now: float) -> bool:
        """Stores a value in place of an older one; False when what is held leaves no room for it."""
        byte_count = len(value) + len(answer.tenant) + len(answer.answer_key) + ENTRY_OVERHEAD_BYTES
        older = self._entries.get(answer)
        room = self._byte_limit - self.byte_count + (older.byte_count if older else 0)
        evicted = self._evictable(byte_count - room, now, spared=answer)
        if evicted is None:
            return False
        for leaving in evicted:
            self._note_departure(self._remove(leaving), now)
        held_until = self._remove(answer).held_until if older else 0.0
        self._entries[answer] = _Entry(answer.tenant, value, byte_count, now + time_to_live_seconds, held_until)
        self.byte_count += byte_count
        return True

    def delete(self, answer: AnswerId) -> bool:
        """Forgets one answer, held or not; says whether it was there."""
        if answer not in self._entries:
            return False
        self._remove(answer)
        return True

    def clear(self, tenant: str | None) -> int:
        """Forgets a tenant's answers, or all with None, held or not; returns how many."""
        leaving = [answer for answer in self._entries if tenant is None or answer.tenant == tenant]
        for answer in leaving:
            self._remove(answer)
        return len(leaving)

    def _live(self, answer: AnswerId, now: float) -> _Entry | None:
        entry = self._entries.get(answer)
        # The tenant is in the key already. Asked again, because a mistake here would show one tenant's text to another.
        if entry is None or entry.tenant != answer.tenant:
            return None
        if _has_ended(entry, now):
            self._note_departure(self._remove(answer), now)
            return None
        self._entries.move_to_end(answer)
        return entry

    def _evictable(self, byte_count: int, now: float, *, spared: AnswerId) -> list[AnswerId] | None:
        """The oldest entries that free so many bytes; None when those not held are too few."""
        leaving: list[AnswerId] = []
        for answer, entry in self._entries.items():
            if byte_count <= 0:
                break
            if entry.held_until <= now and answer != spared:
                leaving.append(answer)
                byte_count -= entry.byte_count
        return leaving if byte_count <= 0 else None

    def _remove(self, answer: AnswerId) -> _Entry:
        entry = self._entries.pop(answer)
        self.byte_count -= entry.byte_count
        return entry

    def _note_departure(self, entry: _Entry, now: float) -> None:
        if _has_ended(entry, now):
            self.expired_count += 1
        else:
            self.evicted_count += 1


def _has_ended(entry: _Entry, now: float) -> bool:
    return entry.expires_at <= now and entry.held_until <= now
