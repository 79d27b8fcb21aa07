"""The guest's first and only root: busybox, the kernel's modules, our init and agent, as one uncompressed
cpio.

Uncompressed because unpacking costs guest time, which under TCG is dearer than the host's page cache.
"""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

from rayos_images.apt import ARCHIVE, Apt, mirror, unpack
from rayos_images.arch import DEFAULT, Architecture
from rayos_images.cache import Cache
from rayos_images.cpio import Archive
from rayos_images.errors import ImageError
from rayos_images.kernel import BOOT_MODULES, Kernel
from rayos_images.modules import trim

RECIPE: Final = 1  # raise it when this file changes what it makes of the same inputs
GUEST: Final = Path(__file__).parent / "guest"

SCRIPTS: Final = {  # path in the guest -> file in images/rayos_images/guest
    "init": "init",
    "etc/rayos/agent": "agent",
    "etc/rayos/late": "late",
    "etc/rayos/lease": "lease",
    "etc/acpi/PWRF/00000080": "power",
    "etc/profile": "profile",
}
_FSTAB: Final = "proc /proc proc\nsys /sys sysfs\ndev /dev devtmpfs\n"
_DIRECTORIES: Final = (
    "bin", "dev", "etc", "etc/acpi", "etc/acpi/PWRF", "etc/rayos", "lib", "lib/modules", "mnt", "proc", "root",
    "run", "sbin", "sys", "usr", "usr/bin", "usr/sbin", "var", "var/log",
)  # fmt: skip
_IN_SBIN: Final = ("init", "reboot", "poweroff", "halt", "modprobe", "insmod", "udhcpc", "acpid")


def build(cache: Cache, kernel: Kernel) -> Path:
    """Return the initramfs for `kernel`, built when the cache has none of these very contents (one second).

    Raises `ImageError` when there is no static busybox and the archive cannot be reached.
    """
    busybox = find_busybox(cache, kernel.architecture)
    scripts = {path: (GUEST / name).read_bytes() for path, name in SCRIPTS.items()}
    modules = {
        str(p.relative_to(kernel.modules)): p for p in sorted(kernel.modules.rglob("*")) if p.is_file()
    }
    inputs: dict[str, Any] = {
        "recipe": RECIPE,
        "release": kernel.release,
        "kernel": kernel.modules.parent.name,  # its own key: the modules are part of that entry
        "busybox": _digest(busybox.read_bytes()),
        "scripts": {path: _digest(data) for path, data in scripts.items()},
        "boot_modules": {group: list(names) for group, names in BOOT_MODULES.items()},
    }

    def make(directory: Path) -> None:
        contents = {path: file.read_bytes() for path, file in modules.items()}
        archive = pack(
            busybox.read_bytes(),
            _applets(busybox),
            kernel.release,
            contents,
            scripts,
            serial_tty=kernel.architecture.serial_tty,
        )
        (directory / "initramfs.cpio").write_bytes(archive)
        (directory / "inputs.json").write_text(json.dumps(inputs, indent=1))

    return cache.build("initramfs", inputs, make) / "initramfs.cpio"


def pack(
    busybox: bytes,
    applets: list[str],
    release: str,
    modules: dict[str, bytes],
    scripts: dict[str, bytes],
    *,
    serial_tty: str = DEFAULT.serial_tty,
) -> bytes:
    """Return the archive. `modules` are by path below `lib/modules/<release>`, `scripts` by path in the
    guest."""
    archive = Archive()
    for directory in _DIRECTORIES:
        archive.directory(directory)
    archive.directory("tmp", 0o1777)
    archive.character_device("dev/console", 5, 1)  # the kernel opens it before init runs
    archive.fifo("run/lease")
    archive.symlink("var/run", "/run")
    archive.file("bin/busybox", busybox, 0o755)
    for applet in applets:
        if applet != "busybox":
            archive.symlink(f"{'sbin' if applet in _IN_SBIN else 'bin'}/{applet}", "/bin/busybox")
    archive.file("etc/fstab", _FSTAB.encode())
    archive.file("etc/passwd", b"root:x:0:0:root:/root:/bin/sh\n")
    archive.file("etc/group", b"root:x:0:\ntty:x:5:\n")
    archive.file("etc/hosts", b"127.0.0.1 localhost rayos\n")
    groups = "".join(f"{group}_modules='{' '.join(names)}'\n" for group, names in BOOT_MODULES.items())
    archive.file("etc/rayos/modules", groups.encode())
    archive.file("etc/rayos/serial", f"serial_tty={serial_tty}\n".encode())
    for path, data in scripts.items():
        archive.file(path, data, 0o755)
    made: set[Path] = set()
    for name, data in modules.items():
        inside = Path("lib/modules", release, name)
        for parent in reversed(inside.parents[:-3]):
            if parent not in made:
                made.add(parent)
                archive.directory(str(parent))
        archive.file(str(inside), trim(data) if name.endswith(".ko") else data)
    return archive.finish()


def find_busybox(cache: Cache, architecture: Architecture = DEFAULT) -> Path:
    """Return a static busybox of an architecture: the host's, else that of the package busybox-static, cached."""
    installed = shutil.which("busybox")
    if (
        installed is not None
        and b"/ld-linux" not in (data := Path(installed).read_bytes())
        and architecture.is_program(data)
    ):
        return Path(installed)
    note_name = f"busybox-{architecture.name}"
    note = cache.read_note(note_name)
    if note is not None and (entry := cache.path("busybox", note)).is_dir():
        return entry / "busybox"
    with cache.scratch("busybox") as scratch:
        apt = Apt(
            scratch / "apt", [(mirror("/debian", ARCHIVE), architecture.kernel_suite)], architecture.debian
        )
        inputs = {"recipe": RECIPE, "packages": [[p.file, p.sha256] for p in apt.resolve(["busybox-static"])]}

        def make(directory: Path) -> None:
            unpack(apt.download(["busybox-static"], scratch / "debs"), scratch / "root")
            found = [
                path
                for path in (scratch / "root/bin/busybox", scratch / "root/usr/bin/busybox")
                if path.exists()
            ]
            if not found:
                raise ImageError("the package busybox-static holds no busybox")
            shutil.copy(found[0], directory / "busybox")

        entry = cache.build("busybox", inputs, make)
    cache.write_note(note_name, inputs)
    return entry / "busybox"


def _applets(busybox: Path) -> list[str]:
    return subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
