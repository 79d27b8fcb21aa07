"""The network card as the Linux driver uses it: every feature bit, the control queue, several queues, the cable."""

from __future__ import annotations

import io
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from scapy.layers.inet import ICMP
from scapy.layers.l2 import Ether
from scapy.utils import RawPcapNgReader

from rayos_vmm.config.firewall import FirewallConfig, FirewallRule
from rayos_vmm.config.spec import Net, Quota, VmSpec
from rayos_vmm.errors import Invalid
from rayos_vmm.hardware.client import KeeperClient, WorkerClient
from rayos_vmm.hardware.keeper import WorkerHardware
from rayos_vmm.service.service import Service
from rayos_vmm.shared.packet import WorkerError
from tests.integration.service_lab import BRIDGE, home, lab, running

pytestmark = [pytest.mark.guest, pytest.mark.root]

CARD = VmSpec(
    name="svc",
    cpus=2,
    tpm=False,
    net=Net(mtu=1400, queues=2),
    quota=Quota(net_rate="10Gbit/s"),
    firewall=FirewallConfig(rules=[FirewallRule(name="host", action="allow")]),
)
# linux/if_packet.h, linux/if_ether.h
SOL_PACKET, PACKET_AUXDATA, ETH_P_ALL = 263, 8, 3
#: VIRTIO 1.3, 5.1.3: what the driver must have accepted, and who answers for it.
FEATURES = {
    "CSUM": 0,
    "GUEST_CSUM": 1,
    "MTU": 3,
    "GUEST_TSO4": 7,
    "GUEST_TSO6": 8,
    "HOST_TSO4": 11,
    "HOST_TSO6": 12,
    "MRG_RXBUF": 15,
    "STATUS": 16,  # QEMU's, as are the control queue and its commands
    "CTRL_VQ": 17,
    "CTRL_RX": 18,
    "CTRL_VLAN": 19,
    "GUEST_ANNOUNCE": 21,
    "MQ": 22,
    "CTRL_MAC_ADDR": 23,
}
#: `ethtool -L eth0 combined N`, which busybox lacks: SIOCETHTOOL with ETHTOOL_SCHANNELS (linux/ethtool.h).
CHANNELS = r"""
static long call(long n, long a, long b, long c) {
    long r; __asm__ volatile("syscall" : "=a"(r) : "a"(n), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory"); return r;
}
__attribute__((force_align_arg_pointer)) void _start(void) {
    long *stack = __builtin_frame_address(0); char **argv = (char **)(stack + 2);
    unsigned channels[9] = {0x3d, 0, 0, 0, 0, 0, 0, 0, argv[1][0] - '0'};
    struct { char name[16]; void *data; char rest[16]; } request = {"eth0", channels, ""};
    call(60, call(16, call(41, 2, 2, 0), 0x8946, (long)&request) ? 1 : 0, 0, 0);
}
"""


def packets(data: bytes) -> list[tuple[bytes, Any]]:
    """The packets of a capture with what stands beside them, as scapy reads it."""
    return list(RawPcapNgReader(io.BytesIO(data)))  # type: ignore[arg-type]  # it takes files, too


async def succeed(service: Service, command: str) -> str:
    result = await service.guests.exec("svc", command, 60)
    assert result.exit_status == 0, (command, result)
    return result.stdout.decode()


async def ping(service: Service, target: str, *, cpu: int = 0) -> None:
    """The guest reaches `target` from one of its processors, whose queues carry it."""
    await succeed(service, f"taskset {1 << cpu:x} ping -c 2 -W 10 {target}")


async def requests(service: Service) -> list[int]:
    """Chains that each queue has carried."""
    return [queue["requests"] for queue in (await service.guests.stats("svc"))["net"]["queues"]]


@asynccontextmanager
async def card() -> AsyncIterator[tuple[Service, Any]]:
    async with home() as paths, lab(paths, hardware=WorkerHardware(), network=True) as service:
        await running(service, CARD)
        yield service, paths


def compile_channels(folder: Path) -> bytes:
    source, program = folder / "channels.c", folder / "channels"
    source.write_text(CHANNELS)
    options = ["-O1", "-static", "-nostdlib", "-fno-stack-protector", "-w"]
    subprocess.run([shutil.which("gcc") or "cc", *options, str(source), "-o", str(program)], check=True)
    return program.read_bytes()


