"""Sends a plan's requests from one process and keeps their records.

Open flows are sent when the plan says, whatever the server does; nothing waits for an answer. If this process cannot
keep up, requests are sent late and say so (`sent - planned`), and latency still counts from the planned time. Closed
flows are users, each with one request at a time.

This is one of several workers: it takes every n-th request of the open flows, and every n-th user.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
import numpy as np
from numpy.typing import NDArray

from tidegate.bench.arrivals import Closed
from tidegate.bench.checkers import AnswerChecker, Answers
from tidegate.bench.clients.answer import Client
from tidegate.bench.exchange import Exchange
from tidegate.bench.flows import Flow
from tidegate.bench.ledger import Ending, Outcome, Record
from tidegate.bench.plan import CLOSED_REQUESTS, Plan, Requests
from tidegate.bench.prompts import Prompts
from tidegate.bench.targets import Target

IN_FLIGHT_LIMIT: Final = 50_000
"""Requests of one worker that are under way; more are not sent, which the ledger says of each."""

SENT_IN_A_ROW: Final = 16
"""Requests that are due are sent in rows of this many; between two rows the streams under way have their turn."""

REFUSED_USER_SECONDS: Final = 0.01
"""The least a closed loop's user waits after anything but an answer; else it would ask again without end."""

_CLOSED_NUMBERS: Final = 1 << 40
"""The numbers of a closed flow's requests begin at a multiple of this; those of open flows are below it."""


class Share(msgspec.Struct, frozen=True):
    """Which part of a plan a worker has."""

    index: int = 0
    count: int = 1


class Progress(msgspec.Struct):
    """How far a worker is."""

    planned: int = 0
    sent: int = 0
    in_flight: int = 0
    tokens: int = 0
    outcomes: dict[str, int] = {}
    lag_seconds: float = 0.0
    """How far behind its plan the last request was sent."""


