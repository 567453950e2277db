"""Files: uploads in pieces, what is refused, and what is left on disk."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import pytest
from google.api import httpbody_pb2
from google.rpc import error_details_pb2, status_pb2

from tidegate.batch.multipart import Upload
from tidegate.common.errors import Reason, TidegateError
from tidegate.v1 import batch_pb2

BOUNDARY = "a-boundary"
FORM = f'multipart/form-data; boundary="{BOUNDARY}"'


def form(*parts: tuple[str, str | None, bytes]) -> bytes:
    """A body of (name, filename, content) parts."""
    text = b""
    for name, filename, content in parts:
        attributes = f'name="{name}"' + ("" if filename is None else f'; filename="{filename}"')
        text += f"--{BOUNDARY}\r\nContent-Disposition: form-data; {attributes}\r\n\r\n".encode() + content + b"\r\n"
    return text + f"--{BOUNDARY}--\r\n".encode()


PURPOSE = ("purpose", None, b"batch")


async def reason(call: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    info = error_details_pb2.ErrorInfo()
    found = dict(raised.value.trailing_metadata())
    status_pb2.Status.FromString(found["grpc-status-details-bin"]).details[0].Unpack(info)
    return info.reason


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
def test_a_file_comes_out_of_its_form_however_it_is_cut(size):
    content = b"one\r\n--a-boundar\r\n\r\n--" + bytes(range(256))
    body, got = form(PURPOSE, ("file", "a b.jsonl", content)), []
    upload = Upload(FORM, got.append)
    for start in range(0, len(body), size):
        upload.feed(body[start : start + size])
    upload.finish()
    assert (b"".join(got), upload.filename, upload.fields) == (content, "a b.jsonl", {"purpose": "batch"})


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (form(PURPOSE), Reason.MISSING_REQUIRED_PARAMETER),
        (form(("file", "a", b"x")), Reason.MISSING_REQUIRED_PARAMETER),
        (form(("purpose", None, b"vision"), ("file", "a", b"x")), Reason.INVALID_VALUE),
        (form(PURPOSE, ("file", "a", b"x"), ("file", "b", b"y")), Reason.INVALID_VALUE),
        (form(PURPOSE, ("expires_after[seconds]", None, b"1"), ("file", "a", b"x")), Reason.UNSUPPORTED_PARAMETER),
        (form(("purpose", None, b"x" * 2000)), Reason.INVALID_VALUE),
        (form(*[PURPOSE] * 17), Reason.INVALID_HTTP),
        (form(PURPOSE, ("file", "a", b"x"))[:-10], Reason.INVALID_HTTP),
        (b"no form at all", Reason.INVALID_HTTP),
        (b"", Reason.INVALID_HTTP),
    ],
)
def test_a_form_that_is_no_upload_is_refused(body, said):
    with pytest.raises(TidegateError) as raised:
        upload = Upload(FORM, lambda _: None)
        upload.feed(body)
        upload.finish()
    assert raised.value.reason is said


@pytest.mark.parametrize(
    "kind",
    ["", "application/json", "multipart/form-data", "text/plain; ü", "multipart/form-data; boundary=" + "x" * 71],
)
def test_a_body_of_another_type_is_refused(kind):
    with pytest.raises(TidegateError) as raised:
        Upload(kind, lambda _: None)
    assert raised.value.reason is Reason.UNSUPPORTED_MEDIA_TYPE


async def test_a_file_is_kept_read_listed_and_deleted(start, unix_clock):
    service = await start()
    content = "".join(f"line {i}\n" for i in range(30_000))
    file = await service.upload(content, filename="mine.jsonl")
    assert file == {
        "id": file["id"],
        "object": "file",
        "bytes": len(content),
        "created_at": int(unix_clock.now),
        "expires_at": int(unix_clock.now) + 30 * 86_400,
        "filename": "mine.jsonl",
        "purpose": "batch",
        "status": "processed",
        "status_details": None,
    }
    service = await start()  # It is on disk.
    assert (await service.content(file["id"])).decode() == content
    request = batch_pb2.GetFileRequest(file_id=file["id"])
    assert json.loads((await service.stub.GetFile(request)).data) == file
    deleted = await service.stub.DeleteFile(batch_pb2.DeleteFileRequest(file_id=file["id"]))
    assert json.loads(deleted.data) == {"id": file["id"], "object": "file", "deleted": True}
    assert await reason(service.stub.GetFile(request)) == "NOT_FOUND"
    assert await reason(service.content(file["id"])) == "NOT_FOUND"
    assert list((service.folder / "files").iterdir()) == []


async def test_files_are_listed_in_pages_both_ways(start):
    service = await start()
    ids = [(await service.upload(f"{i}"))["id"] for i in range(3)]
    for order, expected in (("asc", ids), ("desc", ids[::-1]), ("", ids[::-1])):
        found, after = [], ""
        while True:
            request = batch_pb2.ListFilesRequest(limit=2, order=order, after=after)
            page = json.loads((await service.stub.ListFiles(request)).data)
            found += [each["id"] for each in page["data"]]
            after = page["last_id"]
            if not page["has_more"]:
                break
        assert found == expected
    none = json.loads((await service.stub.ListFiles(batch_pb2.ListFilesRequest(purpose="batch_output"))).data)
    assert none == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}
    assert await reason(service.stub.ListFiles(batch_pb2.ListFilesRequest(order="up"))) == "INVALID_VALUE"


async def test_a_grpc_client_may_send_the_file_as_it_is(start):
    service = await start()
    file = await service.send_file([b"a\n", b"b\n"], "application/jsonl")
    assert (file["purpose"], await service.content(file["id"])) == ("batch", b"a\nb\n")
    empty = await service.send_file([b""], "application/jsonl")
    assert (empty["bytes"], await service.content(empty["id"])) == (0, b"")


async def test_a_file_that_is_too_large_is_refused_after_it_was_read(start):
    service = await start(file_bytes_limit=2_000)
    kept = await service.upload("x" * 2_000)
    assert await reason(service.upload("x" * 2_001)) == "REQUEST_TOO_LARGE"
    assert [path.name for path in (service.folder / "files").iterdir()] == [kept["id"]]


async def test_what_a_tenant_may_keep_is_bounded(start):
    service = await start(files_per_tenant_limit=2)
    await service.upload("a", tenant="a")
    await service.upload("a", tenant="a")
    assert await reason(service.upload("a", tenant="a")) == "INVALID_VALUE"
    await service.upload("a", tenant="b")
    service = await start(bytes_per_tenant_limit=1_024)
    await service.upload("a" * 1_024, tenant="c")
    assert await reason(service.upload("a", tenant="c")) == "INVALID_VALUE"


async def test_uploads_at_once_are_bounded_and_one_that_breaks_off_leaves_nothing(start):
    service = await start(upload_limit=1)
    begun = asyncio.Event()

    async def hang():
        yield httpbody_pb2.HttpBody(content_type="application/jsonl", data=b"abc")
        begun.set()
        await asyncio.sleep(60)

    hanging = service.stub.CreateFile(hang())
    await begun.wait()
    while not list((service.folder / "files").iterdir()):
        await asyncio.sleep(0.01)
    assert await reason(service.upload("a")) == "SERVER_IS_OVERLOADED"
    hanging.cancel()
    while list((service.folder / "files").iterdir()):
        await asyncio.sleep(0.01)
    await service.upload("a")


async def test_a_start_sweeps_what_no_file_is_and_old_files_go(start, unix_clock):
    service = await start()
    file = await service.upload("a")
    leftover = service.folder / "files" / ("file-" + "0" * 32)
    leftover.write_text("never acknowledged")
    service = await start()
    assert [path.name for path in (service.folder / "files").iterdir()] == [file["id"]]
    unix_clock.now += 30 * 86_400
    service = await start()
    while list((service.folder / "files").iterdir()):
        await asyncio.sleep(0.01)
    assert await reason(service.content(file["id"])) == "NOT_FOUND"
