"""Debian's generic kernel in the form that QEMU starts the fastest, with the modules that a guest of ours can use."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rayos_images.apt import ARCHIVE, SECURITY, Apt, mirror, unpack
from rayos_images.arch import DEFAULT, Architecture
from rayos_images.cache import Cache, key_of
from rayos_images.modules import aliases_of, depends_of, insertion_order, name_of

RECIPE: Final = 2  # raise it when the layout of the entry or the list of modules changes


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


@dataclass(frozen=True, slots=True)
class Kernel:
    """`modules` (`modules.dep`, `modules.alias`, `kernel/…`) belongs into `/lib/modules/<release>` of a guest."""

    architecture: Architecture
    vmlinux: Path
    release: str
    modules: Path


def command_line(architecture: Architecture = DEFAULT, *, has_display: bool = True) -> str:
    """The command line that our kernel should be started with."""
    display = [architecture.display_command_line] if has_display else []
    return " ".join([*display, architecture.command_line])


def build(cache: Cache, architecture: Architecture = DEFAULT, *, refresh: bool = False) -> Kernel:
    """Return an architecture's kernel, built from the archive when the cache has none.

    With `refresh` also when there is a newer.

    The first call downloads 70 MB and takes about ten seconds; later ones are offline. Raises `ImageError`
    when the archive cannot be reached or its kernel is not of a known form.
    """
    # Versions of this program that want other modules share the cache.
    note_name = f"kernel-{architecture.name}-{key_of({'recipe': RECIPE, 'modules': _WANTED})}"
    note = cache.read_note(note_name)
    if not refresh and note is not None and note.get("recipe") == RECIPE and note.get("modules") == _WANTED:
        entry = cache.path("kernel", note)
        if entry.is_dir():
            return _kernel(entry, architecture)
    with cache.scratch("kernel") as scratch:
        suites = [
            (mirror("/debian", ARCHIVE), architecture.kernel_suite),
            (mirror("/debian-security", SECURITY), f"{architecture.kernel_suite}-security"),
        ]
        apt = Apt(scratch / "apt", suites, architecture.debian)
        newest = [
            name for name in apt.depends(architecture.kernel_package) if name.startswith("linux-image-")
        ]
        package = newest[0] if newest else architecture.kernel_package
        inputs: dict[str, Any] = {
            "recipe": RECIPE,
            "modules": _WANTED,
            "packages": [[found.file, found.sha256] for found in apt.resolve([package])],
        }

        def make(directory: Path) -> None:
            unpack(apt.download([package], scratch / "debs"), scratch / "root")
            _arrange(scratch / "root", directory, architecture)

        entry = cache.build("kernel", inputs, make)
    cache.write_note(note_name, inputs)
    return _kernel(entry, architecture)


def _arrange(root: Path, entry: Path, architecture: Architecture) -> None:
    (image,) = (root / "boot").glob("vmlinuz-*")
    release = image.name.removeprefix("vmlinuz-")
    source = root / "lib/modules" / release
    (entry / "vmlinux").write_bytes(architecture.boot_image(image.read_bytes()))
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
    aliases = [f"alias {alias} {name}\n" for name in order for alias in aliases_of(files[name].read_bytes())]
    (modules / "modules.alias").write_text("".join(aliases))
    (entry / "manifest.json").write_text(json.dumps({"release": release}))


def _kernel(entry: Path, architecture: Architecture) -> Kernel:
    release = json.loads((entry / "manifest.json").read_text())["release"]
    return Kernel(architecture, entry / "vmlinux", release, entry / "modules")
