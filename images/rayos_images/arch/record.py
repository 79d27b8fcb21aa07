"""The record of a processor architecture, as far as kernel, initramfs and QEMU depend on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture. `name` is `uname -m`'s, `debian` is Debian's (`dpkg --print-architecture`)."""

    name: str
    debian: str
    #: `e_machine` of its programs (ELF, gABI 4.1): a busybox of another one is of no use in the guest.
    elf_machine: int

    #: The machines (`uname -m`) whose KVM runs it.
    kvm_hosts: tuple[str, ...]

    # -- as a guest -------------------------------------------------------------------------------------------------
    kernel_package: str
    kernel_suite: str
    #: From the package's `vmlinuz` to the file that `-kernel` starts; raises `ImageError`.
    boot_image: Callable[[bytes], bytes]
    #: What our kernel is started with, and what comes before it where there is a display.
    command_line: str
    display_command_line: str
    #: The serial line's device, without /dev/.
    serial_tty: str
    #: The same kernel without a root file system, talking as early as it can: it panics, restarts, and QEMU ends.
    trial_command_line: str

    # -- its QEMU ---------------------------------------------------------------------------------------------------
    qemu: str
    qemu_package: str
    #: Debian packages of firmware that QEMU needs to start at all, and their directories below /usr.
    firmware_packages: tuple[str, ...]
    firmware_directories: tuple[str, ...]
    #: The board on which abilities are tried.
    trial_machine: str

    # -- as a host --------------------------------------------------------------------------------------------------
    #: Where Debian puts its shared libraries, and the dynamic loader among them.
    library_directory: str
    loader: str

    def is_program(self, data: bytes) -> bool:
        """True when `data` begins an ELF file for this architecture (little-endian, gABI 4.1, ELF header)."""
        return data[:4] == b"\x7fELF" and int.from_bytes(data[18:20], "little") == self.elf_machine
