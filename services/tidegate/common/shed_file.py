"""The file in which the scheduler tells Envoy what to refuse for it: a runtime layer that Envoy watches.

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
"""The shares are told in parts of this."""

NOTHING_REFUSED: Final = {"realtime": 1.0, "standard": 1.0, "batch": 1.0}
"""What is let through of each class when the scheduler keeps up."""

_RUNTIME: Final = "type.googleapis.com/envoy.service.runtime.v3.Runtime"


def write_shares(path: Path, shares: Mapping[str, float]) -> None:
    """Says what is let through of each class, by its name; 1 is all.

    Raises:
        OSError: the file cannot be written.
    """
    # Whole numbers alone would be taken for per cent.
    refused = {
        name: {"numerator": round((1 - share) * WHOLE), "denominator": "TEN_THOUSAND"} for name, share in shares.items()
    }
    layer = {"@type": _RUNTIME, "name": "shed", "layer": {"tidegate": {"shed": refused}}}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    # JSON is YAML, too, and cheap to write.
    temporary.write_text(json.dumps({"resources": [layer]}), encoding="utf-8")
    temporary.replace(path)
