"""Files, batches and lines in SQLite. What a call of it has done is on disk when the call returns.

Invariants, each kept by one transaction an act:
- A line is `pending` until its result stands in its row; a second result for it changes nothing. So a line that was
  executed twice (the process died before the first result was kept) counts once and is written once.
- A batch's counts are those of its rows.
- An output file's row and the end of its batch are one act; before it, the rows of its lines are still there, so the
  file can be written again. Afterwards they are gone.

Knows no clock and no disk beside its own file. One thread at a time.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from tidegate.batch.lines import Usage
from tidegate.batch.records import OPEN, Status, StoredBatch, StoredFile

SCHEMA_VERSION: Final = 1

_SCHEMA: Final = """
CREATE TABLE files (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL,
    byte_count INTEGER NOT NULL,
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL
) STRICT;
CREATE INDEX files_of_tenant ON files (tenant, number);
CREATE TABLE batches (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    input_file_id TEXT NOT NULL,
    completion_window TEXT NOT NULL,
    metadata TEXT,
    status TEXT NOT NULL,
    ends_as TEXT,
    errors TEXT,
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL,
    in_progress_at INTEGER,
    finalizing_at INTEGER,
    completed_at INTEGER,
    failed_at INTEGER,
    expired_at INTEGER,
    cancelling_at INTEGER,
    cancelled_at INTEGER,
    output_file_id TEXT,
    error_file_id TEXT,
    total_count INTEGER NOT NULL DEFAULT 0,
    completed_count INTEGER NOT NULL DEFAULT 0,
    failed_count INTEGER NOT NULL DEFAULT 0,
    prompt_token_count INTEGER NOT NULL DEFAULT 0,
    cached_token_count INTEGER NOT NULL DEFAULT 0,
    completion_token_count INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE INDEX batches_of_tenant ON batches (tenant, number);
CREATE INDEX open_batches ON batches (number) WHERE status IN ('validating', 'in_progress', 'finalizing', 'cancelling');
CREATE TABLE lines (
    batch_number INTEGER NOT NULL REFERENCES batches (number),
    line_number INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('pending', 'completed', 'failed')),
    custom_id TEXT,
    body BLOB,
    result BLOB,
    PRIMARY KEY (batch_number, line_number)
) STRICT;
"""

_FILE: Final = "id, tenant, filename, purpose, byte_count, created_at, expires_at"
_OPEN: Final = "status IN ({})".format(", ".join(f"'{status.value}'" for status in OPEN))


class StoreError(Exception):
    """The database cannot be used; the message says why."""


class Refused(Exception):
    """A bound is reached; the message names it."""


@dataclass(frozen=True, slots=True)
class PendingLine:
    """A line that waits for its result."""

    number: int
    custom_id: str
    body: bytes


@dataclass(frozen=True, slots=True)
class NewLine:
    """A line as validation found it; one with a fault has its result at once."""

    number: int
    custom_id: str | None
    body: bytes | None
    failed_result: bytes | None = None


class Store:
    """The database.

    Raises:
        StoreError: it was made by another version, or cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            self._database.row_factory = sqlite3.Row
            self._database.execute("PRAGMA journal_mode = WAL")
            # With WAL, anything less loses acknowledged commits at a power cut.
            self._database.execute("PRAGMA synchronous = FULL")
            self._make_schema()
        except sqlite3.Error as error:
            raise StoreError(f"{path}: {error}") from error

    def close(self) -> None:
        """Ends the use of it."""
        self._database.close()

    # Files.

    def add_file(self, file: StoredFile) -> None:
        """Keeps a file whose content is in its place."""
        with self._transaction():
            self._insert_file(file)

    def check_room(self, tenant: str, *, file_limit: int, byte_limit: int) -> None:
        """Raises Refused when the tenant may keep no more."""
        row = self._one("SELECT count(*), coalesce(sum(byte_count), 0) FROM files WHERE tenant = ?", tenant)
        if row[0] >= file_limit:
            raise Refused(f"There are {row[0]} files already; the limit is {file_limit}. Delete some.")
        if row[1] >= byte_limit:
            raise Refused(f"The files have {row[1]} bytes already; the limit is {byte_limit}. Delete some.")

    def file(self, tenant: str, file_id: str) -> StoredFile | None:
        """One file of the tenant."""
        row = self._one_or_none(f"SELECT {_FILE} FROM files WHERE id = ? AND tenant = ?", file_id, tenant)
        return None if row is None else StoredFile(**dict(row))

    def files(
        self, tenant: str, *, after: str, limit: int, descending: bool, purpose: str
    ) -> tuple[list[StoredFile], bool]:
        """A page of the tenant's files, and whether there are more."""
        comparison, order = ("<", "DESC") if descending else (">", "ASC")
        rows = self._database.execute(
            f"SELECT {_FILE} FROM files WHERE tenant = :tenant AND (:purpose = '' OR purpose = :purpose) AND "
            f"(:after = '' OR number {comparison} (SELECT number FROM files WHERE id = :after AND tenant = :tenant)) "
            f"ORDER BY number {order} LIMIT :limit + 1",
            {"tenant": tenant, "purpose": purpose, "after": after, "limit": limit},
        ).fetchall()
        return [StoredFile(**dict(row)) for row in rows[:limit]], len(rows) > limit

    def delete_file(self, tenant: str, file_id: str) -> bool:
        """Forgets a file; answers whether there was one. Its content is the caller's to remove."""
        return self._execute("DELETE FROM files WHERE id = ? AND tenant = ?", file_id, tenant) == 1

    def file_ids(self) -> set[str]:
        """Of all tenants."""
        return {row[0] for row in self._database.execute("SELECT id FROM files")}

    def forget_old(self, now: int, *, lifetime_seconds: int) -> list[str]:
        """Forgets files past their time, and batches that ended so long ago; answers the files' ids."""
        with self._transaction():
            expired = [row[0] for row in self._database.execute("SELECT id FROM files WHERE expires_at <= ?", (now,))]
            self._database.execute("DELETE FROM files WHERE expires_at <= ?", (now,))
            ended = "coalesce(completed_at, failed_at, expired_at, cancelled_at)"
            self._database.execute(f"DELETE FROM batches WHERE NOT {_OPEN} AND {ended} <= ?", (now - lifetime_seconds,))
        # The log is as long as the largest act since; the database keeps its size, and uses it again.
        self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return expired

    # Batches.

    def create_batch(self, batch: dict[str, Any], *, tenant_limit: int, limit: int) -> StoredBatch:
        """Keeps a new batch, `validating`.

        Args:
            batch: id, tenant, endpoint, input_file_id, completion_window, metadata, created_at, expires_at.

        Raises:
            Refused: the tenant, or all together, have as many open as they may.
        """
        row = {**batch, "status": Status.VALIDATING.value, "metadata": _json(batch["metadata"])}
        with self._transaction():
            count = self._one(f"SELECT count(*) FROM batches WHERE tenant = ? AND {_OPEN}", batch["tenant"])[0]
            if count >= tenant_limit:
                raise Refused(f"There are {count} batches already that have not ended; the limit is {tenant_limit}.")
            if self._one(f"SELECT count(*) FROM batches WHERE {_OPEN}")[0] >= limit:
                raise Refused("There are as many batches as this mesh takes at a time.")
            names = ", ".join(row)
            self._database.execute(
                f"INSERT INTO batches ({names}) VALUES ({', '.join(f':{name}' for name in row)})", row
            )
        found = self.batch(batch["tenant"], batch["id"])
        assert found is not None
        return found

    def batch(self, tenant: str, batch_id: str) -> StoredBatch | None:
        """One batch of the tenant."""
        row = self._one_or_none("SELECT * FROM batches WHERE id = ? AND tenant = ?", batch_id, tenant)
        return None if row is None else _batch(row)

    def batch_by_number(self, number: int) -> StoredBatch:
        """A batch that is there."""
        return _batch(self._one("SELECT * FROM batches WHERE number = ?", number))

    def batches(self, tenant: str, *, after: str, limit: int) -> tuple[list[StoredBatch], bool]:
        """A page of the tenant's batches, newest first, and whether there are more."""
        rows = self._database.execute(
            "SELECT * FROM batches WHERE tenant = :tenant AND "
            "(:after = '' OR number < (SELECT number FROM batches WHERE id = :after AND tenant = :tenant)) "
            "ORDER BY number DESC LIMIT :limit + 1",
            {"tenant": tenant, "after": after, "limit": limit},
        ).fetchall()
        return [_batch(row) for row in rows[:limit]], len(rows) > limit

    def open_batches(self) -> list[StoredBatch]:
        """Those that go on, oldest first."""
        return [_batch(row) for row in self._database.execute(f"SELECT * FROM batches WHERE {_OPEN} ORDER BY number")]

    def cancel(self, tenant: str, batch_id: str, now: int) -> bool:
        """Turns a batch to `cancelling`; answers whether it could be."""
        changed = self._execute(
            "UPDATE batches SET status = 'cancelling', cancelling_at = ? "
            "WHERE id = ? AND tenant = ? AND status IN ('validating', 'in_progress')",
            now, batch_id, tenant,
        )  # fmt: skip
        return changed == 1

    # A batch's life.

    def forget_lines(self, number: int) -> None:
        """Begins the reading of the file anew: it was cut off before."""
        self._execute("DELETE FROM lines WHERE batch_number = ?", number)

    def add_lines(self, number: int, lines: Sequence[NewLine]) -> None:
        """Keeps lines of a batch that is being read."""
        rows = [
            (number, line.number, "failed" if line.failed_result is not None else "pending", line.custom_id, line.body,
             line.failed_result)
            for line in lines
        ]  # fmt: skip
        with self._transaction():
            self._database.executemany("INSERT INTO lines VALUES (?, ?, ?, ?, ?, ?)", rows)

    def start(self, number: int, now: int) -> None:
        """The file is read: the counts are known, and the lines may be sent. One that is being cancelled stays so."""
        with self._transaction():
            total, failed = self._one(
                "SELECT count(*), coalesce(sum(state = 'failed'), 0) FROM lines WHERE batch_number = ?", number
            )
            self._database.execute(
                "UPDATE batches SET total_count = ?, failed_count = ? WHERE number = ?", (total, failed, number)
            )
            self._database.execute(
                "UPDATE batches SET status = 'in_progress', in_progress_at = ? "
                "WHERE number = ? AND status = 'validating'",
                (now, number),
            )

    def fail(self, number: int, errors: Sequence[dict[str, Any]], now: int) -> None:
        """The file as a whole cannot be used."""
        with self._transaction():
            self._database.execute("DELETE FROM lines WHERE batch_number = ?", (number,))
            self._database.execute(
                "UPDATE batches SET status = 'failed', failed_at = ?, errors = ? WHERE number = ?",
                (now, _json(list(errors)), number),
            )

    def pending_lines(self, number: int, *, after: int, limit: int) -> list[PendingLine]:
        """The next lines without a result, by number."""
        rows = self._database.execute(
            "SELECT line_number, custom_id, body FROM lines "
            "WHERE batch_number = ? AND line_number > ? AND state = 'pending' ORDER BY line_number LIMIT ?",
            (number, after, limit),
        )
        return [PendingLine(row[0], row[1], row[2]) for row in rows]

    def finish_line(
        self, number: int, line_number: int, *, completed: bool, result: bytes, usage: Usage | None = None
    ) -> bool:
        """Keeps a line's result; answers False, and changes nothing, when it has one already."""
        usage = usage or Usage()
        with self._transaction():
            changed = self._database.execute(
                "UPDATE lines SET state = ?, result = ?, body = NULL "
                "WHERE batch_number = ? AND line_number = ? AND state = 'pending'",
                ("completed" if completed else "failed", result, number, line_number),
            ).rowcount
            if changed:
                self._database.execute(
                    "UPDATE batches SET completed_count = completed_count + ?, failed_count = failed_count + ?, "
                    "prompt_token_count = prompt_token_count + ?, cached_token_count = cached_token_count + ?, "
                    "completion_token_count = completion_token_count + ? WHERE number = ?",
                    (
                        completed,
                        not completed,
                        usage.prompt_tokens,
                        usage.cached_tokens,
                        usage.completion_tokens,
                        number,
                    ),
                )
        return changed == 1

    def fail_lines(self, number: int, results: Sequence[tuple[int, bytes]]) -> None:
        """Ends lines that will not be sent any more; those that have a result keep it."""
        with self._transaction():
            changed = self._database.executemany(
                "UPDATE lines SET state = 'failed', result = ?, body = NULL "
                "WHERE batch_number = ? AND line_number = ? AND state = 'pending'",
                [(result, number, line_number) for line_number, result in results],
            ).rowcount
            self._database.execute(
                "UPDATE batches SET failed_count = failed_count + ? WHERE number = ?", (changed, number)
            )

    def decide_end(self, number: int, wanted: Status, now: int) -> Status:
        """Every line has its result: the end is decided, by the first who does, and the files may be written.

        A batch that was cancelled shows `cancelling` until its end, and one that was not, `finalizing`.
        """
        with self._transaction():
            self._database.execute(
                "UPDATE batches SET ends_as = CASE status WHEN 'cancelling' THEN 'cancelled' ELSE ? END, "
                "finalizing_at = CASE status WHEN 'cancelling' THEN NULL ELSE ? END, "
                "status = CASE status WHEN 'cancelling' THEN status ELSE 'finalizing' END "
                "WHERE number = ? AND ends_as IS NULL",
                (wanted.value, now, number),
            )
        return Status(self._one("SELECT ends_as FROM batches WHERE number = ?", number)[0])

    def results(self, number: int, *, completed: bool, after: int, limit: int) -> list[tuple[int, bytes]]:
        """The next results of one kind, with their lines' numbers."""
        rows = self._database.execute(
            "SELECT line_number, result FROM lines WHERE batch_number = ? AND line_number > ? AND state = ? "
            "ORDER BY line_number LIMIT ?",
            (number, after, "completed" if completed else "failed", limit),
        )
        return [(row[0], row[1]) for row in rows]

    def end(self, number: int, output: StoredFile | None, errors: StoredFile | None, now: int) -> None:
        """The end that was decided, with the files whose contents are in their places."""
        with self._transaction():
            for file in (output, errors):
                if file is not None:
                    self._insert_file(file)
            status = self._one("SELECT ends_as FROM batches WHERE number = ?", number)[0]
            self._database.execute(
                f"UPDATE batches SET status = ends_as, output_file_id = ?, error_file_id = ?, {status}_at = ? "
                "WHERE number = ?",
                (output and output.id, errors and errors.id, now, number),
            )
            self._database.execute("DELETE FROM lines WHERE batch_number = ?", (number,))

    def _make_schema(self) -> None:
        version = self._one("PRAGMA user_version")[0]
        if version == 0:
            with self._transaction():
                for statement in _SCHEMA.split(";"):
                    self._database.execute(statement)
                self._database.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        elif version != SCHEMA_VERSION:
            raise StoreError(f"the batch database has version {version}, and this program knows {SCHEMA_VERSION}")

    def _insert_file(self, file: StoredFile) -> None:
        row = msgspec.structs.asdict(file)
        self._database.execute(
            f"INSERT INTO files ({_FILE}) VALUES (:id, :tenant, :filename, :purpose, :byte_count, :created_at, "
            ":expires_at)",
            row,
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            self._database.rollback()
            raise

    def _execute(self, statement: str, *values: Any) -> int:
        """One statement as a transaction; answers the rows that it changed."""
        return self._database.execute(statement, values).rowcount

    def _one(self, statement: str, *values: Any) -> Any:
        return self._database.execute(statement, values).fetchone()

    def _one_or_none(self, statement: str, *values: Any) -> sqlite3.Row | None:
        row: sqlite3.Row | None = self._one(statement, *values)
        return row


def _batch(row: sqlite3.Row) -> StoredBatch:
    values = dict(row)
    for name in ("metadata", "errors"):
        values[name] = None if values[name] is None else msgspec.json.decode(values[name])
    values["status"] = Status(values["status"])
    values["ends_as"] = values["ends_as"] and Status(values["ends_as"])
    return StoredBatch(**values)


def _json(value: Any) -> str | None:
    return None if value is None else msgspec.json.encode(value).decode()
