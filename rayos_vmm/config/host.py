"""The host's resources, and whether a machine fits.

Invariant: a machine that is refused is refused before anything of it exists, with what was asked and what
there is.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rayos_vmm.config.firewall import check_firewall
from rayos_vmm.config.spec import (
    FOREIGN_MEMORY_MINIMUM_BYTES,
    LARGE_BLOCK_BUSES,
    MEMORY_MINIMUM_BYTES,
    Disk,
    Net,
    VmSpec,
)
from rayos_vmm.config.units import format_size, parse_size
from rayos_vmm.errors import Invalid

SECTOR_BYTES: Final = 512
_STAT_BLOCK_BYTES: Final = 512  # stat(2), st_blocks, whatever the file system's block is
_MIB: Final = 1 << 20
#: QEMU under TCG, keeper, worker, TPM process and swtpm take 85 MiB beside the guest's memory (rss of their group).
OVERHEAD_BYTES: Final = 96 << 20
STORAGE_DAEMON: Final = "qemu-storage-daemon"


@dataclass(frozen=True, slots=True)
class Host:
    """The resources that can be handed out now."""

    cpus: int
    memory_available_bytes: int


def read_host(meminfo: Path = Path("/proc/meminfo")) -> Host:
    """The host as it is: processors this process may use, memory the kernel calls available."""
    available = 0
    for line in meminfo.read_text().splitlines():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    return Host(cpus=len(os.sched_getaffinity(0)), memory_available_bytes=available)


def _disk_problems(index: int, disk: Disk, quota_bytes: int) -> Iterator[str]:
    key = f"disks[{index}]"
    sources = [name for name in ("path", "size", "directory") if getattr(disk, name) is not None]
    if len(sources) != 1:
        yield f"{key} has {' and '.join(sources) or 'none'} of path, size and directory; exactly one is needed"
        return
    yield from _bus_problems(key, disk)
    if disk.directory is not None:
        path = Path(disk.directory)
        if disk.format != "raw" or disk.read_only or disk.snapshot:
            yield f"{key} is a directory, which is a raw disk thrown away at the end"
        elif not path.is_absolute():
            yield f"{key}.directory = {disk.directory!r} is a relative path; the service needs an absolute one"
        elif not path.is_dir():
            yield f"{key}.directory {path} is no directory"
        return
    if disk.format != "raw":
        if disk.size is not None:
            yield f"{key} is a new empty disk of format {disk.format}; a new disk is raw"
        if shutil.which(STORAGE_DAEMON) is None:
            yield f"{key}.format = {disk.format!r} needs {STORAGE_DAEMON} (Debian: qemu-system-common)"
    if disk.size is not None:
        if disk.snapshot:
            yield f"{key} is a new empty disk and snapshot; it is thrown away with the machine anyway"
        size_bytes = parse_size(disk.size)
        if disk.read_only:
            yield f"{key} is a new empty disk and read_only; such a disk is of no use"
        if size_bytes < _MIB or size_bytes % SECTOR_BYTES:
            yield f"{key}.size = {disk.size!r}; allowed are multiples of {SECTOR_BYTES}B from 1MiB"
        elif size_bytes > quota_bytes:
            yield f"{key}.size = {disk.size!r} exceeds quota.disk = {format_size(quota_bytes)!r}"
        return
    path = Path(disk.path or "")
    if not path.is_absolute():
        yield f"{key}.path = {disk.path!r} is a relative path; the service needs an absolute one"
    elif not path.exists():
        yield f"{key}.path {path} does not exist"
    elif not os.access(path, os.R_OK if disk.read_only or disk.snapshot else os.R_OK | os.W_OK):
        yield f"{key}.path {path} cannot be {'read' if disk.read_only or disk.snapshot else 'written'}"
    elif disk.format != "raw":
        return  # its size is its reader's to know
    elif path.is_file() and path.stat().st_size == 0:
        yield f"{key}.path {path} has 0 bytes; a disk has at least 1"
    elif path.is_file() and path.stat().st_blocks * _STAT_BLOCK_BYTES > quota_bytes:
        taken = path.stat().st_blocks * _STAT_BLOCK_BYTES
        yield f"{key}.path {path} takes {taken} bytes; quota.disk allows {format_size(quota_bytes)}"


def _bus_problems(key: str, disk: Disk) -> Iterator[str]:
    """The options of a disk that its bus does not have."""
    if disk.queues is not None and disk.bus != "virtio":
        yield f"{key}.queues = {disk.queues}: bus = {disk.bus!r} has one; virtio has several"
    if disk.logical_block_size != SECTOR_BYTES and disk.bus not in LARGE_BLOCK_BUSES:
        yield (
            f"{key}.logical_block_size = {disk.logical_block_size}: bus = {disk.bus!r} has {SECTOR_BYTES}; "
            f"{', '.join(LARGE_BLOCK_BUSES)} take others"
        )


def check_shape(spec: VmSpec) -> None:
    """Whether the specification makes sense on any host.

    Raises:
        Invalid: it does not; the message names the key, what was seen and what is allowed.
    """
    memory = spec.memory_bytes
    least = MEMORY_MINIMUM_BYTES if spec.is_our_guest else FOREIGN_MEMORY_MINIMUM_BYTES
    if memory < least:
        raise Invalid(
            f"memory = {spec.memory!r} is too small; at least {format_size(least)} is needed",
            hint='write for example memory = "256MiB"',
        )
    if memory % _MIB:
        raise Invalid(f"memory = {spec.memory!r} is not a whole number of MiB, as QEMU needs")
    host_memory = spec.quota.host_memory_bytes
    if host_memory is not None and host_memory < memory + OVERHEAD_BYTES:
        raise Invalid(
            f"quota.host_memory = {spec.quota.host_memory!r} does not hold memory = {spec.memory!r} and the "
            f"{format_size(OVERHEAD_BYTES)} that the processes around it take",
            hint=f'write at least host_memory = "{format_size(memory + OVERHEAD_BYTES)}"',
        )
    if spec.quota.disk_bytes < _MIB:
        raise Invalid(f"quota.disk = {spec.quota.disk!r}; at least 1MiB is needed")
    if spec.quota.net_rate_bits_per_second < 1000:
        raise Invalid(f"quota.net_rate = {spec.quota.net_rate!r}; at least 1kbit/s is needed")
    if spec.quota.disk_rate_bytes_per_second == 0:
        raise Invalid(f"quota.disk_rate = {spec.quota.disk_rate!r}; at least 1B/s is needed")
    try:
        _ = spec.gpu.mode_sizes
    except ValueError as error:
        raise Invalid(f"gpu.modes: {error}") from None
    check_firewall(spec.firewall)
    if len(set(spec.console_ports)) != len(spec.console_ports):
        raise Invalid(
            f"console.ports: {', '.join(spec.console_ports)}; each name at most once, ours included"
        )
    if len(set(spec.input.devices)) != len(spec.input.devices):
        raise Invalid(f"input.devices: {', '.join(spec.input.devices)}; each at most once")
    if (spec.net.address == "upstream") != (spec.net.bridge is not None):
        raise Invalid(
            f"net.address = {spec.net.address!r} with net.bridge = {spec.net.bridge!r}",
            hint='an upstream address needs the bridge that has the uplink: address = "upstream", bridge = "br0"',
        )
    if spec.net.model != "virtio" and (spec.net.queues > 1 or spec.net.mtu != Net().mtu):
        raise Invalid(
            f"net.model = {spec.net.model!r} with net.queues = {spec.net.queues}, net.mtu = {spec.net.mtu}: "
            f"such a card has 1 and {Net().mtu}; model = 'virtio' has others"
        )
    for text in spec.net.publish:
        if not all(1 <= int(port) <= 65535 for port in text.split(":")[-2:]):
            raise Invalid(f"net.publish = {text!r}: ports from 1 to 65535 are allowed")
    if spec.net.publish and not spec.net.enabled:
        raise Invalid("net.publish without a network card", hint="net.enabled = true")
    if spec.net.queues > 1 and not spec.net.ctrl_vq:
        raise Invalid(f"net.queues = {spec.net.queues} without net.ctrl_vq, by which a driver asks for them")
    if spec.gpu.enabled and not spec.gpu.is_ours and (spec.gpu.scanouts > 1 or spec.gpu.modes):
        raise Invalid(
            f"gpu.model = {spec.gpu.model!r} with gpu.scanouts = {spec.gpu.scanouts}, gpu.modes = {spec.gpu.modes}: "
            "it has one monitor and one mode; model = 'virtio' has more"
        )
    frame_bytes = 4 * spec.gpu.width * spec.gpu.height
    if spec.gpu.enabled and spec.quota.gpu_memory_bytes < frame_bytes:
        raise Invalid(
            f"quota.gpu_memory = {spec.quota.gpu_memory!r} does not hold one frame of "
            f"{spec.gpu.width}x{spec.gpu.height} ({frame_bytes} bytes)"
        )


def _overcommitted(spec: VmSpec, host: Host) -> list[str]:
    """Sentences on what is asked for beyond what the host has; a machine may well never use it."""
    found = []
    if spec.cpus > host.cpus:
        found.append(f"cpus = {spec.cpus} exceeds the host's {host.cpus}")
    if spec.memory_bytes > host.memory_available_bytes:
        available = format_size(host.memory_available_bytes // _MIB * _MIB)
        found.append(f"memory = {spec.memory!r} exceeds the {available} that the host has available")
    return found


def check_host(spec: VmSpec, host: Host, *, is_strict: bool = False) -> list[str]:
    """Whether the host can run it now: processors, memory, disk images. Blocking (it looks at files).

    Returns notes on what is asked for beyond what the host has; `is_strict` makes them errors.

    Raises:
        Invalid: it cannot; the message names the key, what was seen and what is allowed.
    """
    notes = _overcommitted(spec, host)
    if notes and is_strict:
        raise Invalid(notes[0], hint="ask for less, stop another machine, or set [service] overcommit = true")
    for index, disk in enumerate(spec.disks):
        for problem in _disk_problems(index, disk, spec.quota.disk_bytes):
            raise Invalid(problem)
    total = sum(raw_bytes(disk, spec.quota.disk_bytes) for disk in spec.disks)
    if total > spec.quota.disk_bytes:
        raise Invalid(
            f"the disks have {format_size(total)} in all, which exceeds the machine's quota.disk = "
            f"{format_size(spec.quota.disk_bytes)!r}",
            hint="make them smaller, or the quota larger",
        )
    return notes


def raw_bytes(disk: Disk, quota_bytes: int) -> int:
    """Bytes of the host's storage that a disk counts for: none if it is read-only, not raw, or a directory. Blocking.

    An image that is larger than the quota counts for what it takes now; its worker bounds what it comes to take.
    """
    if disk.read_only or disk.format != "raw" or disk.directory is not None:
        return 0
    if disk.size is not None:
        return parse_size(disk.size)
    path = Path(disk.path or "")
    return counted_bytes(path, quota_bytes) if path.is_file() else 0


def counted_bytes(image: Path, quota_bytes: int) -> int:
    """A raw image's size; of one that is larger than the quota the bytes that it takes, since it may be sparse."""
    status = image.stat()
    return status.st_size if status.st_size <= quota_bytes else status.st_blocks * _STAT_BLOCK_BYTES
