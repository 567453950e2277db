"""Reads recorded loads: Azure's LLM inference traces and Mooncake's.

Sources of the forms:
- Azure Public Dataset, AzureLLMInferenceTrace_*.csv: columns TIMESTAMP (date and time, up to seven digits of a second,
  in the traces of 2024 with a time zone), ContextTokens, GeneratedTokens.
- Mooncake (FAST 2025), *_trace.jsonl: `timestamp` in milliseconds, `input_length`, `output_length`, `hash_ids`, one a
  block of 512 tokens of the prompt; the same id is the same block. A CSV with these columns is taken too, its ids in
  one field with blanks, commas or brackets between.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from tidegate.bench.arrivals import LARGEST_PLAN, PlanError

HASH_BLOCK_TOKENS: Final = 512
"""Tokens of a prompt that one of Mooncake's hash ids stands for."""

_TIME_ZONE: Final = re.compile(r"(Z|[+-]\d\d:?\d\d)$")


@dataclass(frozen=True)
class TraceRows:
    """A recorded load, in order of time."""

    seconds: NDArray[np.float64]
    """From the first request."""
    prompt_tokens: NDArray[np.int32]
    answer_tokens: NDArray[np.int32]
    block_ids: tuple[tuple[int, ...], ...]
    """Of each request's prompt; empty ones where the trace has none."""

    def at_rate(self, rate: float) -> TraceRows:
        """The same, stretched or squeezed in time to so many requests per second on average."""
        span = float(self.seconds[-1]) if len(self.seconds) > 1 else 0.0
        if rate <= 0 or span == 0.0:
            return self
        factor = (len(self.seconds) - 1) / rate / span
        return TraceRows(self.seconds * factor, self.prompt_tokens, self.answer_tokens, self.block_ids)


def read_trace(path: Path, *, request_limit: int = LARGEST_PLAN) -> TraceRows:
    """Reads a trace, by its first line: JSON lines, or CSV with a head.

    Raises:
        PlanError: the file is not one, with the line at fault.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            rows: Iterable[dict[str, Any]] = map(json.loads, file) if first.startswith("{") else csv.DictReader(file)
            return _collect(rows, path, request_limit)
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"cannot read the trace {path}: {error}") from error


def _collect(rows: Iterable[dict[str, Any]], path: Path, request_limit: int) -> TraceRows:
    read: list[tuple[float, int, int, tuple[int, ...]]] = []
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            if number > request_limit:
                break
            read.append(_row(row))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise PlanError(
            f"{path}, request {number}: {error!r}; a trace has TIMESTAMP, ContextTokens and GeneratedTokens, or "
            "timestamp, input_length and output_length"
        ) from error
    if not read:
        raise PlanError(f"the trace {path} has no requests")
    read.sort(key=lambda each: each[0])
    return TraceRows(
        seconds=np.array([each[0] - read[0][0] for each in read]),
        prompt_tokens=np.maximum(1, np.array([each[1] for each in read], np.int32)),
        answer_tokens=np.maximum(1, np.array([each[2] for each in read], np.int32)),
        block_ids=tuple(each[3] for each in read),
    )


def _row(row: dict[str, Any]) -> tuple[float, int, int, tuple[int, ...]]:
    if "TIMESTAMP" in row:
        moment = np.datetime64(_TIME_ZONE.sub("", row["TIMESTAMP"].strip()).replace(" ", "T"), "ns")
        return float(moment.astype(np.int64)) / 1e9, int(row["ContextTokens"]), int(row["GeneratedTokens"]), ()
    milliseconds = float(row["timestamp"])
    return milliseconds / 1000, int(row["input_length"]), int(row["output_length"]), _ids(row.get("hash_ids"))


def _ids(value: Any) -> tuple[int, ...]:
    if isinstance(value, str):
        value = re.findall(r"\d+", value)
    return tuple(int(each) for each in value or ())
