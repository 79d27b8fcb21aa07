"""Debian's generic kernel, decompressed for PVH boot, with the modules that a guest of ours can use.

A bzImage spends five seconds of TCG time on decompressing itself (reference/qemu.md, 4); its `vmlinux` is an
ELF file with a PVH note that `-kernel` starts directly.
"""

import gzip
import json
import lzma
import shutil
import struct
import subprocess
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rayos_images.apt import ARCHIVE, SECURITY, Apt, mirror, unpack
from rayos_images.cache import Cache, key_of
from rayos_images.errors import ImageError
from rayos_images.modules import depends_of, insertion_order, name_of

RECIPE: Final = 1  # raise it when the layout of the entry or the list of modules changes
SUITE: Final = "bookworm"
PACKAGE: Final = "linux-image-amd64"

DEFAULT_CMDLINE: Final = (
    "console=tty0 console=ttyS0 quiet no_timer_check tsc=reliable random.trust_cpu=on cryptomgr.notests"
    " initcall_blacklist=crypto_kdf108_init"  # its self-test takes 0.13 s under TCG; nothing here uses it
)
"""What our kernel should be started with. `ttyS0` stays last, else the serial log is silent; `tty0` feeds the
GPU."""

# Inserted at boot when their device is there (guest/init); the order is that of insertion.
BOOT_MODULES: Final = {
    "core": ("virtio_pci",),
    "console": ("virtio_console",),
    "blk": ("virtio_blk",),
    "net": ("virtio_net",),
    "input": ("virtio_input", "evdev"),
    "gpu": ("virtio_gpu",),
    "late": ("evdev", "button", "virtio_rng"),
}
# For `modprobe` and `mount` in the guest; never inserted by our init.
EXTRA_MODULES: Final = (
    "ext4", "crc32c_generic", "vfat", "nls_cp437", "nls_ascii", "nls_iso8859_1", "isofs", "loop", "overlay",
    "tun", "8021q", "virtio_balloon", "vsock", "vmw_vsock_virtio_transport",
)  # fmt: skip

_WANTED: Final = [name for group in BOOT_MODULES.values() for name in group] + list(EXTRA_MODULES)

# Documentation/x86/boot.rst: offsets into a bzImage
_SETUP_SECTS, _HDRS, _PAYLOAD_OFFSET = 0x1F1, 0x202, 0x248
_SECTOR: Final = 512


@dataclass(frozen=True, slots=True)
class Kernel:
    """`modules` holds `modules.dep` and `kernel/…` and belongs into `/lib/modules/<release>` of a guest."""

    vmlinux: Path
    release: str
    modules: Path


def build(cache: Cache, *, refresh: bool = False) -> Kernel:
    """Return the kernel, built from the archive when the cache has none or, with `refresh`, when there is a
    newer.

    The first call downloads 70 MB and takes about ten seconds; later ones are offline. Raises `ImageError`
    when the archive cannot be reached or its kernel is not of a known form.
    """
    # Versions of this program that want other modules share the cache.
    note_name = f"kernel-{key_of({'recipe': RECIPE, 'modules': _WANTED})}"
    note = cache.read_note(note_name)
    if not refresh and note is not None and note.get("recipe") == RECIPE and note.get("modules") == _WANTED:
        entry = cache.path("kernel", note)
        if entry.is_dir():
            return _kernel(entry)
    with cache.scratch("kernel") as scratch:
        suites = [
            (mirror("/debian", ARCHIVE), SUITE),
            (mirror("/debian-security", SECURITY), f"{SUITE}-security"),
        ]
        apt = Apt(scratch / "apt", suites)
        (package,) = [name for name in apt.depends(PACKAGE) if name.startswith("linux-image-")][:1] or [
            PACKAGE
        ]
        inputs: dict[str, Any] = {
            "recipe": RECIPE,
            "modules": _WANTED,
            "packages": [[found.file, found.sha256] for found in apt.resolve([package])],
        }

        def make(directory: Path) -> None:
            unpack(apt.download([package], scratch / "debs"), scratch / "root")
            _arrange(scratch / "root", directory)

        entry = cache.build("kernel", inputs, make)
    cache.write_note(note_name, inputs)
    return _kernel(entry)


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


def _arrange(root: Path, entry: Path) -> None:
    (image,) = (root / "boot").glob("vmlinuz-*")
    release = image.name.removeprefix("vmlinuz-")
    source = root / "lib/modules" / release
    (entry / "vmlinux").write_bytes(extract_vmlinux(image.read_bytes()))
    shutil.copy(root / "boot" / f"config-{release}", entry / "config")
    files = {name_of(path.name): path for path in source.rglob("*.ko")}
    builtin = {name_of(Path(line).name) for line in (source / "modules.builtin").read_text().split()}
    depends: dict[str, tuple[str, ...]] = {}

    def load(name: str) -> None:
        if name in files and name not in depends:
            depends[name] = depends_of(files[name].read_bytes())
            for dependency in depends[name]:
                load(dependency)

    for name in _WANTED:
        load(name)
    order = insertion_order([name for name in _WANTED if name not in builtin], depends)
    modules = entry / "modules"
    lines = []
    for name in order:
        relative = files[name].relative_to(source)
        (modules / relative.parent).mkdir(parents=True, exist_ok=True)
        shutil.copy(files[name], modules / relative)
        needed = insertion_order([name], depends)[:-1]
        lines.append(
            f"{relative}:{''.join(f' {files[other].relative_to(source)}' for other in reversed(needed))}\n"
        )
    (modules / "modules.dep").write_text("".join(lines))
    (entry / "manifest.json").write_text(json.dumps({"release": release}))


def _kernel(entry: Path) -> Kernel:
    release = json.loads((entry / "manifest.json").read_text())["release"]
    return Kernel(entry / "vmlinux", release, entry / "modules")
