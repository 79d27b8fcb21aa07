"""A worker that dies is replaced, and the guest notices nothing.

Each test kills the worker many times while one device is busy, and afterwards asks every device (`CHECKS`) whether it
still works. QEMU must not have seen a disconnect, the guest's kernel must not have seen an error.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import trio

from rayos_devices.kinds import KINDS
from rayos_vmm.testing.checks import CHECKS
from rayos_vmm.testing.daemon import PrivateDaemon
from rayos_vmm.testing.guest import Guest
from rayos_vmm.testing.pytest_plugin import GuestFactory

pytestmark = [pytest.mark.guest, pytest.mark.root]

SECONDS_BETWEEN_KILLS = 0.1
ENOUGH_KILLS = 10
#: Written, synced, dropped from the guest's cache, read back: every round the same bytes.
VERIFIED_WRITES = """
    for round in $(seq 30); do
        dd if=/dev/urandom of=/tmp/data bs=64k count=4 2>/dev/null
        dd if=/tmp/data of=/dev/vda bs=64k seek=$((round * 4)) conv=fsync 2>/dev/null || exit 1
        echo 3 >/proc/sys/vm/drop_caches
        dd if=/dev/vda bs=64k skip=$((round * 4)) count=4 2>/dev/null | cmp -s - /tmp/data || exit 2
    done
"""


@dataclass
class Kills:
    """How many workers died, by pid: none is counted twice."""

    pids: set[int]


@asynccontextmanager
async def killing(guest: Guest) -> AsyncIterator[Kills]:
    """Kills the guest's worker again and again inside the block."""
    kills = Kills(set())

    async def kill_again_and_again() -> None:
        while True:
            await trio.sleep(SECONDS_BETWEEN_KILLS)
            kills.pids.add(await guest.kill_worker())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(kill_again_and_again)
        yield kills
        nursery.cancel_scope.cancel()


async def check_all(guest: Guest, daemon: PrivateDaemon) -> None:
    """Every device works, and the guest's kernel has nothing to complain of."""
    for check in CHECKS.values():
        await check(guest, daemon)
    log = await guest.succeed("dmesg")
    complaints = [line for line in log.splitlines() if "error" in line.lower() and "vd" in line]
    assert not complaints, complaints


async def test_killed_under_disk_writes_that_are_verified(
    guest_factory: GuestFactory, rayos_daemon: PrivateDaemon
) -> None:
    """Written, synced, dropped from the guest's cache, read back: every round the same bytes."""
    async with guest_factory(disk="64MiB") as guest:
        async with killing(guest) as kills:
            while len(kills.pids) < ENOUGH_KILLS:
                await guest.succeed(VERIFIED_WRITES, timeout=120)
        await check_all(guest, rayos_daemon)


async def test_killed_while_typing(guest_factory: GuestFactory, rayos_daemon: PrivateDaemon) -> None:
    """Typed characters arrive once each, in order: on the console, and on the keyboard."""
    typed = "".join(random.Random(1).choices("abcdefghijklmnopqrstuvwxyz0123456789\n", k=6000)) + "\n"
    async with guest_factory(disk="64MiB") as guest:
        await guest.console.send("stty -echo; cat >/tmp/typed; echo all-$((6*7))\n")
        await trio.sleep(0.5)
        async with killing(guest) as kills:
            for start in range(0, len(typed), 100):
                await guest.console.send(typed[start : start + 100])
            await guest.console.send("\x04")
            await guest.console.expect("all-42", timeout=30)
            find = "grep -l 'RayOS keyboard' /sys/class/input/event*/device/name | cut -d/ -f5"
            node = (await guest.succeed(find)).strip()
            await guest.succeed(f"cat /dev/input/{node} >/tmp/keys 2>/dev/null & echo $! >/tmp/pid")
            bursts = 0
            while bursts < 20 or len(kills.pids) < ENOUGH_KILLS:
                bursts += 1
                # A reader in the guest has a buffer of 64 events, and Linux drops what does not fit.
                await guest.send_chars("a" * 5)
                await guest.wait_until_succeeds(
                    f"[ $(wc -c </tmp/keys) -ge {bursts * 5 * 4 * 24} ]", timeout=30
                )
        assert (await guest.read_file("/tmp/typed")).decode() == typed
        keys = await guest.read_file("/tmp/keys")
        values = [
            keys[at + 20] for at in range(0, len(keys), 24) if keys[at + 16 : at + 20] == b"\x01\x00\x1e\x00"
        ]
        assert values == [1, 0] * 5 * bursts
        await guest.succeed("kill $(cat /tmp/pid)")
        await check_all(guest, rayos_daemon)


async def test_killed_while_drawing(guest_factory: GuestFactory, rayos_daemon: PrivateDaemon) -> None:
    """The picture is drawn on, and in the end it is the right one, ours and QEMU's."""
    async with guest_factory(disk="64MiB") as guest:
        async with killing(guest) as kills:
            draw = "dd if=/dev/urandom of=/dev/fb0 bs=64k count=16 seek=$((n % 40)) 2>/dev/null"
            while len(kills.pids) < ENOUGH_KILLS:
                await guest.succeed(f"for n in $(seq 60); do {draw}; done", timeout=120)
        await check_all(guest, rayos_daemon)


async def test_killed_in_packed_rings(guest_factory: GuestFactory, rayos_daemon: PrivateDaemon) -> None:
    """Linux has accepted them (bit 34) on every device, uses them all, and loses nothing when the worker dies."""
    accepted = (
        "cd /sys/bus/virtio/devices; for d in *; do echo $(cat $d/device) $(cut -c35 $d/features); done"
    )
    async with guest_factory(disk="64MiB", packed=True) as guest:
        lines = (await guest.succeed(accepted)).split("\n")
        found = {(int(line.split()[0], 16), line.split()[1]) for line in lines if line}
        assert found == {(kind.virtio_id, "1") for kind in KINDS.values()}
        async with killing(guest) as kills:
            while len(kills.pids) < ENOUGH_KILLS:
                await guest.succeed(VERIFIED_WRITES, timeout=120)
        await check_all(guest, rayos_daemon)
