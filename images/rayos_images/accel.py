"""Does KVM work here? Seen by booting a kernel under it, since `/dev/kvm` may be there and open and yet run
nothing.

The answer is remembered per boot of the host; without KVM the accelerator is `tcg`, with the reason.
"""

import os
import platform
import select
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final, Literal

from rayos_images import kernel
from rayos_images.cache import Cache
from rayos_images.errors import ImageError
from rayos_images.qemu import Qemu

RECIPE: Final = 2
DEVICE: Final = Path("/dev/kvm")
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
FIRST_LINE_S: Final = 4.0  # earlyprintk comes within 0.2 s where KVM works
TIMEOUT_S: Final = 15.0  # a kernel panics without a root file system after 1 s under KVM, 2 s when nested

# The kernel runs through all of its own initialisation, finds no root and, by panic=-1, restarts: QEMU exits.
_END: Final = b"VFS: Unable to mount root fs"


@dataclass(frozen=True, slots=True)
class Accel:
    """The value for `-accel`, and the reason: a sentence for people."""

    name: Literal["kvm", "tcg"]
    reason: str


def probe(cache: Cache, qemu: Qemu) -> Accel:
    """Return the accelerator to use with `qemu`; takes 4 to 15 seconds when KVM is broken, once per boot of the host.

    Raises `ImageError` only when the kernel to try cannot be built.
    """
    architecture = qemu.architecture
    if (machine := platform.machine()) not in architecture.kvm_hosts:
        return Accel("tcg", f"KVM of a {machine} runs no {architecture.name} guests")
    if not DEVICE.exists():
        return Accel("tcg", f"{DEVICE} does not exist: this machine offers no hardware virtualisation")
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        return Accel("tcg", f"no permission to use {DEVICE}: join its group (usually kvm)")
    image = kernel.build(cache, architecture)
    identity = {
        "recipe": RECIPE,
        "boot_id": BOOT_ID.read_text().strip(),
        "qemu": list(qemu.argv),
        "vmlinux": str(image.vmlinux),
    }
    note = cache.read_note("accel")
    if note is None or note.get("identity") != identity:
        found = _try(qemu, image.vmlinux)
        note = {"identity": identity, "name": found.name, "reason": found.reason}
        cache.write_note("accel", note)
    return Accel("kvm" if note["name"] == "kvm" else "tcg", str(note["reason"]))


def _try(qemu: Qemu, vmlinux: Path) -> Accel:
    board, append = qemu.architecture.trial_machine, qemu.architecture.trial_command_line
    command = [
        *qemu.argv, "-M", board, "-accel", "kvm", "-cpu", "host", "-m", "256M", "-nodefaults", "-no-user-config",
        "-nic", "none", "-display", "none", "-no-reboot", "-serial", "stdio",
        "-kernel", str(vmlinux), "-append", append,
    ]  # fmt: skip
    started = time.monotonic()
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
    except OSError as error:
        raise ImageError(f"cannot start {command[0]}: {error.strerror}") from error
    with process:
        log = _read(process.stdout, started) if process.stdout else b""
        process.kill()
        ended = process.wait() != -signal.SIGKILL  # by itself
        errors = process.stderr.read().decode(errors="replace").strip() if process.stderr else ""
    seconds = time.monotonic() - started
    if _END in log:
        return Accel("kvm", f"a kernel ran under KVM in {seconds:.1f} s")
    if ended:
        said = errors.splitlines()[0][:200] if errors else "no message"
        return Accel("tcg", f"{DEVICE} is there but QEMU ended early under KVM: {said}")
    seen = f"stopped after {len(log.splitlines())} lines of its log" if log else "printed nothing"
    return Accel("tcg", f"{DEVICE} is there but a kernel {seen} within {seconds:.0f} s under KVM")


def _read(stream: IO[bytes], started: float) -> bytes:
    """Return what the guest printed up to its end, or up to the time limits."""
    log = b""
    while _END not in log:
        limit_s = started + (TIMEOUT_S if log else FIRST_LINE_S) - time.monotonic()
        if limit_s <= 0 or not select.select([stream], [], [], limit_s)[0]:
            break
        data = os.read(stream.fileno(), 1 << 16)
        if not data:
            break
        log += data
    return log
