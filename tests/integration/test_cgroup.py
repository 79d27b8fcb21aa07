"""A machine's processes are bounded together, whoever is forked later, and nothing of that is left."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest

from rayos_tpm.client import TpmClient
from rayos_vmm.config.spec import Gpu, Net, Quota, VmSpec
from rayos_vmm.errors import GuestGone
from rayos_vmm.hardware.client import KeeperClient
from rayos_vmm.hardware.keeper import WorkerHardware
from rayos_vmm.host import cgroup
from rayos_vmm.machine.view import ExitReason
from rayos_vmm.service.service import Service
from tests.integration.service_lab import home, lab, running

pytestmark = [pytest.mark.guest, pytest.mark.root]

SPEC = VmSpec(
    name="bounded",
    net=Net(enabled=False),
    gpu=Gpu(enabled=False),
    quota=Quota(cpus=1.5, cpu_weight=50, host_memory="1GiB", tasks=300),
)


def groups() -> set[Path]:
    """The machine's groups, one for each controller (or one for all)."""
    return {group for parent in cgroup.available().values() for group in parent.glob("bounded-*")}


def members(group: Path) -> set[int]:
    return set(map(int, (group / "cgroup.procs").read_text().split()))


async def processes(service: Service, runtime: Path) -> set[int]:
    """QEMU, the TPM and its swtpm, the keeper and its worker."""
    keeper = KeeperClient(runtime)
    status = await keeper.status()
    keeper.close()
    swtpm = (await TpmClient(runtime).status()).swtpm_pid
    pid = (await service.machines.get("bounded")).pid
    assert pid is not None
    return {pid, swtpm, int(status["pid"]), int(status["worker_pid"])}


async def check_bounds(service: Service, runtime: Path) -> None:
    """Each controller has its value and all of the processes, a worker's successor too."""
    said = {
        path.name: path.read_text().strip()
        for group in groups()
        for path in group.glob("*")
        if path.is_file() and path.name in VALUES
    }
    assert said.items() <= VALUES.items() and said["pids.max"] == "300"
    assert len(said) >= 4
    everybody = await processes(service, runtime)
    for group in groups():
        assert everybody <= members(group)
    keeper = KeeperClient(runtime)
    await keeper.kill_worker()
    await service.guests.stats("bounded")  # its successor answers
    successor = int((await keeper.status())["worker_pid"])
    keeper.close()
    assert successor not in everybody
    assert all(successor in members(group) for group in groups())


VALUES = {
    "pids.max": "300",
    # version 1
    "cpu.shares": "512",
    "cpu.cfs_quota_us": "150000",
    "memory.limit_in_bytes": str(1 << 30),
    # version 2
    "cpu.weight": "50",
    "cpu.max": "150000 100000",
    "memory.max": str(1 << 30),
}


async def test_a_machine_is_bounded_as_a_whole_or_says_why_not() -> None:
    """On a host without control groups a quota that needs them is refused, and the others are told."""
    async with home() as paths, lab(paths, hardware=WorkerHardware()) as service:
        if cgroup.missing():
            await service.machines.define(SPEC)
            with pytest.raises(GuestGone, match=r"quota\.(cpus|host_memory) cannot be kept"):
                await service.machines.start("bounded")
        else:
            await running(service, SPEC)
            await check_bounds(service, paths.vm_runtime("bounded"))
            await check_exhaustion(service)
        assert not groups()


async def check_exhaustion(service: Service) -> None:
    """A guest at work whose memory group is full is ended by the kernel, and its sentence names the quota."""
    group = cgroup.available()["memory"] / next(path.name for path in groups())
    is_unified = (group / "memory.max").exists()
    usage, limit = (
        ("memory.current", "memory.max") if is_unified else ("memory.usage_in_bytes", "memory.limit_in_bytes")
    )
    (group / limit).write_text(str(int((group / usage).read_text()) + (24 << 20)))
    with suppress(GuestGone):
        await service.guests.exec("bounded", "dd if=/dev/urandom of=/tmp/load bs=1M count=120", 60)
    view = await service.machines.wait("bounded", "stopped", 60)
    assert view.exit_reason in (ExitReason.QEMU_CRASHED, ExitReason.DEVICES_LOST)
    assert "used up its quota.host_memory" in view.reason
