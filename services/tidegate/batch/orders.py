"""What a client asks for in the body of POST /v1/batches, and how it asks for pages of lists. Pure."""

from __future__ import annotations

from typing import Any, Final
from uuid import uuid4

import msgspec

from tidegate.batch.lines import ENDPOINTS
from tidegate.common.errors import Reason, TidegateError

COMPLETION_WINDOW: Final = "24h"
COMPLETION_WINDOW_SECONDS: Final = 86_400
"""OpenAI's only one."""

METADATA_PAIRS_LIMIT: Final = 16
METADATA_KEY_LIMIT: Final = 64
METADATA_VALUE_LIMIT: Final = 512
"""OpenAI's bounds; characters."""

FIELDS: Final = ("input_file_id", "endpoint", "completion_window", "metadata")

FILES_PAGE_LIMIT: Final = 10_000
BATCHES_PAGE_LIMIT: Final = 100
BATCHES_PAGE_DEFAULT: Final = 20


class BatchOrder(msgspec.Struct, frozen=True):
    """A batch as it is asked for."""

    input_file_id: str
    endpoint: str
    metadata: dict[str, str] | None


def parse_order(body: bytes) -> BatchOrder:
    """Reads the body.

    Raises:
        TidegateError: what is wrong, and where.
    """
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TidegateError(Reason.INVALID_JSON, f"The body is not JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise TidegateError(Reason.INVALID_TYPE, "The body must be a JSON object.")
    unknown = [name for name in fields if name not in FIELDS]
    if unknown:
        raise TidegateError(
            Reason.UNSUPPORTED_PARAMETER, f"The parameter '{unknown[0]}' is not supported here.", field=unknown[0]
        )
    endpoint, window = _text(fields, "endpoint"), _text(fields, "completion_window")
    if endpoint not in ENDPOINTS:
        raise _invalid("endpoint", f"endpoint must be one of {', '.join(ENDPOINTS)}.")
    if window != COMPLETION_WINDOW:
        raise _invalid("completion_window", f"completion_window must be '{COMPLETION_WINDOW}'.")
    return BatchOrder(_text(fields, "input_file_id"), endpoint, _metadata(fields.get("metadata")))


def new_batch(order: BatchOrder, tenant: str, now: int) -> dict[str, Any]:
    """What the store keeps of a batch that begins."""
    return {
        "id": f"batch_{uuid4().hex}",
        "tenant": tenant,
        "endpoint": order.endpoint,
        "input_file_id": order.input_file_id,
        "completion_window": COMPLETION_WINDOW,
        "metadata": order.metadata,
        "created_at": now,
        "expires_at": now + COMPLETION_WINDOW_SECONDS,
    }


def page_limit(given: int | None, *, default: int, largest: int) -> int:
    """The length of a page.

    Raises:
        TidegateError: it is out of range.
    """
    limit = default if given is None else given
    if not 1 <= limit <= largest:
        raise _invalid("limit", f"limit is {limit}, must be from 1 to {largest}.")
    return limit


def is_descending(order: str) -> bool:
    """The order of a page.

    Raises:
        TidegateError: there is no such order.
    """
    if order not in ("", "asc", "desc"):
        raise _invalid("order", "order must be 'asc' or 'desc'.")
    return order != "asc"


def _text(fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is None:
        raise TidegateError(
            Reason.MISSING_REQUIRED_PARAMETER, f"Missing required parameter: {name}.", field=name
        )  # fmt: skip
    if not isinstance(value, str):
        raise TidegateError(Reason.INVALID_TYPE, f"{name} must be a text.", field=name)
    return value


def _metadata(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(each, str) for each in value.values()):
        raise TidegateError(Reason.INVALID_TYPE, "metadata must be an object of texts.", field="metadata")
    if len(value) > METADATA_PAIRS_LIMIT:
        raise _invalid("metadata", f"metadata has {len(value)} entries; the limit is {METADATA_PAIRS_LIMIT}.")
    if any(len(key) > METADATA_KEY_LIMIT or len(text) > METADATA_VALUE_LIMIT for key, text in value.items()):
        message = f"Keys have at most {METADATA_KEY_LIMIT} characters, values {METADATA_VALUE_LIMIT}."
        raise _invalid("metadata", message)
    return value


def _invalid(field: str, message: str) -> TidegateError:
    return TidegateError(Reason.INVALID_VALUE, message, field=field)
