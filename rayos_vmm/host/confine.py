"""The launcher of QEMU and swtpm: a process becomes a user of its own, among its own files, and then that program.

    python -I -S confine.py --uid 1900004096 --read /usr --read vmlinux --socket disk0.sock -- qemu-system-x86_64 …

Its root holds the paths that were named and nothing else (so neither the directories above them nor their permissions
matter); it has no network, no capability and cannot gain one; Landlock says the same once more, and no TCP. QEMU's
own `-sandbox` comes on top, with `elevateprivileges=deny`, which its `-run-with user=` does not survive.

Without root it stays who it is, among all files of that user, of which Landlock leaves it the named ones.
A layer that is missing is said on standard error; an error ends it with 126 before the program runs.

Run as a file by an interpreter without site packages: starting costs 30 ms, and the process keeps its id.
"""

from __future__ import annotations

import argparse
import os
import resource
import stat
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

if __name__ == "__main__":  # isolated: our packages are not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rayos_vmm.host import landlock, privilege

#: A file that only its owner may read is copied for the program; larger ones (disks, ISO images) are refused.
MAX_COPY_BYTES: Final = 512 << 20
#: QEMU has a thread for each CPU and up to 64 of its pool.
MAX_THREADS: Final = 512
#: What `execve` could not be reached for, as a shell says it.
EXIT_REFUSED: Final = 126

_READ: Final = landlock.READ_FILE | landlock.READ_DIR | landlock.EXECUTE
_WRITE: Final = (
    landlock.READ_FILE
    | landlock.READ_DIR
    | landlock.WRITE_FILE
    | landlock.TRUNCATE
    | landlock.MAKE_REG
    | landlock.REMOVE_FILE
    | landlock.REFER
)
_DEVICE: Final = landlock.READ_FILE | landlock.WRITE_FILE | landlock.IOCTL_DEV

_NOSUID_NODEV: Final = privilege.MOUNT_ATTR_NOSUID | privilege.MOUNT_ATTR_NODEV
_ATTRIBUTES: Final = {
    "read": _NOSUID_NODEV | privilege.MOUNT_ATTR_RDONLY,
    "write": _NOSUID_NODEV | privilege.MOUNT_ATTR_NOEXEC,
    "socket": _NOSUID_NODEV | privilege.MOUNT_ATTR_NOEXEC,
    "device": privilege.MOUNT_ATTR_NOSUID | privilege.MOUNT_ATTR_NOEXEC,
}


@dataclass(frozen=True, slots=True)
class Reach:
    """The files that a program may reach; absolute paths.

    read: files and directories, to read and to execute. write: files and directories that become the user's own.
    sockets: that it may connect to; they become the user's own. devices: such as /dev/kvm.
    """

    read: Sequence[Path] = ()
    write: Sequence[Path] = ()
    sockets: Sequence[Path] = ()
    devices: Sequence[Path] = ()


def confined(argv: Sequence[str], reach: Reach, *, uid: int) -> list[str]:
    """The command line that runs `argv` as `uid` (0: stay) with `reach` alone."""
    options = []
    for name, paths in _by_kind(reach):
        for path in paths:
            options += [f"--{name}", str(path)]
    return [sys.executable, "-I", "-S", __file__, "--uid", str(uid), *options, "--", *argv]


def _by_kind(reach: Reach) -> list[tuple[str, Sequence[Path]]]:
    kinds = ("read", reach.read), ("write", reach.write), ("socket", reach.sockets), ("device", reach.devices)
    return list(kinds)


def program_directories(argv: Iterable[str]) -> list[Path]:
    """Where a program that is run by `argv` has its files: /usr, or the `usr` of a bundle, and the loader's."""
    found: dict[Path, None] = {}
    for word in argv:
        parts = Path(word).parts
        if not word.startswith("/"):
            continue
        found[Path(*parts[: parts.index("usr") + 1]) if "usr" in parts else Path(word).parent] = None
    if Path("/usr") in found:
        system = ("/lib", "/lib64", "/etc/ld.so.cache", "/etc/alternatives")
        found.update({Path(name): None for name in system if Path(name).exists()})
    return list(found)


def _said(layer: str, apply: Callable[[], object]) -> None:
    try:
        apply()
    except OSError as error:
        print(f"confine: without {layer}: {error}", file=sys.stderr, flush=True)


# -- as root -----------------------------------------------------------------------------------------------------


def _hand_over(path: Path, uid: int) -> None:
    """Make a file, socket or directory with what is in it the user's; nothing is followed."""
    os.chown(path, uid, uid, follow_symlinks=False)
    if path.is_dir() and not path.is_symlink():
        for entry in path.iterdir():
            if not entry.is_dir():
                os.chown(entry, uid, uid, follow_symlinks=False)


