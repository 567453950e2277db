"""What the store keeps of files and batches, and OpenAI's objects made of it. Pure. Times are Unix seconds."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any, Final

import msgspec


class Status(enum.StrEnum):
    """OpenAI's states of a batch."""

    VALIDATING = "validating"
    FAILED = "failed"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


OPEN: Final = (Status.VALIDATING, Status.IN_PROGRESS, Status.FINALIZING, Status.CANCELLING)
"""The states that go on by themselves."""

STAMPED: Final = tuple(f"{status}_at" for status in Status if status is not Status.VALIDATING)
"""The fields that say when a state began."""


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file."""

    id: str
    tenant: str
    filename: str
    purpose: str
    byte_count: int
    created_at: int
    expires_at: int


class StoredBatch(msgspec.Struct, frozen=True, kw_only=True):
    """A batch."""

    number: int
    """Its key in the store, in order of creation."""
    id: str
    tenant: str
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: dict[str, str] | None
    status: Status
    ends_as: Status | None
    """Decided when its last line was: what it is when its files are written."""
    errors: list[dict[str, Any]] | None
    created_at: int
    expires_at: int
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    total_count: int = 0
    completed_count: int = 0
    failed_count: int = 0
    prompt_token_count: int = 0
    cached_token_count: int = 0
    completion_token_count: int = 0


def file_object(file: StoredFile) -> dict[str, Any]:
    """OpenAI's file object."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.byte_count,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def batch_object(batch: StoredBatch) -> dict[str, Any]:
    """OpenAI's batch object."""
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": None if batch.errors is None else {"object": "list", "data": batch.errors},
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status.value,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": batch.created_at,
        "expires_at": batch.expires_at,
        **{name: getattr(batch, name) for name in STAMPED},
        "request_counts": {
            "total": batch.total_count,
            "completed": batch.completed_count,
            "failed": batch.failed_count,
        },
        "usage": {
            "input_tokens": batch.prompt_token_count,
            "input_tokens_details": {"cached_tokens": batch.cached_token_count},
            "output_tokens": batch.completion_token_count,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": batch.prompt_token_count + batch.completion_token_count,
        },
        "metadata": batch.metadata,
    }


def list_object(objects: Sequence[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    """OpenAI's page of a list."""
    return {
        "object": "list",
        "data": list(objects),
        "first_id": objects[0]["id"] if objects else None,
        "last_id": objects[-1]["id"] if objects else None,
        "has_more": has_more,
    }


def deleted_object(file_id: str) -> dict[str, Any]:
    """OpenAI's word that a file is gone."""
    return {"id": file_id, "object": "file", "deleted": True}
