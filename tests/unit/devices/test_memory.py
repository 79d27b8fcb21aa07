"""Guest memory: views lie wholly inside one shared region, or there is none."""

from __future__ import annotations

import fcntl
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayos_devices.errors import ChainError, ProtocolError
from rayos_devices.virtio.memory import MAX_REGIONS, GuestMemory, RegionSpec
from tests.framework.guest_memory import F_ADD_SEALS, F_SEAL_SHRINK, GuestRam
from tests.framework.target import Footprint, mapped

F_SEAL_WRITE = 0x8
PAGE = 4096


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    with GuestRam(16 * PAGE) as ram:
        yield ram


def table(*regions: GuestRam) -> GuestMemory:
    memory = GuestMemory()
    memory.replace([ram.spec for ram in regions], [ram.fd for ram in regions])
    return memory


def test_a_view_is_the_shared_bytes(ram: GuestRam) -> None:
    """Both sides see each other's writes; the region's first and last byte are reachable."""
    memory = table(ram)
    view = memory.view(ram.base + 100, 5)
    ram.write(ram.base + 100, b"hello")
    assert bytes(view) == b"hello"
    memory.view(ram.end - 1, 1)[0] = 7
    assert ram.read(ram.end - 1, 1) == b"\7"
    assert len(memory.view(ram.base, ram.size)) == ram.size
    assert len(memory.user_view(ram.user(ram.base), ram.size)) == ram.size


@pytest.mark.parametrize(
    ("offset", "length"),
    [
        (-1, 1),
        (-1, 2),
        (16 * PAGE, 0),
        (16 * PAGE, 1),
        (16 * PAGE - 1, 2),
        (0, 16 * PAGE + 1),
        (1, (1 << 64) - 1),
    ],
)
def test_bytes_outside_a_region_have_no_view(ram: GuestRam, offset: int, length: int) -> None:
    """ChainError for the guest's addresses, ProtocolError for the frontend's."""
    memory = table(ram)
    with pytest.raises(ChainError):
        memory.view(ram.base + offset, length)
    if length:
        with pytest.raises(ProtocolError):
            memory.user_view(ram.user(ram.base) + offset, length)


def test_a_view_never_spans_two_regions() -> None:
    """Neighbours in guest addresses are different mappings."""
    with GuestRam(PAGE, guest_address=0) as low, GuestRam(PAGE, guest_address=PAGE) as high:
        memory = table(low, high)
        assert len(memory.view(0, PAGE)) == len(memory.view(PAGE, PAGE)) == PAGE
        with pytest.raises(ChainError):
            memory.view(PAGE - 1, 2)
        memory.view(PAGE, 1)[0] = 9
        assert high.read(PAGE, 1) == b"\x09" and low.read(0, 1) == b"\0"


def test_the_offset_into_the_file_is_honoured() -> None:
    """Bytes of the file before mmap_offset are not shared."""
    with GuestRam(PAGE, mmap_offset=3 * PAGE) as ram:
        memory = table(ram)
        memory.view(ram.base, 3)[:] = b"abc"
        assert os.pread(ram.fd, 3, 3 * PAGE) == b"abc"
        assert os.pread(ram.fd, 3, 0) == bytes(3)


@pytest.mark.parametrize(
    "spec",
    [
        RegionSpec(0, 0, 0, 0),
        RegionSpec((1 << 64) - PAGE, PAGE + 1, 0, 0),
        RegionSpec((1 << 64) - PAGE, PAGE, 0, 0),
        RegionSpec(0, PAGE, (1 << 64) - 1, 0),
        RegionSpec(0, PAGE, 0, (1 << 64) - 1),
        RegionSpec(0, 17 * PAGE, 0, 0),
        RegionSpec(0, PAGE, 0, 16 * PAGE),
        RegionSpec(0, 1 << 62, 0, 0),
    ],
    ids=[
        "empty",
        "guest wraps",
        "guest ends at 2^64",
        "user wraps",
        "offset wraps",
        "file too small",
        "offset at end",
        "huge",
    ],
)
def test_an_impossible_region_is_refused(ram: GuestRam, spec: RegionSpec) -> None:
    """ProtocolError, the former table stays, no mapping is left."""
    memory = table(ram)
    before = Footprint()
    with pytest.raises(ProtocolError):
        memory.replace([spec], [ram.fd])
    with pytest.raises(ProtocolError):
        memory.add(spec, ram.fd)
    before.check()
    assert len(memory.view(ram.base, 1)) == 1


