"""Leases on stable storage: SQLite, write-ahead log, synchronous=FULL (https://sqlite.org/pragma.html).

Invariant: when `write` has returned, the bindings survive a crash of the process and of the machine. One
process has the file; a second one is refused. A damaged file is set aside and a damaged row skipped: neither
keeps the server from starting.
"""

import os
import sqlite3
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from rayos_net.dhcp.binding import FOREVER, Binding, BindingState

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS binding (
    ip INTEGER PRIMARY KEY, client BLOB NOT NULL, hardware BLOB NOT NULL, client_id BLOB, host_name TEXT,
    state TEXT NOT NULL, expires REAL, since REAL NOT NULL, port TEXT NOT NULL
) WITHOUT ROWID, STRICT
"""
_WRITE: Final = "INSERT OR REPLACE INTO binding VALUES "
_ROW: Final = "(?, ?, ?, ?, ?, ?, ?, ?, ?)"
ROWS_MAX: Final = 64  # in one statement
_READ: Final = "SELECT ip, client, hardware, client_id, host_name, state, expires, since, port FROM binding"


class StoreError(RuntimeError):
    """The lease file can't be used; the text says why."""


class LeaseStore:
    """The lease file at `path`, made with mode 0600 when absent. Use from one thread at a time; a context
    manager.

    Raises StoreError when another process has the file, or the directory can't be written. `skipped` counts
    rows that `read` could not use, `set_aside` is where a damaged file went, if there was one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.skipped = 0
        self.set_aside: Path | None = None
        try:
            self._connection = self._open()
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise StoreError(self._why(error)) from error
            self.set_aside = path.with_name(f"{path.name}.damaged-{time.time_ns()}")
            path.rename(self.set_aside)
            for tail in ("-wal", "-shm"):
                path.with_name(path.name + tail).unlink(missing_ok=True)
            self._connection = self._open()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; it then consists of the one file at `path`."""
        self._connection.close()

    def write(self, bindings: Iterable[Binding]) -> None:
        """Bring the bindings to stable storage in one transaction. Raises StoreError when that fails (disk
        full).
        """
        values = [
            (
                one.ip,
                one.client,
                one.hardware,
                one.client_id,
                one.host_name,
                one.state._value_,  # as .value, without its descriptor in Python
                None if one.expires == FOREVER else one.expires,
                one.since,
                one.port,
            )
            for one in bindings
        ]
        # A statement gives the interpreter up once, whatever it writes: with one for each row this thread and the
        # one that answers clients would take turns.
        parts = [values[at : at + ROWS_MAX] for at in range(0, len(values), ROWS_MAX)]
        try:
            if len(parts) == 1:
                self._insert(parts[0])
                return
            with self._connection:
                self._connection.execute("BEGIN IMMEDIATE")
                for part in parts:
                    self._insert(part)
        except sqlite3.Error as error:
            raise StoreError(self._why(error)) from error

    def _insert(self, rows: Sequence[tuple[object, ...]]) -> None:
        text = _WRITE + ", ".join((_ROW,) * len(rows))
        self._connection.execute(text, [value for row in rows for value in row])

    def read(self) -> list[Binding]:
        """All stored bindings; rows that make no sense are skipped and counted."""
        found = []
        for row in self._connection.execute(_READ):
            try:
                found.append(_binding(row))
            except (ValueError, TypeError):
                self.skipped += 1
        return found

    def _open(self) -> sqlite3.Connection:
        try:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise StoreError(f"lease file {self.path}: {error.strerror}") from error
        connection = sqlite3.connect(self.path, timeout=0.2, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA locking_mode=EXCLUSIVE")  # also: no shared-memory file
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute(_SCHEMA)
            connection.execute("BEGIN IMMEDIATE")  # takes the lock now, not at the first lease
            connection.execute("COMMIT")
            if connection.execute("PRAGMA quick_check").fetchone() != ("ok",):
                raise sqlite3.DatabaseError("the integrity check failed")
        except BaseException:
            connection.close()
            raise
        return connection

    def _why(self, error: sqlite3.Error) -> str:
        if "locked" in str(error):
            return f"lease file {self.path} is in use by another DHCP server; stop it or choose another file"
        return f"lease file {self.path}: {error}"


def _binding(
    row: tuple[int, bytes, bytes, bytes | None, str | None, str, float | None, float, str],
) -> Binding:
    ip, client, hardware, client_id, host_name, state, expires, since, port = row
    if not 0 < ip < 1 << 32 or len(hardware) != 6 or not client:
        raise ValueError("row outside its bounds")
    return Binding(
        ip,
        bytes(client),
        bytes(hardware),
        client_id,
        host_name,
        BindingState(state),
        FOREVER if expires is None else expires,
        since,
        port,
    )
