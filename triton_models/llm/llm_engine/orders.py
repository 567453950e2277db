"""What the first rank says to the others, as bytes that are made once for all of them.

Invariant: what comes from another host is numbers, texts and lists of them, never an object; anything else is refused.
"""

import io
import pickle

from .step_tensors import RowWork

Work = tuple[int, list[int], list[int], int]


def packed(order: str, *arguments: object) -> bytes:
    """An order and what it needs, as bytes."""
    return pickle.dumps((order, *arguments), pickle.HIGHEST_PROTOCOL)


def unpacked(payload: bytes) -> tuple:
    """The order and what it needs; pickle.UnpicklingError where there is an object in it."""
    return _Plain(io.BytesIO(payload)).load()


def plain_works(works: list[RowWork]) -> list[Work]:
    """A step's work as an order may hold it."""
    return [(work.start, work.token_ids, work.block_ids, work.sample_count) for work in works]


def row_works(works: list[Work]) -> list[RowWork]:
    """The same again as it was."""
    return [RowWork(*work) for work in works]


class _Plain(pickle.Unpickler):
    """Knows no classes and no functions, by which pickled bytes could run what they like."""

    def find_class(self, module_name: str, global_name: str) -> type:
        raise pickle.UnpicklingError(f"an order holds {module_name}.{global_name}, expected plain values")
