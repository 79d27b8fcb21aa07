"""The service's firewall and the worker's: rules with names and origins, in force when they are said to be."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from rayos_devices.net.backend import NetBackend
from rayos_devices.net.outcome import ACTION_MASK, ALLOW, DENY, HOLDS, REJECT
from rayos_devices.net.port import SinkPort
from rayos_devices.state import StateStore
from rayos_net.firewall.flow import UDP_SECONDS
from rayos_net.firewall.memory import MEMORY_BYTES
from rayos_vmm.cli.firewall import _rule, add_firewall
from rayos_vmm.config.firewall import FirewallConfig, FirewallRule, OwnedRule, check_firewall
from rayos_vmm.errors import Conflict, GuestGone, Invalid, NotFound
from rayos_vmm.network.firewall import Firewall
from rayos_vmm.shared.addresses import AddressPage, AddressView
from rayos_vmm.shared.packet import WorkerGone
from rayos_vmm.shared.view import Verdict
from rayos_vmm.worker.firewall import PortFirewall, Settings, decode
from rayos_vmm.worker.reports import VerdictWatch
from tests.framework.network import FixedNetwork
from tests.framework.target import Stepped
from tests.unit.devices.test_net_filter import udp4
from tests.unit.net.frames import ether, udp

SUBNET = IPv4Network("10.0.0.0/24")
MAC = "52:59:00:00:00:01"
OTHER = "52:59:00:00:00:02"
HOST, GUEST, PEER = "10.0.0.1", "10.0.0.2", "10.0.0.3"
UPLINK = "192.0.2.2"


class Worker:
    """A machine's worker without its process."""

    def __init__(self, judge: PortFirewall) -> None:
        self.judge = judge
        self.is_gone = False

    async def set_rules(self, device: str, settings: bytes) -> int:
        await trio.lowlevel.checkpoint()
        if self.is_gone:
            raise WorkerGone("it left")
        return self.judge.apply(decode(settings))

    async def explain(self, device: str, packet: str) -> Verdict:
        return self.judge.explain(packet)

    async def rule_counts(self, device: str) -> tuple[int, list[int]]:
        return self.judge.settings.revision, self.judge.counts()

    @asynccontextmanager
    async def trace(self, device: str) -> AsyncIterator[AsyncIterator[Verdict]]:
        """One packet."""

        async def verdicts() -> AsyncIterator[Verdict]:
            packet = f"tcp {GUEST}:1 > {HOST}:22"
            yield msgspec.structs.replace(self.judge.explain(packet), direction="out", packet=packet)

        yield verdicts()


async def start(
    firewall: Firewall, vm: str, runtime: Path, *, store: StateStore | None = None
) -> PortFirewall:
    """Starts a firewall as the keeper's worker does."""
    runtime.mkdir(exist_ok=True)  # noqa: ASYNC240 - one directory
    given = await firewall.plug(vm, runtime)
    try:
        view = AddressView(given.page_fd)
    finally:
        os.close(given.page_fd)
    return PortFirewall(
        bytes.fromhex(given.mac.replace(":", "")),
        server=int(IPv4Address(given.server)),
        is_guarded=given.is_guarded,
        fixed=[int(IPv4Address(one)) for one in given.addresses],
        view=view,
        store=store,
        settings=Settings(revision=given.revision, rules=given.rules),
    )


def rule(name: str, action: str = "allow", **fields: Any) -> FirewallRule:
    return FirewallRule(name=name, action=action, **fields)  # type: ignore[arg-type]


@pytest.fixture
def firewall() -> Firewall:
    made = Firewall(FixedNetwork(SUBNET), host=lambda: [UPLINK])
    made.define("a", FirewallConfig(), MAC)
    made.define("b", FirewallConfig(), OTHER)
    return made


async def says(firewall: Firewall, packet: str) -> tuple[str, str, str]:
    told = await firewall.explain("a", packet)
    return told.action, told.rule, told.origin


async def test_by_default_a_guest_has_the_world_but_neither_the_host_nor_other_guests(
    firewall: Firewall,
) -> None:
    """With no rule of anybody's, running or not; before its lease it has nothing."""
    assert (await firewall.explain("a", f"tcp {GUEST}:1 > {HOST}:53")).reason == "source_address"
    firewall.bind(MAC, GUEST)
    for packet, expected in (
        (f"udp {GUEST}:1 > {HOST}:53", ("allow", "host-dns", "default")),
        (f"tcp {GUEST}:1 > {HOST}:53", ("allow", "host-dns-tcp", "default")),
        (f"icmp {GUEST} > {HOST}", ("allow", "host-ping", "default")),
        (f"tcp {GUEST}:1 > {HOST}:22", ("reject", "host", "default")),
        (f"tcp {GUEST}:1 > {UPLINK}:22", ("reject", "host", "default")),
        (f"tcp {GUEST}:1 > 93.184.216.34:443", ("allow", "", "")),
        (f"tcp {GUEST}:1 > {PEER}:22", ("deny", "isolation", "default")),
        (f"in tcp {HOST}:1 > {GUEST}:22", ("allow", "host-in", "default")),
        (f"in tcp {PEER}:1 > {GUEST}:22", ("deny", "", "")),
        (f"in tcp 93.184.216.34:1 > {GUEST}:22", ("deny", "", "")),
    ):
        assert await says(firewall, packet) == expected, packet


