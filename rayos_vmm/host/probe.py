"""Finds out what a running process may still do, from the kernel's own word (proc_pid_status(5), namespaces(7)).

Nothing that the process says of itself is believed. `seen` looks, `shortfalls` compares with what is expected of its
kind; both need to be root to see other users' processes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rayos_vmm.host import privilege

#: Users of machines' processes begin here (`host/identity.py`).
_FIRST_USER: Final = 1_900_000_000
_FILTERED: Final = 2  # proc_pid_status(5): Seccomp, SECCOMP_MODE_FILTER
#: No files: what their names stand for reaches nothing.
_HARMLESS: Final = (
    "/memfd:",
    "/dev/null",
    "/dev/zero",
    "/dev/urandom",
    "/dev/net/tun",
    "/dev/kvm",
    "/dev/fuse",
)


@dataclass(frozen=True, slots=True)
class Seen:
    """A process as it is. `capabilities` and `gainable` (its bounding set) are sets of bits."""

    uid: int
    capabilities: int
    gainable: int
    has_no_new_privileges: bool
    is_filtered: bool
    has_own_network: bool
    root: tuple[str, ...]
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Expected:
    """The confinement of a kind of process. `root` None: whatever its program needs."""

    has_own_user: bool = True
    capabilities: frozenset[int] = frozenset()
    is_filtered: bool = True
    is_root_empty: bool = False


KINDS: Final[dict[str, Expected]] = {
    "worker": Expected(is_root_empty=True),
    "keeper": Expected(
        has_own_user=False,
        capabilities=frozenset({privilege.CAP_SETUID, privilege.CAP_SETGID, privilege.CAP_KILL}),
        is_filtered=False,
        is_root_empty=True,
    ),
    "tpm": Expected(),
    "swtpm": Expected(),
    "qemu": Expected(),
    "reader": Expected(
        has_own_user=False,
        capabilities=frozenset({privilege.CAP_SYS_ADMIN, privilege.CAP_DAC_OVERRIDE}),
        is_filtered=False,
    ),
}


def seen(pid: int) -> Seen:
    """Looks at a process. Errors: OSError when it is gone or may not be looked at."""
    process = Path(f"/proc/{pid}")
    status = dict(
        line.split(":", 1) for line in (process / "status").read_text("ascii", "replace").splitlines()
    )
    files = []
    for entry in (process / "fd").iterdir():
        try:
            files.append(str(entry.readlink()))
        except FileNotFoundError:
            continue  # closed meanwhile
    return Seen(
        uid=int(status["Uid"].split()[1]),
        capabilities=int(status["CapEff"], 16) | int(status["CapPrm"], 16),
        gainable=int(status["CapBnd"], 16),
        has_no_new_privileges=int(status["NoNewPrivs"]) == 1,
        is_filtered=int(status["Seccomp"]) == _FILTERED,
        has_own_network=(process / "ns/net").readlink() != Path("/proc/self/ns/net").readlink(),
        root=tuple(sorted(entry.name for entry in (process / "root").iterdir())),
        files=tuple(sorted(files)),
    )


def foreign(files: Sequence[str], known: Sequence[Path]) -> list[str]:
    """The open files that are below none of the `known` directories, and are none of them."""
    return [
        name
        for name in dict.fromkeys(name.removesuffix(" (deleted)") for name in files)
        if name.startswith("/")
        and not name.startswith(_HARMLESS)
        and not any(Path(name).is_relative_to(path) for path in known)
    ]


def shortfalls(kind: str, found: Seen, known: Sequence[Path]) -> list[str]:
    """In words, each thing that a process of a kind may and should not; empty when it is confined as it ought to be.

    Args:
        kind: one of KINDS.
        known: directories and files that a process of its machine may have open.
    """
    wanted = KINDS[kind]
    allowed = sum(1 << capability for capability in wanted.capabilities)
    faults = []
    if wanted.has_own_user and found.uid < _FIRST_USER:
        faults.append(f"it is user {found.uid}, not one of its machine's own")
    if extra := found.capabilities & ~allowed:
        faults.append(f"it has capabilities {extra:#x} too many")
    if extra := found.gainable & ~allowed:
        faults.append(f"it can gain capabilities {extra:#x}")
    if not found.has_no_new_privileges:
        faults.append("a program that it executes may gain privileges")
    if wanted.is_filtered and not found.is_filtered:
        faults.append("no filter of system calls")
    if not found.has_own_network:
        faults.append("it has the host's network")
    if wanted.is_root_empty and found.root:
        faults.append(f"its root holds {', '.join(found.root[:5])}")
    elif {"home", "root", "boot", "srv"} & set(found.root):
        faults.append("its root is the host's")
    if others := foreign(found.files, known):
        faults.append(f"it holds {', '.join(others[:5])}")
    return faults


def of_user(uid: int) -> str:
    """The user in words."""
    return "root" if uid == os.geteuid() == 0 else f"user {uid}"
