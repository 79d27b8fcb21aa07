"""The images behind a machine's disks when it starts: new ones, throw-away copies, directories. All of it blocks.

Invariant: what is thrown away is a file of the machine's own; an image that somebody named is only read for it.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Final

from rayos_images.errors import ImageError
from rayos_images.fat import build_fat_image
from rayos_vmm.config.spec import Disk
from rayos_vmm.config.units import parse_size
from rayos_vmm.errors import Busy, Invalid
from rayos_vmm.hardware.protocols import DiskImage
from rayos_vmm.machine.machine import Machine

_FICLONE: Final = 0x40049409  # linux/fs.h
#: SeaBIOS counts no cylinder of a smaller virtio disk, and does not boot it; a boot sector alone is a disk, too.
LEAST_BYTES: Final = 1 << 20
#: Sizes of floppies that QEMU's drive knows: 720 KiB, 1.44 MB, 2.88 MB.
_FLOPPIES: Final = (737280, 1474560, 2949120)


def prepare_disks(machine: Machine) -> list[DiskImage]:
    """Makes what is not there yet; every image exists afterwards.

    Raises:
        Invalid: a directory cannot be a FAT disk, or a floppy is too large.
        Busy: somebody writes to the image that is to be copied.
        OSError: it cannot be written.
    """
    spec, images = machine.record.spec, []
    for index, disk in enumerate(spec.disks):
        path = machine.disk_path(index)
        if disk.snapshot:
            _copy(Path(disk.path or ""), path)
        elif disk.directory is not None:
            try:
                build_fat_image(Path(disk.directory), path)
            except ImageError as error:
                raise Invalid(f"disks[{index}].directory: {error}") from None
        elif disk.size is not None and not path.exists():
            temporary = path.with_suffix(".new")
            with temporary.open("wb") as file:
                file.truncate(parse_size(disk.size))
            temporary.rename(path)
        images.append(
            DiskImage(
                path,
                disk.read_only,
                spec.disk_serial(index),
                spec.disk_queues(disk),
                disk.format,
                bus=disk.bus,
                size_bytes=_size(index, disk, path),
                block_bytes=disk.logical_block_size,
                is_unsafe=disk.cache == "unsafe",
            )
        )
    return images


def throw_away(machine: Machine) -> None:
    """Removes what the machine wrote to and nobody asked to keep."""
    for index, disk in enumerate(machine.record.spec.disks):
        if disk.is_thrown_away:
            machine.disk_path(index).unlink(missing_ok=True)


def _size(index: int, disk: Disk, path: Path) -> int:
    """The disk's bytes, for media that have them from a list; 0 is as many as the image has."""
    if disk.format != "raw" or not path.is_file():
        return 0
    image_bytes = path.stat().st_size
    if disk.bus not in ("floppy", "sd"):
        return LEAST_BYTES if image_bytes < LEAST_BYTES else 0
    if disk.bus == "sd":
        return 1 << max(image_bytes - 1, 1).bit_length()  # SD Physical Layer: QEMU wants a power of two
    for size in _FLOPPIES:
        if image_bytes <= size:
            return size
    raise Invalid(f"disks[{index}] is a floppy of {image_bytes} bytes; at most {_FLOPPIES[-1]} are allowed")


def _copy(source: Path, target: Path) -> None:
    """A copy of an image: a clone where the file system can, else its data without its holes."""
    temporary = target.with_suffix(".new")
    with source.open("rb") as image, temporary.open("wb") as copy:
        try:
            fcntl.flock(image, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Busy(f"disk {source} is being written by another machine", code="busy") from None
        try:
            fcntl.ioctl(copy, _FICLONE, image.fileno())
        except OSError:
            _copy_data(image.fileno(), copy.fileno())
    temporary.rename(target)


def _copy_data(source: int, target: int) -> None:
    size = os.lseek(source, 0, os.SEEK_END)
    os.ftruncate(target, size)
    at = 0
    while at < size:
        try:
            start = os.lseek(source, at, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # nothing but a hole
        at = os.lseek(source, start, os.SEEK_HOLE)
        while start < at:
            done = os.copy_file_range(source, target, at - start, start, start)
            if done == 0:
                raise OSError(errno.EIO, "the image became shorter while it was copied")
            start += done
