"""The policy of a running service: the table, its record, its store, the gate pages and the clock.

Order of every change: rights rise after their audit record is on disk, and fall before. So a service that dies between
two steps, or whose disk is full, leaves less than was decided, never more; and a caller hears of success only when the
decision, its record and the table are on disk. What a service that is gone had granted for a time ends with the next
service, or with the machine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager, closing, suppress
from functools import cache
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec
import trio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from rayos_vmm.config.firewall import OwnedRule
from rayos_vmm.config.spec import Quota, VmSpec
from rayos_vmm.errors import Conflict, Invalid, NotFound
from rayos_vmm.events import EventLog
from rayos_vmm.policy import compile as compiler
from rayos_vmm.policy.audit import Anchor, Damage, Entry, Operation, verify
from rayos_vmm.policy.audit_key import load_private
from rayos_vmm.policy.audit_log import AuditFailed, AuditLog, Room, open_audit
from rayos_vmm.policy.audit_trail import AuditTrail
from rayos_vmm.policy.audit_witness import AuditWitness, Heads
from rayos_vmm.policy.capability import Capability, missing, names, parse
from rayos_vmm.policy.constraint import NO_CONSTRAINTS, Constraints, port_rules
from rayos_vmm.policy.grant import Grant, Moment
from rayos_vmm.policy.hierarchy import Place
from rayos_vmm.policy.pages import Devices, GatePages, NoDevices
from rayos_vmm.policy.rulebook import RuleBook
from rayos_vmm.policy.table import Denied, Saved, Table, Unknown, holders
from rayos_vmm.policy.view import GrantView, PolicyStatus, RecordState, RightView, Verified

log = logging.getLogger(__name__)
#: The wall clock may be set while we sleep: it is looked at again after so many seconds while a grant has an end.
_LOOK_AGAIN_S: Final = 1.0


class PolicyStore(Protocol):
    """Where the table is kept."""

    async def load_policy(self) -> bytes | None: ...
    async def save_policy(self, data: bytes, anchor: bytes) -> None: ...
    async def load_anchor(self) -> bytes | None: ...
    async def save_anchor(self, anchor: bytes) -> None: ...


class Stored(msgspec.Struct, frozen=True):
    """The table as it is kept."""

    table: Saved


def read_clocks() -> Moment:
    """Now."""
    return Moment(time.time(), time.clock_gettime(time.CLOCK_BOOTTIME), _boot_id())


@cache
def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


class Authority:
    """Use `open_authority`. Every method may be called from any task of the same run."""

    def __init__(
        self,
        store: PolicyStore,
        audit: AuditLog,
        table: Table,
        now: Callable[[], Moment],
        book: RuleBook,
        devices: Devices,
        heads: Heads,
    ) -> None:
        self.audit = audit
        self._heads = heads
        self.audit_trail = AuditTrail(audit)
        self.audit_key: Ed25519PublicKey | None = None
        self.book = book
        self.now = now
        self.lock = trio.Lock()  # one change at a time
        self._store = store
        self._table = table
        self._pages = GatePages(table, book, devices)
        self._changed = trio.Event()

    # -- machines ------------------------------------------------------------------------------------------------

    async def define(self, vm: str, capabilities: Sequence[str], where: Place | None = None) -> None:
        """A machine with the rights of its specification, at a place in the hierarchy.

        Raises:
            Invalid: there is no such capability, zone or parent.
            Conflict: there are too many machines.
            AuditFailed: it could not be recorded.
        """
        rights = parse_rights(capabilities)
        async with self.lock:
            if self._table.is_known(vm):  # of a definition that was not finished
                self._table.forget(vm)
            if where is not None:
                self.book.join(vm, where)
            try:
                await self._rise(
                    lambda table: table.define(vm, rights), Operation.DEFINE, vm, capabilities=names(rights)
                )
            except BaseException:
                self.book.leave(vm)
                raise

    def place(self, specs: Mapping[str, VmSpec]) -> None:
        """The machines that a former service defined, all at once: a parent may come after its child."""
        places = {vm: Place(spec.zone, spec.parent) for vm, spec in specs.items()}
        for vm, why in self.book.adopt(places).items():
            log.warning("a machine has no place in the policy", extra={"vm": vm, "why": why})
            self.audit.note(Operation.POLICY, vm, allowed=False, why=why)

    async def adopt(self, vm: str, capabilities: Sequence[str]) -> None:
        """A machine that a former service defined, perhaps before there was a policy."""
        if not self._table.is_known(vm):
            await self.define(vm, capabilities)

    async def forget(self, vm: str, *, why: str = "") -> None:
        """A machine is removed: with it goes all that it held and passed on. `why` is recorded."""
        async with self.lock:
            gone = self._table.forget(vm)
            self.book.leave(vm)
            self._write_pages(holders(gone))
            with suppress(AuditFailed):  # nothing to refuse: it is gone
                lost: dict[str, Any] = {"grants": [grant.id for grant in gone]}
                await self.audit.append(Operation.REMOVE, vm, **(lost | {"why": why} if why else lost))
            await self._save()

    async def forget_ghosts(self, known: Collection[str]) -> list[str]:
        """Forgets, and records, every machine that holds rights and is not `known`; returns these.

        A service that was killed between the two steps of a removal leaves one.
        """
        ghosts = sorted({grant.holder for grant in self._table.grants.values()} - set(known))
        for vm in ghosts:
            log.warning("the policy knew a machine that there is not", extra={"vm": vm})
            await self.forget(vm, why="there was no such machine when the service started")
        return ghosts

    def open(self, vm: str, runtime: Path, *, is_new: bool) -> Path:
        """The gate page in a machine's run directory says from now on what the policy says. Errors: OSError."""
        self._end(self.now())
        return self._pages.open(vm, runtime, is_new=is_new)

    def refresh(self) -> None:
        """Other rules hold: every gate page says so from now on."""
        self._pages.write()
        self._wake()

    def cap(self, vm: str, quota: Quota) -> Quota:
        """Returns the quota of a machine, narrowed by the rules."""
        return self.book.cap(vm, quota)

    def close(self, vm: str) -> None:
        """The machine's devices are gone. Safe to call again."""
        self._pages.close(vm)

    # -- decisions -----------------------------------------------------------------------------------------------

    async def grant(
        self,
        vm: str,
        capabilities: Sequence[str],
        ttl_s: float | None,
        reason: str,
        constraints: Constraints = NO_CONSTRAINTS,
    ) -> GrantView:
        """Gives rights, for a time or until they are revoked; in force on the running devices when this returns.

        Raises:
            NotFound: there is no such machine.
            Invalid: there is no such capability.
            Conflict: the policy does not allow it.
            AuditFailed: it could not be recorded, and is not in force.
        """
        rights = parse_rights(capabilities)
        async with self.lock:
            now = self.now()
            self._end(now)
            return await self._rise(
                lambda table: table.grant(vm, rights, ttl_s, reason, now, constraints),
                Operation.GRANT,
                vm,
                capabilities=names(rights),
                ttl_s=ttl_s,
                reason=reason,
                **_told(constraints),
            )

    async def delegate(
        self,
        source: str,
        to: str,
        capabilities: Sequence[str],
        ttl_s: float | None,
        constraints: Constraints = NO_CONSTRAINTS,
    ) -> GrantView:
        """One machine passes rights on to another. Raises as `grant`."""
        rights = parse_rights(capabilities)
        async with self.lock:
            now = self.now()
            self._end(now)
            return await self._rise(
                lambda table: table.delegate(source, to, rights, ttl_s, now, constraints),
                Operation.DELEGATE,
                to,
                source=source,
                capabilities=names(rights),
                ttl_s=ttl_s,
                **_told(constraints),
            )

    async def revoke(self, grant_id: int) -> list[GrantView]:
        """Ends a grant and all that was passed on from it; returns what went.

        Raises:
            NotFound: there is none of that number (any more).
            AuditFailed: it is in force, and could not be recorded.
        """
        return await self._revoke(lambda table, now: table.revoke(grant_id, now), "", id=grant_id)

    async def revoke_rights(self, vm: str, capabilities: Sequence[str]) -> list[GrantView]:
        """Takes rights from a machine, wherever it has them from. Raises as `revoke`, and Invalid."""
        rights = parse_rights(capabilities)
        return await self._revoke(
            lambda table, now: table.revoke_rights(vm, rights, now), vm, capabilities=names(rights)
        )

    def need(self, vm: str, rights: Capability, what: str) -> None:
        """Returns when a machine has these rights now, under the rules too.

        Raises:
            Forbidden: it lacks one; `what` needs it.
        """
        lacks = rights & ~self.book.narrow(vm, self._table.holds(vm))
        if lacks:
            raise missing(vm, [next(iter(lacks))], what)

    async def watch(self, vm: str, rights: Capability, what: str) -> None:
        """Raises Forbidden as soon as a machine does not have these rights; ends when cancelled."""
        while True:
            changed = self._changed
            self.need(vm, rights, what)
            await changed.wait()

    def port_rules(self, vm: str) -> list[OwnedRule]:
        """Firewall rules that keep a machine to the ports of its grants; before all others."""
        return port_rules(self._table.bounds(vm).ports, "grants")

    # -- questions -----------------------------------------------------------------------------------------------

    def grants(self, vm: str | None = None) -> list[GrantView]:
        """Returns all grants, the machines' own rights among them, oldest first."""
        now = self.now()
        return [grant.view(now) for grant in self._table.grants.values() if vm in (None, grant.holder)]

    def status(self) -> PolicyStatus:
        """How much there is of everything that has a limit, and whether decisions can be recorded."""
        return PolicyStatus(
            revision=self.book.revision,
            **self._table.usage(),
            **self.book.usage(),
            audit=RecordState(
                records=self.audit.anchor.seq,
                in_memory=len(self.audit.ring),
                lost=self.audit.lost,
                trouble=self.audit.trouble,
                witness=self._heads.trouble,
            ),
        )

    def explain(self, vm: str) -> list[RightView]:
        """Each right of a machine and the chain of grants that it comes from.

        Raises:
            NotFound: there is no such machine.
        """
        if not self._table.is_known(vm):
            raise NotFound(f"there is no machine {vm!r}")
        return compiler.explain(self._table, self.book, vm, self.now())

    def records(self, limit: int) -> list[Entry]:
        """The last records."""
        return list(self.audit.ring)[-limit:]

    async def verify(self) -> Verified:
        """Whether the audit record is what was written; where it is not."""
        await self.audit.sync()
        anchors = [self.audit.anchor]
        if raw := await self._store.load_anchor():
            anchors.append(msgspec.json.decode(raw, type=Anchor))
        lost = self.audit.lost
        try:
            with closing(self.audit.lines()) as lines:
                found = await trio.to_thread.run_sync(lambda: verify(lines, anchors, self.audit_key))
        except Damage as damage:
            return Verified(ok=False, problem=str(damage), seq=damage.seq, offset=damage.offset, lost=lost)
        except OSError as error:
            return Verified(ok=False, problem=str(error), seq=0, offset=0, lost=lost)
        return Verified(
            ok=True,
            records=found.anchor.seq,
            first=found.first,
            digest=found.anchor.digest,
            signed=found.signed,
            lost=lost,
        )

    async def restart_audit(self, why: str) -> Path:
        """Sets a damaged record aside and begins another, as `AuditLog.restart`; returns the folder of the old one.

        Raises:
            Conflict: nothing is wrong with the record.
            AuditFailed: another cannot be begun.
        """
        async with self.lock:
            raw = await self._store.load_anchor()
            end = msgspec.json.decode(raw, type=Anchor) if raw else Anchor()
            folder = await self.audit.restart(end, why)
            await self._save()
            return folder

    # -- the clock -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Ends grants when their time has come. Ends when cancelled."""
        while True:
            changed = self._changed
            left = self._table.next_end(self.now())
            if left is None:
                await changed.wait()
                continue
            with trio.move_on_after(min(left, _LOOK_AGAIN_S)):
                await changed.wait()
                continue
            await self._expire()

    def _end(self, now: Moment) -> bool:
        """Ends what is over, on the running devices too; whether there was any."""
        gone = self._table.expire(now)
        self._write_pages(holders(gone))
        for grant in gone:
            self.audit.note(
                Operation.EXPIRE, grant.holder, id=grant.id, capabilities=names(grant.capabilities)
            )
        return bool(gone)

    async def _expire(self) -> None:
        if not self._end(self.now()):
            return
        await self.audit.sync()
        async with self.lock:
            try:
                await self._save()
            except Exception as error:  # of the store: the next start finds them over, by the clock
                log.error("the end of grants could not be stored: %s", error)

    # -- inner workings ------------------------------------------------------------------------------------------

    async def _rise(self, change: Callable[[Table], Grant], op: Operation, vm: str, **data: Any) -> GrantView:
        """Tries the change on a copy, records it, makes it, stores it, and only then lets the devices know."""
        try:
            grant = change(self._table.copy())
        except Denied as error:
            raise self._refused(error, op, vm, data) from None
        await self.audit.append(op, vm, id=grant.id, parent=grant.parent, **data)
        try:
            grant = change(self._table)  # time has passed: what it came from may be over
        except Denied as error:
            raise self._refused(error, op, vm, data) from None
        try:
            await self._save()
        except BaseException:
            self._table.drop(grant.id)
            self.audit.note(Operation.REVOKE, vm, id=grant.id, why="it could not be stored")
            raise
        try:
            await self._pages.constrain(vm)
        except BaseException:
            self._table.drop(grant.id)
            self._write_pages({vm})
            self.audit.note(Operation.REVOKE, vm, id=grant.id, why="its constraints were not taken")
            await self._save()
            raise
        self._write_pages({vm})
        self._wake()
        return grant.view(self.now())

    async def _revoke(
        self, change: Callable[[Table, Moment], list[Grant]], vm: str, **data: Any
    ) -> list[GrantView]:
        async with self.lock:
            now = self.now()
            self._end(now)
            try:
                gone = change(self._table, now)
            except Denied as error:
                raise self._refused(error, Operation.REVOKE, vm, data) from None
            self._write_pages(holders(gone))
            self._wake()
            lost = [grant.id for grant in gone]
            await self.audit.append(
                Operation.REVOKE, vm or (gone[0].holder if gone else ""), lost=lost, **data
            )
            await self._save()
            return [grant.view(now) for grant in gone]

    def _refused(self, error: Denied, op: Operation, vm: str, data: dict[str, Any]) -> NotFound | Conflict:
        self.audit.note(Operation.CHECK_FAIL, vm, allowed=False, asked=op.value, why=str(error), **data)
        return NotFound(str(error)) if isinstance(error, Unknown) else Conflict(str(error), code="denied")

    def _write_pages(self, vms: set[str]) -> None:
        self._pages.write(vms)
        if vms:
            self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, trio.Event()
        changed.set()

    async def _save(self) -> None:
        encode = msgspec.json.encode
        await self._store.save_policy(encode(Stored(self._table.save())), encode(self.audit.anchor))


