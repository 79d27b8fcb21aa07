"""Machine records in SQLite: WAL, synchronous=FULL, one writer.

Invariant: what `save` returned from is on disk. The daemon that opened the file is its only writer (it holds
`daemon.lock`); every call runs in a thread, one at a time.
"""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Final, Literal, TypeVar

import msgspec
import trio

from rayos_vmm.errors import RayosError
from rayos_vmm.machine.record import Record

SCHEMA_VERSION: Final = 1
_SCHEMA: Final = (
    "CREATE TABLE IF NOT EXISTS vm (name TEXT PRIMARY KEY, record BLOB NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS unreadable (name TEXT PRIMARY KEY, record BLOB, why TEXT NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS policy (one INTEGER PRIMARY KEY CHECK (one = 1), content BLOB NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS anchor (one INTEGER PRIMARY KEY CHECK (one = 1), content BLOB NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS token (one INTEGER PRIMARY KEY CHECK (one = 1), content BLOB NOT NULL) STRICT",
    "CREATE TABLE IF NOT EXISTS revision "
    "(number INTEGER PRIMARY KEY, content BLOB NOT NULL, document BLOB NOT NULL) STRICT",
)
_T = TypeVar("_T")
#: By SQLite's name of the error (https://sqlite.org/rescode.html).
_HINTS: Final = {
    "SQLITE_FULL": "the disk is full: make room",
    "SQLITE_CORRUPT": "move the file away to start afresh; what runs is listed, and goes on",
    "SQLITE_NOTADB": "move the file away to start afresh; what runs is listed, and goes on",
}


class StoreError(RayosError):
    """The database cannot be opened, read or written."""

    code = "store_failed"


def read_records(path: Path) -> list[Record]:
    """Every readable record, by name, for somebody who is not the daemon. Blocking.

    Raises:
        StoreError: the file cannot be read.
    """
    if not path.exists():
        return []
    try:
        with closing(sqlite3.connect(path)) as connection:
            rows = connection.execute("SELECT record FROM vm ORDER BY name").fetchall()
    except sqlite3.Error as error:
        raise StoreError(f"{path}: {error}") from None
    records = []
    for (data,) in rows:
        with suppress(msgspec.DecodeError, msgspec.ValidationError):
            records.append(msgspec.json.decode(data, type=Record))
    return records