def make_file(kind: str, directory: Path) -> int:
    """A descriptor that must not become guest memory."""
    if kind == "regular file":
        fd = os.open(directory / "file", os.O_RDWR | os.O_CREAT)
        os.ftruncate(fd, PAGE)
        return fd
    if kind == "eventfd":
        return os.eventfd(0)
    if kind == "directory":
        return os.open(directory, os.O_RDONLY)
    fd = os.memfd_create("guest-ram", os.MFD_ALLOW_SEALING)
    match kind:
        case "not sealed":
            os.ftruncate(fd, PAGE)
        case "sealed against writing":
            os.ftruncate(fd, PAGE)
            fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_WRITE)
        case "read only":
            os.ftruncate(fd, PAGE)
            fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)
            writable, fd = fd, os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
            os.close(writable)
        case "larger than any address space":
            os.ftruncate(fd, 1 << 60)
            fcntl.fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)
    return fd


@pytest.mark.parametrize(
    "kind",
    [
        "regular file",
        "eventfd",
        "directory",
        "not sealed",
        "sealed against writing",
        "read only",
        "larger than any address space",
    ],
)
def test_only_a_sealed_writable_memfd_is_guest_memory(kind: str, tmp_path: Path) -> None:
    """A file that could shrink would kill the worker; whatever cannot be mapped is the peer's fault."""
    before = Footprint()
    fd = make_file(kind, tmp_path)
    size = 1 << 60 if kind.startswith("larger") else PAGE
    with pytest.raises(ProtocolError):
        GuestMemory().replace([RegionSpec(0, size, 0, 0)], [fd])
    os.close(fd)
    before.check()


def test_sealed_memory_cannot_be_truncated(ram: GuestRam) -> None:
    """Sealed memory cannot be truncated: the reason why F_SEAL_SHRINK is demanded."""
    with pytest.raises(PermissionError):
        os.ftruncate(ram.fd, 0)


def test_regions_may_not_overlap() -> None:
    """In a table, and one added to it."""
    with GuestRam(2 * PAGE, guest_address=0) as low, GuestRam(PAGE, guest_address=PAGE) as high:
        with pytest.raises(ProtocolError, match="overlaps"):
            table(low, high)
        memory = table(low)
        with pytest.raises(ProtocolError, match="overlaps"):
            memory.add(high.spec, high.fd)
        assert len(memory.regions) == 1


def test_there_is_a_most_of_regions() -> None:
    """MAX_REGIONS, by table and one by one; as many descriptors as regions."""
    with GuestRam(PAGE) as ram:
        specs = [RegionSpec(n * PAGE, PAGE, n * PAGE, 0) for n in range(MAX_REGIONS + 1)]
        memory = GuestMemory()
        with pytest.raises(ProtocolError):
            memory.replace(specs, [ram.fd] * len(specs))
        with pytest.raises(ProtocolError):
            memory.replace(specs[:2], [ram.fd])
        memory.replace(specs[:MAX_REGIONS], [ram.fd] * MAX_REGIONS)
        with pytest.raises(ProtocolError):
            memory.add(specs[MAX_REGIONS], ram.fd)


def test_regions_come_and_go_one_by_one() -> None:
    """ADD_MEM_REG and REM_MEM_REG; a removed region is neither found nor mapped any more."""
    before = Footprint()
    with GuestRam(PAGE, guest_address=0) as low, GuestRam(PAGE, guest_address=8 * PAGE) as high:
        memory = GuestMemory()
        memory.add(low.spec, low.fd)
        memory.add(high.spec, high.fd)
        memory.view(8 * PAGE, 1)
        memory.remove(high.spec)
        with pytest.raises(ChainError):
            memory.view(8 * PAGE, 1)
        with pytest.raises(ProtocolError):
            memory.remove(high.spec)
        memory.view(0, 1)
        memory.clear()
        with pytest.raises(ChainError):
            memory.view(0, 1)
    before.check()


def test_a_mapping_lives_as_long_as_a_view_of_it(ram: GuestRam) -> None:
    """A request in flight never looks into unmapped memory."""
    memory = table(ram)
    gc.collect()
    before = mapped()
    view = memory.view(ram.base, 4)
    memory.clear()
    view[:] = b"late"
    assert ram.read(ram.base, 4) == b"late"
    del view
    assert mapped() == before - 1
