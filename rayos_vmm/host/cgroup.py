"""A machine's processes as one: a control group with its weight, its processors, its memory, its number of tasks.

QEMU, the TPM and its swtpm, the keeper and its workers are in one group below `rayos`; whatever they fork later is born
in it. Version 2 has one tree for all controllers, version 1 one for each (Linux, admin-guide/cgroup-v2.rst and
cgroup-v1/). Invariant: a group goes with its machine; when the service was killed, the next one takes it away with what
else is left of that.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from rayos_vmm.config.spec import Quota
from rayos_vmm.errors import GuestGone

ROOT: Final = Path("/sys/fs/cgroup")
CONTROLLERS: Final = ("cpu", "memory", "pids")
PERIOD_US: Final = 100_000
PARENT: Final = "rayos"
_REMOVE_TRIES: Final = 25
_REMOVE_PAUSE_S: Final = 0.02


def available(root: Path = ROOT) -> dict[str, Path]:
    """The directory in which each controller's groups go; without the controllers that this host or user lacks."""
    if os.geteuid():
        return {}
    if (root / "cgroup.controllers").exists():
        offered = (root / "cgroup.controllers").read_text().split()
        return {name: root / PARENT for name in CONTROLLERS if name in offered and os.access(root, os.W_OK)}
    return {
        name: root / name / PARENT
        for name in CONTROLLERS
        if (root / name / "cgroup.procs").exists() and os.access(root / name, os.W_OK)
    }


def missing(root: Path = ROOT, there: Collection[str] | None = None) -> str:
    """Why machines have no control group of their own, or not all of one; empty when they have.

    `there` is what `available` said, where the caller has asked.
    """
    if os.geteuid():
        return "control groups need root"
    found = available(root) if there is None else there
    lacking = [name for name in CONTROLLERS if name not in found]
    return f"no control group for {', '.join(lacking)} below {root}" if lacking else ""


def _make(groups: Mapping[str, Path], root: Path, *, is_unified: bool) -> None:
    """Raises OSError."""
    for group in set(groups.values()):
        group.mkdir(parents=True, exist_ok=True)
    if is_unified:
        for directory in (root, root / PARENT):
            for name in groups:
                (directory / "cgroup.subtree_control").write_text(f"+{name}")


def _settings(quota: Quota, *, is_unified: bool) -> Iterator[tuple[str, str, str, str]]:
    """(controller, file, value, the key of the quota when it was asked for)."""
    cpus, memory = quota.cpus, quota.host_memory_bytes
    if is_unified:
        yield "cpu", "cpu.weight", str(quota.cpu_weight), ""
        if cpus is not None:
            yield "cpu", "cpu.max", f"{round(cpus * PERIOD_US)} {PERIOD_US}", "cpus"
        if memory is not None:
            yield "memory", "memory.max", str(memory), "host_memory"
    else:
        yield "cpu", "cpu.shares", str(max(2, quota.cpu_weight * 1024 // 100)), ""
        if cpus is not None:
            yield "cpu", "cpu.cfs_period_us", str(PERIOD_US), "cpus"
            yield "cpu", "cpu.cfs_quota_us", str(round(cpus * PERIOD_US)), "cpus"
        if memory is not None:
            yield "memory", "memory.limit_in_bytes", str(memory), "host_memory"
    yield "pids", "pids.max", str(quota.tasks), ""


def _family(pids: Sequence[int]) -> list[int]:
    """The processes and their descendants."""
    found: list[int] = []
    waiting = list(pids)
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            with suppress(OSError):
                waiting += map(int, children.read_text().split())
    return found


def enclose(group: str, quota: Quota, pids: Sequence[int], *, root: Path = ROOT) -> str:
    """Puts a machine's processes into a `group` of their own with what its quota says; blocking.

    Returns why that is not (wholly) so, for a host that cannot and a quota that does not ask for it; else "".

    Raises:
        GuestGone: the quota asks for what this host does not have.
    """
    is_unified = (root / "cgroup.controllers").exists()
    groups = {name: parent / group for name, parent in available(root).items()}
    try:
        _make(groups, root, is_unified=is_unified)
        for controller, file, value, key in _settings(quota, is_unified=is_unified):
            if controller in groups:
                (groups[controller] / file).write_text(value)
            elif key:
                raise GuestGone(
                    f"quota.{key} cannot be kept: {missing(root, groups)}",
                    hint=f"leave quota.{key} out",
                    code="no_cgroup",
                )
        for _ in range(2):  # a process that is forked meanwhile is there the second time
            for pid in _family(pids):
                for directory in set(groups.values()):
                    with suppress(ProcessLookupError):
                        (directory / "cgroup.procs").write_text(str(pid))
    except OSError as error:
        raise GuestGone(f"the control group {error.filename}: {error.strerror}", code="no_cgroup") from None
    return missing(root, groups)


def memory_kills(group: str, *, root: Path = ROOT) -> int:
    """How many processes of a group the kernel has killed because its memory was used up; 0 where it does not say."""
    for path in (
        root / PARENT / group / "memory.events",
        root / "memory" / PARENT / group / "memory.oom_control",
    ):
        with suppress(OSError):
            counted = dict(line.split() for line in path.read_text().splitlines())
            return int(counted.get("oom_kill", 0))
    return 0


def remove(group: str, *, root: Path = ROOT) -> None:
    """Removes a machine's group once its processes are gone, for which it waits a moment. Blocking."""
    for directory in (root / PARENT, *(root / controller / PARENT for controller in CONTROLLERS)):
        for _ in range(_REMOVE_TRIES):
            try:
                (directory / group).rmdir()
            except OSError as error:
                if error.errno == errno.EBUSY:  # the kernel has not forgotten the last process yet
                    time.sleep(_REMOVE_PAUSE_S)
                    continue
            break
        with suppress(OSError):
            directory.rmdir()  # the last one takes it away
