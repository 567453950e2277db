"""Batches from their order to their files, through the service, before a mesh that is faked."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import pytest
from google.api import httpbody_pb2
from google.rpc import error_details_pb2, status_pb2

from tidegate.common.errors import Reason, TidegateError
from tidegate.v1 import batch_pb2

CHAT = "/v1/chat/completions"


def chat_line(custom_id: str, content: str | None = None, **changes: Any) -> str:
    body = {"model": "m", "messages": [{"role": "user", "content": content or custom_id}]}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body} | changes) + "\n"


def waiting(**counts: int) -> Any:
    from tidegate.v1 import scheduler_pb2

    classes = {"realtime": 1, "standard": 2, "batch": 3}
    lanes = [
        scheduler_pb2.LaneSnapshot(service_class=number, waiting_request_count=counts.get(name, 0))
        for name, number in classes.items()
    ]
    return scheduler_pb2.Snapshot(lanes=lanes, replicas=[scheduler_pb2.ReplicaSnapshot(connected=True, credit_count=8)])


async def refusal(call: Any) -> tuple[str, str]:
    """The reason and the message of a call that is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    found = dict(raised.value.trailing_metadata())
    info = error_details_pb2.ErrorInfo()
    status_pb2.Status.FromString(found["grpc-status-details-bin"]).details[0].Unpack(info)
    return info.reason, raised.value.details()


async def test_a_batch_is_answered_line_by_line_in_the_class_and_the_name_of_its_tenant(start, mesh, unix_clock):
    service = await start()
    file = await service.upload("".join(chat_line(f"line-{i}") for i in range(30)), tenant="a")
    created = await service.create(file["id"], tenant="a", metadata={"job": "nightly"})
    assert (created["object"], created["status"], created["endpoint"]) == ("batch", "validating", CHAT)
    assert created["expires_at"] - created["created_at"] == 86_400
    batch = await service.until(created["id"], "completed", tenant="a")
    assert batch["request_counts"] == {"total": 30, "completed": 30, "failed": 0}
    assert batch["usage"] == {
        "input_tokens": 90,
        "input_tokens_details": {"cached_tokens": 30},
        "output_tokens": 60,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 150,
    }
    now = int(unix_clock.now)
    assert [batch[name] for name in ("in_progress_at", "finalizing_at", "completed_at")] == [now] * 3
    assert (batch["error_file_id"], batch["errors"], batch["metadata"]) == (None, None, {"job": "nightly"})
    lines = await service.lines(batch["output_file_id"], tenant="a")
    assert set(lines) == {f"line-{i}" for i in range(30)}
    for custom_id, line in lines.items():
        assert (line["error"], line["response"]["status_code"]) == (None, 200)
        assert line["response"]["body"]["choices"][0]["message"]["content"] == custom_id.upper()
    assert {(fields["x-tidegate-tenant"], fields["x-tidegate-class"]) for fields, _ in mesh.seen} == {("a", "batch")}
    request_ids = {line["response"]["request_id"] for line in lines.values()}
    assert request_ids == {fields["x-request-id"] for fields, _ in mesh.seen}


async def test_lines_that_cannot_be_sent_are_told_in_the_error_file_and_the_others_go_on(start, mesh):
    service = await start(line_bytes_limit=1024)
    mesh.act = lambda text: (
        TidegateError(Reason.CONTEXT_LENGTH_EXCEEDED, "too long", field="messages") if text == "long" else None
    )
    content = "".join(
        [
            chat_line("good"),
            "{not json}\n",
            "\n",
            chat_line("url", url="/v1/embeddings"),
            chat_line("method", method="GET"),
            chat_line("good", "again"),
            chat_line("refused", "long"),
            chat_line("stream", body={"stream": True}),
            chat_line("nothing", body=None),
            json.dumps({"method": "POST", "url": CHAT, "body": {}}) + "\n",
            chat_line("huge", "x" * 2000),
            chat_line("last").rstrip("\n"),
        ]
    )
    created = await service.create((await service.upload(content))["id"])
    batch = await service.until(created["id"], "completed")
    assert batch["request_counts"] == {"total": 11, "completed": 2, "failed": 9}
    assert set(await service.lines(batch["output_file_id"])) == {"good", "last"}
    failed = [json.loads(line) for line in (await service.content(batch["error_file_id"])).splitlines()]
    told = {line["error"]["line"]: (line["custom_id"], line["error"]["code"]) for line in failed if line["error"]}
    assert told == {
        2: (None, "invalid_json_line"),
        4: ("url", "invalid_url"),
        5: ("method", "invalid_method"),
        6: ("good", "duplicate_custom_id"),
        8: ("stream", "unsupported_parameter"),
        9: ("nothing", "missing_required_parameter"),
        10: (None, "missing_required_parameter"),
        11: (None, "line_too_long"),
    }
    refused = next(line for line in failed if line["custom_id"] == "refused")
    assert (refused["error"], refused["response"]["status_code"]) == (None, 400)
    assert refused["response"]["body"]["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("content", "code"),
    [("", "empty_file"), ("\n \n", "empty_file"), (chat_line("a") * 4, "too_many_lines")],
)
async def test_a_file_that_cannot_be_used_as_a_whole_fails_its_batch(start, content, code):
    service = await start(line_count_limit=3)
    created = await service.create((await service.upload(content))["id"])
    batch = await service.until(created["id"], "failed")
    assert [error["code"] for error in batch["errors"]["data"]] == [code]
    assert (batch["errors"]["object"], batch["output_file_id"]) == ("list", None)


