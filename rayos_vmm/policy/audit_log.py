"""The audit record: append only, one fdatasync for all that wait (group commit), and the last records in memory.

Invariant: `append` returns when its record is on disk, and raises otherwise, so a caller that waits for it fails
closed. What could not be written is counted, and the next record says how many. A failed fdatasync is final: what the
kernel dropped cannot be told from what it wrote.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from rayos_vmm.config.spec import is_name
from rayos_vmm.errors import Conflict, Unavailable
from rayos_vmm.policy.audit import (
    CHECKPOINT_EVERY,
    RING,
    TEXT_MAXIMUM,
    Anchor,
    Chain,
    Damage,
    Entry,
    Head,
    Operation,
    PublicKey,
    fitted_data,
    verify,
)
from rayos_vmm.policy.audit_segments import Segments, Unsure, closed_segments, read_lines
from rayos_vmm.policy.grant import Moment

#: Records that may wait for the disk; more are lost and counted.
PENDING_MAXIMUM: Final = 4096
#: Bytes after which another segment is begun, and segments that are kept before the one that grows.
SEGMENT_BYTES: Final = 4 << 20
SEGMENTS_KEPT: Final = 256
#: Seconds of quiet after which what is not signed is signed.
_SIGN_AFTER_S: Final = 30.0


class AuditFailed(Unavailable):
    """The record of a decision cannot be written, so the decision does not hold."""

    code = "audit_failed"


@dataclass(frozen=True, slots=True)
class Room:
    """The room that the record takes: bytes of a segment, and how many are kept beside the one that grows."""

    segment_bytes: int = SEGMENT_BYTES
    kept: int = SEGMENTS_KEPT


async def _kept_nowhere(_head: Head, _end: Anchor) -> None:
    """The head of the record is not kept elsewhere."""


class AuditLog:
    """Use `open_audit`."""

    def __init__(
        self,
        segments: Segments,
        ring: deque[Entry],
        now: Callable[[], Moment],
        sign: Callable[[bytes], bytes] | None = None,
        room: Room | None = None,
        keep: Callable[[Head, Anchor], Awaitable[None]] = _kept_nowhere,
    ):
        self.path = segments.path
        self.ring = ring
        self.lost = 0
        self._segments = segments
        self._room = room or Room()
        self._now = now
        self._sign = sign
        self._keep = keep
        self._head: Head | None = None  # to be kept elsewhere, once it is on disk
        self._signed = 0  # the last checkpoint
        self._chain = Chain(segments.durable)
        self._planned = segments.size  # of the segment that grows, with what waits
        self._firsts = self._all_firsts()
        self._pending: list[tuple[Entry, bytes, Anchor]] = []
        self._lock = trio.Lock()
        self._wanted = trio.Event()
        self._untold = 0
        self._broken = ""
        self._losses = 0  # how often records that were chained had to be taken back

    @property
    def anchor(self) -> Anchor:
        """The last record that is on disk."""
        return self._segments.durable

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
            hint = "rayos audit verify says more; rayos audit restart sets it aside" if self._broken else ""
            why = self._broken or "too many records wait"
            raise AuditFailed(f"{self.path} is not written: {why}", hint=hint)
        with trio.CancelScope(shield=True):  # half a decision is none
            await self._flush(entry.seq, self._losses)
        return entry

    def note(self, op: Operation, vm: str = "", *, allowed: bool = True, **data: Any) -> None:
        """For what has happened already: written soon, counted if it cannot be."""
        self._add(op, vm, allowed, data)
        self._wanted.set()

    async def restart(self, end: Anchor, why: str) -> Path:
        """Sets a record that is damaged aside, as it is, and goes on with another; returns the folder with the old one.

        Numbers go on behind `end`, the last place that is known of the old record, so that none is given out twice.

        Raises:
            Conflict: nothing is wrong with the record.
            AuditFailed: another cannot be begun.
        """
        if not self._broken:
            raise Conflict("the audit record is whole; nothing is set aside")
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self._now().wall))
        folder = self.path.with_name(f"{self.path.stem}-damaged-{stamp}")
        async with self._lock:
            try:
                await trio.to_thread.run_sync(self._segments.begin_anew, folder, end)
            except OSError as error:
                raise AuditFailed(f"{folder}: {error.strerror}") from None
            trouble, self._broken = self._broken, ""
            self._losses += 1
            self._pending = []
            self._chain = Chain(end)
            self._planned = 0
            self._firsts = [end.seq + 1]
            self._signed = end.seq
            self._head = None
        await self.append(Operation.RESTART, why=why, trouble=trouble, set_aside=folder.name)
        self.checkpoint()
        await self.sync()
        return folder

    def _add(self, op: Operation, vm: str, allowed: bool, data: dict[str, Any]) -> Entry | None:
        if self._broken or len(self._pending) >= PENDING_MAXIMUM:
            self._lose(1)
            return None
        self._turn_if_full()
        entry = self._chained(op, vm, allowed, data)
        if self._chain.anchor.seq - self._signed >= CHECKPOINT_EVERY:
            self.checkpoint()
        return entry

    def note_signed(self, seq: int) -> None:
        """The record `seq` is a checkpoint."""
        self._signed = seq

    def checkpoint(self) -> None:
        """Signs everything up to here, unless there is nothing new."""
        anchor = self._chain.anchor
        if self._sign is None or anchor.seq <= self._signed or self._broken:
            return
        signature = self._sign(anchor.signed_bytes()).hex()
        entry = self._chained(Operation.CHECKPOINT, "", True, {"signature": signature})
        self._signed = entry.seq
        self._head = Head(seq=anchor.seq, digest=anchor.digest, time=entry.time, signature=signature)
        self._wanted.set()

    def _turn_if_full(self) -> None:
        """Begins the next segment, if this one is full or its first record is not there."""
        if self._planned:
            if self._planned < self._room.segment_bytes:
                return
            self.checkpoint()
        elif not self._chain.anchor.seq:
            return
        before = self._chain.anchor
        if self._firsts[-1] != before.seq + 1:
            self._firsts.append(before.seq + 1)
        del self._firsts[: -self._room.kept - 1]
        self._planned = 0
        self._chained(Operation.SEGMENT, "", True, {"digest": before.digest, "kept_from": self._firsts[0]})

    def _chained(self, op: Operation, vm: str, allowed: bool, data: dict[str, Any]) -> Entry:
        now = self._now()
        if vm and not is_name(vm):
            data, vm = {**data, "no_name": vm}, ""
        entry = Entry(
            seq=self._chain.anchor.seq + 1,
            time=now.wall,
            steady=now.steady,
            op=op,
            vm=vm,
            allowed=allowed,
            data=fitted_data(data),
            lost=self._untold,
        )
        line = self._chain.add(entry)
        self._untold = 0
        self._planned += len(line)
        self._pending.append((entry, line, self._chain.anchor))
        return entry

    def _lose(self, count: int) -> None:
        self.lost += count
        self._untold += count

    async def _flush(self, seq: int, losses: int) -> None:
        """Everything up to `seq` is on disk when this returns. Whoever comes first writes for all that wait."""
        async with self._lock:
            if losses != self._losses:
                raise AuditFailed(f"{self.path}: the record was lost with one before it")
            if self.anchor.seq >= seq:
                return
            batch, self._pending = self._pending, []
            try:
                await trio.to_thread.run_sync(self._write, batch)
            except OSError as error:
                if isinstance(error, Unsure):
                    self._broken = error.strerror or str(error)
                self._take_back(batch)
                raise AuditFailed(f"{self.path}: {error.strerror}", hint="is the disk full?") from None
            finally:
                self.ring.extend(entry for entry, _, _ in batch if entry.seq <= self.anchor.seq)

    def _write(self, batch: list[tuple[Entry, bytes, Anchor]]) -> None:
        self._segments.write(batch)

    def _take_back(self, batch: list[tuple[Entry, bytes, Anchor]]) -> None:
        """Goes on from the last record on disk: what was chained behind it is lost."""
        self._losses += 1
        gone = [entry for entry, _, _ in [*batch, *self._pending] if entry.seq > self.anchor.seq]
        self._untold = sum(entry.lost for entry in gone)
        self._lose(len(gone))
        self._pending = []
        self._chain = Chain(self.anchor)
        self._planned = self._segments.size
        self._firsts = self._all_firsts()
        self._signed = min(self._signed, self.anchor.seq)
        self._head = None

    def _all_firsts(self) -> list[int]:
        return [*(first for first, _ in closed_segments(self.path)), self._segments.first]

    async def run(self) -> None:
        """Writes what was noted, and signs what has not been for a while. Ends when cancelled."""
        while True:
            with trio.move_on_after(_SIGN_AFTER_S) as quiet:
                await self._wanted.wait()
            self._wanted = trio.Event()
            if quiet.cancelled_caught:
                self.checkpoint()
            await self.sync()
            await self._keep_head()

    async def _keep_head(self) -> None:
        """Has the head kept elsewhere, when there is another that is on disk."""
        head = self._head
        if head is not None and head.seq < self.anchor.seq:
            await self._keep(head, self.anchor)
            self._head = None if self._head is head else self._head

    async def end(self) -> None:
        """Signs and writes all that there is, and has it kept."""
        self.checkpoint()
        await self.sync()
        await self._keep_head()

    async def sync(self) -> None:
        """Writes all that waits; what fails is counted."""
        if self._chain.anchor.seq > self.anchor.seq:
            try:
                with trio.CancelScope(shield=True):
                    await self._flush(self._chain.anchor.seq, self._losses)
            except AuditFailed:
                return

    def lines(self) -> Generator[bytes, None, None]:
        """Yields the lines that are on disk now, of all segments that are kept."""
        return self._segments.lines()


class _Tail:
    """The lines of the last two segments, and what was read of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0  # of whole lines in the open segment
        self.last: deque[bytes] = deque(maxlen=RING)

    def lines(self) -> Iterator[bytes]:
        for _, closed in closed_segments(self.path)[-1:]:
            for line in read_lines(closed):
                self.last.append(line)
                yield line
        total = self.path.stat().st_size if self.path.exists() else 0
        for line in read_lines(self.path) if total else ():
            if not line.endswith(b"\n") and self.size + len(line) == total:
                return  # torn: nobody was told of it
            self.size += len(line)
            self.last.append(line)
            yield line

    def entries(self) -> deque[Entry]:
        """The last records, as far as they can be read."""
        found: deque[Entry] = deque(maxlen=RING)
        for line in self.last:
            try:
                found.append(msgspec.json.decode(line[line.find(b" ") + 1 :], type=Entry))
            except msgspec.MsgspecError:
                break
        return found


