"""Changes of the policy document: each is a revision, recorded, stored, then in force on every device, or nothing.

Invariant: the document in force is the last that the store has; whoever is told of a revision finds it in force.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import msgspec

from rayos_vmm.errors import Conflict, Invalid, NotFound
from rayos_vmm.events import EventLog
from rayos_vmm.policy.audit import Operation
from rayos_vmm.policy.authority import Authority
from rayos_vmm.policy.document import Change, Document, Level, Member, check, difference, parse
from rayos_vmm.policy.enforcement import APPLY_TIMEOUT_S, Enforcement
from rayos_vmm.policy.hierarchy import Effective
from rayos_vmm.policy.rulebook import RuleBook
from rayos_vmm.policy.view import Changes, LaggingVm, LaggingZone, PolicyView, Propagation, Shown, Zone

#: Revisions that are kept to go back to.
KEPT: Final = 100


class Revision(msgspec.Struct, frozen=True, kw_only=True):
    """One change: when (seconds since the epoch), why, and of how many paths."""

    number: int
    time: float
    reason: str
    changes: int


class RevisionStore(Protocol):
    """Where revisions are kept by number, each with the document that it led to."""

    async def load_revisions(self) -> list[bytes]: ...
    async def load_document(self, number: int) -> bytes: ...
    async def save_revision(self, number: int, revision: bytes, document: bytes, *, keep: int) -> None: ...


class Revisions:
    """Every method may be called from any task of the same run."""

    def __init__(
        self,
        store: RevisionStore,
        authority: Authority,
        kept: list[Revision],
        enforcement: Enforcement | None = None,
        events: EventLog | None = None,
    ) -> None:
        self._store = store
        self.authority = authority
        self._events = events
        self._kept = {revision.number: revision for revision in kept}
        self._enforcement = enforcement or Enforcement(authority.book.revision)
        self.broadcaster = self._enforcement.broadcaster

    @property
    def book(self) -> RuleBook:
        """The rule book in force."""
        return self.authority.book

    # -- questions -----------------------------------------------------------------------------------------------

    def show(self) -> Shown:
        """The document in force and its revision; 0 before the first."""
        return Shown(revision=self.book.revision, document=msgspec.to_builtins(self.book.document))

    def history(self) -> list[Revision]:
        """The revisions that are kept, oldest first."""
        return [self._kept[number] for number in sorted(self._kept)]

    def diff(self, tables: Mapping[str, Any]) -> list[Change]:
        """Returns the changes that applying this document would make.

        Raises:
            Invalid: it would be rejected; with the path.
        """
        document = parse(tables)
        self.book.trial(document)
        return difference(self.book.document, document)

    def explain(self, vm: str) -> PolicyView:
        """All that holds for a machine, each with its origin, and its rights with the grants they come from.

        Raises:
            NotFound: there is no such machine.
        """
        rights = self.authority.explain(vm)
        return PolicyView(
            **msgspec.structs.asdict(self.book.of(vm).view()), revision=self.book.revision, rights=rights
        )

    def zones(self) -> list[Zone]:
        """Each zone, how many rules it has, and the machines in it."""
        members: dict[str | None, list[str]] = {}
        for vm, effective in sorted(self.book.effective.items()):
            members.setdefault(effective.zone, []).append(vm)
        return [
            Zone(zone=name, rules=len(level.rules), vms=members.get(name, []))
            for name, level in sorted(self.book.document.zone.items())
        ]

    def scalability(self) -> Propagation:
        """How far the newest revision has come: in all, for each machine, for each zone."""
        distribution = self.broadcaster.distribution
        status = distribution.view()
        vms = []
        for vm, effective in sorted(self.book.effective.items()):
            target = distribution.targets.get(vm)
            vms.append(
                LaggingVm(
                    vm=vm,
                    zone=effective.zone,
                    parent=effective.parent,
                    firewall_rules=len(effective.firewall),
                    applied=target.applied if target is not None and target.applied >= 0 else None,
                    lag=target.lag if target is not None else 0,
                    problem=target.problem if target is not None else "",
                )
            )
        zones = [
            LaggingZone(
                **msgspec.structs.asdict(zone), lagging=[vm for vm in zone.vms if vm in status.lagging]
            )
            for zone in self.zones()
        ]
        status = msgspec.structs.replace(status, vms=len(vms), zones=len(zones))
        return Propagation(status=status, vms=vms, zones=zones)

    # -- changes -------------------------------------------------------------------------------------------------

    async def apply(self, tables: Mapping[str, Any], reason: str = "", base: int | None = None) -> Changes:
        """Puts a document in the place of the one in force, on the running devices too when this returns.

        Args:
            base: the revision that the caller changed; None: whichever is in force.

        Raises:
            Invalid: it was rejected; with the path of what is wrong.
            Conflict: another revision than `base` is in force.
            AuditFailed: it could not be recorded, and is not in force.
        """
        document = parse(tables)
        return await self._change(lambda _now: document, reason, base)

    async def rollback(self, number: int) -> Changes:
        """The document of a former revision holds again, as a new revision. Raises NotFound, and as `apply`."""
        if number != 0 and number not in self._kept:
            known = ", ".join(map(str, sorted(self._kept))) or "none"
            raise NotFound(f"revision {number} is not kept; kept are {known}")
        document = Document()
        if number:
            document = msgspec.json.decode(await self._store.load_document(number), type=Document)
        return await self._change(lambda _now: document, f"back to revision {number}", None)

    async def create_zone(self, zone: str) -> Changes:
        """A zone without rules. Raises Conflict when there is one of this name, and as `apply`."""

        def create(now: Document) -> Document:
            if zone in now.zone:
                raise Conflict(f"there is a zone {zone} already")
            return msgspec.structs.replace(now, zone={**now.zone, zone: Level()})

        return await self._change(create, f"create zone {zone}", None)

    async def remove_zone(self, zone: str) -> Changes:
        """Takes a zone and its rules away. Raises NotFound, Invalid when a machine is in it, and as `apply`."""

        def remove(now: Document) -> Document:
            self._need_zone(now, zone)
            rest = {name: level for name, level in now.zone.items() if name != zone}
            return msgspec.structs.replace(now, zone=rest)

        return await self._change(remove, f"remove zone {zone}", None)

    async def assign(self, vm: str, zone: str | None, parent: str | None) -> Changes:
        """Puts a machine into a zone, or under a parent; None leaves as it is. Raises NotFound, and as `apply`."""

        def assign(now: Document) -> Document:
            if zone is not None:
                self._need_zone(now, zone)
            if vm not in self.book.effective:
                raise NotFound(f"there is no machine {vm!r}")
            old = now.vm.get(vm, Member())
            member = msgspec.structs.replace(old, zone=zone or old.zone, parent=parent or old.parent)
            return msgspec.structs.replace(now, vm={**now.vm, vm: member})

        where = " ".join(filter(None, (zone and f"in zone {zone}", parent and f"under {parent}")))
        return await self._change(assign, f"{vm} {where or 'stays'}", None)

    # -- inner workings ------------------------------------------------------------------------------------------

    def _need_zone(self, document: Document, zone: str) -> None:
        if zone not in document.zone:
            known = ", ".join(sorted(document.zone)) or "none"
            raise NotFound(f"there is no zone {zone!r}; known: {known}")

    async def _change(self, make: Callable[[Document], Document], reason: str, base: int | None) -> Changes:
        authority, book = self.authority, self.book
        async with authority.lock:
            before = book.document
            if base is not None and base != book.revision:
                raise Conflict(
                    f"revision {book.revision} is in force, and the change is of {base}",
                    hint="look at what changed: rayos policy show, rayos policy history",
                    code="stale",
                )
            document = make(before)
            try:
                check(document)
                effective = book.trial(document)
                stale = self._check_firewall(effective)
            except Invalid as error:
                authority.audit.note(Operation.POLICY, allowed=False, reason=reason, why=error.message)
                raise
            changes = difference(before, document)
            answer = Changes(revision=book.revision, changes=changes)
            if not changes:
                return answer
            number = book.revision + 1
            paths = [change.path for change in changes]
            entry = await authority.audit.append(
                Operation.POLICY, revision=number, reason=reason, paths=paths[:50], changes=len(paths)
            )
            kept = Revision(number=number, time=entry.time, reason=reason, changes=len(paths))
            encode = msgspec.json.encode
            try:
                await self._store.save_revision(number, encode(kept), encode(document), keep=KEPT)
            except BaseException:
                authority.audit.note(
                    Operation.POLICY, allowed=False, revision=number, why="it could not be stored"
                )
                raise
            self._kept[number] = kept
            for old in sorted(self._kept)[:-KEPT]:
                del self._kept[old]
            book.take(document, number, effective)
            authority.refresh()
            if self._events is not None:
                self._events.publish("policy.applied", revision=number, reason=reason, changes=len(paths))
            for vm in stale - self.broadcaster.distribution.targets.keys():
                await self._enforcement.refresh(vm)
            self.broadcaster.announce(number, stale)
        await self.broadcaster.wait_all_applied(APPLY_TIMEOUT_S)
        lagging = self.broadcaster.distribution.lagging()
        return msgspec.structs.replace(answer, revision=number, lagging=lagging)

    def _check_firewall(self, effective: Mapping[str, Effective]) -> set[str]:
        """The machines whose firewall rules will be others. Raises Invalid when one of them cannot have these."""
        old = self.book.effective
        stale = {vm for vm, new in effective.items() if vm not in old or new.firewall != old[vm].firewall}
        moved = any(vm not in old or new.zone != old[vm].zone for vm, new in effective.items())
        if moved or set(old) - set(effective):  # `zone:` words stand for others
            stale = set(effective)
        for vm in stale:
            self._enforcement.check_inherited(vm, effective[vm].firewall)
        return stale


async def load_book(store: RevisionStore) -> tuple[RuleBook, list[Revision]]:
    """The document in force, and the revisions that are kept, oldest first.

    Raises:
        msgspec.DecodeError: what is stored is not ours.
    """
    kept = [msgspec.json.decode(data, type=Revision) for data in await store.load_revisions()]
    if not kept:
        return RuleBook(), kept
    last = kept[-1].number
    return RuleBook(msgspec.json.decode(await store.load_document(last), type=Document), last), kept
