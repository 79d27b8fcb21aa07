"""The policy as a service runs it: order of steps, ends, and what a disk that refuses means."""

from __future__ import annotations

import mmap
import os
from functools import partial
from pathlib import Path

import pytest
import trio

from rayos_devices.gate import Gate, Op
from rayos_vmm.config.spec import CAPABILITIES
from rayos_vmm.errors import Conflict, Invalid, NotFound
from rayos_vmm.policy.audit import Operation
from rayos_vmm.policy.audit_log import AuditFailed, open_audit
from rayos_vmm.policy.authority import Authority, open_authority, read_clocks
from rayos_vmm.policy.capability import DEVICE_NAMES
from rayos_vmm.policy.grant import Moment
from rayos_vmm.shared.gate import PAGE_NAME

ALL = ["all"]


class Memory:
    """A store that forgets when the test ends."""

    def __init__(self) -> None:
        self.data: bytes | None = None
        self.anchor: bytes | None = None
        self.is_full = False
        self.saved = trio.Event()

    async def load_policy(self) -> bytes | None:
        return self.data

    async def save_policy(self, data: bytes, anchor: bytes) -> None:
        if self.is_full:
            raise OSError(28, "No space left on device")
        self.data, self.anchor = data, anchor
        self.saved.set()

    async def load_anchor(self) -> bytes | None:
        return self.anchor

    async def save_anchor(self, anchor: bytes) -> None:
        self.anchor = anchor


def gate(runtime: Path) -> Gate:
    """The gate of a device, which has the page open for reading."""
    with (runtime / PAGE_NAME).open("rb") as file:
        return Gate(memoryview(mmap.mmap(file.fileno(), mmap.PAGESIZE, prot=mmap.PROT_READ)))


def operations(authority: Authority) -> list[str]:
    return [entry.op.value for entry in authority.records(1000)]


async def test_a_right_comes_and_goes_on_the_page_and_in_the_record(tmp_path: Path) -> None:
    ahead = 0.0

    def now() -> Moment:
        return Moment(1000.0 + ahead, 10.0 + ahead, "boot")

    store = Memory()
    async with open_authority(store, tmp_path / "audit.log", now=now) as authority:
        await authority.define("a", ALL)
        authority.open("a", tmp_path, is_new=True)
        page = gate(tmp_path)
        assert page.allows(Op.DISK_WRITE.index)
        await authority.revoke_rights("a", ["disk_w"])
        assert not page.allows(Op.DISK_WRITE.index)
        assert page.allows(Op.DISK_READ.index) and page.allows(Op.DISK_FLUSH.index)
        granted = await authority.grant("a", ["CAP_DISK_W"], 0.2, "a test")
        assert page.allows(Op.DISK_WRITE.index)
        assert granted.left_s == 0.2
        await authority.audit.sync()
        assert page.allows(Op.DISK_WRITE.index)
        store.saved = trio.Event()
        ahead = 0.2
        with trio.fail_after(20):
            await store.saved.wait()  # it looks once the time has passed that was left
        assert not page.allows(Op.DISK_WRITE.index)
        assert operations(authority) == ["DEFINE", "REVOKE", "GRANT", "EXPIRE"]
        assert (await authority.verify()).ok
        authority.close("a")


async def test_a_next_service_finds_the_grants_and_the_page(tmp_path: Path) -> None:
    store = Memory()
    async with open_authority(store, tmp_path / "audit.log") as authority:
        await authority.define("a", ["CAP_NET"])
        await authority.define("b", [])
        authority.open("a", tmp_path, is_new=True)
        await authority.grant("a", ["gpu"], 60, "keep")
        await authority.grant("a", ["input"], 0.05, "too short")
        await authority.delegate("a", "b", ["gpu"], None)
        saved = store.data
    await trio.sleep(0.06)
    store.data = saved
    async with open_authority(store, tmp_path / "audit.log") as authority:
        authority.open("a", tmp_path, is_new=False)
        page = gate(tmp_path)
        assert page.allows(Op.GPU_RENDER.index) and not page.allows(Op.INPUT_INJECT.index)
        ends = [grant.left_s or 0.0 for grant in authority.grants() if grant.capabilities == ["CAP_GPU"]]
        assert len(ends) == 2 and ends[1] <= ends[0] <= 60  # the delegation ends with its parent
        await authority.revoke_rights("a", ["gpu"])
        assert authority.grants("b")[0].capabilities == [] and len(authority.grants("b")) == 1
        assert not page.allows(Op.GPU_RENDER.index)
        assert (await authority.verify()).ok


async def test_refusals_have_a_class_and_are_recorded(tmp_path: Path) -> None:
    async with open_authority(Memory(), tmp_path / "audit.log") as authority:
        await authority.define("a", ["CAP_NET"])
        await authority.define("b", [])
        with pytest.raises(Invalid, match="no capability 'fly'"):
            await authority.grant("a", ["fly"], 1, "")
        with pytest.raises(Invalid, match="right of callers"):
            await authority.grant("a", ["CAP_ADMIN"], 1, "")
        with pytest.raises(NotFound, match="no machine"):
            await authority.grant("c", ["net"], 1, "")
        with pytest.raises(Conflict, match="no grant with CAP_GPU"):
            await authority.delegate("a", "b", ["gpu"], 1)
        with pytest.raises(NotFound, match="no grant 77"):
            await authority.revoke(77)
        await authority.audit.sync()
        refused = [entry for entry in authority.records(100) if entry.op is Operation.CHECK_FAIL]
        assert len(refused) == 3 and not any(entry.allowed for entry in refused)