async def test_the_linux_driver_uses_what_the_card_offers(tmp_path: Path) -> None:
    """Offloads, MTU, queue pairs, MAC, VLAN, receive mode, cable, announcement: as guest and network see them."""
    async with card() as (service, paths):
        bits = (await succeed(service, "cat /sys/class/net/eth0/device/features")).strip()
        assert {name for name, bit in FEATURES.items() if bits[bit] != "1"} == set()
        assert (await succeed(service, "cat /sys/class/net/eth0/mtu")).strip() == "1400"
        host = str((await trio.to_thread.run_sync(bridge_address)).split("/")[0])
        await queue_pairs(service, host, compile_channels(tmp_path))
        await segments(service, host)
        await capture(service, host, paths)
        await polling(service, host, paths)
        await control_queue(service, host)
        await cable(service, host)
        await stops(service, host)
        keeper = KeeperClient(paths.vm_runtime("svc"))
        await keeper.kill_worker()
        keeper.close()
        for cpu in (0, 1):
            await ping(service, host, cpu=cpu)


def bridge_address() -> str:
    shown = subprocess.run(
        ["ip", "-o", "-4", "addr", "show", BRIDGE], check=True, capture_output=True, text=True
    )
    return shown.stdout.split()[3]


async def queue_pairs(service: Service, host: str, channels: bytes) -> None:
    """Frames of a processor come back on its own queue; a pair that the driver gives up is not used."""
    for cpu in (0, 1):
        await ping(service, host, cpu=cpu)
        before = await requests(service)
        await ping(service, host, cpu=cpu)
        moved = [after - old for after, old in zip(await requests(service), before, strict=True)]
        assert all(moved[2 * cpu : 2 * cpu + 2]), (cpu, moved)
    await service.guests.write_file("svc", "/tmp/channels", channels, 0o755)
    await succeed(service, "/tmp/channels 1")
    before = await requests(service)
    for cpu in (0, 1):
        await ping(service, host, cpu=cpu)
    assert (await requests(service))[2:] == before[2:]
    await succeed(service, "/tmp/channels 2")
    await ping(service, host, cpu=1)
    assert (await requests(service))[3] > before[3]


async def segments(service: Service, host: str) -> None:
    """TCP passes in segments far above the MTU, both ways: one frame, one system call, no checksum of ours."""
    size = 8 << 20
    received = 0

    async def serve(listener: socket.socket, *, sends: bool) -> None:
        nonlocal received
        async with trio.SocketListener(trio.socket.from_stdlib_socket(listener)) as accepting:
            async with await accepting.accept() as stream:
                if sends:
                    await stream.send_all(os.urandom(size))
                    return
                async for data in stream:
                    received += len(data)

    commands = {
        "net.tx": f"head -c {size} /dev/urandom | nc {host} {{}} && echo {size}",
        "net.rx": f"nc {host} {{}} </dev/null | wc -c",
    }
    for direction, command in commands.items():
        before = (await service.guests.stats("svc"))["net"]["operations"][direction]
        listener = socket.create_server((host, 0))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(serve, listener, sends=direction == "net.rx"))
            assert int(await succeed(service, command.format(listener.getsockname()[1]))) == size
        after = (await service.guests.stats("svc"))["net"]["operations"][direction]
        mean = (after["bytes"] - before["bytes"]) / (after["allowed"] - before["allowed"])
        assert mean > CARD.net.mtu + 14, (direction, mean)
    assert received == size


async def capture(service: Service, host: str, paths: Any) -> None:
    """Scapy reads the guest's pings and their answers out of it; it ends by count and by leaving."""
    pieces = service.guests.capture("svc", count=40)
    data = await anext(pieces)
    with pytest.raises(Invalid, match="captured already"):
        await anext(service.guests.capture("svc"))
    await succeed(service, f"ping -c 10 -i 0.01 -s 1000 -W 10 {host}")
    keeper = KeeperClient(paths.vm_runtime("svc"))
    await keeper.kill_worker()
    keeper.close()
    async with trio.open_nursery() as nursery:

        async def ping_on() -> None:
            while True:
                await succeed(service, f"ping -c 5 -i 0.01 -s 1000 -W 10 {host}")

        nursery.start_soon(ping_on)
        async with aclosing(pieces):
            async for piece in pieces:
                data += piece
        nursery.cancel_scope.cancel()
    frames = packets(data)
    assert len(frames) == 40
    echoes = [(Ether(frame)[ICMP], meta.direction) for frame, meta in frames if ICMP in Ether(frame)]
    out = {(icmp.id, icmp.seq): bytes(icmp.payload) for icmp, direction in echoes if direction == 2}
    back = {(icmp.id, icmp.seq): bytes(icmp.payload) for icmp, direction in echoes if direction == 1}
    assert len(out) >= 10 and all(len(data) == 1000 for data in out.values())
    both = out.keys() & back.keys()
    assert len(both) >= 9 and all(out[one] == back[one] for one in both)
    async with aclosing(service.guests.capture("svc", snap=60)) as short:
        data = await anext(short)
        await succeed(service, f"ping -c 1 -s 1000 -W 10 {host}")
        while not (kept := [one for one in packets(data) if one[1].wirelen > 1000]):
            data += await anext(short)
        assert {len(frame) for frame, _ in kept} == {60}


