"""The policy document as a service runs it: on the pages at once, in the record, in the store, or not at all."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from rayos_devices.gate import Op
from rayos_vmm.config.firewall import FirewallRule, OwnedRule
from rayos_vmm.config.spec import Quota, VmSpec
from rayos_vmm.errors import Conflict, Invalid, NotFound
from rayos_vmm.policy.audit_log import AuditFailed
from rayos_vmm.policy.authority import Authority, load_table, open_authority
from rayos_vmm.policy.enforcement import Enforcement, InheritedRules
from rayos_vmm.policy.hierarchy import Place
from rayos_vmm.policy.revisions import KEPT, Revisions, load_book
from rayos_vmm.policy.view import Zone
from rayos_vmm.service.store import Store, StoreError, open_store
from tests.unit.policy.test_authority import gate

NO_GPU = {"kind": "capability", "deny": ["CAP_GPU"]}


class Firewalls:
    """The machines' firewalls: takes two rules at most."""

    def __init__(self) -> None:
        self.refreshed: list[str] = []

    def check_inherited(self, vm: str, inherited: Sequence[OwnedRule]) -> None:
        if len(inherited) > 2:
            raise Invalid(f"{vm}: too many")

    async def refresh(self, vm: str) -> int:
        self.refreshed.append(vm)
        return 1


@asynccontextmanager
async def opened(
    directory: Path, firewall: Firewalls | None = None
) -> AsyncIterator[tuple[Authority, Revisions, Store]]:
    async with open_store(directory / "db") as store:
        book, kept = await load_book(store)
        table, enforcement = await load_table(store), Enforcement(book.revision, firewall)
        async with open_authority(
            store, directory / "audit.log", table=table, book=book, devices=enforcement
        ) as authority:
            yield authority, Revisions(store, authority, kept, enforcement), store


async def test_a_rule_acts_on_the_page_and_is_found_by_the_next_service(tmp_path: Path) -> None:
    """A grant of what a rule denies gives nothing until the rule goes; a rollback is a revision too."""
    document: dict[str, Any] = {"zone": {"lab": {"rules": {"no-gpu": NO_GPU}}}}
    async with opened(tmp_path) as (authority, revisions, _):
        await revisions.create_zone("lab")
        await authority.define("a", ["all"], Place(zone="lab"))
        await authority.define("b", ["all"], Place())
        authority.open("a", tmp_path, is_new=True)
        page = gate(tmp_path)
        assert page.allows(Op.GPU_RENDER.index)
        answer = await revisions.apply(document, "quiet", base=1)
        assert answer.revision == 2 and answer.changes[0].path == "zone.lab.rules.no-gpu"
        assert not page.allows(Op.GPU_RENDER.index) and page.allows(Op.NET_TX.index)
        await authority.grant("a", ["gpu"], None, "not enough")
        assert not page.allows(Op.GPU_RENDER.index)
        found = revisions.explain("a")
        gpu = next(right for right in found.rights if right.capability == "CAP_GPU")
        assert (gpu.allowed, gpu.denied_by, len(gpu.from_)) == (False, "zone:lab/no-gpu", 2)
        assert revisions.explain("b").levels == ["host"]
        assert revisions.zones() == [Zone(zone="lab", rules=1, vms=["a"])]
    async with opened(tmp_path) as (authority, revisions, _):
        authority.place({"b": VmSpec(name="b"), "a": VmSpec(name="a", zone="lab")})
        authority.open("a", tmp_path, is_new=False)
        page = gate(tmp_path)
        assert revisions.book.revision == 2 and not page.allows(Op.GPU_RENDER.index)
        assert (await revisions.apply(document)).revision == 2  # nothing differs
        assert (await revisions.rollback(1)).revision == 3
        assert page.allows(Op.GPU_RENDER.index)
        assert [(r.number, r.reason) for r in revisions.history()] == [
            (1, "create zone lab"),
            (2, "quiet"),
            (3, "back to revision 1"),
        ]
        recorded = [entry.data["revision"] for entry in authority.records(100) if entry.op == "POLICY"]
        assert recorded == [1, 2, 3] and (await authority.verify()).ok


async def test_a_change_is_whole_or_none(tmp_path: Path) -> None:
    """A machine that cannot have it, a stale base, a full store, a record that is refused: nothing changes."""
    async with opened(tmp_path) as (authority, revisions, store):
        await revisions.create_zone("lab")
        await authority.define("a", ["all"], Place(zone="lab"))
        authority.open("a", tmp_path, is_new=True)
        page = gate(tmp_path)
        host = {"rules": {"no-gpu": NO_GPU}}
        with pytest.raises(Invalid, match=r"vm\.a\.zone = 'lab': there is no such zone"):
            await revisions.apply({"host": host})
        with pytest.raises(Invalid, match=r"vm\.a\.zone"):
            await revisions.remove_zone("lab")
        with pytest.raises(Conflict, match="revision 1 is in force"):
            await revisions.apply({"host": host, "zone": {"lab": {}}}, base=0)
        with pytest.raises(NotFound, match="revision 7 is not kept; kept are 1"):
            await revisions.rollback(7)

        async def full(*_: Any, **__: Any) -> None:
            raise StoreError("No space left on device")

        right, store.save_revision = store.save_revision, full  # type: ignore[method-assign]
        with pytest.raises(StoreError):
            await revisions.apply({"host": host, "zone": {"lab": {}}})
        store.save_revision = right  # type: ignore[method-assign]
        authority.audit.fail("of a test")
        with pytest.raises(AuditFailed):
            await revisions.apply({"host": host, "zone": {"lab": {}}})
        assert page.allows(Op.GPU_RENDER.index)
        assert revisions.book.revision == 1 and len(revisions.history()) == 1


