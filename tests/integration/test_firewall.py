"""Firewall and spoof guard with real guests: what leaves one, what reaches the other, live."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from rayos_net.naming import tap_name
from rayos_vmm.config.firewall import FirewallRule
from rayos_vmm.config.spec import Gpu, VmSpec
from rayos_vmm.hardware.client import KeeperClient
from rayos_vmm.machine.view import VmState
from rayos_vmm.network.local import local_addresses
from rayos_vmm.service.service import Service
from tests.integration.service_lab import BRIDGE, home, lab

pytestmark = [pytest.mark.guest, pytest.mark.root]

PORT = 7000
#: Sends broadcasts of 1,400 bytes as fast as it can (x86-64: socket, setsockopt(SO_BROADCAST), sendto).
STORM = """
static long call(long n, long a, long b, long c, long d, long e, long f) {
    register long r10 __asm__("r10") = d, r8 __asm__("r8") = e, r9 __asm__("r9") = f;
    long r;
    __asm__ volatile("syscall" : "=a"(r) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return r;
}
static char data[1400];
__attribute__((force_align_arg_pointer)) void _start(void) {
    struct { unsigned short family, port; unsigned address; char rest[8]; } all = {2, 0x0900, 0xffffffff, ""};
    long sock = call(41, 2, 2, 0, 0, 0, 0), on = 1;
    call(54, sock, 1, 6, (long)&on, 4, 0);
    for (;;) call(44, sock, (long)data, sizeof data, 0, (long)&all, sizeof all);
}
"""


def spec(name: str) -> VmSpec:
    return VmSpec(name=name, gpu=Gpu(enabled=False), tpm=False)


async def status(service: Service, name: str, command: str) -> int:
    """The exit status of a command in a guest."""
    return (await service.guests.exec(name, command, 60)).exit_status


async def reaches(service: Service, address: str) -> bool:
    return await status(service, "a", f"ping -c1 -W3 {address}") == 0


async def reasons(service: Service, name: str) -> dict[str, int]:
    stats = await service.guests.stats(name)
    found = stats["net"]["firewall"]["reasons"]
    assert isinstance(found, dict)
    return found


async def hits(service: Service, name: str, rule: str) -> int:
    counts = await service.firewall.counts(name)
    assert counts is not None
    return next(
        count
        for one, count in zip(service.firewall.rules(name), counts, strict=True)
        if one.rule.name == rule
    )


async def until(what: Any, timeout_s: float = 60) -> None:
    """Returns once `what()` is true."""
    with trio.fail_after(timeout_s):
        while True:
            if await what():
                return
            await trio.sleep(0.05)


@asynccontextmanager
async def on_failure_kill(service: Service) -> AsyncIterator[None]:
    """The guests are to outlive this service, but not the test."""
    try:
        yield
    except BaseException:
        with trio.CancelScope(shield=True):
            for view in await service.machines.list():
                if view.state is VmState.RUNNING:
                    await service.machines.kill(view.spec.name)
        raise


async def boot(service: Service) -> tuple[str, str]:
    """Both guests, and their addresses."""
    async with trio.open_nursery() as nursery:
        for name in "ab":
            await service.machines.define(spec(name))
            nursery.start_soon(service.machines.start, name)
    views = [await service.machines.wait(name, "ready", 120) for name in "ab"]
    addresses = [view.address for view in views]
    assert all(addresses)
    return str(addresses[0]), str(addresses[1])


async def kernel_guards(vm: str) -> set[str]:
    """The addresses that the kernel lets a machine's tap send from; none without a guard."""
    command = ["nft", "-j", "list", "set", "netdev", "rayos", f"{tap_name(vm)}.ip4"]
    done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
    found = json.loads(done.stdout or b'{"nftables": []}')["nftables"]
    return {address for one in found for address in one.get("set", {}).get("elem", ())}


async def check_defaults(service: Service, host: str, other: str) -> None:
    """The host both ways and its names; not the other guest, who never sees a frame of it."""
    assert await reaches(service, host)
    address = (await service.machines.get("a")).address
    await trio.run_process(["ping", "-c", "1", "-W", "5", str(address)], capture_stdout=True)
    assert await status(service, "a", f"nslookup b.guest.rayos {host}") == 0
    assert not await reaches(service, other)
    assert await hits(service, "a", "isolation") >= 1
    assert (await service.guests.stats("a"))["net"]["denials"]["firewall"] >= 1


async def check_host(service: Service, host: str) -> None:
    """A service of the host that listens everywhere is reached nowhere, until a rule says so; new addresses as well."""
    late = "198.51.100.86"
    (listener,) = await trio.open_tcp_listeners(0, host="0.0.0.0")
    port = listener.socket.getsockname()[1]

    async def connects(address: str) -> bool:
        return await status(service, "a", f"nc -w 5 {address} {port} </dev/null >/dev/null 2>&1") == 0

    async def is_refused() -> bool:
        packet = f"tcp {(await service.machines.get('a')).address}:4000 > {late}:{port}"
        return bool((await service.firewall.explain("a", packet)).rule == "host")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, trio.SocketStream.aclose, [listener])
        others = local_addresses() - {host}
        assert others
        for address in (host, min(others)):
            assert not await connects(address)
        assert not await is_refused()
        await trio.run_process(["ip", "addr", "add", f"{late}/32", "dev", BRIDGE])
        await until(is_refused)
        assert not await connects(late)
        opened = FirewallRule(
            name="web", action="allow", direction="out", protocol="tcp", ports=port, to=host
        )
        await service.firewall.set_own("a", [opened])
        assert await connects(host) and not await connects(late)
        await service.firewall.set_own("a", [])
        nursery.cancel_scope.cancel()


