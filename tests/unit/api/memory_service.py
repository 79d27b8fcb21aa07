"""A service without guests: the API's contract with `Service`, in memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from ipaddress import IPv4Network
from typing import Any

import msgspec
import trio

from rayos_tpm.event_log import Entry, Log, Source
from rayos_tpm.explain import explain
from rayos_tpm.nv import pad_policy
from rayos_tpm.policy import Policy
from rayos_tpm.protocol import Attestation, DeviceInfo, QuoteBundle, Status, TpmState
from rayos_vmm.config.spec import VmSpec
from rayos_vmm.errors import Conflict, GuestGone, NotFound, Timeout_
from rayos_vmm.events import Event, EventLog
from rayos_vmm.guest.tpm import parse_pcrs
from rayos_vmm.guest.view import ConsolePort
from rayos_vmm.machine.history import History
from rayos_vmm.machine.recording import Recordings, Step
from rayos_vmm.machine.seats import Preference, Seats
from rayos_vmm.machine.view import Damage, ExecResult, VmState, VmView
from rayos_vmm.network.firewall import Firewall
from rayos_vmm.network.view import DhcpStatus, Lease, NamesView
from rayos_vmm.policy.gatekeeper import Peer
from rayos_vmm.policy.token import Ask
from rayos_vmm.qemu.platform import AcceleratorView, QemuView
from rayos_vmm.service.connections import ConnectionCounts
from rayos_vmm.service.view import Info
from rayos_vmm.shared.timed import Span, cut
from tests.framework.network import FixedNetwork


class MemoryTpm:
    """A TPM that measured a kernel, whose quotes nobody signed."""

    def __init__(self) -> None:
        self.nv = bytes(256)

    async def status(self) -> Status:
        return Status("uuid", TpmState.MEASURED, "", "seed", 1, "launch", 1, 0, 0, 1, 1.0, 0.0, "")

    async def pcrs(self, chosen: str | None) -> dict[int, bytes]:
        return {index: bytes(32) for index in parse_pcrs(chosen) or range(2)}

    async def log(self) -> Log:
        return Log("uuid", "seed", [Entry(8, b"k" * 32, Source.HOST, "kernel", "kernel vmlinux")])

    async def explain(self, chosen: str | None) -> list[str]:
        return explain(await self.log(), pcrs=parse_pcrs(chosen))

    async def attest(self, nonce: bytes, chosen: str | None) -> Attestation:
        if nonce == b"\0":
            raise GuestGone("attestation unavailable: the guest damaged it", code="attestation_unavailable")
        values = {str(index): value for index, value in (await self.pcrs(chosen)).items()}
        return Attestation(QuoteBundle(b"message", b"signature", nonce, values, b"key"), await self.log())

    async def extend(self, description: str, digest: bytes) -> int:
        return 11

    async def read_nv(self) -> bytes:
        return self.nv

    async def write_nv(self, data: bytes) -> None:
        self.nv = pad_policy(data)

    async def unseal(self) -> bytes:
        return b"secret"

    async def device(self) -> DeviceInfo:
        return DeviceInfo("2.0", 0, "1.59", "IBM", "SW   TPM", "1.2", 24, 2048, 0)

    async def policy(self) -> Policy:
        return Policy.from_log(await self.log())


class MemoryDisplay:
    """Two monitors; only the second one's picture ever changes, once."""

    def __init__(self, resized: list[tuple[int, int, int]]) -> None:
        self._resized = resized

    async def info(self) -> dict[str, Any]:
        mode = {"width": 640, "height": 480}
        one = {"mode": mode, "picture": mode, "cursor": None}
        return {"serial": 7, "scanouts": [{"scanout": n, "is_on": not n, **one} for n in range(2)]}

    async def resize(self, width: int, height: int, scanout: int = 0) -> None:
        self._resized.append((width, height, scanout))

    async def wait_damage(self, since: int, scanout: int = 0, timeout_s: float = 60.0) -> Damage:
        if since >= 7 or not scanout:
            raise Timeout_(f"nothing changed within {timeout_s} s")
        return Damage(serial=7, scanout=scanout, x=1, y=2, width=3, height=4)

    async def screenshot(self, scanout: int = 0, *, with_cursor: bool = False) -> bytes:
        return b"\x89PNG" + bytes((scanout, with_cursor))


class Everybody:
    """Lets everybody in, and keeps what they asked for."""

    def __init__(self) -> None:
        self.asked: list[Ask] = []

    async def admit(self, ask: Ask, peer: Peer, text: str, *, is_change: bool) -> None:
        assert peer.uid == os.geteuid() and peer.pid > 0
        self.asked.append(ask)


