"""Records survive: what was saved is loaded by the next service, damage is reported with the file's name."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
import trio

from rayos_vmm.config.spec import Disk, VmSpec
from rayos_vmm.host.process import ProcessId
from rayos_vmm.machine.record import Live, Record
from rayos_vmm.machine.view import VmState
from rayos_vmm.service.store import StoreError, open_store


async def test_a_record_comes_back_as_it_was(tmp_path: Path) -> None:
    """Specification, state and processes, in another connection."""
    record = Record(
        spec=VmSpec(name="a", disks=[Disk(size="1GiB")]),
        uuid="u",
        state=VmState.RUNNING,
        live=Live(qemu=ProcessId(1, 2), ports=3),
    )
    async with open_store(tmp_path / "db") as store:
        await store.save(record)
        await store.save(Record(spec=VmSpec(name="b"), uuid="v"))
        await store.delete("b")
        await store.delete("never")
    async with open_store(tmp_path / "db") as store:
        assert await store.load() == ([record], {})


async def test_a_record_is_written_when_it_has_changed(tmp_path: Path) -> None:
    """Saving what is on disk already costs no write; what is saved while another write is under way is not lost."""
    record = Record(spec=VmSpec(name="a"), uuid="u")
    async with open_store(tmp_path / "db") as store:
        await store.save(record)
        before = store._connection.total_changes
        await store.save(record)
        assert store._connection.total_changes == before
        async with trio.open_nursery() as nursery:
            for state in (VmState.STARTING, VmState.RUNNING, VmState.DEFINED):
                record.state = state
                nursery.start_soon(store.save, msgspec.structs.replace(record))
        await store.delete("a")
        await store.save(record)
    async with open_store(tmp_path / "db") as store:
        assert await store.load() == ([record], {})


async def test_a_record_that_cannot_be_read_is_set_aside(tmp_path: Path) -> None:
    """It is named, it keeps nobody else from being read, and it stays until it is deleted."""
    path = tmp_path / "db"
    async with open_store(path) as store:
        for name in ("a", "b", "c"):
            await store.save(Record(spec=VmSpec(name=name), uuid=name))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE vm SET record = substr(record, 9) WHERE name = 'a'")
        connection.execute("UPDATE vm SET name = 'other' WHERE name = 'b'")
    for _ in range(2):
        async with open_store(path) as store:
            records, unreadable = await store.load()
        assert [record.uuid for record in records] == ["c"]
        assert set(unreadable) == {"a", "other"} and "the record of 'b'" in unreadable["other"]
    async with open_store(path) as store:
        await store.delete("a")
        assert set((await store.load())[1]) == {"other"}


async def test_a_file_that_is_not_ours_is_refused_by_name(tmp_path: Path) -> None:
    """The user learns which file it is and what to do."""
    path = tmp_path / "db"
    path.write_bytes(b"this is not a database, and long enough to be read as one" * 20)
    with pytest.raises(StoreError, match=str(path)) as refused:
        async with open_store(path):
            pass
    assert "move the file away" in refused.value.hint