async def test_places_come_and_go_with_machines(tmp_path: Path) -> None:
    async with opened(tmp_path) as (authority, revisions, _):
        with pytest.raises(Invalid, match=r"vm\.a\.zone = 'lab'"):
            await authority.define("a", ["all"], Place(zone="lab"))
        assert authority.grants() == [] and revisions.book.effective == {}
        await revisions.create_zone("lab")
        with pytest.raises(Conflict, match="there is a zone lab already"):
            await revisions.create_zone("lab")
        await authority.define("a", ["all"], Place(zone="lab"))
        await authority.define("b", ["all"], Place(parent="a"))
        with pytest.raises(Conflict, match="a is the parent of b"):
            revisions.book.check_leave("a")
        await authority.forget("a")  # an ephemeral one asks nobody
        assert revisions.explain("b").zone == "lab"
        await authority.forget("b")
        await authority.define("c", ["all"], Place())
        await revisions.assign("c", "lab", None)
        assert revisions.show().document == {"zone": {"lab": {}}, "vm": {"c": {"zone": "lab"}}}
        with pytest.raises(NotFound, match="no zone 'x'; known: lab"):
            await revisions.assign("c", "x", None)
        with pytest.raises(NotFound, match="no machine 'x'"):
            await revisions.assign("x", "lab", None)
        with pytest.raises(Invalid, match=r"vm\.c\.parent = 'c': a circle"):
            await revisions.assign("c", None, "c")


async def test_at_most_64_machines(tmp_path: Path) -> None:
    async with opened(tmp_path) as (authority, revisions, _):
        for number in range(64):
            revisions.book.join(f"v{number}", Place())
        with pytest.raises(Conflict, match="there are 64 machines; at most 64"):
            await authority.define("more", ["all"], Place())
        await authority.forget("v3")
        await authority.define("more", ["all"], Place())


async def test_a_machine_whose_parent_is_gone_is_adopted_without_a_place(tmp_path: Path) -> None:
    async with opened(tmp_path) as (authority, revisions, _):
        authority.place({"a": VmSpec(name="a", parent="gone"), "b": VmSpec(name="b", zone="gone")})
        assert revisions.book.of("a").levels == ("host",)
        await authority.audit.sync()
        told = [(entry.vm, entry.data["why"]) for entry in authority.records(10)]
        assert told == [
            ("a", "vm.a.parent = 'gone': there is no such machine"),
            ("b", "vm.b.zone = 'gone': there is no such zone"),
        ]


async def test_old_revisions_are_forgotten_and_limits_reach_the_quota(tmp_path: Path) -> None:
    async with opened(tmp_path) as (authority, revisions, store):
        for number in range(KEPT + 3):
            rule = {"kind": "resource", "input_queue": 1000 - number}
            await revisions.apply({"host": {"rules": {"less": rule}}})
        assert [kept.number for kept in revisions.history()] == list(range(4, KEPT + 4))
        assert len(await store.load_revisions()) == KEPT
        assert authority.cap("any", Quota(input_queue=10_000)).input_queue == 1000 - KEPT - 2
        with trio.fail_after(60):
            await revisions.rollback(4)
        assert authority.cap("any", Quota(input_queue=10_000)).input_queue == 997


async def test_firewalls_get_the_rules_of_the_policy_before_their_own(tmp_path: Path) -> None:
    """Only those whose rules change are told; what one machine's firewall cannot take is rejected for all."""
    rule = {"kind": "firewall", "action": "deny", "to": "zone:lab"}
    lab: dict[str, Any] = {"rules": {"one": rule, "early": {**rule, "priority": 5}}}
    firewalls = Firewalls()
    async with opened(tmp_path, firewalls) as (authority, revisions, store):
        inherited = InheritedRules(await load_table(store), authority.book)
        await revisions.apply({"zone": {"lab": {}}})
        await authority.define("a", ["all"], Place(zone="lab"))
        await authority.define("b", ["all"], Place())
        firewalls.refreshed.clear()
        await revisions.apply({"zone": {"lab": lab}})
        assert firewalls.refreshed == ["a"]
        own = [OwnedRule("vm:a", FirewallRule(name="mine", action="allow"))]
        merged = inherited.merge("a", own)
        assert [(owned.origin, owned.rule.name) for owned in merged] == [
            ("zone:lab", "early"),
            ("zone:lab", "one"),
            ("vm:a", "mine"),
        ]
        assert inherited.merge("b", own) == own and inherited.members("zone:lab") == ["a"]
        with pytest.raises(Invalid, match="there is no zone:x"):
            inherited.members("zone:x")
        with pytest.raises(Invalid, match="a: too many"):
            await revisions.apply({"zone": {"lab": {"rules": {**lab["rules"], "three": rule}}}})
        assert revisions.book.revision == 2
