"""A ledger's records as columns, for figures and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tidegate.bench.ledger import Ending, Outcome, Record

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Columns:
    """Row i is record i; NaN where a record has no such time."""

    planned: Floats
    lag: Floats
    """From the planned time until it was first sent."""
    ended: Floats
    ttft: Floats
    """From the planned time to the first token of the last attempt."""
    tpot: Floats
    """Of each further token; NaN with fewer than two."""
    latency: Floats
    """From the planned time to the last token of a whole answer."""
    tokens: NDArray[np.int64]
    """That came, of the last attempt."""
    wasted_tokens: NDArray[np.int64]
    """That came for nothing: of attempts that did not end in time."""
    refusal_seconds: Floats
    """From when the last attempt was to be sent until it was refused."""
    outcome: NDArray[Any]
    tenant: NDArray[Any]
    service_class: NDArray[Any]
    flow: NDArray[Any]
    reason: NDArray[Any]

    def __len__(self) -> int:
        return len(self.planned)

    def of(self, outcome: Outcome) -> NDArray[np.bool_]:
        """Which rows have an outcome."""
        rows: NDArray[np.bool_] = self.outcome == outcome.value
        return rows

    def where(self, rows: NDArray[np.bool_]) -> Columns:
        """Some of the rows."""
        return Columns(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})


def columns_of(records: Sequence[Record]) -> Columns:
    """The records' columns."""
    rows = [_row(record) for record in records]
    columns = list(zip(*rows, strict=True)) if rows else [()] * 9
    floats = [np.array([np.nan if value is None else value for value in column], float) for column in columns[:7]]
    planned, lag, ended, ttft, tpot, latency, refusal_seconds = floats
    return Columns(
        planned=planned,
        lag=lag,
        ended=ended,
        ttft=ttft,
        tpot=tpot,
        latency=latency,
        refusal_seconds=refusal_seconds,
        tokens=np.array(columns[7], np.int64),
        wasted_tokens=np.array(columns[8], np.int64),
        outcome=np.array([record.outcome.value for record in records], object),
        tenant=np.array([record.tenant for record in records], object),
        service_class=np.array([record.service_class for record in records], object),
        flow=np.array([record.flow for record in records], object),
        reason=np.array([record.last.reason if record.last else "" for record in records], object),
    )


def _row(record: Record) -> tuple[float | None, ...]:
    last = record.last
    if last is None:
        return (record.planned, None, None, None, None, None, None, 0, 0)
    ttft = tpot = latency = None
    if last.first_token is not None and last.last_token is not None:
        ttft = last.first_token - record.planned
        tpot = (last.last_token - last.first_token) / (last.token_count - 1) if last.token_count > 1 else None
        latency = last.last_token - record.planned if last.ending is Ending.COMPLETED else None
    wasted = record.token_count - (last.token_count if record.outcome is Outcome.IN_TIME else 0)
    return (
        record.planned,
        record.attempts[0].sent - record.planned,
        last.ended,
        ttft,
        tpot,
        latency,
        last.ended - last.due if last.ending is Ending.REFUSED else None,
        last.token_count,
        wasted,
    )
