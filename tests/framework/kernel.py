"""Kernels that stand in for an operating system: built from `kernels/` with gcc when a test wants one."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import Final

SOURCES: Final = Path(__file__).parent / "kernels"
_FLAGS: Final = (
    *("-m32", "-march=i686", "-O1", "-ffreestanding", "-nostdlib", "-static", "-no-pie", "-fno-pic"),
    *("-fno-stack-protector", "-mno-sse", "-mno-mmx", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function"),
    *("-Wno-implicit-fallthrough", "-Wl,--build-id=none", "-Wl,--no-warn-rwx-segments"),
)


def build_case(case: str, directory: Path, *, kib: int = 64) -> Path:
    """The kernel that does `case` of `kernels/cases.c`; `kib` is how much `marks` prints."""
    path = directory / f"{case}-{kib}.elf"
    return (
        path if path.exists() else build_kernel("cases", directory, f"-DCASE={case}", f"-DKIB={kib}", to=path)
    )


def build_kernel(name: str, directory: Path, *flags: str, to: Path | None = None) -> Path:
    """The multiboot kernel `kernels/NAME.c`, as an ELF file in `directory`."""
    target = to or directory / f"{name}.elf"
    sources = [str(SOURCES / "boot.S"), str(SOURCES / f"{name}.c")]
    command = ["gcc", *_FLAGS, *flags, "-T", str(SOURCES / "link.ld"), "-o", str(target), *sources]
    subprocess.run(command, check=True, timeout=60)
    return target


def as_64_bit(kernel: Path) -> Path:
    """The same kernel in a 64-bit ELF file beside it, which says that it is for x86-64."""
    target = kernel.with_suffix(".elf64")
    subprocess.run(["objcopy", "-O", "elf64-x86-64", str(kernel), str(target)], check=True, timeout=60)
    return target


def build_bios_disk(name: str, tag: str) -> bytes:
    """The first 32 sectors of a disk that boots `kernels/NAME.c` by BIOS; the second one holds `tag`."""
    with tempfile.TemporaryDirectory() as directory:
        sector, code = Path(directory) / "sector", Path(directory) / "code"
        raw = ("-Wl,--oformat=binary", "-Wl,--build-id=none", "-nostdlib", "-static", "-no-pie", "-m32")
        first = ["gcc", *raw, "-Wl,-Ttext=0x7c00", "-o", str(sector), str(SOURCES / "bios.S")]
        rest = ["gcc", *_FLAGS, "-m16", "-T", str(SOURCES / "real.ld"), "-Wl,--oformat=binary"]
        subprocess.run(first, check=True, timeout=60)
        subprocess.run([*rest, "-o", str(code), str(SOURCES / f"{name}.c")], check=True, timeout=60)
        head = sector.read_bytes()[:512] + tag.encode().ljust(7 * 512, b"\0")
        return head + code.read_bytes().ljust(24 * 512, b"\0")
