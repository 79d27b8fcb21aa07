"""The confinement of a device worker and its keeper, should a guest take them over.

The keeper goes first, once, when its sockets are bound: it never opens a file again, so its root is empty and it has
no network; it keeps CAP_SETUID and CAP_SETGID (its workers get a user of their own), CAP_KILL (it ends them) and the
right to remove its sockets by a descriptor of their directory. It keeps fork, and therefore has no system-call filter
of its own: it parses no byte that a guest wrote, and what QEMU says it relays.

Each worker, a fork, has that already and gives up the rest, in this order since each step needs the ones before undone:
its user and every capability, its limits, its files, its system calls. Nothing here can be taken back. A layer that
this host does not have is named in the report and the others stand: who may run a guest without root is not refused
for it.
"""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from rayos_vmm.host import landlock, privilege
from rayos_vmm.worker import seccomp

#: "trap" is for tests: a refused system call is named on standard error before the worker ends. "off" is for figures.
Mode = Literal["on", "trap", "off"]

#: Private memory (heap, not guest memory or pixels) beyond what a full console and a picture in flight take.
HEADROOM_BYTES: Final = 256 << 20
#: Code, libraries and rings, as address space.
CODE_BYTES: Final = 1 << 30
#: Guest memory is mapped by each device, and twice while the table is exchanged.
MAPPINGS: Final = 2
#: Descriptors: five for each of 64 queues, with room.
DESCRIPTORS: Final = 1024
#: Threads the kernel may run for io_uring in our name; the filter lets nobody start a process.
KERNEL_WORKERS: Final = 64


@dataclass(frozen=True, slots=True)
class Bounds:
    """The bounds of one worker. `uid` 0: stays who it is; `memory_bytes` 0: unknown."""

    uid: int = 0
    devices: int = 1
    memory_bytes: int = 0
    shared_bytes: int = 0

    @property
    def limits(self) -> dict[int, int]:
        """rlimits. FSIZE stays open: a disk image is a file."""
        limits = {
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_NPROC: KERNEL_WORKERS,
            resource.RLIMIT_NOFILE: DESCRIPTORS,
            resource.RLIMIT_DATA: HEADROOM_BYTES + self.shared_bytes,
        }
        if self.memory_bytes:
            mapped = MAPPINGS * self.devices * self.memory_bytes + 2 * self.shared_bytes
            limits[resource.RLIMIT_AS] = CODE_BYTES + mapped
        return limits


def mode_wanted() -> Mode:
    """RAYOS_SANDBOX of the service: "trap" names refused system calls, "off" is for comparing figures."""
    match os.environ.get("RAYOS_SANDBOX", "on"):
        case "trap":
            return "trap"
        case "off":
            return "off"
        case _:
            return "on"


class Report:
    """Layer -> {"on": whether it holds, "what": in words}, as `KeeperClient.status` gives it."""

    def __init__(self) -> None:
        self.layers: dict[str, dict[str, Any]] = {}

    def layer(self, name: str, apply: Callable[[], str]) -> None:
        """Apply one layer and note how it went."""
        try:
            what = apply()
        except (OSError, ValueError) as error:
            self.missing(name, str(error))
        else:
            self.layers[name] = {"on": True, "what": what}

    def missing(self, name: str, why: str) -> None:
        self.layers[name] = {"on": False, "what": why}


def confine_keeper(mode: Mode = "on") -> Report:
    """Apply to the keeper, when everything it needs is open. Never raises: see `Report`."""
    report = Report()
    if mode == "off":
        return report
    prepare()
    if os.geteuid() != 0:
        for name in ("namespaces", "root"):
            report.missing(name, f"needs root; this is user {os.geteuid()}")
    else:
        report.layer("namespaces", _namespaces)
        report.layer("root", _root)
        report.layer("keeper", _keeper_capabilities)
    privilege.no_new_privileges()
    privilege.limit({resource.RLIMIT_CORE: 0, resource.RLIMIT_NOFILE: 4 * DESCRIPTORS})
    return report


def _namespaces() -> str:
    privilege.unshare(privilege.CLONE_NEWNET | privilege.CLONE_NEWIPC | privilege.CLONE_NEWUTS)
    return "network, IPC and UTS of its own"


def _root() -> str:
    privilege.empty_root()
    return "empty, read-only"


def _keeper_capabilities() -> str:
    privilege.drop_bounding_set()
    privilege.keep_capabilities(privilege.CAP_SETUID, privilege.CAP_SETGID, privilege.CAP_KILL)
    return "CAP_SETUID, CAP_SETGID, CAP_KILL"


def confine_worker(bounds: Bounds, inherited: Report, mode: Mode = "on") -> Report:
    """Apply to a worker that holds every descriptor it will ever open itself. Never raises: see `Report`."""
    report = Report()
    report.layers.update(inherited.layers)
    if mode == "off":
        return report
    if bounds.uid and os.geteuid() == 0:
        report.layer("user", lambda: _user(bounds.uid))
    else:
        why = "no user of its own was given" if os.geteuid() == 0 else "needs root"
        report.missing("user", f"stays user {os.geteuid()}: {why}")
    report.layer("capabilities", _no_capabilities)
    report.layer("limits", lambda: _limits(bounds))
    report.layer("landlock", _landlock)
    report.layer("seccomp", lambda: seccomp.install("trap" if mode == "trap" else "kill"))
    return report


def _user(uid: int) -> str:
    privilege.become(uid)
    return str(uid)


def _no_capabilities() -> str:
    privilege.keep_capabilities()
    privilege.no_new_privileges()
    return "none, none to be gained"


def _limits(bounds: Bounds) -> str:
    privilege.not_dumpable()
    limits = bounds.limits
    privilege.limit(limits)
    space = limits.get(resource.RLIMIT_AS)
    return (
        f"{limits[resource.RLIMIT_DATA] >> 20} MiB of private memory, "
        + (f"{space >> 20} MiB of address space, " if space else "")
        + f"{DESCRIPTORS} descriptors, {KERNEL_WORKERS} tasks, no core"
    )


def _landlock() -> str:
    return landlock.restrict()


def prepare() -> None:
    """Load what Python would load late, while there are files. Cheap when it was done (before the fork)."""
    import encodings.idna  # socket names
    import linecache  # a traceback
    import traceback

    del encodings, linecache, traceback
    ctypes.get_errno()
