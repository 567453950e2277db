"""What the waiting room counts."""

from __future__ import annotations

from typing import Final

from prometheus_client import Counter, Gauge

STREAMS: Final = Counter(
    "tidegate_waiting_streams",
    "Streams that came, by how they ended: ended, refused, broken, left, unread; or full, and went the ordinary way.",
    ["outcome"],
)
STATUSES: Final = Counter("tidegate_waiting_statuses", "Places that were told.")
OPEN_STREAMS: Final = Gauge("tidegate_waiting_open_streams", "Streams that are open now.")
