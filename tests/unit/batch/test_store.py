"""The store: each line's first result counts, each act is whole, and another version's file is refused."""

from __future__ import annotations

import sqlite3

import pytest

from tidegate.batch.lines import Usage
from tidegate.batch.records import Status, StoredFile
from tidegate.batch.store import NewLine, Store, StoreError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "batch.sqlite3"


@pytest.fixture
def store(path):
    opened = Store(path)
    yield opened
    opened.close()


@pytest.fixture
def number(store):
    """A batch that sends three lines; one of its file could not be sent."""
    batch = store.create_batch(
        {
            "id": "batch_1",
            "tenant": "t",
            "endpoint": "/v1/completions",
            "input_file_id": "file-1",
            "completion_window": "24h",
            "metadata": None,
            "created_at": 100,
            "expires_at": 200,
        },
        tenant_limit=1,
        limit=1,
    )
    lines = [NewLine(index, f"c{index}", b"{}") for index in (1, 2, 4)]
    store.add_lines(batch.number, [*lines, NewLine(3, None, None, b"bad")])
    store.start(batch.number, 101)
    return batch.number


def file(file_id):
    return StoredFile(
        id=file_id, tenant="t", filename="f", purpose="batch_output", byte_count=1, created_at=1, expires_at=1000
    )


def counts(store, number):
    batch = store.batch_by_number(number)
    return batch.total_count, batch.completed_count, batch.failed_count, batch.completion_token_count


def test_a_second_result_for_a_line_changes_nothing(store, number):
    usage = Usage(1, 5, 0)
    assert store.finish_line(number, 1, completed=True, result=b"first", usage=usage)
    assert not store.finish_line(number, 1, completed=False, result=b"second", usage=usage)
    store.fail_lines(number, [(1, b"third"), (2, b"cancelled")])
    assert counts(store, number) == (4, 1, 2, 5)
    assert store.results(number, completed=True, after=0, limit=10) == [(1, b"first")]
    assert store.results(number, completed=False, after=0, limit=10) == [(2, b"cancelled"), (3, b"bad")]
    assert [line.number for line in store.pending_lines(number, after=0, limit=10)] == [4]


def test_what_was_done_is_there_for_the_next_process(store, number, path):
    store.finish_line(number, 1, completed=True, result=b"first")
    other = Store(path)  # As after kill -9: the first one was never closed.
    assert counts(other, number) == (4, 1, 1, 0)
    assert [line.number for line in other.pending_lines(number, after=1, limit=1)] == [2]
    other.close()


def test_the_files_and_the_end_of_a_batch_are_one_act(store, number):
    assert store.decide_end(number, Status.COMPLETED, 110) is Status.COMPLETED
    store.add_file(file("file-2"))
    with pytest.raises(sqlite3.IntegrityError):
        store.end(number, file("file-3"), file("file-2"), 111)
    batch = store.batch_by_number(number)
    assert (batch.status, batch.output_file_id, store.file("t", "file-3")) == (Status.FINALIZING, None, None)
    assert len(store.pending_lines(number, after=0, limit=10)) == 3
    store.end(number, file("file-3"), None, 111)
    batch = store.batch_by_number(number)
    assert (batch.status, batch.completed_at, batch.output_file_id) == (Status.COMPLETED, 111, "file-3")
    assert store.results(number, completed=False, after=0, limit=10) == []
    assert store.open_batches() == []


def test_the_end_of_a_batch_is_decided_once(store, number):
    assert store.decide_end(number, Status.EXPIRED, 110) is Status.EXPIRED
    assert not store.cancel("t", "batch_1", 111)
    assert store.decide_end(number, Status.COMPLETED, 112) is Status.EXPIRED
    assert store.batch_by_number(number).finalizing_at == 110


def test_a_cancelled_batch_stays_cancelling_until_its_end(store, number):
    assert store.cancel("t", "batch_1", 105)
    assert store.decide_end(number, Status.COMPLETED, 110) is Status.CANCELLED
    assert store.batch_by_number(number).status is Status.CANCELLING
    store.end(number, None, None, 111)
    batch = store.batch_by_number(number)
    assert (batch.status, batch.cancelling_at, batch.cancelled_at) == (Status.CANCELLED, 105, 111)


def test_old_batches_are_forgotten_after_their_end_only(store, number):
    store.forget_old(10_000, lifetime_seconds=1)
    assert store.batch("t", "batch_1") is not None
    store.decide_end(number, Status.COMPLETED, 110)
    store.end(number, None, None, 111)
    store.forget_old(111, lifetime_seconds=1)
    assert store.batch("t", "batch_1") is not None
    store.forget_old(112, lifetime_seconds=1)
    assert store.batch("t", "batch_1") is None


@pytest.mark.parametrize("content", [b"this is no database at all, not even nearly" * 100, None])
def test_a_file_of_another_kind_or_version_is_refused(tmp_path, content):
    path = tmp_path / "other.sqlite3"
    if content is None:
        with sqlite3.connect(path) as database:
            database.execute("PRAGMA user_version = 99")
    else:
        path.write_bytes(content)
    with pytest.raises(StoreError, match=r"other\.sqlite3|version 99"):
        Store(path)