def _told(constraints: Constraints) -> dict[str, Any]:
    return {"constraints": msgspec.to_builtins(constraints)} if constraints.count else {}


def parse_rights(words: Sequence[str]) -> Capability:
    """See `capability.parse`. Raises Invalid."""
    try:
        return parse(words)
    except ValueError as error:
        raise Invalid(str(error)) from None


async def load_table(store: PolicyStore) -> Table:
    """The table that a former service left, or an empty one."""
    raw = await store.load_policy()
    return Table(msgspec.json.decode(raw, type=Stored).table if raw else None)


@asynccontextmanager
async def open_authority(
    store: PolicyStore,
    audit_path: Path,
    *,
    events: EventLog | None = None,
    now: Callable[[], Moment] = read_clocks,
    table: Table | None = None,
    book: RuleBook | None = None,
    devices: Devices | None = None,
    key_path: Path | None = None,
    room: Room | None = None,
    witness: AuditWitness | None = None,
) -> AsyncIterator[Authority]:
    """The policy that a former service left, without what is over by now.

    Args:
        table: as `load_table` gives it, for those who need it before; else it is loaded here.
        devices: who is told of constraints.
        key_path: the key that signs the record, made when there is none.
        room: of the record.
        witness: the place outside of this host that keeps the record's head.

    Raises:
        AuditFailed: the audit file cannot be opened.
    """
    if table is None:
        table = await load_table(store)
    raw_anchor = await store.load_anchor()
    anchor = msgspec.json.decode(raw_anchor, type=Anchor) if raw_anchor else None
    key = await trio.to_thread.run_sync(load_private, key_path) if key_path is not None else None
    public = key.public_key() if key is not None else None
    heads = Heads(store, witness)
    sign = key.sign if key is not None else None
    try:
        async with (
            open_audit(audit_path, now, sign, key=public, anchor=anchor, room=room, keep=heads.keep) as audit,
            trio.open_nursery() as nursery,
        ):
            authority = Authority(store, audit, table, now, book or RuleBook(), devices or NoDevices(), heads)
            authority.audit_key = public
            await authority._expire()
            nursery.start_soon(authority.run)
            nursery.start_soon(authority.audit_trail.run, events)
            nursery.start_soon(heads.run)
            try:
                yield authority
            finally:
                nursery.cancel_scope.cancel()
                authority._pages.close_all()
    finally:
        with trio.CancelScope(shield=True):
            await heads.tell_last()
