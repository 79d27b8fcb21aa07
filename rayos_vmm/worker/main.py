"""The worker: serves every device of one VM on one thread. It opens nothing; all it has was handed to it.

It may be killed between any two instructions. What its successor must know is in guest memory, in the keeper's
transcript and in the devices' state stores (devices/rayos_devices/state.py), never only here.
"""

from __future__ import annotations

import array
import logging
import socket
from ipaddress import IPv4Address

from rayos_devices.backend import Backend
from rayos_devices.gate import Gate
from rayos_devices.kind import Surroundings
from rayos_devices.kinds import KINDS
from rayos_devices.loop import Loop
from rayos_devices.state import StateStore
from rayos_devices.vhost_user.connection import Connection
from rayos_vmm.shared import packet
from rayos_vmm.shared.accounts import AccountWriter
from rayos_vmm.shared.addresses import AddressView
from rayos_vmm.shared.packet import Head
from rayos_vmm.shared.spec import Device, Firewall, WorkerSpec
from rayos_vmm.worker.ceilings import Ceilings
from rayos_vmm.worker.control import Control
from rayos_vmm.worker.firewall import PortFirewall, Settings
from rayos_vmm.worker.memory import DeviceMemory, map_flows, map_gate, shared_bytes
from rayos_vmm.worker.reports import DenialWatch, VerdictWatch, watch_fullness
from rayos_vmm.worker.sandbox import Bounds, Mode, Report, confine_worker

log = logging.getLogger(__name__)


class Worker:
    """The backends, and the link on which the keeper hands over connections."""

    def __init__(
        self,
        spec: WorkerSpec,
        link: socket.socket,
        control: socket.socket,
        memory: list[DeviceMemory],
        accepting: list[list[socket.socket]],
    ) -> None:
        self.loop = Loop()
        self._link = link
        gate = map_gate(spec.gate_fd)
        self.backends = [
            build(device, held, self.loop, gate) for device, held in zip(spec.devices, memory, strict=True)
        ]
        for backend, held in zip(self.backends, memory, strict=True):
            backend.offer_packed(held.journals)
        for device, backend, listening in zip(spec.devices, self.backends, accepting, strict=True):
            if listening and (accept := KINDS[device.kind].accept) is not None:
                accept(backend, device, listening, self.loop)
        link.setblocking(False)
        self.loop.register(link.fileno(), self._link_ready)
        accounts = AccountWriter(spec.accounts_fd, self.backends, self.loop)
        ceilings = Ceilings(self.loop, self.backends, gate, self._tell_event)
        self._control = Control(self.loop, control, self.backends, ceilings.apply, accounts)
        DenialWatch(self.loop, self.backends, self._tell_event)
        watch_fullness(self.loop, self.backends, self._tell_event)
        VerdictWatch(self.loop, self.backends, self._tell_event)

    def _link_ready(self, _events: int) -> None:
        try:
            data, ancillary, _, _ = self._link.recvmsg(
                packet.MAX_PACKET_BYTES, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        if not data:
            self.loop.stop()  # the keeper is gone, and QEMU's sockets with it
            return
        fds = array.array("i")
        for _, _, content in ancillary:
            fds.frombytes(content[:4])
        head, _ = packet.decode(data)
        if head["op"] == "ping":
            self._tell({"op": "pong"})
            return
        if head["op"] == "hand_over":
            self.loop.stop()  # after this round: no request is half done then
            return
        sock = socket.socket(fileno=fds[0])
        self._connect(
            int(head["device"]),
            int(head["session"]),
            sock,
            resume=bool(head["resume"]),
            config_writes=int(head["config_writes"]),
        )

    def _connect(
        self, index: int, session: int, sock: socket.socket, *, resume: bool, config_writes: int
    ) -> None:
        def closed(reason: str) -> None:
            log.info("session of %s ended: %s", self.backends[index].name, reason)
            self._tell({"op": "dropped", "device": index, "session": session, "reason": reason})

        Connection(sock, self.backends[index], self.loop, closed, resume=resume, config_writes=config_writes)

    def confine(self, bounds: Bounds, inherited: Report, mode: Mode) -> None:
        """Give up all that serving does not need, and tell the keeper what holds."""
        report = confine_worker(bounds, inherited, mode)
        self._tell({"op": "confined", "layers": report.layers})

    def _tell_event(self, event: Head) -> None:
        self._tell({"op": "event", "event": event})

    def _tell(self, head: Head) -> None:
        self._link.send(packet.encode(head), socket.MSG_NOSIGNAL)


def build(device: Device, memory: DeviceMemory, loop: Loop, gate: Gate) -> Backend:
    """The backend of one device, in the state its predecessor left; it asks `gate` for each operation."""
    state = memory.store()
    judge = None if device.firewall is None else _judge(device.firewall, state, memory.bulk_fd)
    around = Surroundings(loop=loop, gate=gate, state=state, bulk_fd=memory.bulk_fd, judge=judge)
    return KINDS[device.kind].build(device, around)


def _judge(firewall: Firewall, state: StateStore | None, flows_fd: int) -> PortFirewall:
    return PortFirewall(
        bytes.fromhex(firewall.mac.replace(":", "")),
        server=int(IPv4Address(firewall.server)) if firewall.server else 0,
        is_guarded=firewall.is_guarded,
        fixed=[int(IPv4Address(one)) for one in firewall.addresses],
        view=AddressView(firewall.page_fd),
        store=state,
        settings=Settings(revision=firewall.revision, rules=firewall.rules),
        flows=map_flows(flows_fd),
    )


def run_worker(
    spec: WorkerSpec,
    link: socket.socket,
    control: socket.socket,
    memory: list[DeviceMemory],
    accepting: list[list[socket.socket]],
    inherited: Report,
) -> None:
    """Serve until the keeper closes the link, or wants to hand over to a successor.

    `inherited` is what the keeper gave up already.
    """
    worker = Worker(spec, link, control, memory, accepting)
    bounds = Bounds(spec.uid, len(spec.devices), spec.memory_bytes, shared_bytes(spec.devices))
    worker.confine(bounds, inherited, spec.sandbox)
    worker.loop.run()
    for backend in worker.backends:
        backend.finish()