class Sender:
    """One worker's part of a run.

    Args:
        client: connected; it takes its times from `now` too.
        now: seconds since the beginning of the run, below 0 before it.
        checker: None where the answers cannot be known.
    """

    def __init__(
        self,
        plan: Plan,
        target: Target,
        client: Client,
        now: Callable[[], float],
        *,
        share: Share | None = None,
        checker: AnswerChecker | None = None,
    ) -> None:
        self._plan = plan
        self._client = client
        self._now = now
        self._share = share or Share()
        self._exchange = Exchange(client, now)
        self._tenants = plan.load.tenants
        self._prompts = Prompts(plan.seed, target.lowest_token, target.highest_token)
        self._open = plan.open_requests()
        self._closed: dict[int, Requests] = {}
        self._answers = Answers(checker, self._prompt_again)
        self._outcomes: Counter[str] = Counter()
        self._planned_count = self._in_flight = self._tokens = 0
        self._lag_seconds = 0.0
        self.records: list[Record] = []
        self.largest_in_flight = 0

    @property
    def progress(self) -> Progress:
        """How far it is."""
        return Progress(
            planned=self._planned_count,
            sent=len(self.records),
            in_flight=self._in_flight,
            tokens=self._tokens,
            outcomes=dict(self._outcomes),
            lag_seconds=self._lag_seconds,
        )

    async def run(self) -> None:
        """Sends everything and waits for every answer; each attempt has a time limit of its own.

        Cancelling it ends what is under way; the records stay.
        """
        async with asyncio.TaskGroup() as group:
            for index, flow in enumerate(self._plan.load.flows):
                if isinstance(flow.arrivals, Closed):
                    self._closed[index] = self._plan.closed_requests(index)
                    for user in range(self._share.index, flow.arrivals.users, self._share.count):
                        group.create_task(self._user(index, flow, flow.arrivals, user))
            await self._send_open(group)

    def finish(self) -> int:
        """Compares the answers with what they must be; how many were compared."""
        self._answers.finish()
        return self._answers.checked_count

    async def _send_open(self, group: asyncio.TaskGroup) -> None:
        rows = range(self._share.index, len(self._open), self._share.count)
        self._planned_count += len(rows)
        in_a_row = 0
        for row in rows:
            planned = float(self._open.planned_seconds[row])
            in_a_row = in_a_row + 1 if self._now() >= planned else 0
            if in_a_row and in_a_row % SENT_IN_A_ROW == 0:
                await asyncio.sleep(0)
            # A loop, because uvloop's timers are whole milliseconds and may come early.
            while (wait := planned - self._now()) > 0:
                await asyncio.sleep(wait)
            self._lag_seconds = -wait
            record = self._record(self._open, row, row, planned)
            if self._in_flight >= IN_FLIGHT_LIMIT:
                self._outcomes[Outcome.NOT_SENT] += 1
            else:
                self._begin()
                group.create_task(self._request(record, self._open, row))

    async def _user(self, index: int, flow: Flow, arrivals: Closed, user: int) -> None:
        thinking = random.Random(f"{self._plan.seed}/{index}/{user}")
        requests = self._closed[index]
        turn = user
        await asyncio.sleep(max(0.0, flow.begin_seconds - self._now()))
        while (now := self._now()) < flow.end_seconds:
            row = turn % CLOSED_REQUESTS
            record = self._record(requests, row, _CLOSED_NUMBERS * (index + 1) + turn, now)
            self._planned_count += 1
            self._begin()
            await self._request(record, requests, row)
            turn += arrivals.users
            pause = thinking.expovariate(1 / arrivals.think_seconds) if arrivals.think_seconds else 0.0
            answered = record.outcome in (Outcome.IN_TIME, Outcome.LATE)
            await asyncio.sleep(pause if answered else max(pause, REFUSED_USER_SECONDS))

    def _begin(self) -> None:
        self._in_flight += 1
        self.largest_in_flight = max(self.largest_in_flight, self._in_flight)

    async def _request(self, record: Record, requests: Requests, row: int) -> None:
        flow = self._plan.load.flows[requests.flow[row]]
        prompt = self._prompt(record, requests, row, as_text=self._client.wants_text)
        try:
            answer = await self._exchange.run(record, flow, prompt, float(requests.leave_seconds[row]))
        finally:
            self._in_flight -= 1
            self._tokens += record.token_count
            self._outcomes[record.outcome.value] += 1
        last = record.last
        if answer is not None and last is not None and last.ending is Ending.COMPLETED:
            self._answers.add(record, answer)

    def _record(self, requests: Requests, row: int, number: int, planned: float) -> Record:
        flow = self._plan.load.flows[requests.flow[row]]
        record = Record(
            number=number,
            flow=flow.name,
            tenant=self._tenants[requests.tenant[row]],
            service_class=flow.service_class,
            planned=planned,
            deadline_seconds=flow.deadline_seconds,
            prompt_tokens=int(requests.prompt_tokens[row]),
            asked_tokens=int(requests.answer_tokens[row]),
        )
        self.records.append(record)
        return record

    def _prompt(self, record: Record, requests: Requests, row: int, *, as_text: bool) -> Any:
        prefix = (int(requests.tenant[row]), self._plan.load.flows[requests.flow[row]].shared_prefix_tokens)
        if as_text:
            return self._prompts.text(record.number, record.prompt_tokens, prefix=prefix)
        blocks = requests.block_ids[row] if requests.block_ids else ()
        return self._prompts.token_ids(record.number, record.prompt_tokens, prefix=prefix, block_ids=blocks)

    def _prompt_again(self, record: Record) -> Sequence[int] | str:
        closed, turn = divmod(record.number, _CLOSED_NUMBERS)
        requests = self._closed[closed - 1] if closed else self._open
        row = turn % CLOSED_REQUESTS if closed else turn
        prompt: NDArray[np.int32] | str = self._prompt(record, requests, row, as_text=self._client.wants_text)
        return prompt if isinstance(prompt, str) else prompt.tolist()
