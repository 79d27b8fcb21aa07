"""`rayos doctor --verify`: every process of every running machine is looked at, and what falls short is named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from rayos_tpm.client import TpmClient
from rayos_tpm.errors import TpmError
from rayos_vmm.client.client import Client
from rayos_vmm.hardware.client import KeeperClient
from rayos_vmm.host.probe import KINDS, of_user, seen, shortfalls
from rayos_vmm.host.process import stat_fields
from rayos_vmm.machine.view import VmView
from rayos_vmm.paths import Paths
from rayos_vmm.shared.packet import WorkerGone

_PARENT_FIELD: Final = 4  # proc_pid_stat(5)
_READERS: Final = (b"qemu-storage-daemon", b"disk_reader.py")

Looked = tuple[str, str, list[str]]


async def processes(view: VmView, paths: Paths) -> list[tuple[str, int]]:
    """(kind, process id) of each process of a machine, as they name each other; the kinds are those of `probe`."""
    runtime = paths.vm_runtime(view.spec.name)
    found: list[tuple[str, int]] = [] if view.pid is None else [("qemu", view.pid)]
    keeper = KeeperClient(runtime)
    with suppress(WorkerGone):
        status = await keeper.status()
        found += [("keeper", int(status["pid"])), ("worker", int(status["worker_pid"]))]
    keeper.close()
    with suppress(TpmError):
        swtpm = (await TpmClient(runtime).status()).swtpm_pid
        with suppress(OSError):
            found += [("tpm", int(stat_fields(swtpm)[_PARENT_FIELD])), ("swtpm", swtpm)]
    return found + [("reader", pid) for pid in _readers(runtime)]


def _readers(runtime: Path) -> Iterator[int]:
    mark = bytes(runtime) + b"/"
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if any(word.endswith(_READERS) for word in words[:4]) and any(mark in word for word in words):
                yield int(process.name)


def _known(view: VmView, paths: Paths) -> list[Path]:
    """Directories and files that a machine's processes may have open."""
    spec = view.spec
    own = [paths.vm_runtime(spec.name), paths.vm_state(spec.name), paths.cache, Path("/usr")]
    named = [spec.kernel, spec.initrd, spec.cdrom, spec.firmware, *(disk.path for disk in spec.disks)]
    return own + [Path(path) for path in named if path is not None]


async def verify(client: Client, paths: Paths) -> list[Looked]:
    """Of each process its name, what it is like, and what falls short (nothing, when it is as it ought to be)."""
    looked: list[Looked] = []
    for view in await client.machines():
        if view.pid is None:
            continue
        known, missing = _known(view, paths), set(KINDS) - {"reader"}
        if not view.spec.tpm:
            missing -= {"tpm", "swtpm"}
        for kind, pid in await processes(view, paths):
            missing.discard(kind)
            name = f"{view.spec.name}: {kind} {pid}"
            try:
                found = seen(pid)
            except OSError as error:
                looked.append((name, "", [f"it cannot be looked at: {error.strerror}"]))
                continue
            text = f"{of_user(found.uid)}, {len(found.files)} descriptors"
            looked.append((name, text, shortfalls(kind, found, known)))
        looked += [(f"{view.spec.name}: {kind}", "", ["it did not answer"]) for kind in sorted(missing)]
    return looked