class MemoryInput:
    """Notes what it is asked for, and records that."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.recordings = Recordings()

    async def devices(self) -> Any:
        one = {"device": "keyboard", "kind": "keyboard", "leds": ["caps"], "held": []}
        return [{**one, "waiting_events": 0, "queue_limit": 64, "dropped": 0}]

    async def type_text(self, text: str, layout: str | None = None) -> str:
        self.asked.append(("type", text, layout))
        return "virtio"

    async def press(self, combo: str) -> str:
        self.asked.append(("press", combo))
        return "ps2"

    async def point(self, x: float, y: float, buttons: Sequence[str] = ()) -> None:
        self.asked.append(("point", x, y, list(buttons)))

    async def move(self, dx: int, dy: int, wheel: int = 0, buttons: Sequence[str] = ()) -> None:
        self.asked.append(("move", dx, dy, wheel, list(buttons)))

    async def touch(self, points: Sequence[tuple[float, float]]) -> None:
        self.asked.append(("touch", points))

    async def send(self, device: str, events: Sequence[tuple[int, int, int]]) -> None:
        self.recordings.note(device, events)

    def check_recordable(self) -> None:
        self.recordings.check()

    def record(self) -> Any:
        return self.recordings.open()

    async def replay(self, steps: Sequence[Step], speed: float = 1.0) -> None:
        for step in steps:
            await self.send(step.device, step.events)


class MemoryService:
    """Machines are views; a console says back what it is told; `exec` returns its own command."""

    def __init__(self) -> None:
        #: One object stands for each noun of the service.
        self.machines = self.guests = self.dhcp = self
        self.vms: dict[str, VmView] = {}
        self.files: dict[tuple[str, str], bytes] = {}
        self.consoles: dict[tuple[str, int], History] = {}
        self.inputs: dict[str, MemoryInput] = {}
        self.seats = Seats()
        self.resized: list[tuple[int, int, int]] = []
        self.sizes: list[tuple[str, int, int, int]] = []
        self.addresses = ["10.86.0.2"]
        self.renewed: list[str] = []
        self.log = EventLog()
        self.one_tpm = MemoryTpm()
        self.gatekeeper = Everybody()
        self.connections = ConnectionCounts()
        self.firewall = Firewall(FixedNetwork(IPv4Network("10.0.0.0/24")))
        self.clients = 0
        self.nobody = trio.Event()
        self.cancelled = trio.Event()

    async def info(self) -> Info:
        return Info(
            version="0",
            qemu=QemuView(version="11", source="here", has_console=True, has_display_events=True),
            accelerator=AcceleratorView(name="tcg", reason="in memory"),
            subnet=None,
            bridge=None,
            network_trouble="in memory",
            uptime_s=0.0,
            compiled=False,
            runtime="/run",
            state="/var",
        )

    def _find(self, name: str) -> VmView:
        if name not in self.vms:
            raise NotFound(f"there is no machine {name!r}", hint="`rayos ps` lists them")
        return self.vms[name]

    def _become(self, name: str, state: VmState) -> VmView:
        self.vms[name] = msgspec.structs.replace(self._find(name), state=state)
        self.log.publish("vm.state", name, state=str(state))
        return self.vms[name]

    async def define(self, spec: VmSpec) -> VmView:
        if spec.name in self.vms:
            raise Conflict(f"the name {spec.name!r} is taken")
        self.vms[spec.name] = VmView(spec=spec, state=VmState.DEFINED)
        for port in range(3):
            self.consoles[spec.name, port] = History()
        return self.vms[spec.name]

    async def start(self, name: str) -> VmView:
        return self._become(name, VmState.RUNNING)

    async def stop(self, name: str, timeout_s: float = 20.0) -> VmView:
        self.consoles[name, 0].close()
        return self._become(name, VmState.STOPPED)

    async def kill(self, name: str) -> VmView:
        return await self.stop(name)

    async def pause(self, name: str) -> VmView:
        return self._become(name, VmState.PAUSED)

    async def resume(self, name: str) -> VmView:
        return self._become(name, VmState.RUNNING)

    async def reset(self, name: str) -> VmView:
        return self._find(name)

    async def remove(self, name: str) -> None:
        self._find(name)
        del self.vms[name]

    async def get(self, name: str) -> VmView:
        return self._find(name)

    async def list(self) -> Any:
        return list(self.vms.values())

    async def console_write(self, name: str, port: int, data: bytes) -> None:
        self.consoles[name, port].write(data)

    @contextlib.asynccontextmanager
    async def console_stream(
        self, name: str, port: int, since: int | None = None
    ) -> AsyncIterator[AsyncIterator[tuple[int, bytes]]]:
        self._find(name)
        async with contextlib.aclosing(self.consoles[name, port].follow(since)) as chunks:
            yield chunks

    def console_seat(self, name: str, port: int, who: str, preference: Preference) -> Any:
        self._find(name)
        return self.seats.open(port, who, preference)

    async def console_ports(self, name: str) -> Any:
        plain = {"name": "", "is_console": True, "guest_open": True, "columns": 0, "rows": 0}
        told = [{"port": number, **plain, **self.seats.describe(number)} for number in range(3)]
        return msgspec.convert(told, list[ConsolePort])

    @contextlib.asynccontextmanager
    async def console_pieces(
        self, name: str, port: int, since: int = 0, *, follow: bool = False
    ) -> AsyncIterator[AsyncIterator[Span]]:
        history = self.consoles[self._find(name).spec.name, port]

        async def pieces() -> AsyncGenerator[Span, None]:
            if not follow and since >= history.end:
                return
            async with contextlib.aclosing(history.follow(since)) as chunks:
                async for offset, data in chunks:
                    for piece in cut(offset, data, history.marks(offset, offset + len(data))):
                        yield piece
                    if not follow:
                        return

        async with contextlib.aclosing(pieces()) as open_pieces:
            yield open_pieces

    async def console_resize(self, name: str, port: int, columns: int, rows: int) -> None:
        self.sizes.append((name, port, columns, rows))

    def input(self, name: str) -> MemoryInput:
        self._find(name)
        return self.inputs.setdefault(name, MemoryInput())

    def display(self, name: str) -> MemoryDisplay:
        self._find(name)
        return MemoryDisplay(self.resized)

    async def qmp(self, name: str, command: str, arguments: dict[str, Any] | None = None) -> Any:
        return {"command": command, "arguments": arguments}

    async def qmp_transcript(self, name: str) -> str:
        self._find(name)
        return '{"at": 1.0, "execute": {"command": "query-status"}}\n'

    async def exec(self, name: str, command: str | Sequence[str], timeout_s: float = 60.0) -> ExecResult:
        if command == "sleep":
            try:
                await trio.sleep_forever()
            finally:
                self.cancelled.set()
        return ExecResult(exit_status=3, stdout=str(command).encode(), stderr=b"\xff")

    async def read_file(self, name: str, path: str) -> bytes:
        if (name, path) not in self.files:
            raise NotFound(f"{path} does not exist in the guest")
        return self.files[name, path]

    async def write_file(self, name: str, path: str, data: bytes, mode: int = 0o644) -> None:
        self.files[name, path] = data

    async def stats(self, name: str) -> dict[str, Any]:
        raise RuntimeError("a bug")

    def tpm(self, name: str) -> MemoryTpm:
        self._find(name)
        return self.one_tpm

    async def leases(self) -> Any:
        plain = {
            "mac": "52:59:00:00:00:01",
            "state": "bound",
            "expires": 1.0,
            "host_name": "dev",
            "port": "ray-dev-0",
        }
        return msgspec.convert([{"address": address, **plain} for address in self.addresses], list[Lease])

    async def status(self) -> DhcpStatus:
        return DhcpStatus(
            serving=True,
            trouble="",
            link="rayos0",
            subnet="10.86.0.0/24",
            leases={"bound": len(self.addresses)},
            counters={},
            names=NamesView(domain="guest.rayos", trouble="", counters={}),
            upstream={},
        )

    async def logs(self, name: str | None = None) -> dict[str, Any]:
        if name is not None:
            self._find(name)
        asked = {"at": 2.0, "port": "ray-dev-0", "mac": "52:59:00:00:00:01", "xid": 7, "request": "DISCOVER"}
        said = {"answer": None, "address": "10.86.0.2", "why": "port_full"}
        sent = {"at": 1.0, "xid": 8, "kind": "REQUEST", "attempts": 2, "outcome": "answered"}
        return {"server": [{**asked, **said}], "clients": {"dev": [sent]}}

    async def renew(self, name: str) -> None:
        self._find(name)
        self.renewed.append(name)

    async def release(self, address: str) -> None:
        if address not in self.addresses:
            raise NotFound(f"nobody has a lease for {address}")
        self.addresses.remove(address)

    def events(self, since: int | None = None) -> AsyncIterator[Event]:
        return self.log.follow(since)

    async def wait(self, name: str, condition: str, timeout_s: float = 60.0) -> VmView:
        raise Timeout_(f"{name} was not {condition} within {timeout_s} s")

    @contextlib.contextmanager
    def client(self) -> Iterator[None]:
        self.clients += 1
        try:
            yield
        finally:
            self.clients -= 1
            if not self.clients:
                self.nobody.set()