def _load(path: Path, anchor: Anchor, key: PublicKey | None) -> tuple[Segments, deque[Entry], str]:
    """The end of the record, its last entries, and what is wrong since the last segment but one."""
    tail = _Tail(path)
    try:
        found = verify(tail.lines(), [anchor], key, is_whole=False)
    except Damage as damage:
        size = path.stat().st_size if path.exists() else 0
        return Segments(path, 1, Anchor(), size), tail.entries(), str(damage)
    first = found.anchor.seq + 1
    if tail.size:
        line = next(read_lines(path))
        first = msgspec.json.decode(line[line.find(b" ") + 1 :], type=Entry).seq
    return Segments(path, first, found.anchor, tail.size), tail.entries(), ""


@asynccontextmanager
async def open_audit(
    path: Path,
    now: Callable[[], Moment],
    sign: Callable[[bytes], bytes] | None = None,
    *,
    key: PublicKey | None = None,
    anchor: Anchor | None = None,
    room: Room | None = None,
    keep: Callable[[Head, Anchor], Awaitable[None]] = _kept_nowhere,
) -> AsyncIterator[AuditLog]:
    """The record at `path`, made when there is none. A damaged one is left as it is, and no decision can be made.

    Args:
        sign: signs checkpoints: at intervals, when the record is opened, and when it is closed.
        key: signatures have to be by it; those of the last two segments are checked here, with the chain.
        anchor: a place that has to be in the record.
        keep: is told the signed head and the end of the record at each checkpoint and at the end.

    Raises:
        AuditFailed: it cannot be opened.
    """
    try:
        segments, ring, damage = await trio.to_thread.run_sync(_load, path, anchor or Anchor(), key)
    except OSError as error:
        raise AuditFailed(f"{path}: {error.strerror}") from None
    try:
        log = AuditLog(segments, ring, now, sign, room, keep)
        if damage:
            log.fail(f"it is damaged: {damage[:TEXT_MAXIMUM]}")
        else:
            if ring and ring[-1].op is Operation.CHECKPOINT:
                log.note_signed(ring[-1].seq)
            log.checkpoint()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(log.run)
            try:
                yield log
            finally:
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    await log.end()
    finally:
        segments.close()
