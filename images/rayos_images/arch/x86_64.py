"""x86-64: Debian's amd64."""

from __future__ import annotations

from typing import Final

from rayos_images.arch.record import Architecture
from rayos_images.bzimage import extract_vmlinux

X86_64: Final = Architecture(
    name="x86_64",
    debian="amd64",
    elf_machine=62,  # EM_X86_64
    kvm_hosts=("x86_64",),
    kernel_package="linux-image-amd64",
    kernel_suite="bookworm",
    boot_image=extract_vmlinux,
    # `ttyS0` stays last, else the serial log is silent; `tty0` feeds the GPU. kdf108's self-test takes 0.13 s under
    # TCG, and nothing here uses it.
    display_command_line="console=tty0",
    command_line="console=ttyS0 quiet no_timer_check tsc=reliable random.trust_cpu=on cryptomgr.notests"
    " initcall_blacklist=crypto_kdf108_init",
    serial_tty="ttyS0",
    trial_command_line="earlyprintk=serial,ttyS0 console=ttyS0 panic=-1 no_timer_check",
    qemu="qemu-system-x86_64",
    qemu_package="qemu-system-x86",
    firmware_packages=("seabios",),
    firmware_directories=("share/seabios", "share/qemu"),
    trial_machine="q35",
    library_directory="lib/x86_64-linux-gnu",
    loader="ld-linux-x86-64.so.2",
)