async def test_rules_name_machines_and_follow_their_leases(firewall: Firewall, tmp_path: Path) -> None:
    """`vm:b` is what b has leased now, for a worker that runs too; without a lease the rule matches nothing."""
    worker = Worker(await start(firewall, "a", tmp_path / "a"))
    await firewall.attach("a", tmp_path / "a", worker)
    firewall.bind(MAC, GUEST)
    await firewall.set_own("a", [rule("peers", direction="out", to=["vm:b", "10.0.0.200/32"])])
    packet = f"tcp {GUEST}:1 > {PEER}:22"
    assert await says(firewall, packet) == ("deny", "isolation", "default")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(firewall.run)
        for bind, expected in (
            (firewall.bind, ("allow", "peers", "vm:a")),
            (firewall.unbind, ("deny", "isolation", "default")),
        ):
            assert bind(OTHER, PEER) and not bind(OTHER, PEER)
            await trio.testing.wait_all_tasks_blocked()
            assert await says(firewall, packet) == expected
        nursery.cancel_scope.cancel()


class NoMail:
    """A policy that denies mail, and has a zone."""

    def merge(self, vm: str, own: Sequence[OwnedRule]) -> Sequence[OwnedRule]:
        return [OwnedRule("host", rule("no-smtp", "deny", direction="out", protocol="tcp", ports=25)), *own]

    def members(self, word: str) -> list[str]:
        return {"zone:web": ["b"]}[word]


async def test_merged_rules_keep_their_origins(tmp_path: Path) -> None:
    """Rules that a policy puts before and behind a machine's own are told apart by whose they are."""
    firewall = Firewall(FixedNetwork(SUBNET), inherited=NoMail())
    firewall.define("a", FirewallConfig(), MAC)
    firewall.define("b", FirewallConfig(), OTHER)
    firewall.bind(MAC, GUEST)
    firewall.bind(OTHER, PEER)
    assert (
        await firewall.set_own("a", [rule("web", to="zone:web"), rule("smtp", protocol="tcp", ports=25)]) > 0
    )
    assert await says(firewall, f"tcp {GUEST}:1 > 93.184.216.34:25") == ("deny", "no-smtp", "host")
    assert await says(firewall, f"tcp {GUEST}:1 > {PEER}:80") == ("allow", "web", "vm:a")
    assert [one.origin for one in firewall.rules("a")] == ["host", "vm:a", "vm:a", *["default"] * 7]


async def test_rules_are_in_force_when_set_rules_returns(firewall: Firewall, tmp_path: Path) -> None:
    """The revision is the worker's; a flow that was remembered as allowed is refused on its next frame."""
    judge = await start(firewall, "a", tmp_path / "a")
    await firewall.attach("a", tmp_path / "a", Worker(judge))
    firewall.bind(MAC, GUEST)
    await firewall.set_own("a", [rule("yes", to=HOST)])
    frame = udp4()
    assert judge.judge(frame, True, 1.0) & ACTION_MASK == ALLOW
    epoch = judge.epoch[0]
    revision = await firewall.set_own("a", [rule("no", "deny", to=HOST)])
    assert revision == judge.settings.revision and judge.epoch[0] > epoch
    verdict = judge.judge(frame, True, 1.0)
    assert verdict & ACTION_MASK == DENY and verdict & HOLDS
    assert (await firewall.counts("a")) is not None
    # The same again changes nothing, and forgets no flow.
    epoch = judge.epoch[0]
    assert await firewall.refresh("a") > revision and judge.epoch[0] == epoch


