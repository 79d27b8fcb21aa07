"""A disk that is longer than its image: zeros behind the end, and writes make the image longer."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rayos_devices.blk.store import RawStore
from rayos_devices.errors import ConfigurationError, RequestError


def store(path: Path, data: bytes, **options: int) -> RawStore:
    path.write_bytes(data)
    return RawStore(os.open(path, os.O_RDWR | os.O_CLOEXEC), **options)  # type: ignore[arg-type]


def read(disk: RawStore, offset: int, size: int) -> bytes:
    data = bytearray(b"?" * size)
    disk.read([memoryview(data)], offset)
    return bytes(data)


def test_an_image_need_not_fill_its_last_sector(tmp_path: Path) -> None:
    """`cat boot.bin kernel.bin > os.img` is a disk, as in QEMU."""
    disk = store(tmp_path / "odd.img", b"x" * 1300)
    assert disk.size_bytes == 1536 and read(disk, 1024, 512) == b"x" * 276 + bytes(236)
    disk.write([memoryview(b"y" * 512)], 1024)
    assert (tmp_path / "odd.img").read_bytes() == b"x" * 1024 + b"y" * 512
    disk.close()


def test_a_medium_is_larger_than_what_is_on_it(tmp_path: Path) -> None:
    """A boot sector is a floppy; what is behind it takes no storage."""
    disk = store(tmp_path / "boot.img", b"x" * 512, size_bytes=1474560)
    assert disk.size_bytes == 1474560 and read(disk, 1474048, 512) == bytes(512)
    assert not disk.is_allocated(1 << 20, 512)
    disk.close()


def test_an_image_that_became_shorter_is_an_error_and_not_zeros(tmp_path: Path) -> None:
    """The guest hears that its bytes are lost."""
    disk = store(tmp_path / "cut.img", b"x" * 4096)
    os.truncate(tmp_path / "cut.img", 1024)
    with pytest.raises(RequestError, match="truncated"):
        read(disk, 1024, 512)
    disk.close()


def test_an_unsafe_disk_syncs_nothing_and_an_empty_one_is_none(tmp_path: Path) -> None:
    """`cache = "unsafe"` is what it says; an image of no bytes has no sector."""
    disk = store(tmp_path / "unsafe.img", b"x" * 512, is_unsafe=True)
    disk.sync()
    disk.is_failed = True
    disk.sync()
    disk.close()
    with pytest.raises(ConfigurationError, match="0 bytes"):
        store(tmp_path / "empty.img", b"")
