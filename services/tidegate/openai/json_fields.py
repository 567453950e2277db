"""Reading an untrusted JSON object field by field: every fault is a TidegateError that names the field exactly.

A field that is null counts as absent, as OpenAI has it for optional parameters. Booleans are not numbers, and 1.0
is not an integer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Final, NoReturn

from tidegate.common.errors import Reason, TidegateError

SHOWN_CHARACTER_LIMIT: Final = 64
"""How much of a client's own words is repeated in an error message."""

_KINDS: Final = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "an integer"}

_NOTHING: Final[Mapping[str, tuple[Any, ...]]] = {}


def read_object(body: bytes) -> dict[str, Any]:
    """The JSON object that a body is.

    Raises:
        TidegateError: INVALID_JSON for anything that is not JSON (NaN, broken UTF-8, a cut end, nesting without
            end), INVALID_TYPE for JSON that is not an object.
    """
    try:
        document = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise TidegateError(Reason.INVALID_JSON, f"The body is not UTF-8: byte {error.start} is wrong.") from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise TidegateError(Reason.INVALID_JSON, f"The body is not JSON: {error.msg} at {place}.") from error
    except RecursionError as error:
        raise TidegateError(Reason.INVALID_JSON, "The body is nested too deeply.") from error
    except ValueError as error:
        raise TidegateError(Reason.INVALID_JSON, "The body has a number that is not JSON or is too long.") from error
    if not isinstance(document, dict):
        raise TidegateError(Reason.INVALID_TYPE, f"The body must be a JSON object, is {kind_of(document)}.")
    return document


class Fields:
    """The fields of one object; each is taken once, and what is left at the end is unknown."""

    def __init__(self, values: dict[str, Any], path: str = "") -> None:
        self._values = values
        self._path = path
        self._taken: set[str] = set()

    def path(self, name: str) -> str:
        """The field's path from the body's root (`stream_options.include_usage`)."""
        return f"{self._path}.{name}" if self._path else name

    def take(self, name: str) -> Any:
        """The field's value as it is; None when it is absent or null."""
        self._taken.add(name)
        return self._values.get(name)

    def boolean(self, name: str) -> bool | None:
        """A boolean field."""
        value = self.take(name)
        if value is not None and not isinstance(value, bool):
            refuse_type(self.path(name), "a boolean", value)
        return value

    def integer(self, name: str, low: int, high: int) -> int | None:
        """An integer field in [low, high]."""
        value = self.take(name)
        if value is None:
            return None
        integer = checked_integer(value, self.path(name))
        if not low <= integer <= high:
            refuse_value(self.path(name), f"must be in [{low}, {high}], is {shown(integer)}")
        return integer

    def number(self, name: str, low: float, high: float, *, open_below: bool = False) -> float | None:
        """A number field in [low, high], or in (low, high]."""
        value = self.take(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            refuse_type(self.path(name), "a number", value)
        if not low <= value <= high or (open_below and value == low):
            refuse_value(self.path(name), f"must be in {'(' if open_below else '['}{low}, {high}], is {shown(value)}")
        return float(value)

    def string(self, name: str, character_limit: int, *, may_be_empty: bool = True) -> str | None:
        """A string field of valid Unicode."""
        value = self.take(name)
        if value is None:
            return None
        return checked_text(value, self.path(name), character_limit=character_limit, may_be_empty=may_be_empty)

    def array(self, name: str) -> list[Any] | None:
        """An array field."""
        value = self.take(name)
        if value is not None and not isinstance(value, list):
            refuse_type(self.path(name), "an array", value)
        return value

    def fields(self, name: str) -> Fields | None:
        """A field that is an object itself."""
        value = self.take(name)
        if value is None:
            return None
        return Fields(checked_object(value, self.path(name)), self.path(name))

    def finish(self, neutral: Mapping[str, tuple[Any, ...]] = _NOTHING) -> None:
        """Ends the reading: what nobody took is unknown, or is unsupported but for values that ask for nothing.

        Args:
            neutral: the unsupported fields, and of each the values (beside null) that ask for nothing.
        """
        for name, value in self._values.items():
            if name in self._taken:
                continue
            if name not in neutral:
                path = self.path(shown_name(name))
                raise TidegateError(Reason.UNKNOWN_PARAMETER, f"Unknown parameter: '{path}'.", field=path)
            if value is not None and not any(type(value) is type(one) and value == one for one in neutral[name]):
                refuse_unsupported(self.path(name))


def checked_object(value: Any, path: str) -> dict[str, Any]:
    """The value, an object."""
    if not isinstance(value, dict):
        refuse_type(path, "an object", value)
    return value


def checked_integer(value: Any, path: str) -> int:
    """The value, an integer."""
    if isinstance(value, bool) or not isinstance(value, int):
        refuse_type(path, "an integer", value)
    return value


def checked_text(value: Any, path: str, *, character_limit: int | None = None, may_be_empty: bool = True) -> str:
    """The value, a string of valid Unicode."""
    if not isinstance(value, str):
        refuse_type(path, "a string", value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        refuse_value(path, f"has half of a surrogate pair at character {error.start}")
    if not value and not may_be_empty:
        refuse_value(path, "must not be empty")
    if character_limit is not None and len(value) > character_limit:
        refuse_value(path, f"must be at most {character_limit} characters, has {len(value)}")
    return value


def refuse_type(path: str, wanted: str, value: Any) -> NoReturn:
    """INVALID_TYPE in OpenAI's words."""
    message = f"Invalid type for '{path}': expected {wanted}, but got {kind_of(value)} instead."
    raise TidegateError(Reason.INVALID_TYPE, message, field=path)


def refuse_value(path: str, fault: str) -> NoReturn:
    """INVALID_VALUE in OpenAI's words."""
    raise TidegateError(Reason.INVALID_VALUE, f"Invalid value for '{path}': {fault}.", field=path)


def refuse_unsupported(path: str, why: str = "is not supported") -> NoReturn:
    """UNSUPPORTED_PARAMETER: OpenAI has it, this mesh does not."""
    raise TidegateError(Reason.UNSUPPORTED_PARAMETER, f"Unsupported parameter: '{path}' {why}.", field=path)


def refuse_missing(path: str) -> NoReturn:
    """MISSING_REQUIRED_PARAMETER in OpenAI's words."""
    raise TidegateError(Reason.MISSING_REQUIRED_PARAMETER, f"Missing required parameter: '{path}'.", field=path)


def kind_of(value: Any) -> str:
    """The JSON type of a value, with its article."""
    if value is None:
        return "null"
    if isinstance(value, float):
        return "a decimal"
    return _KINDS[type(value)]


def shown(value: float | str) -> str:
    """A client's value as an error message repeats it: short, and always valid Unicode."""
    if isinstance(value, int) and abs(value) >= 10**SHOWN_CHARACTER_LIMIT:
        return "a number of more than 64 digits"
    if isinstance(value, float) and not math.isfinite(value):
        return "not finite"
    if isinstance(value, str):
        return repr(shown_name(value))
    return str(value)


def shown_name(name: str) -> str:
    """A client's string, cut to a length and with anything that is not printable escaped."""
    cut = name if len(name) <= SHOWN_CHARACTER_LIMIT else name[:SHOWN_CHARACTER_LIMIT] + "..."
    return cut if cut.isprintable() else cut.encode("unicode_escape").decode("ascii")


def _refuse_constant(name: str) -> NoReturn:
    raise TidegateError(Reason.INVALID_JSON, f"The body is not JSON: {name} is not a JSON number.")