def _private_copy(path: Path) -> bytes | None:
    """The contents of a file that others may not read; None for what can be shown as it is."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode) or status.st_mode & stat.S_IROTH:
        return None
    if status.st_size > MAX_COPY_BYTES:
        raise OSError(f"{path} may be read by its owner only, and has {status.st_size} bytes: chmod o+r it")
    return path.read_bytes()


def build_root(reach: Reach, uid: int, *, has_proc: bool = True) -> None:
    """Be in a root that holds what may be reached and nothing else. Errors: OSError."""
    before = os.umask(0o022)  # the user, whose root this is not, walks through its directories
    privilege.private_mounts()
    trees: list[tuple[Path, bool, int]] = []
    copies: list[tuple[Path, bytes]] = []
    for kind, paths in _by_kind(reach):
        for path in paths:
            if path.is_relative_to("/proc/self/fd"):
                continue
            data = _private_copy(path) if kind == "read" and uid else None
            if data is not None:
                copies.append((path, data))
                continue
            if kind in ("write", "socket") and uid:
                _hand_over(path, uid)
            trees.append((path, path.is_dir(), privilege.clone_tree(str(path), _ATTRIBUTES[kind])))
    privilege.begin_root((1 << 20) + sum(len(data) + 4096 for _, data in copies))
    for path, is_directory, tree in sorted(trees):  # a directory before what is in it
        here = Path(*path.parts[1:])
        if is_directory:
            here.mkdir(parents=True, exist_ok=True)
        elif not here.exists():
            here.parent.mkdir(parents=True, exist_ok=True)
            here.touch()
        privilege.attach_tree(tree, str(here))
        os.close(tree)
    for path, data in copies:
        here = Path(*path.parts[1:])
        here.parent.mkdir(parents=True, exist_ok=True)
        here.write_bytes(data)
        here.chmod(0o400)
        os.chown(here, uid, uid)
    if has_proc:
        # QEMU looks for modules beside /proc/self/exe and opens sealed copies at /proc/self/fd; it sees no other.
        Path("proc").mkdir(exist_ok=True)
        privilege.mount("proc", "proc", "proc", privilege.PROC_FLAGS, "hidepid=invisible,subset=pid")
    privilege.enter_root()
    os.umask(before)


def _as_root(reach: Reach, uid: int) -> list[tuple[int, int]]:
    """Everything that needs root, and giving it up; returns the Landlock rules."""
    groups = [path.stat().st_gid for path in reach.devices]
    privilege.unshare(privilege.CLONE_NEWNET | privilege.CLONE_NEWIPC | privilege.CLONE_NEWUTS)
    build_root(reach, uid)
    rules = [landlock.rights_on("/", _READ), *_rules(reach.write, _WRITE), *_rules(reach.devices, _DEVICE)]
    privilege.drop_bounding_set()
    if uid:
        privilege.become(uid, groups)
    privilege.keep_capabilities()
    return rules


def _rules(paths: Iterable[Path], rights: int) -> list[tuple[int, int]]:
    return [landlock.rights_on(str(path), rights) for path in paths]


# -- the program -------------------------------------------------------------------------------------------------


def _parse(arguments: Sequence[str]) -> tuple[Reach, int, list[str]]:
    parser = argparse.ArgumentParser(prog="confine")
    parser.add_argument("--uid", type=int, default=0)
    for name in _ATTRIBUTES:
        parser.add_argument(f"--{name}", type=Path, action="append", default=[])
    parser.add_argument("argv", nargs="+")
    options = parser.parse_args(arguments)
    return Reach(options.read, options.write, options.socket, options.device), options.uid, options.argv


def main(arguments: Sequence[str]) -> int:
    """Confine this process and become the program; returns only when that failed."""
    reach, uid, argv = _parse(arguments)
    try:
        if os.geteuid() == 0:
            rules = _as_root(reach, uid)
        else:
            rules = _rules(reach.read, _READ) + _rules(reach.write, _WRITE) + _rules(reach.devices, _DEVICE)
            print(f"confine: user {os.geteuid()}, without namespaces: that needs root", file=sys.stderr)
        privilege.limit({resource.RLIMIT_CORE: 0, **({resource.RLIMIT_NPROC: MAX_THREADS} if uid else {})})
        privilege.no_new_privileges()
        _said("Landlock", lambda: landlock.restrict(rules))
        for fd, _ in rules:
            os.close(fd)
        os.execv(argv[0], argv)
    except OSError as error:
        print(f"confine: {argv[0]} does not start: {error}", file=sys.stderr, flush=True)
    return EXIT_REFUSED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
