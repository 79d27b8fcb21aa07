"""A disk image with the files of a directory: one EFI system partition of FAT, in a GPT (UEFI 2.10, 5.3).

A firmware finds `EFI/BOOT/BOOTX64.EFI` there, a kernel its files. The image is a copy: what a guest writes to it does
not reach the directory, and what changes in the directory does not reach the guest. mtools make the file system.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from rayos_images.errors import ImageError

SECTOR_BYTES: Final = 512
#: Where the partition begins, and what the second table takes at the end.
_START_SECTOR: Final = 2048
_TAIL_SECTORS: Final = 34
#: FAT32 has at least 65525 clusters.
LEAST_BYTES: Final = 64 << 20
_MAXIMUM_BYTES: Final = 32 << 30
_ENTRIES: Final = 128
#: 5.3.2: signature, revision, header size, CRC, reserved, this and the other header's block, first and last usable
#: block, disk GUID, first block of entries, their number and size, their CRC.
_HEADER: Final = struct.Struct("<8sIIIIQQQQ16sQIII")
#: 5.3.3: type, partition GUID, first and last block, attributes, name.
_ENTRY: Final = struct.Struct("<16s16sQQQ72s")
_ESP: Final = uuid.UUID("c12a7328-f81f-11d2-ba4b-00a0c93ec93b")
#: One GUID for all: the same directory gives the same disk.
_NAMESPACE: Final = uuid.UUID("6d9f0e0e-8a5c-4f0a-9a55-5261794f5321")
#: 5.2.3: a protective MBR has one partition of type 0xEE over the whole disk.
_MBR_ENTRY: Final = struct.Struct("<BBBBBBBBII")
_BATCH: Final = 256
_TOOLS: Final = ("mformat", "mmd", "mcopy")


def build_fat_image(directory: Path, image: Path, *, room_bytes: int = 64 << 20) -> None:
    """Writes the image of `directory` to `image`, sparse, with at least `room_bytes` free for the guest.

    Raises:
        ImageError: it is no directory, holds what FAT cannot, is larger than 32 GiB, or mtools are missing.
    """
    if not directory.is_dir():
        raise ImageError(f"{directory} is no directory")
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        raise ImageError(f"{missing[0]} is not installed (apt-get install mtools)")
    tree = list(_walk(directory))
    used = sum(file.stat().st_size + 65536 for _, files in tree for file in files) + 65536 * len(tree)
    if used > _MAXIMUM_BYTES:
        raise ImageError(f"{directory} holds {used} bytes; at most {_MAXIMUM_BYTES} fit")
    size = -(-max(LEAST_BYTES, used + used // 64 + room_bytes) // (1 << 20)) * (1 << 20)
    temporary = image.with_suffix(".new")
    try:
        _write_tables(temporary, size // SECTOR_BYTES)
        _fill(directory, tree, temporary, size // SECTOR_BYTES - _START_SECTOR - _TAIL_SECTORS)
        temporary.rename(image)
    finally:
        temporary.unlink(missing_ok=True)


def _walk(directory: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Each directory below, the upper ones first, and its files; a link counts as what it points to, within."""
    root = directory.resolve()
    for name, folders, files in os.walk(directory, followlinks=False):
        here = Path(name)
        folders.sort()
        found = []
        for file in sorted(here / one for one in (*files, *(f for f in folders if (here / f).is_symlink()))):
            if not file.resolve().is_relative_to(root):
                raise ImageError(f"{file} points out of {directory}")
            if not file.is_file():
                raise ImageError(f"{file} is no file and no directory; a FAT disk has nothing else")
            found.append(file)
        yield here, found


def _run(tool: str, *arguments: str) -> None:
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "MTOOLS_SKIP_CHECK": "1", "MTOOLSRC": os.devnull}
    done = subprocess.run(
        [tool, *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        words = done.stderr.strip().splitlines()
        raise ImageError(f"{tool}: {words[-1] if words else f'status {done.returncode}'}")


def _fill(directory: Path, tree: list[tuple[Path, list[Path]]], image: Path, sectors: int) -> None:
    drive = f"{image}@@{_START_SECTOR * SECTOR_BYTES}"
    serial = f"{zlib.crc32(str(directory).encode()):08x}"
    _run(
        "mformat",
        "-i",
        drive,
        "-F",
        "-T",
        str(sectors),
        "-h",
        "255",
        "-s",
        "63",
        "-v",
        "RAYOS",
        "-N",
        serial,
        "::",
    )
    for folder, files in tree:
        inside = folder.relative_to(directory).as_posix()
        if inside != ".":
            _run("mmd", "-i", drive, f"::/{inside}")
        for at in range(0, len(files), _BATCH):
            batch = [str(file) for file in files[at : at + _BATCH]]
            _run("mcopy", "-Q", "-i", drive, *batch, f"::/{'' if inside == '.' else inside}")


def _write_tables(image: Path, sectors: int) -> None:
    last = sectors - 1
    disk = uuid.uuid5(_NAMESPACE, str(sectors))
    partition = uuid.uuid5(_NAMESPACE, f"{sectors}/1")
    name = "EFI system".encode("utf-16-le").ljust(72, b"\0")
    entry = _ENTRY.pack(_ESP.bytes_le, partition.bytes_le, _START_SECTOR, last - _TAIL_SECTORS, 0, name)
    entries = entry.ljust(_ENTRIES * _ENTRY.size, b"\0")

    def header(here: int, other: int, table: int) -> bytes:
        def packed(checksum: int) -> bytes:
            numbers = (here, other, 34, last - 34)
            tail = (disk.bytes_le, table, _ENTRIES, _ENTRY.size, zlib.crc32(entries))
            return _HEADER.pack(b"EFI PART", 0x10000, _HEADER.size, checksum, 0, *numbers, *tail)

        return packed(zlib.crc32(packed(0)))

    mbr = bytearray(SECTOR_BYTES)
    mbr[446:462] = _MBR_ENTRY.pack(0, 0, 2, 0, 0xEE, 0xFF, 0xFF, 0xFF, 1, min(last, 0xFFFFFFFF))
    mbr[510:] = b"\x55\xaa"
    with image.open("wb") as file:
        file.truncate(sectors * SECTOR_BYTES)
        file.write(mbr)
        file.write(header(1, last, 2).ljust(SECTOR_BYTES, b"\0"))
        file.write(entries)
        file.seek((last - 32) * SECTOR_BYTES)
        file.write(entries)
        file.write(header(last, 1, last - 32).ljust(SECTOR_BYTES, b"\0"))