class Store:
    """The table of machines."""

    def __init__(self, connection: sqlite3.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path
        self._limiter = trio.CapacityLimiter(1)
        self._begun: dict[str, bytes] = {}  # the last record of each machine that was given to be written
        self._saved: dict[str, bytes] = {}  # of those, the ones that are on disk

    async def load(self) -> tuple[list[Record], dict[str, str]]:
        """Every record, by name; and of those that cannot be read, by name, why.

        Such a record is set aside, where it stays until `delete`: nothing overwrites it, and it stops nobody else.

        Raises:
            StoreError: the file is damaged, or of a newer version.
        """
        rows = await self._run(
            lambda: self._connection.execute("SELECT name, record FROM vm ORDER BY name").fetchall()
        )
        records: list[Record] = []
        bad: list[tuple[str, bytes, str]] = []
        for name, data in rows:
            try:
                record = msgspec.json.decode(data, type=Record)
                if record.spec.name != name:
                    raise msgspec.ValidationError(f"it is the record of {record.spec.name!r}")
                records.append(record)
            except (msgspec.DecodeError, msgspec.ValidationError) as error:
                bad.append((name, data, str(error)))

        def set_aside() -> list[tuple[str, str]]:
            with self._connection:
                for name, data, why in bad:
                    self._connection.execute(
                        "INSERT OR REPLACE INTO unreadable VALUES (?, ?, ?)", (name, data, why)
                    )
                    self._connection.execute("DELETE FROM vm WHERE name = ?", (name,))
            return self._connection.execute("SELECT name, why FROM unreadable ORDER BY name").fetchall()

        return records, dict(await self._run(set_aside))

    async def save(self, record: Record) -> None:
        """Inserts or replaces a record unless it is as it was saved last; it is on disk when this returns.

        Not cancelled half-way.
        """
        data = msgspec.json.encode(record)
        name = record.spec.name
        if self._saved.get(name) == data:
            return
        self._begun[name] = data
        self._saved.pop(name, None)

        def write() -> None:
            with self._connection:
                self._connection.execute("INSERT OR REPLACE INTO vm VALUES (?, ?)", (name, data))

        with trio.CancelScope(shield=True):
            await self._run(write)
        if self._begun.get(name) is data:  # else a newer one is on its way
            self._saved[name] = data

    async def delete(self, name: str) -> None:
        """Removes a record, also one that was set aside; nothing happens when there is none."""
        self._begun.pop(name, None)
        self._saved.pop(name, None)

        def write() -> None:
            with self._connection:
                self._connection.execute("DELETE FROM vm WHERE name = ?", (name,))
                self._connection.execute("DELETE FROM unreadable WHERE name = ?", (name,))

        with trio.CancelScope(shield=True):
            await self._run(write)

    async def load_policy(self) -> bytes | None:
        """Returns the last argument of `save_policy`; None when that was never called."""
        return await self._load_one("policy")

    async def save_policy(self, data: bytes, anchor: bytes) -> None:
        """Replaces the policy and the audit record's anchor, both or neither; on disk when this returns."""
        await self._save_rows({"policy": data, "anchor": anchor})

    async def load_anchor(self) -> bytes | None:
        """Returns the last anchor of the audit record; None when there never was one."""
        return await self._load_one("anchor")

    async def save_anchor(self, anchor: bytes) -> None:
        """Replaces the audit record's anchor; it is on disk when this returns. Not cancelled half-way."""
        await self._save_rows({"anchor": anchor})

    async def load_tokens(self) -> bytes | None:
        """Returns the last argument of `save_tokens`; None when that was never called."""
        return await self._load_one("token")

    async def save_tokens(self, data: bytes) -> None:
        """Replaces the list of tokens; it is on disk when this returns. Not cancelled half-way."""
        await self._save_rows({"token": data})

    async def _load_one(self, table: Literal["policy", "token", "anchor"]) -> bytes | None:
        query = f"SELECT content FROM {table}"
        row = await self._run(lambda: self._connection.execute(query).fetchone())
        return bytes(row[0]) if row else None

    async def _save_rows(self, contents: Mapping[str, bytes]) -> None:
        def write() -> None:
            with self._connection:
                for table, data in contents.items():
                    self._connection.execute(f"INSERT OR REPLACE INTO {table} VALUES (1, ?)", (data,))

        with trio.CancelScope(shield=True):
            await self._run(write)

    async def load_revisions(self) -> list[bytes]:
        """The revisions of the policy document that are kept, oldest first."""
        query = "SELECT content FROM revision ORDER BY number"
        return [bytes(row[0]) for row in await self._run(lambda: self._connection.execute(query).fetchall())]

    async def load_document(self, number: int) -> bytes:
        """The document of a revision.

        Raises:
            StoreError: it is not kept.
        """
        query = "SELECT document FROM revision WHERE number = ?"
        row = await self._run(lambda: self._connection.execute(query, (number,)).fetchone())
        if row is None:
            raise StoreError(f"{self._path}: there is no revision {number}")
        return bytes(row[0])

    async def save_revision(self, number: int, revision: bytes, document: bytes, *, keep: int) -> None:
        """Adds a revision and forgets all but the last `keep`; on disk when this returns. Not cancelled half-way."""

        def write() -> None:
            with self._connection:
                self._connection.execute(
                    "INSERT INTO revision VALUES (?, ?, ?)", (number, revision, document)
                )
                self._connection.execute("DELETE FROM revision WHERE number <= ?", (number - keep,))

        with trio.CancelScope(shield=True):
            await self._run(write)

    async def _run(self, function: Callable[[], _T]) -> _T:
        try:
            return await trio.to_thread.run_sync(function, limiter=self._limiter)
        except sqlite3.Error as error:
            hint = _HINTS.get(getattr(error, "sqlite_errorname", ""), "")
            raise StoreError(f"{self._path}: {error}", hint=hint) from None


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, check_same_thread=False, timeout=5.0)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise sqlite3.DatabaseError(f"schema version {version}; this program knows {SCHEMA_VERSION}")
        with connection:
            for statement in _SCHEMA:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
    except BaseException:
        connection.close()
        raise
    return connection


@asynccontextmanager
async def open_store(path: Path) -> AsyncIterator[Store]:
    """The store at `path`, made when there is none; its directory exists.

    Raises:
        StoreError: it cannot be opened, is damaged, or of a newer version.
    """
    try:
        connection = await trio.to_thread.run_sync(_open, path)
    except sqlite3.Error as error:
        raise StoreError(f"{path}: {error}", hint="move the file away to start afresh") from None
    try:
        yield Store(connection, path)
    finally:
        connection.close()
