"""A vmlinux comes out of a bzImage, whatever it was compressed with; nothing else is taken for one."""

import gzip
import lzma
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rayos_images import ImageError
from rayos_images.apt import mirror
from rayos_images.bzimage import extract_vmlinux

ELF = b"\x7fELF" + bytes(range(256)) * 40


def zstd(data: bytes) -> bytes:
    return subprocess.run(["zstd", "-cq"], input=data, capture_output=True, check=True).stdout


def bzimage(payload: bytes, setup_sectors: int = 3, offset: int = 96) -> bytes:
    image = bytearray((setup_sectors + 1) * 512 + offset)
    image[0x1F1] = setup_sectors
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", image, 0x248, offset, len(payload) + 4)
    return bytes(image) + payload + struct.pack("<I", len(ELF)) + b"after the payload"


@pytest.mark.parametrize("compress", [lzma.compress, gzip.compress, zstd])
def test_the_kernel_comes_out(compress: Callable[[bytes], bytes]) -> None:
    assert extract_vmlinux(bzimage(compress(ELF))) == ELF


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"", "HdrS"),
        (b"\x7fELF" + bytes(4096), "HdrS"),
        (bzimage(b"LZO???"), "unknown compression of the kernel: payload begins with 4c5a4f3f3f3f"),
        (bzimage(gzip.compress(b"no ELF")), "not an ELF file"),
        (bzimage(lzma.compress(ELF)[:-40]), "damaged"),
        (bzimage(gzip.compress(ELF)[:-40]), "damaged"),
        (bzimage(zstd(ELF)[:-40]), "damaged"),
    ],
)
def test_anything_else_is_refused(image: bytes, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        extract_vmlinux(image)


def test_the_hosts_own_mirror_is_used(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text(
        "# deb http://commented/debian x main\ndeb http://old/ubuntu jammy main\n"
    )
    (tmp_path / "sources.list.d/a.sources").write_text(
        "Types: deb\nURIs: http://near/debian/\nSuites: bookworm\n"
    )
    assert mirror("/debian", "default", tmp_path) == "http://near/debian"
    assert mirror("/debian-security", "default", tmp_path) == "default"