async def test_limits_hold(tmp_path: Path) -> None:
    async with open_authority(Memory(), tmp_path / "audit.log") as authority:
        await authority.define("a", ALL)
        await authority.define("b", [])
        for _ in range(256):
            await authority.grant("a", ["net"], 60, "")
        with pytest.raises(Conflict, match="at most 256"):
            await authority.grant("a", ["net"], 60, "")
        for _ in range(128):
            await authority.delegate("a", "b", ["net"], 60)
        with pytest.raises(Conflict, match="at most 128"):
            await authority.delegate("a", "b", ["net"], 60)
        for vm in "cde":
            await authority.define(vm, [])
        await authority.revoke(3)  # the first of the 256 grants


async def test_a_chain_has_three_hops(tmp_path: Path) -> None:
    async with open_authority(Memory(), tmp_path / "audit.log") as authority:
        await authority.define("a", ["net"])
        for vm in "bcde":
            await authority.define(vm, [])
        for source, to in ("ab", "bc", "cd"):
            await authority.delegate(source, to, ["net"], None)
        with pytest.raises(Conflict, match="at most 3 hops"):
            await authority.delegate("d", "e", ["net"], None)
        with pytest.raises(Conflict, match="no machine twice"):
            await authority.delegate("c", "a", ["net"], None)


async def test_nothing_rises_when_the_record_or_the_store_is_refused(tmp_path: Path) -> None:
    """Rights fall all the same; what was not recorded is counted and told by the next record."""
    store = Memory()
    async with open_authority(store, tmp_path / "audit.log") as authority:
        await authority.define("a", ["CAP_NET"])
        authority.open("a", tmp_path, is_new=True)
        page = gate(tmp_path)
        store.is_full = True
        with pytest.raises(OSError):
            await authority.grant("a", ["gpu"], 60, "")
        assert not page.allows(Op.GPU_RENDER.index) and len(authority.grants()) == 1
        store.is_full = False

        log = authority.audit
        await log.sync()

        def full(_data: bytes) -> None:
            raise OSError(28, "No space left on device")

        right = log._write
        log._write = full  # type: ignore[method-assign, assignment]  # the disk cannot be filled up here
        with pytest.raises(AuditFailed, match="No space left"):
            await authority.grant("a", ["gpu"], 60, "")
        assert not page.allows(Op.GPU_RENDER.index) and len(authority.grants()) == 1
        with pytest.raises(AuditFailed):
            await authority.revoke_rights("a", ["net"])
        assert not page.allows(Op.NET_TX.index)
        log._write = right  # type: ignore[method-assign]
        await authority.grant("a", ["gpu"], 60, "")
        assert page.allows(Op.GPU_RENDER.index)
        assert authority.records(1)[0].lost == log.lost == 2
        assert (await authority.verify()).ok


async def test_a_flipped_byte_and_a_cut_tail_are_found_while_running_and_at_the_next_start(
    tmp_path: Path,
) -> None:
    path = tmp_path / "audit.log"
    store = Memory()
    async with open_authority(store, path) as authority:
        for vm in ("a", "b", "c"):
            await authority.define(vm, ALL)
        whole = path.read_bytes()
        second = whole.index(b"\n") + 1
        path.write_bytes(whole[: second + 80] + bytes([whole[second + 80] ^ 1]) + whole[second + 81 :])
        found = await authority.verify()
        assert not found.ok and (found.seq, found.offset) == (2, second)
    async with open_authority(store, path) as authority:
        with pytest.raises(AuditFailed, match="record 2"):
            await authority.grant("a", ["net"], 1, "")
    path.write_bytes(whole[: whole.rindex(b"\n", 0, -1) + 1])
    async with open_authority(store, path) as authority:
        with pytest.raises(AuditFailed, match="cut off"):
            await authority.grant("a", ["net"], 1, "")
        assert "cut off" in (await authority.verify()).problem


async def test_a_torn_last_record_is_dropped_and_the_chain_goes_on(tmp_path: Path) -> None:
    """A record torn by kill -9, of which nobody was told, is dropped."""
    path = tmp_path / "audit.log"
    async with open_audit(path, read_clocks) as audit:
        await audit.append(Operation.STATE, "a")
    with path.open("ab") as file:
        file.write(b"0123456789abcdef torn")
    async with open_audit(path, read_clocks) as audit:
        assert audit.anchor.seq == 1
        assert (await audit.append(Operation.STATE, "a")).seq == 2
    assert path.read_bytes().count(b"\n") == 2


async def test_many_records_share_a_sync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs = 0
    real = os.fdatasync

    def counted(fd: int) -> None:
        nonlocal syncs
        syncs += 1
        real(fd)

    monkeypatch.setattr(os, "fdatasync", counted)
    async with open_audit(tmp_path / "audit.log", read_clocks) as audit:
        async with trio.open_nursery() as nursery:
            for number in range(200):
                nursery.start_soon(partial(audit.append, Operation.STATE, "a", n=number))
        assert audit.anchor.seq == 200 and len(audit.ring) == 200
    assert syncs < 20


def test_a_specification_may_name_every_device_right() -> None:
    assert CAPABILITIES == DEVICE_NAMES


async def test_what_is_typed_is_recorded_in_sums_without_its_text(tmp_path: Path) -> None:
    """Also what was typed in the last second of a service."""
    async with open_authority(Memory(), tmp_path / "audit.log") as authority:
        for _ in range(100):
            authority.audit_trail.note_input("a", 0, 3)
        authority.audit_trail.note_input("b", 1, 1)
    async with open_authority(Memory(), tmp_path / "audit.log") as authority:
        typed = [(entry.vm, entry.data) for entry in authority.records(10)]
        assert typed == [("a", {"console": 0, "bytes": 300}), ("b", {"console": 1, "bytes": 1})]
