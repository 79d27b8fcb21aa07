"""The entropy device as a Linux guest has it: there by default, fast enough, bounded, and not there when unwanted."""

from __future__ import annotations

import pytest

from rayos_vmm.config.spec import Gpu, Net, VmSpec
from rayos_vmm.hardware.client import KeeperClient
from rayos_vmm.hardware.keeper import WorkerHardware
from tests.integration.service_lab import home, lab, running

pytestmark = [pytest.mark.guest, pytest.mark.root]

SPEC = VmSpec(name="svc", net=Net(enabled=False), tpm=False, gpu=Gpu(enabled=False))
READ = "head -c 4096 /dev/hwrng | sha256sum"


async def test_a_guest_has_a_source_of_random_bytes() -> None:
    """Linux has taken it up, reads other bytes each time, and goes on when the worker is replaced."""
    async with home() as paths, lab(paths, hardware=WorkerHardware()) as service:
        await running(service, SPEC)

        async def said(command: str) -> str:
            result = await service.guests.exec("svc", command, 30)
            assert result.exit_status == 0, result
            return result.stdout.decode().strip()

        await said("until [ -c /dev/hwrng ]; do usleep 50000; done")
        assert await said("cat /sys/class/misc/hw_random/rng_current") == "virtio_rng.0"
        first = await said(READ)
        keeper = KeeperClient(paths.vm_runtime("svc"))
        await keeper.kill_worker()
        keeper.close()
        assert await said(READ) != first
        device = service.accounts.device("svc", "rng", 0)
        assert device.operations["rng.read"].bytes >= 4096
        assert device.limits == {"rate": 1 << 20}
