"""The ELF file inside a Linux bzImage (Linux, Documentation/x86/boot.rst).

A bzImage spends five seconds of TCG time on decompressing itself; its `vmlinux` is an
ELF file with a PVH note that `-kernel` starts directly.
"""

import gzip
import lzma
import struct
import subprocess
import zlib
from typing import Final

from rayos_images.errors import ImageError

# Offsets into a bzImage.
_SETUP_SECTS, _HDRS, _PAYLOAD_OFFSET = 0x1F1, 0x202, 0x248
_SECTOR: Final = 512


def extract_vmlinux(bzimage: bytes) -> bytes:
    """Return the ELF file inside a bzImage.

    Raises `ImageError` when `bzimage` is not one, or is compressed otherwise than with xz, gzip or zstd.
    """
    if bzimage[_HDRS : _HDRS + 4] != b"HdrS" or len(bzimage) < 0x250:
        raise ImageError("not a Linux bzImage: the signature HdrS at offset 0x202 is missing")
    offset, length = struct.unpack_from("<II", bzimage, _PAYLOAD_OFFSET)
    start = ((bzimage[_SETUP_SECTS] or 4) + 1) * _SECTOR + offset
    payload = bzimage[start : start + length - 4]  # the last four bytes are the decompressed size
    try:
        vmlinux = _decompress(payload)
    except (lzma.LZMAError, EOFError, zlib.error, gzip.BadGzipFile, subprocess.CalledProcessError) as error:
        raise ImageError(f"the kernel inside the bzImage is damaged: {error}") from error
    if vmlinux[:4] != b"\x7fELF":
        raise ImageError("the kernel inside the bzImage is not an ELF file")
    return vmlinux


def _decompress(payload: bytes) -> bytes:
    magic = payload[:6]
    if magic == b"\xfd7zXZ\0":
        return lzma.decompress(payload)
    if magic[:2] == b"\x1f\x8b":
        return gzip.decompress(payload)
    if magic[:4] == b"\x28\xb5\x2f\xfd":
        return subprocess.run(["zstd", "-dcq"], input=payload, capture_output=True, check=True).stdout
    raise ImageError(f"unknown compression of the kernel: payload begins with {magic.hex()}")
