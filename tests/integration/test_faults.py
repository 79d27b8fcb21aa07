"""Faults on purpose in a running guest's disk and network card."""

from __future__ import annotations

from ipaddress import IPv4Network

import pytest
import trio

from rayos_vmm.errors import Invalid, NotFound
from rayos_vmm.testing import Guest
from rayos_vmm.testing.pytest_plugin import GuestFactory

pytestmark = [pytest.mark.guest, pytest.mark.root]

READ = "dd if=/dev/vda of=/dev/null bs=512 count=1 iflag=direct skip={}"


async def done(guest: Guest, device: str) -> list[int]:
    return [rule["done"] for rule in (await guest.faults())[device]]


async def lost(guest: Guest, host: str, count: int) -> int:
    """Of so many pings, how many had no answer."""
    once = f"ping -c 1 -W 1 {host} >/dev/null || echo lost"
    return (await guest.succeed(f"for i in $(seq {count}); do {once}; done")).count("lost")


async def test_a_disk_and_a_card_fail_on_purpose(guest_factory: GuestFactory) -> None:
    """Faults strike exactly where they were set, and outlive the worker until they are taken back. The sector that is
    to fail fails and no other, so many times; a late request is late and right; a sync that fails is told; every
    third frame is lost.
    """
    async with guest_factory(disk="64MiB", tpm=False, gpu={"enabled": False}) as guest:
        await guest.set_faults("disk0", "read:error,sector=2048,sectors=8,count=3")
        await guest.succeed(READ.format(2047), READ.format(2056))
        assert "Input/output error" in (await guest.run(READ.format(2050))).stderr.decode()
        assert 1 <= (await done(guest, "disk0"))[0] <= 3  # the guest's kernel may have tried again
        await guest.wait_until_succeeds(READ.format(2050), timeout=30)
        assert (await done(guest, "disk0")) == [3]

        await guest.kill_worker()
        await guest.set_faults("disk0", "read:delay,delay=2s,sector=4096,count=1", "flush:error,nth=2")
        before = trio.current_time()
        await guest.succeed(READ.format(4096))
        assert trio.current_time() - before >= 2
        await guest.succeed("echo 1 >/sys/block/vda/queue/write_cache 2>/dev/null || true")
        write = "dd if=/dev/zero of=/dev/vda bs=4096 count=1 conv=fsync"
        assert [(await guest.run(write)).exit_status for _ in range(3)].count(1) == 1
        assert await done(guest, "disk0") == [1, 1]
        await guest.set_faults("disk0")
        await guest.succeed(write)

        host = str(next(IPv4Network(f"{(await guest.view()).address}/24", strict=False).hosts()))
        assert await lost(guest, host, 3) == 0
        await guest.set_faults("net", "tx:drop,every=3")
        assert await lost(guest, host, 6) >= 1
        await guest.kill_worker()
        assert await lost(guest, host, 6) >= 1
        assert (await done(guest, "net"))[0] > 0
        await guest.set_faults("net", "tx:delay,delay=300ms", "rx:drop,probability=0.5", seed=3)
        await lost(guest, host, 4)
        late, dropped = await done(guest, "net")
        assert late >= 4 and dropped >= 1
        await guest.set_faults("net")
        assert await lost(guest, host, 3) == 0
        assert await guest.faults() == {}

        with pytest.raises(NotFound, match="no device 'console'; there are: disk0, net"):
            await guest.set_faults("console", "read:error")
        with pytest.raises(Invalid, match="allowed are delay, error"):
            await guest.set_faults("disk0", "read:drop")
