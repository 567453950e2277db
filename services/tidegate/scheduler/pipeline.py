"""The path of a request through the scheduler: a table of contents, one call a step, in order."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tidegate.common import headers
from tidegate.common.arena import encode_tensor_header
from tidegate.common.errors import Reason, TidegateError
from tidegate.scheduler.admission import Admission, Conditions
from tidegate.scheduler.anomalies import Anomalies
from tidegate.scheduler.bodies import body_kind, client_request_id, message_of
from tidegate.scheduler.cache_client import CacheClient
from tidegate.scheduler.config import Settings
from tidegate.scheduler.dispatch import Dispatcher
from tidegate.scheduler.expectations import Expectations
from tidegate.scheduler.lite import Lite, Why
from tidegate.scheduler.outcomes import Outcomes
from tidegate.scheduler.placement import Placement
from tidegate.scheduler.preprocess_client import Prepared, PreprocessClient
from tidegate.scheduler.queue import Queue
from tidegate.scheduler.request import Request, ServiceClass
from tidegate.scheduler.shedding import Shedder
from tidegate.scheduler.tenant_limits import Key, TenantLimits
from tidegate.v1 import preprocess_pb2, tensor_pb2


@dataclass(frozen=True, slots=True)
class Decision:
    """What Envoy does with a request: the headers that it gets, and whether its route is looked up again.

    Without a placement and without headers it is passed through, for Envoy to balance by itself. `lite` is why it goes
    to the lite model, where it does.
    """

    header_fields: tuple[tuple[str, str], ...] = ()
    changes_route: bool = False
    placement: Placement | None = None
    lite: Why | None = None


PASS_THROUGH: Final = Decision()
"""Says nothing: Envoy balances the request by itself."""


class Pipeline:
    """Decides about requests. Every method raises TidegateError for a refusal."""

    def __init__(
        self,
        settings: Settings,
        *,
        admission: Admission,
        queue: Queue,
        preprocess: PreprocessClient,
        cache: CacheClient,
        outcomes: Outcomes,
        shedder: Shedder,
        limits: TenantLimits,
        expectations: Expectations,
        anomalies: Anomalies,
        lite: Lite,
        heeds_prefixes: Callable[[], bool],
        clock: Callable[[], float],
        unix_seconds: Callable[[], float] = time.time,
    ) -> None:
        self._unix_seconds = unix_seconds
        self._anomalies = anomalies
        self._lite = lite
        self._heeds_prefixes = heeds_prefixes
        self._settings = settings
        self._shedder = shedder
        self._limits = limits
        self._expectations = expectations
        self._admission = admission
        self._queue = queue
        self._preprocess = preprocess
        self._cache = cache
        self._outcomes = outcomes
        self._clock = clock
        self.body_wait_seconds = settings.body_wait_seconds
        self._longest_wait_seconds = {
            ServiceClass.REALTIME: settings.realtime_deadline_seconds,
            ServiceClass.STANDARD: settings.standard_deadline_seconds,
            ServiceClass.BATCH: settings.batch_deadline_seconds,
        }

    def takes(self, request: Request) -> bool:
        """Whether the scheduler decides about such a request at all."""
        return body_kind(request) is not None

    def admit_headers(self, request: Request) -> None:
        """Refuses from the headers alone what can be refused."""
        now = self._clock()
        given = None if request.client_deadline is None else request.client_deadline - request.arrived_at
        request.offered_count = self._shedder.see(request.service_class, request.whole_at, now, given)
        self._limits.see(_key(request))
        late_seconds = now - request.whole_at
        if late_seconds > self._settings.latest_look_seconds:
            raise self._admission.looked_at_late(late_seconds, self.conditions())
        if request.header_fault is not None:
            field, message = request.header_fault
            raise TidegateError(Reason.INVALID_VALUE, message, field=field)
        refusal = self._admission.refusal_of_headers(request, self.conditions())
        if refusal is not None and not (_is_for_load(refusal) and self._lite.may_help(request, now)):
            self._expectations.count_unread(request, now)
            raise refusal

    def hold_seconds(self, request: Request) -> float:
        """The longest that Envoy must wait for the decision: the request's deadline, and a little to say so."""
        longest = self._settings.longest_hold_seconds
        if request.deadline is None:
            return longest
        return min(longest, max(0.0, request.deadline - self._clock()) + self._settings.tick_seconds + 1.0)

    async def prepare(self, request: Request, body: bytes) -> bool:
        """Learns from the body all that the request's placement needs; False where Envoy is to balance it by itself.

        Apart from `place`, so that a request that waits keeps no copy of its body here: Envoy has it.
        """
        request.body_arrived_at = self._clock()
        kind, message = body_kind(request), message_of(request, body)
        if kind is None or message is None:
            return False
        request.client_request_id = client_request_id(kind, message) or request.client_request_id
        await self._prepare(request, kind, message)
        request.service_class = self._anomalies.class_of(request)
        self._expectations.expect(request, self._clock())
        self._set_deadline(request)
        return True

    async def place(self, request: Request) -> Decision:
        """Decides about a prepared request, however long it waits."""
        if await self._cache.knows(request.answer_key, request.tenant):
            self._note_accepted(request)
            self._expectations.habits.see_known(request.tenant)
            return self._replay(request)
        decision = self._prefer_lite(request)
        if decision is not None:
            return decision
        self._expectations.count(request, self._clock())
        refusal = self._admission.refusal(request, self.conditions())
        if refusal is not None:
            decision = self._to_lite(request, Why.LOAD) if _is_for_load(refusal) else None
            if decision is None:
                raise refusal
            return decision
        self._admit(request)
        placement = await self._queue.wait(request)
        return self._dispatch(request, placement)

    def undo(self, decision: Decision) -> None:
        """Takes back a decision that did not reach Envoy."""
        if decision.placement is None:
            return
        self._expectations.observations.forget(decision.placement.credit_id)
        if decision.lite is None:
            self._queue.put_back(decision.placement)
        else:
            self._lite.put_back(decision.placement)

    def release(self, request: Request) -> None:
        """Gives the tokens of a request back that reaches no replica."""
        if request.tokens is not None:
            self._preprocess.release(request.tokens)

    def conditions(self) -> Conditions:
        """The moment, as admission sees it."""
        now = self._clock()
        dispatcher: Dispatcher = self._queue.dispatcher
        return Conditions(
            now=now,
            drain_rate=dispatcher.drain.rate(now),
            absence_seconds=dispatcher.table.absence_seconds(now),
            held_request_count=self._outcomes.held_request_count,
            random_share=random.random(),
            outlook=self._expectations.outlook,
            has_cache=self._cache.is_reachable,
            lot=random.random(),
        )

    async def _prepare(self, request: Request, kind: preprocess_pb2.BodyKind.ValueType, message: bytes) -> None:
        request.body_byte_count = len(message)
        prepared = await self._preprocess.prepare(
            kind,
            message,
            request.tenant,
            deadline=request.deadline,
            can_dispatch=lambda: self._queue.dispatcher.can_dispatch(self._clock()),
        )
        if prepared is None:
            request.prompt_token_count = int(len(message) / self._settings.bytes_per_token)
            request.service_class = request.named_class or ServiceClass.STANDARD
            return
        request.prompt_token_count = prepared.prompt_token_count
        request.max_tokens = prepared.max_tokens
        request.service_class = request.named_class or _service_class(prepared)
        request.answer_key = prepared.answer_key
        request.model, request.is_portable = prepared.model, prepared.is_portable
        if self._heeds_prefixes():
            request.block_hashes = tuple(prepared.block_hashes[: self._settings.prefix_block_limit])
        if prepared.HasField("tokens"):
            # A copy, for a part of a message keeps the whole of it, and the hashes of a long prompt are many.
            request.tokens = tensor_pb2.Tensor()
            request.tokens.CopyFrom(prepared.tokens)

    def _set_deadline(self, request: Request) -> None:
        last = request.arrived_at + self._settings.longest_hold_seconds
        if request.deadline is None:
            request.deadline = request.arrived_at + self._longest_wait_seconds[request.service_class]
        request.deadline = min(request.deadline, last)

    def _prefer_lite(self, request: Request) -> Decision | None:
        """The way to the lite model of a request that goes there before all others; None for none."""
        if not self._lite.is_there:
            return None
        if self._lite.is_named(request):
            return self._to_lite(request, Why.NAME)
        if self._lite.is_preferred(request):
            return self._to_lite(request, Why.PROMPT)
        nobody_else = self._queue.dispatcher.table.absence_seconds(self._clock()) > 0
        if nobody_else or self._expectations.brownout.prefers_lite(request.service_class):
            return self._to_lite(request, Why.LOAD)
        return None

    def _to_lite(self, request: Request, why: Why) -> Decision | None:
        expected = self._expectations.answer_token_count(request, self._lite.model_name)
        placement = self._lite.place(request, expected, self._clock())
        if placement is None and why is not Why.NAME:
            return None
        self._note_accepted(request)
        if why is not Why.NAME:
            # The tokens and the answer's key are the other model's.
            self.release(request)
            request.tokens, request.answer_key = None, b""
        fields = [(headers.ROUTE, "lite"), (headers.LITE, why.value), *self._common_fields(request)]
        if why is Why.LOAD:
            fields += self._brownout_fields(request)
        if placement is not None:
            fields += self._placement_fields(request, placement)
            self._outcomes.count_lite(why.value)
            self._expectations.observations.dispatch_to_lite(request, placement.credit_id, self._lite.model_name)
        return Decision(tuple(fields), changes_route=True, placement=placement, lite=why)

    def _note_accepted(self, request: Request) -> None:
        """It will be answered; Envoy tells classes apart by the header alone."""
        self._limits.accept(_key(request))
        self._shedder.accept(request.named_class or ServiceClass.STANDARD)

    def _admit(self, request: Request) -> None:
        self._note_accepted(request)
        self._expectations.outlook.shares[request.service_class].admit(request.tenant, request.cost)

    def _replay(self, request: Request) -> Decision:
        fields = ((headers.ROUTE, "cache"), *self._common_fields(request))
        return Decision(fields, changes_route=True)

    def _dispatch(self, request: Request, placement: Placement) -> Decision:
        fields = [*self._placement_fields(request, placement), *self._common_fields(request)]
        if placement.is_owed:
            fields.append((headers.FLOOR, "1"))
        fields += self._brownout_fields(request)
        self._expectations.observations.dispatch(request, placement.credit_id, request.cost)
        return Decision(tuple(fields), placement=placement)

    def _brownout_fields(self, request: Request) -> list[tuple[str, str]]:
        brownout = self._expectations.brownout
        if not brownout.shortens(request.service_class):
            return []
        return [
            (headers.MAX_TOKENS, str(self._settings.brownout_max_tokens)),
            (headers.BROWNOUT, str(brownout.step)),
        ]

    def _placement_fields(self, request: Request, placement: Placement) -> list[tuple[str, str]]:
        fields = [
            (headers.REPLICA, ",".join((placement.address, *placement.alternatives))),
            (headers.CREDIT, placement.credit_id),
            (headers.SENT, f"{self._unix_seconds():.6f}"),
        ]
        if request.tokens is not None:
            fields.append((headers.TENSOR, encode_tensor_header(request.tokens)))
        return fields

    def _common_fields(self, request: Request) -> list[tuple[str, str]]:
        fields = [
            (headers.SERVICE_CLASS, request.service_class.label),
            (headers.QUEUE_MS, f"{request.queue_seconds * 1000:.1f}"),
        ]
        if request.client_deadline is not None:
            left_ms = max(1, round((request.client_deadline - self._clock()) * 1000))
            fields.append((headers.TIMEOUT_MS, str(left_ms)))
        if request.answer_key:
            fields.append((headers.ANSWER_KEY, request.answer_key.hex()))
        return fields


def _is_for_load(refusal: TidegateError) -> bool:
    return refusal.reason in (Reason.SERVER_IS_OVERLOADED, Reason.REPLICA_UNAVAILABLE)


def _key(request: Request) -> Key:
    return Key(request.tenant, "" if request.named_class is None else request.named_class.label)


def _service_class(prepared: Prepared) -> ServiceClass:
    value = int(prepared.service_class)
    return ServiceClass(value) if value in ServiceClass._value2member_map_ else ServiceClass.STANDARD
