"""One record for each processor architecture: which packages its images and its QEMU are made of.

A machine that is emulated and the machine that emulates it may differ. What a guest boots is chosen by the guest's
record; the private QEMU and the libraries beside it are packages of the host's.
"""

from __future__ import annotations

import platform
from typing import Final

from rayos_images.arch.record import Architecture
from rayos_images.arch.x86_64 import X86_64
from rayos_images.errors import ImageError

#: Every architecture that our guest and a QEMU can be had for.
ARCHITECTURES: Final = (X86_64,)
#: Of a guest that does not say.
DEFAULT: Final = X86_64


def host() -> Architecture:
    """This machine's own. Raises `ImageError` when there is no record for it."""
    machine = platform.machine()
    for architecture in ARCHITECTURES:
        if architecture.name == machine:
            return architecture
    known = ", ".join(architecture.name for architecture in ARCHITECTURES)
    raise ImageError(f"this machine is a {machine}: known are {known}")


__all__ = ["ARCHITECTURES", "DEFAULT", "X86_64", "Architecture", "host"]
