"""A worker is moved to another processor under a guest that writes, verifies and is pinged: nothing is lost."""

from __future__ import annotations

import os
import socket
import struct

import msgspec
import pytest
import trio

from rayos_vmm.errors import Invalid
from rayos_vmm.hardware.client import KeeperClient
from rayos_vmm.testing.daemon import PrivateDaemon
from rayos_vmm.testing.ping import ECHO_REPLY, request
from rayos_vmm.testing.pytest_plugin import GuestFactory

pytestmark = [pytest.mark.guest, pytest.mark.root]

MOVES = 20
VERIFY = """
    for round in $(seq 12); do
        dd if=/dev/urandom of=/tmp/data bs=64k count=4 2>/dev/null
        dd if=/tmp/data of=/dev/vda bs=64k seek=$((round * 4)) conv=fsync 2>/dev/null || exit 1
        echo 3 >/proc/sys/vm/drop_caches
        dd if=/dev/vda bs=64k skip=$((round * 4)) count=4 2>/dev/null | cmp -s - /tmp/data || exit 2
    done
"""


async def echoes(address: str, sent: set[int], heard: list[int], done: trio.Event) -> None:
    """Asks fifty times a second until `done`, and notes every answer, then waits for those on their way."""
    identifier = os.getpid() & 0xFFFF
    with trio.socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:

        async def listen() -> None:
            while True:
                packet, (sender, _) = await sock.recvfrom(2048)
                kind, _, _, who, which = struct.unpack_from("!BBHHH", packet, 4 * (packet[0] & 15))
                if (sender, kind, who) == (address, ECHO_REPLY, identifier):
                    heard.append(which)
                    if done.is_set() and sent <= set(heard):
                        nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            while not done.is_set():
                sequence = len(sent)
                sent.add(sequence)
                await sock.sendto(request(identifier, sequence), (address, 0))
                await trio.sleep(0.02)
            nursery.cancel_scope.deadline = trio.current_time() + 10


async def test_moved_under_disk_and_network_load(
    guest_factory: GuestFactory, rayos_daemon: PrivateDaemon
) -> None:
    """Twenty times: no request fails, every frame is answered once, and no worker counts as having died."""
    client = rayos_daemon.client
    cores = sorted(os.sched_getaffinity(0))
    pids: set[int] = set()
    sent: set[int] = set()
    heard: list[int] = []
    async with guest_factory(disk="64MiB", tpm=False) as guest:
        view = await guest.view()
        assert view.address is not None
        path = f"/vms/{view.spec.name}/worker"
        done = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(echoes, view.address, sent, heard, done)
            nursery.start_soon(lambda: guest.succeed(VERIFY, timeout=120))
            for turn in range(MOVES):
                core = cores[turn % len(cores)]
                made = msgspec.json.decode(await client.request("POST", path, body={"core": core}))
                assert made["core"] == core and made["pause_ms"] > 0
                load = msgspec.json.decode(await client.request("GET", "/scalability/load"))
                (worker,) = [one for one in load["workers"] if one["vm"] == view.spec.name]
                assert worker["core"] == core
                assert os.sched_getaffinity(worker["pid"]) == {core}
                pids.add(worker["pid"])
            done.set()
        assert len(pids) == MOVES and load["moves"] >= MOVES
        assert sorted(heard) == sorted(sent), f"of {len(sent)} echoes {len(heard)} came back"
        await guest.succeed(VERIFY, timeout=120)
        log = await guest.succeed("dmesg")
        assert not [line for line in log.splitlines() if "error" in line.lower() and "vd" in line]
        keeper = KeeperClient(rayos_daemon.paths.vm_runtime(view.spec.name))
        status = await keeper.status()
        keeper.close()
        assert (status["restarts"], status["moves"], status["degraded"]) == (0, MOVES, False)
        with pytest.raises(Invalid, match="cores"):
            await client.request("POST", path, body={"core": 4000})
        made = msgspec.json.decode(await client.request("POST", "/scalability/rebalance"))
        assert {"workers", "cores", "imbalance", "variance", "moves", "made"} <= set(made)
