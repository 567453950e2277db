"""The file in which the scheduler tells Envoy what to refuse for it, and when that may come back: a runtime layer that
Envoy watches.

Replaced by rename, as the endpoints are. Envoy keeps what it last read, so a scheduler that starts writes that
nothing is refused, and one that stops does, too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

WHOLE: Final = 10_000
DENOMINATOR: Final = "TEN_THOUSAND"
"""The shares are told in parts of this, which Envoy calls so."""

NOTHING_REFUSED: Final = {"realtime": 1.0, "standard": 1.0, "batch": 1.0}
"""What is let through of each class when the scheduler keeps up."""

RETRY_STEPS_SECONDS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
"""What Envoy can tell those that it refuses: it cannot compute a time, but draws one of several replies by lot."""

RETRY_SPREAD: Final = 4.0
"""The longest time that is drawn is so many times of the shortest: those refused together come back apart."""

_RUNTIME: Final = "type.googleapis.com/envoy.service.runtime.v3.Runtime"


def retry_key(seconds: int) -> str:
    """The runtime key of the lot by which one of the steps is drawn, by those whom no shorter one was drawn for."""
    return f"tidegate.retry.{seconds}"


def retry_step(seconds: float) -> int:
    """The shortest step that is as long as so many seconds; else the longest."""
    return next((step for step in RETRY_STEPS_SECONDS if step >= seconds), RETRY_STEPS_SECONDS[-1])


def retry_lots(shortest: int) -> dict[int, float]:
    """The chance of each step to be drawn by those whom no shorter one was drawn for: of all, each step from the
    shortest on is drawn by as many as the others, up to the spread."""
    drawn = [step for step in RETRY_STEPS_SECONDS if shortest <= step <= RETRY_SPREAD * shortest]
    return {step: 1 / (len(drawn) - drawn.index(step)) if step in drawn else 0.0 for step in RETRY_STEPS_SECONDS}


def write_shares(path: Path, shares: Mapping[str, float], retry_seconds: int = RETRY_STEPS_SECONDS[0]) -> None:
    """Says what is let through of each class, by its name; 1 is all.

    Args:
        retry_seconds: the step after which the first of those that are refused come back.

    Raises:
        OSError: the file cannot be written.
    """
    # Whole numbers alone would be taken for per cent.
    refused = {name: {"numerator": _parts(1 - share), "denominator": DENOMINATOR} for name, share in shares.items()}
    # Here the denominator stands where they are used.
    lots = {str(step): _parts(chance) for step, chance in retry_lots(retry_seconds).items()}
    layer = {"@type": _RUNTIME, "name": "shed", "layer": {"tidegate": {"shed": refused, "retry": lots}}}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    # JSON is YAML, too, and cheap to write.
    temporary.write_text(json.dumps({"resources": [layer]}), encoding="utf-8")
    temporary.replace(path)


def _parts(share: float) -> int:
    return round(share * WHOLE)
