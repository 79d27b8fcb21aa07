"""A machine that does not fit its host is refused, with what was asked and what there is."""

from __future__ import annotations

from pathlib import Path

import pytest

from rayos_vmm.config.host import Host, check_host, check_shape, read_host
from rayos_vmm.config.spec import Disk, Gpu, Net, Quota, VmSpec
from rayos_vmm.errors import Invalid
from rayos_vmm.network.published import Published, parse_published
from rayos_vmm.qemu.arch import check_board

HOST = Host(cpus=2, memory_available_bytes=1 << 30)


def refusal(spec: VmSpec) -> str:
    with pytest.raises(Invalid) as refused:
        check_shape(spec)
        check_board(spec)
        check_host(spec, HOST)
    return refused.value.message


def test_limits_are_named(tmp_path: Path) -> None:
    """Each limit has its sentence."""
    empty, full = tmp_path / "empty.img", tmp_path / "full.img"
    empty.touch()
    full.write_bytes(b"x" * (2 << 20))
    wrong = {
        "cpus = 2 exceeds the 1 of machine = 'isapc'": VmSpec(name="a", cpus=2, machine="isapc"),
        "at least 1MiB": VmSpec(name="a", memory="1000KiB", kernel="/k"),
        "at least 112MiB": VmSpec(name="a", memory="111MiB"),
        "not a whole number of MiB": VmSpec(name="a", memory="200000KiB"),
        "none of path, size and directory": VmSpec(name="a", disks=[Disk()]),
        "path and size of path, size and directory": VmSpec(name="a", disks=[Disk(path="/x", size="1MiB")]),
        "the disks have 12GiB in all, which exceeds the machine's quota.disk = '10GiB'": VmSpec(
            name="a", disks=[Disk(size="6GiB"), Disk(size="6GiB")]
        ),
        "quota.host_memory = '300MiB' does not hold memory = '256MiB' and the 96MiB": VmSpec(
            name="a", quota=Quota(host_memory="300MiB")
        ),
        "exceeds quota.disk = '10GiB'": VmSpec(name="a", disks=[Disk(size="11GiB")]),
        "disks[1].path /nowhere does not exist": VmSpec(
            name="a", disks=[Disk(size="1MiB"), Disk(path="/nowhere")]
        ),
        "relative path": VmSpec(name="a", disks=[Disk(path="disk.img")]),
        "has 0 bytes; a disk has at least 1": VmSpec(name="a", disks=[Disk(path=str(empty))]),
        "bytes; quota.disk allows 1MiB": VmSpec(
            name="a", disks=[Disk(path=str(full))], quota=Quota(disk="1MiB")
        ),
        "is no directory": VmSpec(name="a", disks=[Disk(directory=str(full))]),
        "thrown away at the end": VmSpec(name="a", disks=[Disk(directory="/", read_only=True)]),
        "queues = 2: bus = 'ide' has one": VmSpec(name="a", disks=[Disk(size="1MiB", bus="ide", queues=2)]),
        "bus = 'ahci' has 512": VmSpec(
            name="a", disks=[Disk(size="1MiB", bus="ahci", logical_block_size=4096)]
        ),
        "3 disks have bus = 'floppy'; at most 2": VmSpec(
            name="a", disks=[Disk(size="1MiB", bus="floppy")] * 3
        ),
        "which machine = 'isapc' has not; allowed are ide, floppy": VmSpec(
            name="a", machine="isapc", disks=[Disk(size="1MiB", bus="nvme")]
        ),
        "machine = 'isapc' has no PCI for a display": VmSpec(name="a", machine="isapc"),
        "machine = 'microvm' has no CD drive": VmSpec(name="a", machine="microvm", cdrom="/a.iso"),
        "net.address = 'upstream' with net.bridge = None": VmSpec(name="a", net=Net(address="upstream")),
        "net.address = 'ours' with net.bridge = 'br0'": VmSpec(name="a", net=Net(bridge="br0")),
        "does not hold one frame of 4096x4096": VmSpec(
            name="a", gpu=Gpu(width=4096, height=4096), quota=Quota(gpu_memory="32MiB")
        ),
    }
    for text, spec in wrong.items():
        assert text in refusal(spec)


def test_a_machine_that_fits_is_let_through() -> None:
    """The defaults fit a small host."""
    check_shape(VmSpec(name="a"))
    check_host(VmSpec(name="a", disks=[Disk(size="64MiB")]), HOST)


def test_what_exceeds_the_host_is_a_note_unless_the_service_is_strict() -> None:
    """Races want more processors than there are, and memory is taken when it is touched."""
    notes = check_host(VmSpec(name="a", cpus=3, memory="2G"), HOST)
    assert notes == [
        "cpus = 3 exceeds the host's 2",
        "memory = '2GiB' exceeds the 1GiB that the host has available",
    ]
    with pytest.raises(Invalid, match="cpus = 3 exceeds the host's 2"):
        check_host(VmSpec(name="a", cpus=3), HOST, is_strict=True)


def test_a_sparse_disk_counts_for_what_it_takes(tmp_path: Path) -> None:
    """An installer's target of 256 GiB takes nothing until something is installed."""
    with (tmp_path / "large.img").open("wb") as file:
        file.truncate(256 << 30)
    check_host(VmSpec(name="a", disks=[Disk(path=str(tmp_path / "large.img"))]), HOST)


def test_a_kernel_of_somebody_elses_may_have_a_mebibyte() -> None:
    """Our own guest needs 96."""
    check_shape(VmSpec(name="a", memory="1MiB", kernel="/k"))


def test_the_host_is_read_from_the_kernel(tmp_path: Path) -> None:
    """MemAvailable, in bytes."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable:    64 kB\n")
    assert read_host(meminfo).memory_available_bytes == 65536
    assert read_host().cpus >= 1


def test_a_published_port_is_one_of_the_host_and_one_of_the_guest() -> None:
    """By default nobody but the host reaches it."""
    assert parse_published("8080:80") == Published("127.0.0.1", 8080, 80)
    assert parse_published("0.0.0.0:22:2222") == Published("0.0.0.0", 22, 2222)
    with pytest.raises(ValueError, match="1 to 65535"):
        parse_published("80:65536")
    assert "net.publish without" in refusal(VmSpec(name="a", net=Net(enabled=False, publish=("80:80",))))
