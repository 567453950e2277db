"""When a process that ended is started again: soon, then later and later; one that never was ready, not for ever."""

from __future__ import annotations

from typing import Final

import msgspec

FIRST_DELAY_SECONDS: Final = 0.2
LONGEST_DELAY_SECONDS: Final = 15.0
LARGEST_DELAY_EXPONENT: Final = 16
"""The delay has long reached its bound then; without an end the power outgrows a float after some hundred crashes."""

STEADY_AFTER_SECONDS: Final = 30.0
"""A process that ran for so long has recovered: its next crash is a first one again."""

ATTEMPTS_BEFORE_READY: Final = 3
"""A process that never was ready and crashed so often has a fault that another start will not mend."""

USAGE_EXIT_CODE: Final = 2
"""What a service exits with when its settings are wrong: starting it again changes nothing."""


class Restart(msgspec.Struct, frozen=True):
    """Start the process again after a pause."""

    delay_seconds: float


class GiveUp(msgspec.Struct, frozen=True):
    """Do not start it again."""

    reason: str


class RestartPolicy:
    """Decides for one process. Its memory is the count of crashes in a row."""

    def __init__(self) -> None:
        self._crash_count = 0

    def after_exit(self, *, exit_code: int, ran_seconds: float, was_ready: bool) -> Restart | GiveUp:
        """What to do now that the process ended.

        Args:
            exit_code: as waitpid tells it; negative for a signal.
            ran_seconds: from its start to its end.
            was_ready: whether it ever answered, in this life or an earlier one.
        """
        if ran_seconds >= STEADY_AFTER_SECONDS:
            self._crash_count = 0
        self._crash_count += 1
        if not was_ready and exit_code == USAGE_EXIT_CODE:
            return GiveUp("its settings are wrong")
        if not was_ready and self._crash_count >= ATTEMPTS_BEFORE_READY:
            return GiveUp(f"it ended {self._crash_count} times before it was ready")
        return Restart(min(LONGEST_DELAY_SECONDS, _growing_delay_seconds(self._crash_count)))


def _growing_delay_seconds(crash_count: int) -> float:
    return float(FIRST_DELAY_SECONDS * 4 ** min(crash_count - 1, LARGEST_DELAY_EXPONENT))


def describe_exit(exit_code: int) -> str:
    """How a process ended, for a person."""
    import signal

    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return f"killed by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"killed by signal {-exit_code}"