async def test_a_successor_and_the_next_service_know_the_rules(tmp_path: Path) -> None:
    """A killed worker's successor judges by what its predecessor was told, and a new service counts on from there."""
    memory = os.memfd_create("state")
    first = Firewall(FixedNetwork(SUBNET))
    first.define("a", FirewallConfig(), MAC)
    judge = await start(first, "a", tmp_path / "a", store=StateStore(memory, 1 << 16))
    await first.attach("a", tmp_path / "a", Worker(judge))
    for _ in range(5):
        await first.set_own("a", [rule("no", "deny", to=HOST)])
    first.detach("a")
    successor = PortFirewall(judge.mac, fixed=[int(IPv4Address(GUEST))], store=StateStore(memory, 1 << 16))
    assert successor.settings == judge.settings
    assert successor.explain(f"udp {GUEST}:1 > {HOST}:53").rule == "no"

    second = Firewall(FixedNetwork(SUBNET, {MAC: [GUEST]}))
    second.define("a", FirewallConfig(rules=[rule("yes", to=HOST)]), MAC)
    await second.attach("a", tmp_path / "a", Worker(judge))
    assert judge.settings.revision > successor.settings.revision
    assert (await second.explain("a", f"udp {GUEST}:1 > {HOST}:53")).rule == "yes"
    os.close(memory)


def test_a_reply_finds_its_flow_although_the_worker_died() -> None:
    """Flows that the guest began are known to a successor, as far as the present rules still allow them."""
    page = memoryview(bytearray(MEMORY_BYTES))

    def worker(*rules: dict[str, Any]) -> PortFirewall:
        return PortFirewall(
            bytes.fromhex(MAC.replace(":", "")),
            fixed=[int(IPv4Address(GUEST))],
            flows=page,
            settings=Settings(rules=list(rules)),
        )

    outside, now = "93.184.216.34", time.monotonic()
    asked = ether(udp(GUEST, 4000, outside, 53), source=MAC)
    reply = ether(udp(outside, 53, GUEST, 4000), source=OTHER, destination=MAC)
    stranger = ether(udp(outside, 53, GUEST, 4001), source=OTHER, destination=MAC)

    def passes(judge: PortFirewall, frame: bytes, is_outgoing: bool, later: float = 0.0) -> bool:
        return judge.judge(frame, is_outgoing, now + later) & ACTION_MASK == ALLOW

    first = worker()
    assert not passes(first, reply, False)
    assert passes(first, asked, True)
    second = worker()
    assert passes(second, reply, False) and not passes(second, stranger, False)
    third = worker({"name": "no", "action": "deny", "direction": "out", "protocol": "udp"})
    assert not passes(third, reply, False)
    # Renewed by what passes, else it ends after its time.
    assert passes(second, asked, True, UDP_SECONDS / 2)
    assert passes(worker(), reply, False, UDP_SECONDS * 1.2)
    assert not passes(worker(), reply, False, UDP_SECONDS * 3)


async def test_priority_0_comes_first(firewall: Firewall) -> None:
    """The lowest number is a number, also at the command line."""
    firewall.bind(MAC, GUEST)
    await firewall.set_own("a", [rule("low", "deny", priority=1), rule("lowest", "allow", priority=0)])
    assert (await says(firewall, f"tcp {GUEST}:1 > {HOST}:9"))[1] == "lowest"
    parser = argparse.ArgumentParser()
    add_firewall(parser)
    asked = parser.parse_args(["add", "a", "lowest", "allow", "--priority", "0"])
    assert _rule(asked) == FirewallRule(name="lowest", action="allow", priority=0)


async def test_what_cannot_be_is_refused_and_changes_nothing(firewall: Firewall, tmp_path: Path) -> None:
    await firewall.set_own("a", [rule("one")])
    for rules, words in (
        ([rule("x", ports="80-70", protocol="tcp")], "80-70 are not a range"),
        ([rule("x", ports=80)], "ports need a protocol"),
        ([rule("x", to="10.0.0.1/8")], "has host bits set"),
        ([rule("x", to="nowhere")], "does not appear to be"),
        ([rule("x", protocol="tpc")], "'tpc'; known are"),
        ([rule("x"), rule("x")], "there is a rule x already"),
        ([rule("x", to="zone:none")], "there is no zone:none"),
    ):
        with pytest.raises(Invalid, match=words):
            await firewall.set_own("a", rules)
    assert [one.name for one in firewall.own("a")] == ["one"]
    with pytest.raises(Invalid, match="no packet"):
        await firewall.explain("a", "hello")
    with pytest.raises(NotFound, match="'c'"):
        firewall.own("c")
    with pytest.raises(Conflict, match="does not run"):
        firewall.trace("a")
    with pytest.raises(Invalid, match="IPv4"):
        check_firewall(FirewallConfig(addresses=["fe80::1"]))
    worker = Worker(await start(firewall, "a", tmp_path / "a"))
    await firewall.attach("a", tmp_path / "a", worker)
    worker.is_gone = True
    with pytest.raises(GuestGone, match="did not take"):
        await firewall.set_own("a", [rule("two")])
    assert [one.name for one in firewall.own("a")] == ["two"]


