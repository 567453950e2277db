"""tidegate.v1.Batch: messages to plain calls and back. It decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import Any, Final, TypeVar

import grpc
import msgspec
import structlog
from google.api import httpbody_pb2

from tidegate.batch import orders, records
from tidegate.batch.life import Means
from tidegate.batch.records import StoredBatch, StoredFile
from tidegate.batch.runner import Runner
from tidegate.batch.store import Refused
from tidegate.batch.uploads import Uploads
from tidegate.common import headers
from tidegate.common.errors import Reason, TidegateError, abort
from tidegate.v1 import batch_pb2, batch_pb2_grpc

log = structlog.get_logger()

PIECE_BYTES: Final = 65_536
"""Of a content that is read."""

COME_BACK_SECONDS: Final = 60.0
"""When there are as many batches as may be: one has to end."""

Context = grpc.aio.ServicerContext[Any, Any]

_Answer = TypeVar("_Answer")


class BatchServicer(batch_pb2_grpc.BatchServicer):
    """Serves files and batches."""

    def __init__(self, means: Means, runner: Runner) -> None:
        self._means = means
        self._store = means.store
        self._runner = runner
        self._uploads = Uploads(means)

    async def CreateFile(
        self, request_iterator: AsyncIterator[httpbody_pb2.HttpBody], context: Context
    ) -> httpbody_pb2.HttpBody:
        """Takes an upload."""
        return await _ended(context, self._create_file(_tenant(context), request_iterator))

    async def ListFiles(self, request: batch_pb2.ListFilesRequest, context: Context) -> httpbody_pb2.HttpBody:
        """Lists the tenant's files."""
        return await _ended(context, self._list_files(_tenant(context), request))

    async def GetFile(self, request: batch_pb2.GetFileRequest, context: Context) -> httpbody_pb2.HttpBody:
        """Shows one file."""
        file = await _ended(context, self._file(_tenant(context), request.file_id))
        return _json(records.file_object(file))

    async def GetFileContent(  # type: ignore[override]
        self, request: batch_pb2.GetFileContentRequest, context: Context
    ) -> None:
        """Sends a file's content. A coroutine that writes, so that it ends where it stands when the client leaves."""
        await _ended(context, self._send_content(_tenant(context), request.file_id, context))

    async def DeleteFile(self, request: batch_pb2.DeleteFileRequest, context: Context) -> httpbody_pb2.HttpBody:
        """Forgets a file."""
        return await _ended(context, self._delete_file(_tenant(context), request.file_id))

    async def CreateBatch(self, request: httpbody_pb2.HttpBody, context: Context) -> httpbody_pb2.HttpBody:
        """Begins a batch."""
        return await _ended(context, self._create_batch(_tenant(context), request.data))

    async def ListBatches(self, request: batch_pb2.ListBatchesRequest, context: Context) -> httpbody_pb2.HttpBody:
        """Lists the tenant's batches."""
        return await _ended(context, self._list_batches(_tenant(context), request))

    async def GetBatch(self, request: batch_pb2.GetBatchRequest, context: Context) -> httpbody_pb2.HttpBody:
        """Shows one batch."""
        batch = await _ended(context, self._batch(_tenant(context), request.batch_id))
        return _json(records.batch_object(batch))

    async def CancelBatch(self, request: batch_pb2.CancelBatchRequest, context: Context) -> httpbody_pb2.HttpBody:
        """Ends a batch early."""
        return await _ended(context, self._cancel_batch(_tenant(context), request.batch_id))

    async def _create_file(self, tenant: str, bodies: AsyncIterator[httpbody_pb2.HttpBody]) -> httpbody_pb2.HttpBody:
        settings = self._means.settings
        try:
            await self._store.do(
                lambda store: store.check_room(
                    tenant,
                    file_limit=settings.files_per_tenant_limit,
                    byte_limit=settings.bytes_per_tenant_limit,
                )
            )
        except Refused as refused:
            raise TidegateError(Reason.INVALID_VALUE, str(refused), field="file") from None
        file = await self._uploads.take(tenant, bodies)
        log.info("file_taken", file=file.id, tenant=tenant, bytes=file.byte_count)
        return _json(records.file_object(file))

    async def _list_files(self, tenant: str, request: batch_pb2.ListFilesRequest) -> httpbody_pb2.HttpBody:
        given = request.limit if request.HasField("limit") else None
        largest = orders.FILES_PAGE_LIMIT
        limit = orders.page_limit(given, default=largest, largest=largest)
        descending = orders.is_descending(request.order)
        files, has_more = await self._store.do(
            lambda store: store.files(
                tenant, after=request.after, limit=limit, descending=descending, purpose=request.purpose
            )
        )
        return _json(records.list_object([records.file_object(file) for file in files], has_more=has_more))

    async def _file(self, tenant: str, file_id: str) -> StoredFile:
        file = await self._store.do(lambda store: store.file(tenant, file_id))
        if file is None:
            raise TidegateError(Reason.NOT_FOUND, f"No such File object: {file_id}", field="id")
        return file

    async def _send_content(self, tenant: str, file_id: str, context: Context) -> None:
        await self._file(tenant, file_id)
        try:
            content = await asyncio.to_thread(self._means.folder.open, file_id)
        except FileNotFoundError:
            raise TidegateError(Reason.NOT_FOUND, f"No such File object: {file_id}", field="id") from None
        with content:
            content_type = "application/octet-stream"  # Only the first message of a stream names it.
            while (piece := await asyncio.to_thread(content.read, PIECE_BYTES)) or content_type:
                await context.write(httpbody_pb2.HttpBody(content_type=content_type, data=piece))
                content_type = ""

    async def _delete_file(self, tenant: str, file_id: str) -> httpbody_pb2.HttpBody:
        await self._file(tenant, file_id)
        await self._store.do(lambda store: store.delete_file(tenant, file_id))
        await asyncio.to_thread(self._means.folder.remove, file_id)
        return _json(records.deleted_object(file_id))

    async def _create_batch(self, tenant: str, body: bytes) -> httpbody_pb2.HttpBody:
        order = orders.parse_order(body)
        file = await self._file(tenant, order.input_file_id)
        if file.purpose != "batch":
            raise TidegateError(Reason.INVALID_VALUE, "The file's purpose must be 'batch'.", field="input_file_id")
        settings, new = self._means.settings, orders.new_batch(order, tenant, self._means.now)
        try:
            batch = await self._store.do(
                lambda store: store.create_batch(
                    new, tenant_limit=settings.open_batches_per_tenant_limit, limit=settings.open_batch_limit
                )
            )
        except Refused as refused:
            raise TidegateError(
                Reason.RATE_LIMIT_EXCEEDED, str(refused), retry_after_seconds=COME_BACK_SECONDS
            ) from None
        self._runner.add(batch)
        log.info("batch_created", batch=batch.id, tenant=tenant, file=file.id)
        return _json(records.batch_object(batch))

    async def _list_batches(self, tenant: str, request: batch_pb2.ListBatchesRequest) -> httpbody_pb2.HttpBody:
        given = request.limit if request.HasField("limit") else None
        limit = orders.page_limit(given, default=orders.BATCHES_PAGE_DEFAULT, largest=orders.BATCHES_PAGE_LIMIT)
        batches, has_more = await self._store.do(
            lambda store: store.batches(tenant, after=request.after, limit=limit)
        )  # fmt: skip
        return _json(records.list_object([records.batch_object(batch) for batch in batches], has_more=has_more))

    async def _batch(self, tenant: str, batch_id: str) -> StoredBatch:
        batch = await self._store.do(lambda store: store.batch(tenant, batch_id))
        if batch is None:
            raise TidegateError(Reason.NOT_FOUND, f"No batch found with id '{batch_id}'.", field="id")
        return batch

    async def _cancel_batch(self, tenant: str, batch_id: str) -> httpbody_pb2.HttpBody:
        now = self._means.now
        was_open = await self._store.do(lambda store: store.cancel(tenant, batch_id, now))
        batch = await self._batch(tenant, batch_id)
        if was_open:
            self._runner.cancel(batch)
        elif batch.cancelling_at is None:
            message = f"A batch with status '{batch.status.value}' cannot be cancelled."
            raise TidegateError(Reason.INVALID_VALUE, message, field="id")
        return _json(records.batch_object(batch))


async def _ended(context: Context, answer: Awaitable[_Answer]) -> _Answer:
    """What a call comes to: its answer, or the status of its error. A fault of ours is for the log alone."""
    try:
        return await answer
    except TidegateError as error:
        await abort(context, error)
    except grpc.aio.BaseError:
        raise
    except Exception:
        log.exception("call_failed")
        message = "The request failed because of a fault in the service."
        await abort(context, TidegateError(Reason.INTERNAL_ERROR, message))


def _tenant(context: Context) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == headers.TENANT and isinstance(value, str):
            return value
    return headers.DEFAULT_TENANT


def _json(value: dict[str, Any]) -> httpbody_pb2.HttpBody:
    return httpbody_pb2.HttpBody(content_type="application/json", data=msgspec.json.encode(value))
