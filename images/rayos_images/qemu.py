"""Find a QEMU that can start all the devices that we serve: the system's if it can, else a private one in the
cache.

The private one is Debian's backport with its own libraries and dynamic loader: nothing of the host is
replaced. Its argv works as it is, with any environment: the loader is copied beside the binary, so that
`/proc/self/exe` names a directory of ours, and QEMU then looks for modules and firmware below `qemu-bundle`
in that directory (`get_relocated_path`, QEMU's util/cutils.c), which links back to the private root.
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from rayos_images.apt import ARCHIVE, Apt, mirror, unpack
from rayos_images.arch import DEFAULT, Architecture, host
from rayos_images.cache import Cache
from rayos_images.errors import ImageError
from rayos_images.qemu_probe import CONSOLE_TYPE, VHOST_USER_DEVICES, has_dbus_display, probe

RECIPE: Final = 2  # raise it when the layout of the entry changes
_PROBED: Final = sorted(VHOST_USER_DEVICES)  # of a note: it says nothing of the devices that were not tried
SUITE: Final = "trixie-backports"
BASE_SUITE: Final = "trixie"
LOADER: Final = "rayos-qemu"  # what `ps` shows

# All that the binary links to and its firmware, without what only unused features would load.
_WANTED: Final = re.compile(r"lib.*|zlib1g|qemu-system-(common|data)")
_UNUSED: Final = re.compile(
    r"lib(systemd-shared|nss3|nspr4|sqlite3.*|asound.*|brlapi.*|cacard0|pcsclite1|ncurses.*|tinfo6|pam.*|audit.*"
    r"|sema.*|sepol.*|db5.*|debconf.*|cap-ng0|acl1|attr1|bsd0|md0|usb.*|bz2.*|crypt1)"
)
# QEMU's D-Bus display, by which a guest is told of a display's new mode, and the libraries that it loads.
_DISPLAY_PACKAGE: Final = "qemu-system-modules-opengl"
_DISPLAY: Final = frozenset((_DISPLAY_PACKAGE, "libepoxy0", "libgbm1", "libdrm2", "libexpat1"))
_DROPPED: Final = (
    "usr/share/doc",
    "usr/share/man",
    "usr/share/locale",
    "usr/share/icons",
    "usr/share/lintian",
)


@dataclass(frozen=True, slots=True)
class Qemu:
    """A QEMU for guests of one architecture: `argv` starts it (append options), `device_types` are those that were
    seen to start under TCG. With `has_dbus_display` it started with `-display dbus,p2p=yes`.

    The private one has no iPXE ROMs: give an emulated NIC `romfile=` (empty).
    """

    architecture: Architecture
    argv: tuple[str, ...]
    version: str
    source: Literal["system", "private"]
    device_types: frozenset[str]
    has_dbus_display: bool

    def has(self, device_type: str) -> bool:
        """True when `-device <device_type>` can be started by this QEMU on this machine."""
        return device_type in self.device_types

    @property
    def path(self) -> str:
        """The QEMU binary itself."""
        return next(word for word in reversed(self.argv) if word.endswith(self.architecture.qemu))

    @property
    def missing(self) -> tuple[str, ...]:
        """The device types of ours that it cannot start; empty when it can serve all."""
        return tuple(kind for kind in (*VHOST_USER_DEVICES, "virtio-net-pci") if not self.has(kind))

    @property
    def has_console(self) -> bool:
        """True when our console backend can be its console (QEMU 10.2 and later)."""
        return self.has(CONSOLE_TYPE)


def find(
    cache: Cache, architecture: Architecture = DEFAULT, *, provision: bool = True, refresh: bool = False
) -> Qemu:
    """Return the system's QEMU for an architecture if it can start all devices of ours, else the private one.

    With `provision=False`, or when the private one cannot be had, the system's QEMU is returned with what it
    can do (`missing` tells what not). The first call downloads 28 MB and takes about ten seconds; later ones
    are offline.

    Raises `ImageError` when there is none at all.
    """
    system = _system(cache, architecture)
    if system is not None and not system.missing:
        return system
    try:
        private = _private(cache, architecture, provision=provision, refresh=refresh)
    except ImageError:
        if system is None:
            raise
        return system
    found = private or system
    if found is None:
        raise ImageError(
            f"no {architecture.qemu} in PATH and no private one in {cache.root}: run `python -m images`"
        )
    return found


def _system(cache: Cache, architecture: Architecture) -> Qemu | None:
    path = shutil.which(architecture.qemu)
    if path is None:
        return None
    status = Path(path).stat()
    identity = {
        "path": path,
        "mtime_ns": status.st_mtime_ns,
        "size": status.st_size,
        "recipe": RECIPE,
        "probed": _PROBED,
    }
    note = cache.read_note(architecture.qemu)
    if note is None or note.get("identity") != identity:
        try:
            version, types = probe((path,), architecture.trial_machine)
        except ImageError:  # present and broken: as good as absent
            version, types = "", frozenset()
        has_display = bool(version) and has_dbus_display((path,), architecture.trial_machine)
        note = {
            "identity": identity,
            "version": version,
            "device_types": sorted(types),
            "has_dbus_display": has_display,
        }
        cache.write_note(architecture.qemu, note)
    return _qemu(architecture, (path,), "system", note) if note["version"] else None


def _private(cache: Cache, architecture: Architecture, *, provision: bool, refresh: bool) -> Qemu | None:
    # A note for each recipe: versions of this program that share a cache do not undo each other's work.
    note_name = f"qemu-private-{architecture.name}-{RECIPE}"
    note = cache.read_note(note_name)
    if not refresh and note is not None and note.get("recipe") == RECIPE:
        entry = cache.path("qemu", note["inputs"])
        if entry.is_dir():
            argv = _argv(entry, architecture, host())
            if note.get("probed") != _PROBED:
                note = _note(argv, architecture, note["inputs"])
                cache.write_note(note_name, note)
            return _qemu(architecture, argv, "private", note)
    if not provision:
        return None
    with cache.scratch("qemu") as scratch:
        archive = mirror("/debian", ARCHIVE)
        apt = Apt(scratch / "apt", [(archive, BASE_SUITE), (archive, SUITE)], host().debian)
        own = (architecture.qemu_package, *architecture.firmware_packages)
        names = [
            name
            for name in apt.closure(architecture.qemu_package, suite=SUITE)
            if name in own or (_WANTED.fullmatch(name) and not _UNUSED.fullmatch(name))
        ]
        names += sorted(_DISPLAY.intersection(apt.closure(_DISPLAY_PACKAGE, suite=SUITE)) - set(names))
        specs = [f"{name}/{SUITE}" if name.startswith("qemu") else name for name in names]
        inputs = {"recipe": RECIPE, "packages": [[p.file, p.sha256] for p in apt.resolve(specs)]}

        def make(directory: Path) -> None:
            unpack(apt.download(specs, scratch / "debs"), directory)
            _arrange(directory, architecture.qemu, host())

        entry = cache.build("qemu", inputs, make)
    argv = _argv(entry, architecture, host())
    note = _note(argv, architecture, inputs)
    cache.write_note(note_name, note)
    return _qemu(architecture, argv, "private", note)


def _note(argv: tuple[str, ...], architecture: Architecture, inputs: dict[str, Any]) -> dict[str, Any]:
    """Starts the private QEMU, and says what it can do."""
    version, types = probe(argv, architecture.trial_machine)
    return {
        "recipe": RECIPE,
        "probed": _PROBED,
        "inputs": inputs,
        "version": version,
        "device_types": sorted(types),
        "has_dbus_display": has_dbus_display(argv, architecture.trial_machine),
    }


def _arrange(root: Path, name: str, host: Architecture) -> None:
    binaries = root / "usr/bin"
    for path in binaries.iterdir():
        if path.name != name:
            path.unlink()
    for dropped in _DROPPED:
        shutil.rmtree(root / dropped, ignore_errors=True)
    shutil.copy(root / "usr" / host.library_directory / host.loader, binaries / LOADER)
    (binaries / "qemu-bundle").symlink_to("../..")


def _argv(entry: Path, architecture: Architecture, host: Architecture) -> tuple[str, ...]:
    root, name = entry.absolute() / "usr", architecture.qemu
    firmware = [word for path in architecture.firmware_directories for word in ("-L", str(root / path))]
    return (
        str(root / "bin" / LOADER), "--inhibit-cache", "--library-path", str(root / host.library_directory),
        "--argv0", name, str(root / "bin" / name), *firmware,
    )  # fmt: skip


def _qemu(
    architecture: Architecture,
    argv: tuple[str, ...],
    source: Literal["system", "private"],
    note: Mapping[str, Any],
) -> Qemu:
    types = frozenset(note["device_types"])
    return Qemu(architecture, argv, str(note["version"]), source, types, bool(note["has_dbus_display"]))
