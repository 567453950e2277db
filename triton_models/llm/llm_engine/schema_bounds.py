"""What of a JSON Schema would keep the engine for seconds while it is compiled, which no limit of llguidance ends.

Pure. Invariant: a schema without a fault is compiled in the time that its length bounds.
"""

import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

JOINED_EXPRESSION_BOUND = 12
"""How many patterns and formats there may be where several can come to bear on one text: the time to compile them
doubles with each, from a hundredth of a second with so many to 4 s with twenty."""

MULTIPLE_BOUND = 10_000
"""The largest multipleOf, in units of its last digit, or their product where several can come to bear on one number:
the time grows with its square, from 40 ms with so much to 10 s with a million."""

_EXPRESSIONS = ("pattern", "format")
_BESIDE = frozenset(
    {"$ref", "anyOf", "oneOf", "$defs", "definitions", "$schema", "$id", "$comment"}
    | {"title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"}
)
"""What may stand beside a $ref, an anyOf or a oneOf without a say in the output."""


def schema_fault(schema: dict[str, Any]) -> str:
    """Why a schema must not be compiled; empty where it may be."""
    parts = list(_parts(schema))
    joins = any(_joins(part) for part in parts)
    count = sum(_expression_count(part) for part in parts)
    if joins and count > JOINED_EXPRESSION_BOUND:
        bound = f"expected at most {JOINED_EXPRESSION_BOUND}"
        return f"{count} expressions where schemas are put together, {bound}"
    multiples = {_units(part["multipleOf"]) for part in parts if _is_number(part.get("multipleOf"))}
    largest = math.prod(multiples) if joins else max(multiples, default=0)
    if largest > MULTIPLE_BOUND:
        return f"multipleOf is more than {MULTIPLE_BOUND} of the units of its last digit"
    return ""


def _parts(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All objects in a schema, itself first."""
    left: list[Any] = [schema]
    while left:
        part = left.pop()
        if isinstance(part, dict):
            yield part
            left += part.values()
        elif isinstance(part, list):
            left += part


def _joins(part: dict[str, Any]) -> bool:
    """Whether several schemas come to bear on one value here."""
    refers = isinstance(part.get("$ref"), str) or any(isinstance(part.get(name), list) for name in ("anyOf", "oneOf"))
    return isinstance(part.get("allOf"), list) or (refers and not _BESIDE.issuperset(part))


def _expression_count(part: dict[str, Any]) -> int:
    named = part.get("patternProperties")
    count = sum(isinstance(part.get(name), str) for name in _EXPRESSIONS)
    return count + (len(named) if isinstance(named, dict) else 0)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _units(value: float) -> float:
    """A number in units of its last digit: 125 for 1.25."""
    if isinstance(value, int) or not math.isfinite(value):
        return abs(value)
    digits = Decimal(repr(value))
    places = digits.as_tuple().exponent
    return float(digits.scaleb(-places) if isinstance(places, int) and places < 0 else digits)
