"""How many sequences the engine should run at once: its own bound, less what memory and speed ask for. Pure.

Owns two bounds below the engine's own; time is an argument, in seconds of any monotonic clock.

- *KV blocks*: no more sequences than the blocks hold at the observed need of a request, so that the engine neither
  queues nor preempts for want of memory.
- *Time per output token* (TPOT): additive increase while the target holds, multiplicative decrease when it breaks.

What the slots do with the number is the ledger's.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

from tidegate.model.moving_averages import MovingAverage

OBSERVATION_HALF_LIFE_SECONDS: Final = 60.0
"""How fast the need of a request is forgotten: much slower than load changes, much faster than a day's pattern."""

RELAX_SHARE: Final = 0.9
"""The bound rises while TPOT is below this share of the target; between it and `BREAK_SHARE` it stays."""

BREAK_SHARE: Final = 1.05
"""The bound falls when TPOT is above this share of the target."""

DECREASE_SHARE: Final = 0.9
"""What is left of the bound after it broke; so small a cut costs at most a tenth of the throughput."""

RAISE_SECONDS: Final = 1.0
"""Between two steps up."""

SETTLE_SECONDS: Final = 5.0
"""After a cut, how long nothing is judged: the average has a half-life of 2 s, and says what was before the cut."""


class KvBound:
    """The sequences for which there are KV blocks."""

    def __init__(self) -> None:
        self._token_count = MovingAverage(OBSERVATION_HALF_LIFE_SECONDS)
        self._tokens_per_request: float | None = None

    def add_request(self, token_count: int, now: float) -> None:
        """Takes the tokens, of prompt and answer, of a request that ended."""
        self._token_count.add(token_count, 1, now)
        self._tokens_per_request = self._token_count.value(now)

    def block_count(self, block_token_count: int) -> float | None:
        """The blocks that a request needs, as observed; None before the first one ended."""
        if self._tokens_per_request is None or block_token_count <= 0:
            return None
        return max(1.0, math.ceil(self._tokens_per_request / block_token_count))

    def slots(self, *, engine_count: int, free_blocks: int, total_blocks: int, block_token_count: int) -> int | None:
        """The sequences that fit, those in the engine included; at least 1. None: nothing is known yet.

        The need of one request stays free, for the sequences that grow longer than the average.

        Args:
            engine_count: sequences that the engine has.
        """
        each = self.block_count(block_token_count)
        if each is None or total_blocks <= 0:
            return None
        # Those that run will need their average share, or hold more than it already.
        claimed = max(engine_count * each, total_blocks - free_blocks)
        return max(1, engine_count + math.floor((total_blocks - claimed - each) / each))


class TpotBound:
    """The sequences with which the time per output token stays within its target.

    Args:
        target_seconds: 0 switches it off.
    """

    def __init__(self, target_seconds: float) -> None:
        self._target_seconds = target_seconds
        self._slots: float = math.inf
        self._judged_at = -math.inf

    @property
    def slots(self) -> float:
        """The bound, at least 1; infinite where there is none."""
        return max(1, math.floor(self._slots)) if self._slots < math.inf else math.inf

    def update(self, tpot_seconds: float | None, running_count: int, engine_slot_count: int, now: float) -> None:
        """Takes the measured time; called as often as one likes.

        Args:
            tpot_seconds: the moving average; None where nothing was measured.
            running_count: sequences that ran meanwhile: what is judged.
        """
        if self._target_seconds <= 0 or not tpot_seconds or now < self._judged_at:
            return
        if tpot_seconds > self._target_seconds * BREAK_SHARE:
            # A bound that nothing reached says nothing: what ran was too much.
            reached = max(1, running_count)
            self._slots = max(1.0, min(self._slots, reached) * DECREASE_SHARE)
            self._judged_at = now + SETTLE_SECONDS
        elif tpot_seconds < self._target_seconds * RELAX_SHARE and running_count >= self.slots:
            self._slots = math.inf if self._slots + 1 >= engine_slot_count else self._slots + 1
            self._judged_at = now + RAISE_SECONDS


class Bounds(msgspec.Struct, frozen=True):
    """What the engine says of itself, and what is set."""

    max_sequences: int
    """The engine's own bound, less what others use of it, and less a setting."""
    free_blocks: int
    total_blocks: int
    block_token_count: int


class Capacity:
    """The slots, as the smallest of all bounds.

    Args:
        tpot_target_seconds: 0 for no target.
    """

    def __init__(self, tpot_target_seconds: float = 0.0) -> None:
        self.kv = KvBound()
        self.tpot = TpotBound(tpot_target_seconds)

    def slots(self, bounds: Bounds, *, engine_count: int, tpot_seconds: float | None, now: float) -> int:
        """The slots now; at least 1 where the engine has any.

        Args:
            engine_count: the ledger's holders that the engine has.
            tpot_seconds: the moving average; None where nothing was measured.
        """
        if bounds.max_sequences <= 0:
            return 0
        self.tpot.update(tpot_seconds, engine_count, bounds.max_sequences, now)
        by_blocks = self.kv.slots(
            engine_count=engine_count,
            free_blocks=bounds.free_blocks,
            total_blocks=bounds.total_blocks,
            block_token_count=bounds.block_token_count,
        )
        return int(min(bounds.max_sequences, self.tpot.slots, math.inf if by_blocks is None else by_blocks))