async def test_a_refusal_for_lack_of_room_is_no_result(start, mesh):
    service = await start(attempt_limit=1)
    refusals = [Reason.SERVER_IS_OVERLOADED, Reason.RATE_LIMIT_EXCEEDED, Reason.REPLICA_UNAVAILABLE] * 2
    mesh.act = lambda _: TidegateError(refusals.pop(), "no", retry_after_seconds=0.01) if refusals else None
    created = await service.create((await service.upload(chat_line("a") + chat_line("b")))["id"])
    batch = await service.until(created["id"], "completed")
    assert batch["request_counts"]["completed"] == 2
    assert len(mesh.seen) == 8


async def test_a_fault_is_tried_so_often_and_then_told(start, mesh):
    service = await start(attempt_limit=3)
    mesh.act = lambda text: TidegateError(Reason.INTERNAL_ERROR, "broken") if text == "bad" else None
    created = await service.create((await service.upload(chat_line("bad") + chat_line("good")))["id"])
    batch = await service.until(created["id"], "completed")
    line = (await service.lines(batch["error_file_id"]))["bad"]
    assert (line["response"]["status_code"], line["response"]["body"]["error"]["code"]) == (500, "internal_error")
    assert sum(body["messages"][-1]["content"] == "bad" for _, body in mesh.seen) == 3


async def test_no_more_lines_are_out_than_the_limit(start, mesh):
    service = await start(in_flight_limit=3)
    mesh.act = lambda _: asyncio.sleep(0.01)
    created = await service.create((await service.upload("".join(chat_line(f"{i}") for i in range(20))))["id"])
    await service.until(created["id"], "completed")
    assert mesh.most_in_flight == 3


@pytest.mark.parametrize("service_class", ["realtime", "standard"])
async def test_nothing_is_sent_while_others_wait(start, mesh, service_class):
    mesh.snapshot = waiting(**{service_class: 1})
    service = await start()
    created = await service.create((await service.upload(chat_line("a")))["id"])
    await service.until(created["id"], "in_progress")
    await asyncio.sleep(0.3)
    assert mesh.seen == []
    mesh.snapshot = waiting()
    await service.until(created["id"], "completed")


async def test_a_cancelled_batch_keeps_what_is_done_and_tells_the_rest(start, mesh):
    service = await start(in_flight_limit=1)
    done, hold = asyncio.Event(), asyncio.Event()

    async def act(text: str) -> None:
        if text == "1":
            done.set()
            await hold.wait()

    mesh.act = act
    created = await service.create((await service.upload("".join(chat_line(f"{i}") for i in range(5))))["id"])
    await done.wait()
    request = batch_pb2.CancelBatchRequest(batch_id=created["id"])
    cancelling = json.loads((await service.stub.CancelBatch(request)).data)
    assert cancelling["status"] in ("cancelling", "cancelled")
    batch = await service.until(created["id"], "cancelled")
    assert batch["request_counts"] == {"total": 5, "completed": 1, "failed": 4}
    assert set(await service.lines(batch["output_file_id"])) == {"0"}
    errors = await service.lines(batch["error_file_id"])
    assert {line["error"]["code"] for line in errors.values()} == {"batch_cancelled"}
    assert json.loads((await service.stub.CancelBatch(request)).data)["status"] == "cancelled"


async def test_a_batch_that_has_ended_cannot_be_cancelled(start):
    service = await start()
    created = await service.create((await service.upload(chat_line("a")))["id"])
    await service.until(created["id"], "completed")
    reason, message = await refusal(service.stub.CancelBatch(batch_pb2.CancelBatchRequest(batch_id=created["id"])))
    assert (reason, "completed" in message) == ("INVALID_VALUE", True)


