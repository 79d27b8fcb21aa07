"""The audit file: append only, one fdatasync for all that wait (group commit), and the last records in memory.

Invariant: `append` returns when its record is on disk, and raises otherwise, so a caller that waits for it fails
closed. What could not be written is counted, and the next record says how many. A failed fdatasync is final: what the
kernel dropped cannot be told from what it wrote.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import trio

from rayos_vmm.errors import Unavailable
from rayos_vmm.policy.audit import (
    CHECKPOINT_EVERY,
    LINE_MAXIMUM_BYTES,
    RING,
    Anchor,
    Chain,
    Damage,
    Entry,
    Operation,
    Verifier,
)
from rayos_vmm.policy.grant import Moment

#: Records that may wait for the disk; more are lost and counted.
PENDING_MAXIMUM: Final = 4096
#: Seconds of quiet after which what is not signed is signed.
_SIGN_AFTER_S: Final = 30.0


class AuditFailed(Unavailable):
    """The record of a decision cannot be written, so the decision does not hold."""

    code = "audit_failed"


class AuditLog:
    """Use `open_audit`."""

    def __init__(
        self,
        path: Path,
        fd: int,
        chain: Chain,
        size: int,
        ring: deque[Entry],
        now: Callable[[], Moment],
        sign: Callable[[bytes], bytes] | None = None,
    ):
        self.path = path
        self.ring = ring
        self.lost = 0
        self._fd = fd
        self._now = now
        self._sign = sign
        self._signed = 0  # the last checkpoint
        self._chain = chain
        self._durable = chain.anchor
        self._size = size
        self._pending: list[tuple[Entry, bytes]] = []
        self._lock = trio.Lock()
        self._wanted = trio.Event()
        self._untold = 0
        self._broken = ""
        self._losses = 0  # how often records that were chained had to be taken back

    @property
    def anchor(self) -> Anchor:
        """The last record that is on disk."""
        return self._durable

    @property
    def trouble(self) -> str:
        """Why nothing is written any more; empty while all is well."""
        return self._broken

    def fail(self, why: str) -> None:
        """Nothing is written any more."""
        self._broken = why

    async def append(self, op: Operation, vm: str = "", *, allowed: bool = True, **data: Any) -> Entry:
        """Returns when the record is on disk.

        Raises:
            AuditFailed: it is not, and will not be.
        """
        entry = self._add(op, vm, allowed, data)
        if entry is None:
            raise AuditFailed(f"{self.path} is not written: {self._broken or 'too many records wait'}")
        with trio.CancelScope(shield=True):  # half a decision is none
            await self._flush(entry.seq, self._losses)
        return entry

    def note(self, op: Operation, vm: str = "", *, allowed: bool = True, **data: Any) -> None:
        """For what has happened already: written soon, counted if it cannot be."""
        self._add(op, vm, allowed, data)
        self._wanted.set()

    def _add(self, op: Operation, vm: str, allowed: bool, data: dict[str, Any]) -> Entry | None:
        if self._broken or len(self._pending) >= PENDING_MAXIMUM:
            self._lose(1)
            return None
        entry = self._chained(op, vm, allowed, data)
        if self._chain.anchor.seq - self._signed >= CHECKPOINT_EVERY:
            self.checkpoint()
        return entry

    def note_signed(self, seq: int) -> None:
        """The record `seq` is a checkpoint."""
        self._signed = seq

    def checkpoint(self) -> None:
        """Signs everything up to here, unless there is nothing new."""
        if self._sign is None or self._chain.anchor.seq <= self._signed or self._broken:
            return
        signature = self._sign(self._chain.anchor.signed_bytes()).hex()
        self._signed = self._chained(Operation.CHECKPOINT, "", True, {"signature": signature}).seq

    def _chained(self, op: Operation, vm: str, allowed: bool, data: dict[str, Any]) -> Entry:
        now = self._now()
        entry = Entry(
            seq=self._chain.anchor.seq + 1,
            time=now.wall,
            steady=now.steady,
            op=op,
            vm=vm,
            allowed=allowed,
            data=data,
            lost=self._untold,
        )
        line = self._chain.add(entry)
        self._untold = 0
        self._pending.append((entry, line))
        return entry

    def _lose(self, count: int) -> None:
        self.lost += count
        self._untold += count

    async def _flush(self, seq: int, losses: int) -> None:
        """Everything up to `seq` is on disk when this returns. Whoever comes first writes for all that wait."""
        async with self._lock:
            if losses != self._losses:
                raise AuditFailed(f"{self.path}: the record was lost with one before it")
            if self._durable.seq >= seq:
                return
            batch, self._pending = self._pending, []
            end = self._chain.anchor
            try:
                await trio.to_thread.run_sync(self._write, b"".join(line for _, line in batch))
            except OSError as error:
                self._take_back(batch, error)
                raise AuditFailed(f"{self.path}: {error.strerror}", hint="is the disk full?") from None
            self._durable = end
            self.ring.extend(entry for entry, _ in batch)

    def _write(self, data: bytes) -> None:
        done = 0
        while done < len(data):
            done += os.pwrite(self._fd, memoryview(data)[done:], self._size + done)
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._broken = f"fdatasync: {error.strerror}"
            raise
        self._size += done

    def _take_back(self, batch: list[tuple[Entry, bytes]], error: OSError) -> None:
        """Goes on from the last record on disk: what was chained behind it is lost."""
        self._losses += 1
        self._untold = sum(entry.lost for entry, _ in [*batch, *self._pending])
        self._lose(len(batch) + len(self._pending))
        self._pending = []
        self._chain = Chain(self._durable)
        self._signed = min(self._signed, self._durable.seq)
        try:
            os.ftruncate(self._fd, self._size)
        except OSError:
            self._broken = self._broken or f"{error.strerror}, and it cannot be cut back"

    async def run(self) -> None:
        """Writes what was noted, and signs what has not been for a while. Ends when cancelled."""
        while True:
            with trio.move_on_after(_SIGN_AFTER_S) as quiet:
                await self._wanted.wait()
            self._wanted = trio.Event()
            if quiet.cancelled_caught:
                self.checkpoint()
            await self.sync()

    async def sync(self) -> None:
        """Writes all that waits; what fails is counted."""
        if self._pending:
            try:
                with trio.CancelScope(shield=True):
                    await self._flush(self._pending[-1][0].seq, self._losses)
            except AuditFailed:
                return

    def lines(self) -> Iterator[bytes]:
        """Yields the lines that are on disk now."""
        return read_lines(self.path, self._size)


def read_lines(path: Path, size: int | None = None) -> Iterator[bytes]:
    """Lines of the file, up to `size` bytes; none longer than a record can be, so a damaged file costs no memory."""
    with path.open("rb") as file:
        while size is None or file.tell() < size:
            line = file.readline(LINE_MAXIMUM_BYTES + 1)
            if not line:
                return
            yield line


def _load(path: Path) -> tuple[Chain, int, deque[Entry], str]:
    """The end of the file, its size and last records, and what is wrong. A torn last line was never acknowledged."""
    ring: deque[Entry] = deque(maxlen=RING)
    verifier = Verifier()
    try:
        for line in read_lines(path):
            if not line.endswith(b"\n") and verifier.offset + len(line) == path.stat().st_size:
                break
            ring.append(verifier.read(line))
    except Damage as damage:
        return Chain(verifier.anchor), path.stat().st_size, ring, str(damage)
    return Chain(verifier.anchor), verifier.offset, ring, ""


@asynccontextmanager
async def open_audit(
    path: Path, now: Callable[[], Moment], sign: Callable[[bytes], bytes] | None = None
) -> AsyncIterator[AuditLog]:
    """The log at `path`, made when there is none. A damaged one is left as it is, and no decision can be made.

    With `sign`, checkpoints are signed by it: also when the log is opened, and when it is closed.

    Raises:
        AuditFailed: it cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise AuditFailed(f"{path}: {error.strerror}") from None
    try:
        chain, size, ring, damage = await trio.to_thread.run_sync(_load, path)
        log = AuditLog(path, fd, chain, size, ring, now, sign)
        if damage:
            log.fail(f"it is damaged: {damage}; move it away to start another")
        else:
            os.ftruncate(fd, size)
            if ring and ring[-1].op is Operation.CHECKPOINT:
                log.note_signed(ring[-1].seq)
            log.checkpoint()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(log.run)
            try:
                yield log
            finally:
                nursery.cancel_scope.cancel()
                log.checkpoint()
                await log.sync()
    finally:
        os.close(fd)
