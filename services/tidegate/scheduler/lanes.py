"""The lanes in which requests wait: one a class, strict order between them, first come first served inside.

Invariants, after every call:
- a lane's counts of requests, tokens and bytes are the sums over what waits in it, and within its limits;
- a waiting request is in exactly one lane, and leaves it once.

Pure: no clock, no loop. When and whereto a request leaves is decided elsewhere.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from tidegate.scheduler.request import ServiceClass


@dataclass(frozen=True, slots=True)
class LaneLimits:
    """The bounds of one lane."""

    request_limit: int
    token_limit: int
    byte_limit: int


@dataclass(slots=True, eq=False)
class Waiting:
    """A place in a lane; times in monotonic seconds."""

    request_id: str
    service_class: ServiceClass
    token_count: int
    answer_token_count: int
    byte_count: int
    since: float
    deadline: float
    block_hashes: tuple[int, ...] = ()


class Lane:
    """What waits of one class, oldest first."""

    def __init__(self, limits: LaneLimits) -> None:
        self.limits = limits
        self.token_count = 0
        self.byte_count = 0
        # Ordered, with removal from the middle in constant time: clients that leave are common under load.
        self._waiting: OrderedDict[Waiting, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Waiting]:
        return iter(self._waiting)

    def __contains__(self, waiting: Waiting) -> bool:
        return waiting in self._waiting

    @property
    def oldest(self) -> Waiting | None:
        """The one that leaves next."""
        return next(iter(self._waiting), None)

    def full_bound(self, token_count: int, byte_count: int) -> str:
        """The bound that one more request of this size would break, as a word; empty when there is room."""
        if len(self._waiting) >= self.limits.request_limit:
            return "requests"
        if self.token_count + token_count > self.limits.token_limit:
            return "tokens"
        if self.byte_count + byte_count > self.limits.byte_limit:
            return "bytes"
        return ""

    def add(self, waiting: Waiting) -> None:
        """Puts one at the end."""
        assert waiting not in self._waiting
        self._waiting[waiting] = None
        self.token_count += waiting.token_count
        self.byte_count += waiting.byte_count

    def remove(self, waiting: Waiting) -> None:
        """Takes one out, wherever it stands."""
        del self._waiting[waiting]
        self.token_count -= waiting.token_count
        self.byte_count -= waiting.byte_count


class Lanes:
    """All lanes of a scheduler."""

    def __init__(self, limits: Mapping[ServiceClass, LaneLimits]) -> None:
        self._lanes = {service_class: Lane(limits[service_class]) for service_class in ServiceClass}
        self._by_request_id: dict[str, Waiting] = {}

    def __len__(self) -> int:
        return sum(len(lane) for lane in self._lanes.values())

    def __iter__(self) -> Iterator[Waiting]:
        """Everything that waits, in the order in which it leaves."""
        for lane in self._lanes.values():
            yield from lane

    def __contains__(self, waiting: Waiting) -> bool:
        return waiting in self._lanes[waiting.service_class]

    def lane(self, service_class: ServiceClass) -> Lane:
        """The lane of a class."""
        return self._lanes[service_class]

    @property
    def token_count(self) -> int:
        """Tokens that wait in all lanes."""
        return sum(lane.token_count for lane in self._lanes.values())

    @property
    def next(self) -> Waiting | None:
        """The one that leaves next: the oldest of the most urgent lane that is not empty."""
        for lane in self._lanes.values():
            if lane:
                return lane.oldest
        return None

    def add(self, waiting: Waiting) -> None:
        """Lets one wait; the caller has asked the lane's `full_bound` first."""
        self._lanes[waiting.service_class].add(waiting)
        self._by_request_id[waiting.request_id] = waiting

    def remove(self, waiting: Waiting) -> None:
        """Takes one out."""
        self._lanes[waiting.service_class].remove(waiting)
        if self._by_request_id.get(waiting.request_id) is waiting:
            del self._by_request_id[waiting.request_id]

    def find(self, request_id: str) -> Waiting | None:
        """The waiting request of this id; of two with the same id, the later."""
        return self._by_request_id.get(request_id)

    def count_before(self, service_class: ServiceClass) -> int:
        """How many requests would leave before one that came now."""
        return sum(len(lane) for other, lane in self._lanes.items() if other <= service_class)

    def position(self, waiting: Waiting) -> int:
        """How many leave before it, and itself: 1 is next. Takes time in the length of the lane."""
        urgent = sum(len(lane) for other, lane in self._lanes.items() if other < waiting.service_class)
        return urgent + _index(self._lanes[waiting.service_class], waiting) + 1


def _index(lane: Iterable[Waiting], wanted: Waiting) -> int:
    return next(index for index, waiting in enumerate(lane) if waiting is wanted)