async def test_a_batch_whose_window_ended_is_expired_with_what_it_has(start, mesh, unix_clock):
    mesh.snapshot = waiting(realtime=1)
    service = await start()
    created = await service.create((await service.upload(chat_line("a") + "bad\n"))["id"])
    await service.until(created["id"], "in_progress")
    unix_clock.now += 86_401
    service = await start()
    batch = await service.until(created["id"], "expired")
    assert (batch["expired_at"], batch["completed_at"]) == (int(unix_clock.now), None)
    assert (await service.lines(batch["error_file_id"]))["a"]["error"]["code"] == "batch_expired"
    assert mesh.seen == []


async def test_a_service_that_begins_anew_goes_on_with_what_was_open(start, mesh):
    mesh.snapshot = waiting(standard=1)
    service = await start()
    created = await service.create((await service.upload(chat_line("a") + chat_line("b")))["id"])
    await service.until(created["id"], "in_progress")
    mesh.snapshot = waiting()
    service = await start()
    batch = await service.until(created["id"], "completed")
    assert set(await service.lines(batch["output_file_id"])) == {"a", "b"}


async def test_a_tenant_sees_only_its_own(start):
    service = await start()
    file = await service.upload(chat_line("a"), tenant="a")
    created = await service.create(file["id"], tenant="a")
    other = [("x-tidegate-tenant", "b")]
    stub, file_id, batch_id = service.stub, file["id"], created["id"]
    for call in (
        stub.GetFile(batch_pb2.GetFileRequest(file_id=file_id), metadata=other),
        stub.DeleteFile(batch_pb2.DeleteFileRequest(file_id=file_id), metadata=other),
        stub.GetBatch(batch_pb2.GetBatchRequest(batch_id=batch_id), metadata=other),
        stub.CancelBatch(batch_pb2.CancelBatchRequest(batch_id=batch_id), metadata=other),
        service.create(file_id, tenant="b"),
        service.content(file_id, tenant="b"),
    ):
        assert (await refusal(call))[0] == "NOT_FOUND"
    assert json.loads((await stub.ListFiles(batch_pb2.ListFilesRequest(), metadata=other)).data)["data"] == []
    assert json.loads((await stub.ListBatches(batch_pb2.ListBatchesRequest(), metadata=other)).data)["data"] == []
    await service.until(batch_id, "completed", tenant="a")


async def test_open_batches_are_bounded(start, mesh):
    mesh.snapshot = waiting(realtime=1)
    service = await start(open_batches_per_tenant_limit=2, open_batch_limit=3)
    file_a, file_b = [(await service.upload(chat_line("a"), tenant=tenant))["id"] for tenant in "ab"]
    for _ in range(2):
        await service.create(file_a, tenant="a")
    assert (await refusal(service.create(file_a, tenant="a")))[0] == "RATE_LIMIT_EXCEEDED"
    await service.create(file_b, tenant="b")
    assert (await refusal(service.create(file_b, tenant="b")))[0] == "RATE_LIMIT_EXCEEDED"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"endpoint": "/v1/embeddings"}, "INVALID_VALUE"),
        ({"endpoint": None}, "MISSING_REQUIRED_PARAMETER"),
        ({"completion_window": "1h"}, "INVALID_VALUE"),
        ({"input_file_id": 7}, "INVALID_TYPE"),
        ({"input_file_id": "file-none"}, "NOT_FOUND"),
        ({"metadata": {"a": 1}}, "INVALID_TYPE"),
        ({"metadata": {"a": "x" * 513}}, "INVALID_VALUE"),
        ({"metadata": {str(i): "" for i in range(17)}}, "INVALID_VALUE"),
        ({"output_expires_after": {}}, "UNSUPPORTED_PARAMETER"),
    ],
)
async def test_an_order_that_makes_no_sense_is_refused_with_its_field(start, change, reason):
    service = await start()
    file = await service.upload(chat_line("a"))
    assert (await refusal(service.create(file["id"], **change)))[0] == reason
    broken = httpbody_pb2.HttpBody(data=b"{")
    assert (await refusal(service.stub.CreateBatch(broken)))[0] == "INVALID_JSON"


async def test_batches_are_listed_newest_first_in_pages(start):
    service = await start()
    file = await service.upload(chat_line("a"))
    ids = [(await service.create(file["id"]))["id"] for _ in range(3)]
    request = batch_pb2.ListBatchesRequest(limit=2)
    page = json.loads((await service.stub.ListBatches(request)).data)
    assert ([each["id"] for each in page["data"]], page["has_more"]) == ([ids[2], ids[1]], True)
    request = batch_pb2.ListBatchesRequest(limit=2, after=page["last_id"])
    page = json.loads((await service.stub.ListBatches(request)).data)
    assert ([each["id"] for each in page["data"]], page["has_more"]) == ([ids[0]], False)
    bad = batch_pb2.ListBatchesRequest(limit=0)
    assert (await refusal(service.stub.ListBatches(bad)))[0] == "INVALID_VALUE"