async def check_spoofs(service: Service, host: str) -> None:
    """An address that was not leased, ARP in its name, another hardware address: dropped and counted by name."""
    before = await reasons(service, "a")
    forged = host.rsplit(".", 1)[0] + ".77"
    assert await status(service, "a", f"ip addr add {forged}/24 dev eth0") == 0
    assert await status(service, "a", f"ping -c1 -W1 -I {forged} {host}") != 0
    assert await status(service, "a", f"arping -c1 -w1 -I eth0 -s {forged} {host}") != 0
    assert await status(service, "a", f"ip addr del {forged}/24 dev eth0") == 0
    mac = (await service.machines.get("a")).mac
    assert await status(service, "a", "ip link set eth0 address 52:59:de:ad:be:ef") == 0
    assert not await reaches(service, host)
    assert await status(service, "a", f"ip link set eth0 address {mac}") == 0
    after = await reasons(service, "a")
    for reason in ("source_address", "arp_sender", "source_mac"):
        assert after.get(reason, 0) > before.get(reason, 0), reason
    await until(lambda: reaches(service, host))


async def check_stream(service: Service, other: str) -> None:
    """A running TCP flow stops at once when a rule denies it, and goes on when the rule is gone."""
    deny = FirewallRule(
        name="no-stream", action="deny", direction="out", protocol="tcp", ports=PORT, priority=1
    )
    allow = service.firewall.own("a")
    assert (
        await status(service, "b", f"(sleep 600 | nc -l -p {PORT} >/tmp/got) >/dev/null 2>&1 & sleep 0.2")
        == 0
    )
    line = "while echo line; do usleep 20000; done"
    assert await status(service, "a", f"(({line}) | nc {other} {PORT}) >/dev/null 2>&1 & true") == 0

    async def size() -> int:
        return len(await service.guests.read_file("b", "/tmp/got"))

    async def flows() -> bool:
        before = await size()
        await trio.sleep(0.2)
        return await size() > before

    await until(flows)
    await service.firewall.set_own("a", [deny, *allow])
    assert not await trace_until_denied(service)
    before = await size()
    was = await hits(service, "a", "no-stream")

    async def tried_again() -> bool:
        return await hits(service, "a", "no-stream") > was

    await until(tried_again)
    assert await size() == before
    await service.firewall.set_own("a", allow)
    await until(flows)
    assert await status(service, "a", "killall nc") == 0


def compile_storm(folder: Path) -> bytes:
    source, program = folder / "storm.c", folder / "storm"
    source.write_text(STORM)
    options = ["-O1", "-static", "-nostdlib", "-fno-stack-protector", "-w"]
    subprocess.run([shutil.which("gcc") or "cc", *options, str(source), "-o", str(program)], check=True)
    return program.read_bytes()