async def polling(service: Service, host: str, paths: Any) -> None:
    """The worker looks instead of sleeping, as long as it is told to; the driver's frames pass as before."""
    worker = WorkerClient(paths.vm_runtime("svc"))
    try:
        assert (await worker.polling(1000))["budget_us"] == 1000
        await succeed(service, f"ping -c 20 -i 0.01 -W 10 {host}")
        looked = (await worker.polling(0))["seconds"]
        assert looked > 0
        for cpu in (0, 1):
            await ping(service, host, cpu=cpu)
        assert await worker.polling() == {"budget_us": 0, "window_us": 0, "seconds": looked}
        with pytest.raises(WorkerError, match=r"5000\.0 us: 0 to 1000"):
            await worker.polling(5000)
    finally:
        worker.close()


async def control_queue(service: Service, host: str) -> None:
    """MAC, receive mode and VLAN are QEMU's to take note of; frames follow them."""
    await succeed(service, "ip link set eth0 address 52:59:00:00:77:01 && ip link set eth0 promisc on")
    view = await service.guests.net("svc")
    assert (view.mac, view.promiscuous) == ("52:59:00:00:77:01", True)
    await service.guests.announce("svc")
    await ping(service, host)
    assert "52:59:00:00:77:01" in neighbours()
    await succeed(
        service, "ip link set eth0 promisc off; modprobe 8021q; ip link add link eth0 name v7 type vlan id 7"
    )
    await succeed(service, "ip addr add 10.99.7.2/24 dev v7; ip link set v7 up")
    view = await service.guests.net("svc")
    assert (view.promiscuous, 7 in view.vlans) == (False, True)
    assert await trio.to_thread.run_sync(ask_in_vlan, 7, "10.99.7.2") == 7


def ask_in_vlan(vlan: int, address: str) -> int:
    """Who has `address`, asked with a tag (this host's kernel may have no VLAN links); the tag of the answer."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL)) as wire:
        wire.bind((BRIDGE, 0))
        wire.settimeout(30)
        wire.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        mac = wire.getsockname()[4]
        tag = struct.pack(">HH", 0x8100, vlan)
        request = struct.pack(">HHHBBH", 0x0806, 1, 0x0800, 6, 4, 1)
        wire.send(b"\xff" * 6 + mac + tag + request + mac + bytes(10) + socket.inet_aton(address))
        while True:
            frame, ancillary, _, _ = wire.recvmsg(2048, socket.CMSG_SPACE(20))
            if frame[:6] == mac and frame[12:14] == b"\x08\x06" and frame[28:32] == socket.inet_aton(address):
                return int(struct.unpack_from("=IIIHHHH", ancillary[0][2])[5])


async def cable(service: Service, host: str) -> None:
    """Without it the guest has no carrier; with it the guest tells the network where it is."""
    assert not (await service.guests.set_link("svc", False)).is_up
    assert (await succeed(service, "cat /sys/class/net/eth0/carrier")).strip() == "0"
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0806)) as wire:
        wire.bind((BRIDGE, 0))
        assert (await service.guests.set_link("svc", True)).is_up
        with trio.fail_after(30):
            while True:
                frame = await trio.to_thread.run_sync(wire.recv, 2048)
                if frame[6:12] == bytes.fromhex("525900007701") and frame[28:32] == frame[38:42]:
                    break  # a gratuitous ARP: sender and target are the same address
    await ping(service, host)


async def stops(service: Service, host: str) -> None:
    """Stopped with frames, keys and a command waiting, the guest hears of all of them when it goes on.

    QEMU tells the queues' descriptors anew, and throws away the calls of its first moment.
    """
    guest = (await succeed(service, "ip -4 -o addr show eth0")).split()[3].split("/")[0]
    names = await succeed(service, "grep -l 'RayOS keyboard' /sys/class/input/event*/device/name")
    (machine,) = service.registry.all()
    qmp = machine.need_qmp()
    for stop, go_on in ((service.machines.pause, service.machines.resume), *[(None, None)] * 5):
        await succeed(
            service, f"rm -f /tmp/key; head -c 24 /dev/input/{names.split('/')[4]} >/tmp/key & sleep 0.2"
        )
        await ping(service, host)
        await (stop("svc") if stop else qmp.execute("stop"))
        async with trio.open_nursery() as nursery:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
                for _ in range(20):
                    sender.sendto(b"waiting", (guest, 9))
            nursery.start_soon(succeed, service, "echo")
            await service.guests.input("svc").press("a")
            await (go_on("svc") if go_on else qmp.execute("cont"))
        await ping(service, host)
        await ping(service, host, cpu=1)
        await succeed(service, "until [ $(wc -c </tmp/key) = 24 ]; do sleep 0.1; done")


def neighbours() -> str:
    return run("ip", "neigh", "show", "dev", BRIDGE)


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
