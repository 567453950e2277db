"""Takes uploads: bounded in bytes, in number and in time; kept whole and durable, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Final

from google.api import httpbody_pb2

from tidegate.batch.file_folder import PartialFile, new_file_id
from tidegate.batch.life import Means
from tidegate.batch.multipart import Upload
from tidegate.batch.records import StoredFile
from tidegate.common.errors import Reason, TidegateError

COME_BACK_SECONDS: Final = 5.0
"""When as many uploads are under way as may be."""

FRAMING_BYTES: Final = 65_536
"""What stands beside the file in a body, at most."""

DISCARD_FACTOR: Final = 2
"""A body that is too large is read, and thrown away, up to so many times the bound: clients of HTTP/1.1 send all of it
before they read the answer."""


class Uploads:
    """Takes uploads and puts them into folder and store."""

    def __init__(self, means: Means) -> None:
        self._means = means
        self._under_way = 0

    async def take(self, tenant: str, bodies: AsyncIterator[httpbody_pb2.HttpBody]) -> StoredFile:
        """Takes one upload; it is durable when this returns.

        Raises:
            TidegateError: it cannot be taken; nothing is kept.
        """
        settings = self._means.settings
        if self._under_way >= settings.upload_limit:
            raise TidegateError(
                Reason.SERVER_IS_OVERLOADED,
                f"There are {self._under_way} uploads under way already.",
                retry_after_seconds=COME_BACK_SECONDS,
            )
        self._under_way += 1
        try:
            async with asyncio.timeout(settings.upload_timeout_seconds):
                return await self._take(tenant, bodies)
        except TimeoutError:
            message = f"The upload took longer than {settings.upload_timeout_seconds:g} s."
            raise TidegateError(Reason.DEADLINE_EXCEEDED, message) from None
        finally:
            self._under_way -= 1

    async def _take(self, tenant: str, bodies: AsyncIterator[httpbody_pb2.HttpBody]) -> StoredFile:
        file_id = new_file_id()
        partial = self._means.folder.begin(file_id)
        try:
            upload = await self._read(bodies, partial)
            # Kept and not in the store, if all ends here: the next start sweeps it away.
            await asyncio.to_thread(partial.keep)
        finally:
            partial.drop()
        now = self._means.now
        file = StoredFile(
            id=file_id,
            tenant=tenant,
            filename=upload.filename,
            purpose="batch",
            byte_count=partial.byte_count,
            created_at=now,
            expires_at=now + self._means.settings.lifetime_seconds,
        )
        await self._means.store.do(lambda store: store.add_file(file))
        self._means.metrics.uploaded.inc(file.byte_count)
        return file

    async def _read(self, bodies: AsyncIterator[httpbody_pb2.HttpBody], partial: PartialFile) -> Upload:
        limit = self._means.settings.file_bytes_limit
        upload: Upload | None = None
        fault: TidegateError | None = None
        byte_count = 0
        async for body in bodies:
            byte_count += len(body.data)
            if byte_count > DISCARD_FACTOR * (limit + FRAMING_BYTES):
                break
            if fault is None:
                try:
                    upload = upload or Upload(body.content_type, partial.write)
                    upload.feed(body.data)
                    if partial.byte_count > limit or byte_count > limit + FRAMING_BYTES:
                        raise TidegateError(Reason.REQUEST_TOO_LARGE, f"The file is larger than {limit} bytes.")
                except TidegateError as error:
                    fault = error
        if fault is not None:
            raise fault
        if upload is None:
            raise TidegateError(Reason.MISSING_REQUIRED_PARAMETER, "Missing required parameter: file.", field="file")
        upload.finish()
        return upload
