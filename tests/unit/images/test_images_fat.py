"""A directory as a FAT disk: mtools and a GPT reader of our own judge it."""

from __future__ import annotations

import os
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from rayos_images.errors import ImageError
from rayos_images.fat import build_fat_image


def tree(root: Path) -> Path:
    (root / "EFI" / "BOOT").mkdir(parents=True)
    (root / "EFI" / "BOOT" / "BOOTX64.EFI").write_bytes(b"MZ" + bytes(9000))
    (root / "a file with a long name.txt").write_text("inside")
    (root / "empty").mkdir()
    (root / "link").symlink_to("EFI/BOOT/BOOTX64.EFI")
    return root


def test_a_directory_is_a_disk_with_one_fat_partition(tmp_path: Path) -> None:
    """Both tables of the GPT are sound, the protective MBR is there, and every file is in the partition."""
    image = tmp_path / "esp.img"
    build_fat_image(tree(tmp_path / "esp"), image)
    data = image.read_bytes()
    assert data[510:512] == b"\x55\xaa" and data[450] == 0xEE and len(data) % 512 == 0
    last = len(data) // 512 - 1
    for here, other in (1, last), (last, 1):
        header = data[512 * here : 512 * here + 92]
        assert header[:8] == b"EFI PART" and struct.unpack_from("<QQ", header, 24) == (here, other)
        checksum = struct.unpack_from("<I", header, 16)[0]
        assert zlib.crc32(header[:16] + bytes(4) + header[20:]) == checksum
        at, count, size, entries = struct.unpack_from("<QIII", header, 72)
        assert zlib.crc32(data[512 * at : 512 * at + count * size]) == entries
    start, end = struct.unpack_from("<QQ", data, 1024 + 32)
    assert end < last and data[512 * start + 510 : 512 * start + 512] == b"\x55\xaa"

    drive = f"{image}@@{512 * start}"
    read = ["mtype", "-i", drive, "::/a file with a long name.txt"]
    assert subprocess.run(read, capture_output=True, check=True).stdout == b"inside"
    copied = tmp_path / "copied"
    subprocess.run(["mcopy", "-i", drive, "::/link", str(copied)], check=True)
    assert copied.read_bytes() == b"MZ" + bytes(9000)
    subprocess.run(["mdir", "-i", drive, "::/empty"], check=True, capture_output=True)
    assert image.stat().st_blocks * 512 < 2 << 20  # what is free takes nothing


def test_what_a_fat_disk_cannot_hold_is_refused_by_name(tmp_path: Path) -> None:
    """A link out of the directory would show the guest another file of the host's."""
    root = tree(tmp_path / "esp")
    (root / "out").symlink_to("/etc/hostname")
    with pytest.raises(ImageError, match="out points out of"):
        build_fat_image(root, tmp_path / "a.img")
    (root / "out").unlink()
    os.mkfifo(root / "pipe")
    with pytest.raises(ImageError, match="pipe is no file"):
        build_fat_image(root, tmp_path / "a.img")
    with pytest.raises(ImageError, match="no directory"):
        build_fat_image(root / "link", tmp_path / "a.img")
    assert not list(tmp_path.glob("a.*"))
