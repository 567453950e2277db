"""What this replica can do and does, for schedulers (tidegate.v1.Load), for Envoy (ORCA) and for its own slots.

Owns the moving averages. The engine's own figures come from the Triton client; per-token work here is two
additions, folded into the averages only when somebody asks.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Final

from xds.data.orca.v3 import orca_load_report_pb2

from tidegate.common.errors import RETRY_JITTER
from tidegate.common.lateness import Lateness, WindowedMinimum
from tidegate.model.capacity import Bounds, Capacity
from tidegate.model.look_ahead import LookAhead
from tidegate.model.moving_averages import MovingAverage, MovingRate
from tidegate.model.slots import Slots
from tidegate.model.triton_messages import EngineLoad
from tidegate.v1 import replica_pb2

HALF_LIFE_SECONDS: Final = 2.0

DEFAULT_RETRY_SECONDS: Final = 1.0
"""Told with a refusal before any request has ended, when no rate is known."""

LONGEST_RETRY_SECONDS: Final = 60.0

LONGEST_SILENCE_SECONDS: Final = 10.0
"""A request that hung for long must not stand for all others."""

LATENESS_WINDOW_SECONDS: Final = 0.4

MANY_IN_TRANSIT: Final = 16
"""Fewer requests between here and the engine say nothing: it tells of itself once a step at most."""


class ReplicaLoad:
    """The figures of one replica.

    Args:
        engine: gives the engine's latest figures; None before the first.
    """

    def __init__(
        self,
        address: str,
        model_name: str,
        context_token_count: int,
        engine: Callable[[], EngineLoad | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._address = address
        self._model_name = model_name
        self._context_token_count = context_token_count
        self._engine = engine
        self._clock = clock
        self._per_token = MovingAverage(HALF_LIFE_SECONDS)
        self._first_token = MovingAverage(HALF_LIFE_SECONDS)
        self._tokens = MovingRate(HALF_LIFE_SECONDS, clock())
        self._requests = MovingRate(HALF_LIFE_SECONDS, clock())
        self._errors = MovingRate(HALF_LIFE_SECONDS, clock())
        self._lateness = Lateness()
        self._latest_lateness = WindowedMinimum(LATENESS_WINDOW_SECONDS)
        self._latest_transit = WindowedMinimum(LATENESS_WINDOW_SECONDS)
        self._new_token_count = 0
        self._new_gap_seconds = 0.0
        self._new_gap_token_count = 0
        self.slots: Slots | None = None
        self.capacity = Capacity()
        self.look_ahead = LookAhead(0, clock())
        self.ahead_count = 0
        self.not_ready_reason = "starting"
        self.latest = replica_pb2.Load(replica=address, models=[model_name], not_ready_reason=self.not_ready_reason)
        """The last snapshot, for readers in other threads."""

    def add_tokens(self, count: int, gap_seconds: float | None) -> None:
        """Counts tokens of one stream; the gap is the time since its tokens before, None for its first."""
        self._new_token_count += count
        if gap_seconds is not None:
            self._new_gap_seconds += gap_seconds
            self._new_gap_token_count += count

    def add_arrival(self, delay_seconds: float) -> float:
        """Takes the time from a scheduler's decision until the request is looked at, by two clocks that may differ.

        Returns how much of it is more than the least of the last minutes.
        """
        now = self._clock()
        late_seconds = self._lateness.of(delay_seconds, now)
        self._latest_lateness.add(late_seconds, now)
        return late_seconds

    def add_first_token(self, seconds: float) -> None:
        """Takes one request's time from arrival to its first token."""
        self._first_token.add(seconds, 1, self._clock())

    def add_silence(self, seconds: float) -> None:
        """Takes a request that ended without a first token: its time until then is the least that it would have been.

        Only where that is more than the others take; else those that last too long would leave an average of the rest.
        """
        now = self._clock()
        if seconds > (self._first_token.value(now) or 0.0):
            self._first_token.add(min(seconds, LONGEST_SILENCE_SECONDS), 1, now)

    def add_request(self, *, failed: bool) -> None:
        """Counts a request that ended."""
        self._requests.add(1, self._clock())
        self._errors.add(1 if failed else 0, self._clock())

    def add_need(self, token_count: int) -> None:
        """Takes the tokens, of prompt and answer, of a request that ran to its end."""
        self.capacity.kv.add_request(token_count, self._clock())

    def seconds_per_output_token(self) -> float | None:
        """The moving average of the time per output token; None before the first."""
        return self._per_token.value(self._fold())

    def plan(self, bounds: Bounds, engine_count: int) -> tuple[int, int]:
        """The slots that the engine should have now, and the credits ahead of them."""
        tpot_seconds, now = self.seconds_per_output_token(), self._clock()
        slot_count = self.capacity.slots(bounds, engine_count=engine_count, tpot_seconds=tpot_seconds, now=now)
        self.ahead_count = self.look_ahead.ahead(slot_count, tpot_seconds, now)
        return slot_count, self.ahead_count

    def retry_after_seconds(self) -> float:
        """When the queue should have moved on, by how long slots are held, and a little later by chance."""
        seconds = DEFAULT_RETRY_SECONDS
        if self.slots is not None and (turn_seconds := self.slots.turn_seconds) is not None:
            seconds = max(seconds, (self.slots.ledger.waiting_count + 1) * turn_seconds)
        return min(LONGEST_RETRY_SECONDS, seconds * (1 + RETRY_JITTER * random.random()))

    def snapshot(self) -> replica_pb2.Load:
        """The figures now."""
        now = self._fold()
        engine = self._engine()
        load = replica_pb2.Load(
            replica=self._address,
            models=[self._model_name],
            generated_tokens_per_second=round(self._tokens.per_second(now), 3),
            ready=not self.not_ready_reason,
            not_ready_reason=self.not_ready_reason,
            max_context_tokens=self._context_token_count,
        )
        if self.slots is not None:
            load.running_request_count = self.slots.ledger.running_count
            load.waiting_request_count = self.slots.ledger.waiting_count
            load.slot_count = self.slots.ledger.slot_count
            load.starting_request_count = self.slots.starting_count
            load.paused_request_count = self.slots.ledger.paused_count
            load.ahead_count = self.ahead_count
            load.scheduler_count = self.slots.ledger.scheduler_count
        if engine is not None:
            load.running_request_count = max(load.running_request_count, engine.running)
            load.waiting_request_count += engine.waiting
            load.free_kv_block_count = engine.free_blocks
            load.kv_block_count = engine.total_blocks
            load.kv_block_token_count = engine.block_token_count
            load.reuses_prefixes = bool(engine.reuses_prefixes)
        if (per_token := self._per_token.value(now)) is not None:
            load.time_per_output_token.FromNanoseconds(int(per_token * 1e9))
        if (first_token := self._first_token.value(now)) is not None:
            load.time_to_first_token.FromNanoseconds(int(first_token * 1e9))
        self._latest_transit.add(self._transit_seconds(now), now)
        lateness = max(self._latest_lateness.value(now) or 0.0, self._latest_transit.value(now) or 0.0)
        # In steps, so that what hardly differs is no news.
        load.lateness.FromMilliseconds(10 * round(lateness * 100))
        if self.look_ahead.gap_seconds is not None:
            load.credit_gap.FromMicroseconds(round(self.look_ahead.gap_seconds * 1e4) * 100)
        self.latest = load
        return load

    def _transit_seconds(self, now: float) -> float:
        """How long requests are on their way to the engine, and its outputs on the way back, by Little's law.

        An engine has all that is here in its hands, but for these; there are many where processors are short, and an
        engine that is waited for looks like one that computes.
        """
        engine = self._engine()
        if engine is None or self.slots is None:
            return 0.0
        count = self.slots.ledger.engine_count - engine.running - engine.waiting
        return 0.0 if count < MANY_IN_TRANSIT else count / max(1.0, self._requests.per_second(now))

    @property
    def preemption_count(self) -> int:
        """How often the engine took a sequence's KV blocks for another."""
        engine = self._engine()
        return 0 if engine is None else engine.preemptions

    def orca_report(self) -> orca_load_report_pb2.OrcaLoadReport:
        """The figures as Envoy's weighted round robin reads them: utilisation is requests over slots."""
        now = self._fold()
        load = self.snapshot()
        busy = load.running_request_count + load.waiting_request_count
        report = orca_load_report_pb2.OrcaLoadReport(
            # Zero would mean "no figure"; an idle replica must be the most attractive instead.
            application_utilization=max(0.001, busy / load.slot_count) if load.slot_count else 1.0,
            rps_fractional=max(0.001, self._requests.per_second(now)),
            eps=self._errors.per_second(now),
        )
        if load.kv_block_count:
            report.named_metrics["kv_cache_usage"] = 1 - load.free_kv_block_count / load.kv_block_count
        report.named_metrics["num_requests_waiting"] = load.waiting_request_count
        return report

    def _fold(self) -> float:
        now = self._clock()
        if self._new_token_count:
            self._tokens.add(self._new_token_count, now)
            self._per_token.add(self._new_gap_seconds, self._new_gap_token_count, now)
            self._new_token_count, self._new_gap_seconds, self._new_gap_token_count = 0, 0.0, 0
        return now