async def check_storm(service: Service, host: str, program: bytes) -> None:
    """b broadcasts without end: a is kept busy with nothing of it, reaches the host, answers its agent; so does b."""

    async def denied() -> int:
        return int((await service.guests.stats("a"))["net"]["denials"]["firewall"])

    await service.guests.write_file("b", "/tmp/storm", program, 0o755)
    before = await denied()
    assert await status(service, "b", "ip route add 255.255.255.255/32 dev eth0") == 0
    assert await status(service, "b", "/tmp/storm >/dev/null 2>&1 &") == 0

    async def is_raging() -> bool:
        return await denied() > before + 200

    await until(is_raging)
    received = "cat /sys/class/net/eth0/statistics/rx_packets"
    first = int((await service.guests.exec("a", received, 60)).stdout)
    assert await reaches(service, host)
    assert int((await service.guests.exec("a", received, 60)).stdout) - first < 100
    assert await status(service, "b", "killall storm") == 0


async def open_quiet_stream(service: Service, other: str) -> None:
    """a begins a TCP flow and then only listens."""
    listen = f"touch /tmp/go; (tail -f /tmp/go | nc -l -p {PORT + 1}) >/dev/null 2>&1 & sleep 0.2"
    assert await status(service, "b", listen) == 0
    assert await status(service, "a", f"(sleep 600 | nc {other} {PORT + 1} >/tmp/late) 2>&1 & true") == 0

    async def is_open() -> bool:
        return await status(service, "a", f"grep -q ':{PORT + 1:04X} 01 ' /proc/net/tcp") == 0

    await until(is_open)


async def answer_late(service: Service) -> None:
    """Answers of b on the flow are let in, although a's worker never saw a packet of it."""
    assert await status(service, "b", "echo late >>/tmp/go") == 0

    async def has_come() -> bool:
        return await service.guests.read_file("a", "/tmp/late") == b"late\n"

    await until(has_come)


async def trace_until_denied(service: Service) -> list[str]:
    """Packets of the stream that a trace saw pass before the first that it saw refused."""
    passed: list[str] = []
    with trio.fail_after(60):
        async with service.firewall.trace("a") as verdicts:
            async for told in verdicts:
                packet = str(told.packet)
                if f":{PORT}" in packet and told.direction == "out":
                    if told.action == "deny":
                        assert (told.rule, told.origin) == ("no-stream", "vm:a"), told
                        return passed
                    passed.append(packet)
    raise AssertionError("the trace ended")


async def test_two_guests_under_firewall_and_guard(tmp_path: Path) -> None:
    """Isolated by default, allowed live, refused at once, never forged, whoever of worker and service dies."""
    async with home() as paths:
        async with lab(paths, real=True, network=True, keep=True) as service, on_failure_kill(service):
            a, b = await boot(service)
            host = a.rsplit(".", 1)[0] + ".1"
            assert [await kernel_guards(name) for name in "ab"] == [{a}, {b}]
            await check_defaults(service, host, b)
            await check_host(service, host)
            await service.firewall.set_own("a", [FirewallRule(name="to-b", action="allow", to="vm:b")])
            assert not await reaches(service, b)  # b does not let it in
            await service.firewall.set_own("b", [FirewallRule(name="from-a", action="allow", from_="vm:a")])
            assert await reaches(service, b)
            # Nothing lets b's answers into a but that a began.
            explained = await service.firewall.explain("a", f"in tcp {b}:22 > {a}:9")
            assert (explained.action, explained.reason) == ("deny", "default")
            await check_stream(service, b)
            await check_spoofs(service, host)
            await check_storm(service, host, compile_storm(tmp_path))
            await open_quiet_stream(service, b)
            for name in "ab":
                keeper = KeeperClient(paths.vm_runtime(name))
                await keeper.kill_worker()
                keeper.close()
            await answer_late(service)
            assert await reaches(service, b)
        async with lab(paths, real=True, network=True) as service:
            assert [one.name for one in service.firewall.own("a")] == ["to-b"]
            for name in "ab":
                await service.machines.wait(name, "running", 60)
            assert await reaches(service, b)
            assert [await kernel_guards(name) for name in "ab"] == [{a}, {b}]
            await service.firewall.set_own("b", [])
            assert not await reaches(service, b)
            await service.firewall.set_own(
                "a", [FirewallRule(name="no", action="reject", direction="out", to="vm:b")]
            )
            refused = await service.guests.exec("a", f"nc -w 50 {b} 9 </dev/null", 60)
            assert b"refused" in refused.stderr, refused  # the answer of the firewall, in b's name
            await service.machines.kill("a")
            assert [await kernel_guards(name) for name in "ab"] == [set(), {b}]
