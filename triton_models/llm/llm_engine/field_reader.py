"""Reads typed fields of a model's file, by their names.

Invariant: a field that is missing, of another type or out of its bounds is a ModelLoadError that names the file, the
field and what was expected.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .errors import ModelLoadError

MISSING = object()
"""The default of a field that must be there."""

# Beyond any model; what is larger is a damaged file.
_MOST, _MOST_NUMBER = 1 << 40, 1e30


class Fields:
    """One file's fields; null is as if the field were not there."""

    def __init__(self, path: Path, values: Mapping[str, object]) -> None:
        self._path = path
        self._values = values
        self._asked: set[str] = set()

    def integer(self, key: str, *, default: Any = MISSING, least: int = 0, most: int = _MOST) -> Any:
        value = self._typed(key, int, default)
        if value is not None and not least <= value <= most:
            raise ModelLoadError(f"{self._path}: field {key} is {value}, expected {least} to {most}")
        return value

    def number(self, key: str, *, default: Any = MISSING) -> Any:
        value = self._typed(key, (int, float), default)
        if value is not None and not abs(value) < _MOST_NUMBER:
            raise ModelLoadError(f"{self._path}: field {key} is {value}, expected a finite number")
        return value if value is None else float(value)

    def positive(self, key: str, *, default: Any = MISSING, or_zero: bool = False) -> Any:
        value = self.number(key, default=default)
        if value < 0 or (value == 0 and not or_zero):
            raise ModelLoadError(f"{self._path}: field {key} is {value}, expected more than 0")
        return value

    def text(self, key: str, *, default: Any = MISSING) -> Any:
        return self._typed(key, str, default)

    def fault(self, key: str, value: object) -> ModelLoadError:
        """For a value that cannot be."""
        return ModelLoadError(f"{self._path}: field {key} is {value!r}: not supported")

    def integers(self, key: str, *, default: Any = MISSING) -> Any:
        values = self._typed(key, list, default)
        if not all(type(value) is int for value in values):
            raise ModelLoadError(f"{self._path}: field {key} is {values!r}: not the expected type")
        return values

    def refuse_others(self, silent: Collection[str] = ()) -> None:
        """Refuse fields that nobody asked for, but for those that say nothing; null says as much as no field."""
        for key, value in self._values.items():
            if key not in self._asked and key not in silent and value is not None:
                raise ModelLoadError(f"{self._path}: field {key} is {value!r}: such a field is not supported")

    def boolean(self, key: str, *, default: Any = MISSING) -> Any:
        return self._typed(key, bool, default)

    def expect(self, key: str, values: tuple[object, ...], *, default: Any = MISSING) -> None:
        """Refuse a value that is not one of `values`."""
        value = self._typed(key, object, default)
        if value not in values:
            raise self.fault(key, value)

    def _typed(self, key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        self._asked.add(key)
        value = self._values.get(key)
        if value is None:
            value = default
        if value is MISSING:
            raise ModelLoadError(f"{self._path}: field {key} is missing")
        if value is not default and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
            raise ModelLoadError(f"{self._path}: field {key} is {value!r}: not the expected type")
        return value