def test_a_rejected_frame_is_answered_but_not_without_end() -> None:
    """A flood of refused frames gets a hundred answers a second, and none waits for ever."""
    judge = PortFirewall(
        b"\x52\x59\0\0\0\1",
        fixed=[int(IPv4Address(GUEST))],
        settings=Settings(rules=[{"name": "no", "action": "reject"}]),
    )
    for _ in range(1000):
        assert judge.judge(udp4(), True, 1.0) == REJECT
    assert len(judge.answers) == 16
    assert judge.answers[0][0] and judge.answers[0][1][:6] == judge.mac
    assert judge.counts() == [1000]


def test_an_address_page_is_never_seen_half_written(tmp_path: Path) -> None:
    """A reader sees one version whole, and an older reader sees the next."""
    page = AddressPage(tmp_path / "page", is_new=True)
    with (tmp_path / "page").open("rb") as file:
        view = AddressView(file.fileno())
    assert view.read() == (0, [])
    page.write([3, 1, 2])
    assert view.read() == (1, [1, 2, 3])
    page.close()
    page = AddressPage(tmp_path / "page", is_new=False)
    page.write([])
    assert view.read() == (2, [])
    with pytest.raises(ValueError, match="65 addresses exceed 64"):
        page.write(range(65))
    with pytest.raises(OSError, match="exists"):
        AddressPage(tmp_path / "page", is_new=True)
    page.close()


def test_more_rules_than_fit_are_refused_by_the_worker() -> None:
    judge = PortFirewall(b"\x52\x59\0\0\0\1")
    with pytest.raises(ValueError, match="exceed"):
        judge.apply(decode(b'{"revision": 1, "rules": [%s]}' % b",".join([b"{}"] * 9000)))
    assert judge.settings.revision == 0


def test_the_worker_keeps_a_rule_s_count_over_a_change_and_forgets_the_gone() -> None:
    judge = PortFirewall(b"\x52\x59\0\0\0\1")
    one, two = (
        {"name": "one", "action": "deny", "priority": 9},
        {"name": "two", "action": "deny", "priority": 1},
    )
    judge.apply(Settings(revision=1, rules=[one, two]))
    judge.hits[1], judge.hits[2] = 5, 7
    assert judge.counts() == [7, 5]
    judge.apply(Settings(revision=2, rules=[two, {"name": "new", "action": "allow"}]))
    assert judge.counts() == [5, 0]
    judge.apply(Settings(revision=1, rules=[one]))
    assert judge.settings.revision == 2


def test_a_logged_flow_is_told_once_and_a_flood_in_sums() -> None:
    """One event a flow, whatever it sends; of many flows the first, and how many more there were."""
    judge = PortFirewall(
        b"\x52\x59\0\0\0\1",
        fixed=[int(IPv4Address(GUEST))],
        settings=Settings(
            rules=[
                {"name": "seen", "action": "allow", "log": True, "priority": 2},
                {
                    "name": "would",
                    "action": "deny",
                    "audit_only": True,
                    "priority": 1,
                    "ports": 9,
                    "protocol": "udp",
                },
            ]
        ),
    )
    for _ in range(3):
        judge.judge(udp4(), True, 1.0)
    packet = f"udp {GUEST}:1000 > {HOST}:9"
    told, more = judge.take_events(16)
    assert [(one["packet"], one["rule"], one["action"], one["audit_only"]) for one in told] == [
        (packet, "seen", "allow", False),
        (packet, "would", "deny", True),
    ]
    assert more == 0 and judge.take_events(16) == ([], 0)
    for port in range(2000):
        judge.judge(udp4(1000 + port), True, 1.0)
    told, more = judge.take_events(16)
    assert (len(told), more) == (16, 1984)


def test_what_is_logged_is_published_at_most_once_a_period() -> None:
    """By the worker, on its loop, in one event."""
    judge = PortFirewall(
        b"\x52\x59\0\0\0\1",
        fixed=[int(IPv4Address(GUEST))],
        settings=Settings(rules=[{"name": "seen", "action": "allow", "log": True}]),
    )
    told: list[dict[str, Any]] = []
    with Stepped(lambda loop: NetBackend("net", loop, SinkPort(), judge=judge)) as target:
        VerdictWatch(target.loop, [target.backend], told.append)
        for port in range(20):
            judge.judge(udp4(10 + port), True, 1.0)
        assert not told
        deadline = target.loop.now() + 30
        while not told and target.loop.now() < deadline:
            target.loop.step(1.1)
    ((event,),) = [told]
    assert (event["event"], event["device"], len(event["verdicts"]), event["more"]) == (
        "firewall",
        "net",
        16,
        4,
    )
