"""The steps by which a process gives up root: namespaces, capabilities, user, limits. Each step is small, final and
by ctypes.

Source: namespaces(7), pivot_root(2), capabilities(7), prctl(2), setrlimit(2).
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
from collections.abc import Mapping, Sequence
from typing import Final

from rayos_vmm.host.system_calls import system_calls

CLONE_NEWNS: Final = 0x00020000
CLONE_NEWUTS: Final = 0x04000000
CLONE_NEWIPC: Final = 0x08000000
CLONE_NEWNET: Final = 0x40000000

CAP_DAC_OVERRIDE: Final = 1
CAP_KILL: Final = 5
CAP_SETGID: Final = 6
CAP_SETUID: Final = 7
CAP_SYS_ADMIN: Final = 21
_LAST_CAPABILITY: Final = 63  # prctl answers EINVAL from the kernel's own last one on

MS_RDONLY: Final = 1
MS_NOSUID: Final = 2
MS_NODEV: Final = 4
MS_NOEXEC: Final = 8
MS_REMOUNT: Final = 0x20
MS_REC: Final = 0x4000
MS_PRIVATE: Final = 0x40000
PROC_FLAGS: Final = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC
_MNT_DETACH: Final = 2

# linux/mount.h, linux/fcntl.h; new system calls have the same number everywhere.
_OPEN_TREE: Final = 428
_MOVE_MOUNT: Final = 429
_MOUNT_SETATTR: Final = 442
_OPEN_TREE_CLONE: Final = 1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 4
_AT_FDCWD: Final = -100
_AT_EMPTY_PATH: Final = 0x1000
_AT_RECURSIVE: Final = 0x8000
MOUNT_ATTR_RDONLY: Final = 1
MOUNT_ATTR_NOSUID: Final = 2
MOUNT_ATTR_NODEV: Final = 4
MOUNT_ATTR_NOEXEC: Final = 8
#: attr_set, attr_clr, propagation, userns_fd
_MOUNT_ATTR: Final = struct.Struct("=QQQQ")

_PR_SET_DUMPABLE: Final = 4
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
#: linux/capability.h: _LINUX_CAPABILITY_VERSION_3, and two rounds of effective, permitted, inheritable.
_CAPABILITY_HEADER: Final = struct.pack("=Ii", 0x20080522, 0)
_CAPABILITY_DATA: Final = struct.Struct("=6I")

#: A directory that every system has: the new root is mounted there before it becomes the root.
_MOUNT_POINT: Final = "/tmp"

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")


def unshare(flags: int) -> None:
    """New namespaces for this process and its children. Errors: OSError (EPERM without CAP_SYS_ADMIN)."""
    _check(_libc.unshare(ctypes.c_int(flags)), "unshare")


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """mount(2). Errors: OSError."""
    arguments = source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()
    _check(_libc.mount(*arguments), f"mount {target}")


def private_mounts() -> None:
    """A mount namespace of our own: nothing that is mounted from here on is seen elsewhere. Errors: OSError."""
    unshare(CLONE_NEWNS)
    mount("none", "/", "", MS_REC | MS_PRIVATE)


def begin_root(size_bytes: int = 1 << 20) -> None:
    """Mount an empty tmpfs and make it the working directory: fill it now, then `enter_root`."""
    mount("none", _MOUNT_POINT, "tmpfs", MS_NOSUID | MS_NODEV, f"mode=755,size={size_bytes}")
    os.chdir(_MOUNT_POINT)


def clone_tree(path: str, attributes: int) -> int:
    """A descriptor of a mount of `path` that is attached nowhere, with mount attributes added. Errors: OSError."""
    fd = _libc.syscall(
        ctypes.c_long(_OPEN_TREE),
        ctypes.c_int(_AT_FDCWD),
        path.encode(),
        ctypes.c_uint(_OPEN_TREE_CLONE | os.O_CLOEXEC | _AT_RECURSIVE),
    )
    if fd < 0:
        _check(-1, path)
    wanted = _MOUNT_ATTR.pack(attributes, 0, 0, 0)
    flags = ctypes.c_uint(_AT_EMPTY_PATH | _AT_RECURSIVE)
    size = ctypes.c_size_t(len(wanted))
    _check(_libc.syscall(ctypes.c_long(_MOUNT_SETATTR), ctypes.c_int(fd), b"", flags, wanted, size), path)
    return int(fd)


def attach_tree(fd: int, path: str) -> None:
    """Attach what `clone_tree` gave. Errors: OSError."""
    flags = ctypes.c_uint(_MOVE_MOUNT_F_EMPTY_PATH)
    here = ctypes.c_int(_AT_FDCWD)
    _check(_libc.syscall(ctypes.c_long(_MOVE_MOUNT), ctypes.c_int(fd), b"", here, path.encode(), flags), path)


def enter_root() -> None:
    """Make the working directory the root, read-only, and leave the old one behind."""
    _check(_libc.syscall(ctypes.c_long(system_calls().numbers["pivot_root"]), b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", ctypes.c_int(_MNT_DETACH)), "umount the old root")
    os.chdir("/")
    mount("none", "/", "", MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV)


def empty_root() -> None:
    """A root directory with nothing in it, where nothing can be made. Errors: OSError."""
    private_mounts()
    begin_root()
    enter_root()


def drop_bounding_set(*kept: int) -> None:
    """No program executed from here on gains a capability but these. Errors: OSError (EPERM without CAP_SETPCAP)."""
    for capability in set(range(_LAST_CAPABILITY + 1)) - set(kept):
        if _libc.prctl(_PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) != 0:
            if capability == 0:
                _check(-1, "the capability bounding set")
            break  # past the last one this kernel knows


def keep_capabilities(*kept: int) -> None:
    """Keep these effective and permitted, and no other. Errors: OSError."""
    bits = sum(1 << capability for capability in kept)
    data = _CAPABILITY_DATA.pack(bits & 0xFFFFFFFF, bits & 0xFFFFFFFF, 0, bits >> 32, bits >> 32, 0)
    _check(_libc.capset(_CAPABILITY_HEADER, data), "capset")
    _libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)


def become(uid: int, groups: Sequence[int] = ()) -> None:
    """Another user, in the group of the same number and `groups`. Errors: OSError (EPERM without CAP_SETUID)."""
    os.setgroups(list(groups))
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def no_new_privileges() -> None:
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")


def not_dumpable() -> None:
    """No core file, no ptrace and no /proc/<pid>/mem by others of the same user."""
    _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "PR_SET_DUMPABLE")


def limit(limits: Mapping[int, int]) -> None:
    """Hard limits: a resource that has a lower one keeps it."""
    for kind, wanted in limits.items():
        _, hard = resource.getrlimit(kind)
        value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (value, value))
