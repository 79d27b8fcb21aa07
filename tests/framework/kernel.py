"""Kernels that stand in for an operating system: built from `kernels/` with gcc when a test wants one."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

SOURCES: Final = Path(__file__).parent / "kernels"
_FLAGS: Final = (
    *("-m32", "-march=i686", "-O1", "-ffreestanding", "-nostdlib", "-static", "-no-pie", "-fno-pic"),
    *("-fno-stack-protector", "-mno-sse", "-mno-mmx", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function"),
    *("-Wno-implicit-fallthrough", "-Wl,--build-id=none", "-Wl,--no-warn-rwx-segments"),
)


def build_kernel(name: str, directory: Path) -> Path:
    """The multiboot kernel `kernels/NAME.c`, as an ELF file in `directory`."""
    target = directory / f"{name}.elf"
    sources = [str(SOURCES / "boot.S"), str(SOURCES / f"{name}.c")]
    command = ["gcc", *_FLAGS, "-T", str(SOURCES / "link.ld"), "-o", str(target), *sources]
    subprocess.run(command, check=True, timeout=60)
    return target
