"""The worker's control socket: what the service asks of the devices of a running VM.

Each packet is one request ``{"id", "op", ...}`` and gets one answer ``{"id", ...}`` or ``{"id", "error", "message"}``.
Waiting is a late answer: `console.read` at the end of the output, `console.write` and `inject` without room and
`gpu.wait` answer when there is something to say, so nobody polls.
"""

from __future__ import annotations

import array
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

from rayos_devices.backend import Backend
from rayos_devices.blk.backend import BlkBackend
from rayos_devices.console.backend import ConsoleBackend
from rayos_devices.errors import DeniedError, RequestError
from rayos_devices.faults import Fault, Faults
from rayos_devices.gpu.backend import GpuBackend
from rayos_devices.input.backend import InputBackend
from rayos_devices.limits import Limit
from rayos_devices.loop import Loop
from rayos_devices.net.backend import NetBackend
from rayos_vmm.shared import packet
from rayos_vmm.shared.accounts import AccountWriter, hit_ratio, layers
from rayos_vmm.shared.packet import Head
from rayos_vmm.worker.clients import Clients
from rayos_vmm.worker.firewall import PortFirewall
from rayos_vmm.worker.firewall_control import Answer, FirewallControl, Refused

#: Connections, and unanswered requests of all of them: the service needs a handful.
MAX_CLIENTS: Final = 16
MAX_WAITING: Final = 256
#: Marks of one answer: they are JSON, some 32 bytes each.
MAX_MARKS: Final = 1024
#: Beyond that a sleep costs less than the looking.
MAX_POLLING_US: Final = 1000.0

_B = TypeVar("_B", bound=Backend)


class Control:
    """Serves the listening socket `control` on the loop."""

    def __init__(
        self,
        loop: Loop,
        control: socket.socket,
        backends: Sequence[Backend],
        apply: Callable[[], int] = lambda: 0,
        accounts: AccountWriter | None = None,
    ) -> None:
        self._loop = loop
        self._apply = apply
        self._accounts = accounts or AccountWriter(-1, backends, loop)
        self._backends = {backend.name: backend for backend in backends}
        self._waiting: list[tuple[int, Head, bytes]] = []
        self._asking = -1  # the connection that is being answered
        self._captures: dict[int, NetBackend] = {}
        self._operations: dict[str, Callable[[Head, bytes], Answer]] = {
            "policy": self._policy,
            "stats": self._stats,
            "polling": self._polling,
            "net.capture": self._net_capture,
            "limit": self._limit,
            "level": self._level,
            "inject": self._inject,
            "console.write": self._console_write,
            "console.read": self._console_read,
            "console.resize": self._console_resize,
            "console.ports": self._console_ports,
            "blk.resize": self._blk_resize,
            "faults": self._faults,
            **FirewallControl(self._firewall, loop).operations,
            "gpu.info": self._gpu_info,
            "gpu.frame": self._gpu_frame,
            "gpu.wait": self._gpu_wait,
            "gpu.resize": self._gpu_resize,
        }
        self._clients = Clients(loop, control, MAX_CLIENTS, self._answer, self._closed)
        self._retrying = False
        for backend in backends:
            backend.listen(self._something_happened)
            if isinstance(backend.judge, PortFirewall):
                backend.judge.on_verdict = self._something_happened

    def _closed(self, fd: int) -> None:
        captured = self._captures.pop(fd, None)
        if captured is not None:
            captured.stop_capture()
        for backend in self._backends.values():
            backend.forget_reader(fd)
        self._waiting = [entry for entry in self._waiting if entry[0] != fd]

    def _answer(self, fd: int, head: Head, payload: bytes) -> bool:
        """Answer now or keep the request; False when the client does not take its answers."""
        self._asking = fd
        try:
            operation = self._operations.get(head.get("op", ""))
            if operation is None:
                raise Refused("unknown_operation", f"known: {', '.join(self._operations)}")
            answer = operation(head, payload)
        except DeniedError as error:
            answer = {"error": "denied", "message": str(error), "denied": error.op}, b"", []
        except RequestError as error:
            answer = {"error": "refused", "message": str(error)}, b"", []
        except (KeyError, TypeError, ValueError) as error:
            answer = {"error": "bad_request", "message": f"missing or wrong field: {error}"}, b"", []
        except Refused as error:
            answer = {"error": error.code, "message": str(error)}, b"", []
        if answer is None:
            if len(self._waiting) >= MAX_WAITING:
                return False
            self._waiting.append((fd, head, payload))
            return True
        fields, data, fds = answer
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            reply = packet.encode({"id": head.get("id"), **fields}, data)
            self._clients.sockets[fd].sendmsg([reply], ancillary, socket.MSG_NOSIGNAL)
        except OSError:
            return False
        finally:
            for extra in fds:
                os.close(extra)
        return True

    def _something_happened(self, _what: int = 0) -> None:
        if self._waiting and not self._retrying:
            self._retrying = True
            self._loop.call_soon(self._retry)

    def _retry(self) -> None:
        self._retrying = False
        waiting, self._waiting = self._waiting, []
        for fd, head, payload in waiting:
            if fd in self._clients.sockets and not self._answer(fd, head, payload):
                self._clients.close(fd)

    # -- operations ----------------------------------------------------------------------------------------------

    def _find(self, name: str, kind: type[_B]) -> _B:
        backend = self._backends.get(name)
        if not isinstance(backend, kind):
            known = [n for n, candidate in self._backends.items() if isinstance(candidate, kind)]
            raise Refused("no_such_device", f"no device {name!r}; there are: {', '.join(known) or 'none'}")
        return backend

    def _console(self, head: Head) -> tuple[ConsoleBackend, int]:
        console = self._find(head.get("device", "console"), ConsoleBackend)
        port = head["port"]
        count = len(console.ports())
        if not isinstance(port, int) or not 0 <= port < count:
            raise Refused("no_such_port", f"no port {port!r}: 0 to {count - 1} are there")
        return console, port

    def _firewall(self, name: str) -> PortFirewall:
        judge = self._find(name, NetBackend).judge
        if not isinstance(judge, PortFirewall):
            raise Refused("no_firewall", f"device {name!r} has no firewall")
        return judge

    def _stats(self, _head: Head, _data: bytes) -> Answer:
        found = {name: backend.snapshot() for name, backend in self._backends.items()}
        for firewall in (one["firewall"] for one in found.values() if "firewall" in one):
            ratios = hit_ratio(layers(firewall))
            firewall["hit_percent"] = {layer: round(100 * ratio, 2) for layer, ratio in ratios.items()}
        return {"stats": found}, b"", []

    def _policy(self, _head: Head, _data: bytes) -> Answer:
        return {"revision": self._apply()}, b"", []

    def _polling(self, head: Head, _data: bytes) -> Answer:
        """How long the worker looks for work before it sleeps; with `budget_us`, from now on."""
        if head.get("budget_us") is not None:
            budget = float(head["budget_us"])
            if not 0.0 <= budget <= MAX_POLLING_US:
                raise Refused(
                    "bad_request", f"a polling budget of {budget} us: 0 to {MAX_POLLING_US} is allowed"
                )
            self._loop.set_polling(budget * 1e-6)
        return {"polling": self._loop.polling()}, b"", []

    def _net_capture(self, head: Head, _data: bytes) -> Answer:
        """The first request of a connection starts a capture and is answered at once, the next bring what was caught;
        it ends with the connection."""
        net = self._find(head.get("device", "net"), NetBackend)
        fields = {"offset_ns": time.time_ns() - time.monotonic_ns()}
        if self._captures.get(self._asking) is not net or net.capture is None:
            if self._asking in self._captures:
                raise Refused("bad_request", "this connection captures another device")
            net.start_capture(int(head["snap"]), self._something_happened)
            self._captures[self._asking] = net
            return {**fields, "seen": 0, "dropped": 0}, b"", []
        capture = net.capture
        data = capture.read(packet.MAX_DATA_BYTES)
        if not data:
            capture.ask()
            return None
        return {**fields, "seen": capture.seen, "dropped": capture.dropped}, data, []

    def _limit(self, head: Head, _data: bytes) -> Answer:
        """Change a device's limits, each at once; the answer has all that it has now."""
        backend = self._find(head["device"], Backend)  # type: ignore[type-abstract]
        for name, value in dict(head["limits"]).items():
            backend.change_limit(Limit(name), int(value))
        return {"limits": {limit.value: backend.limit(limit) for limit in backend.LIMITS}}, b"", []

    def _level(self, head: Head, _data: bytes) -> Answer:
        self._accounts.set_level(int(head["level"]))
        return {"level": self._accounts.level}, b"", []

    def _inject(self, head: Head, _data: bytes) -> Answer:
        device = self._find(head["device"], InputBackend)
        events = [(int(t), int(c), int(v)) for t, c, v in head["events"]]
        accepted = device.offer(events, token=int(head.get("token", 0)))
        return ({"accepted": accepted}, b"", []) if accepted or not events else None

    def _console_write(self, head: Head, data: bytes) -> Answer:
        console, port = self._console(head)
        accepted = console.write(port, data, token=int(head.get("token", 0)))
        if accepted == 0 and data:
            return None
        return {"accepted": accepted}, b"", []

    def _console_read(self, head: Head, _data: bytes) -> Answer:
        console, port = self._console(head)
        total = console.total(port)
        offset = total if head["offset"] is None else int(head["offset"])
        if head.get("hold", False):  # as long as the connection lasts
            console.hold(port, self._asking, offset)
        if offset >= total:
            if head.get("wait", True) and head["offset"] is not None:
                return None
            return {"offset": total, "total": total}, b"", []
        start, data = console.read(port, offset, packet.MAX_DATA_BYTES)
        if not head.get("times", False):
            return {"offset": start, "total": total}, data, []
        marks = console.marks(port, start, start + len(data), MAX_MARKS + 1)
        if len(marks) > MAX_MARKS:
            data = data[: marks.pop()[0] - start]
        return {"offset": start, "total": total, "marks": marks}, data, []

    def _console_resize(self, head: Head, _data: bytes) -> Answer:
        console, port = self._console(head)
        is_done = console.resize(port, int(head["columns"]), int(head["rows"]))
        return ({}, b"", []) if is_done else None

    def _console_ports(self, head: Head, _data: bytes) -> Answer:
        return {"ports": self._find(head.get("device", "console"), ConsoleBackend).ports()}, b"", []

    def _gpu(self, head: Head) -> GpuBackend:
        return self._find(head.get("device", "gpu"), GpuBackend)

    def _gpu_info(self, head: Head, _data: bytes) -> Answer:
        gpu = self._gpu(head)
        return {"serial": gpu.damage_serial, "scanouts": gpu.screen.snapshot()}, b"", []

    def _blk_resize(self, head: Head, _data: bytes) -> Answer:
        return {"size_bytes": self._find(head["device"], BlkBackend).resize()}, b"", []

    def _faults(self, head: Head, _data: bytes) -> Answer:
        """With `rules`: from now on these; without: what they did so far."""
        device = self._backends.get(head["device"])
        if not isinstance(device, BlkBackend | NetBackend):
            raise Refused(
                "no_such_device", f"device {head['device']!r} has no faults; disks and network cards have"
            )
        if "rules" in head:
            rules = [Fault(**rule) for rule in head["rules"]]
            device.set_faults(Faults(rules, seed=int(head["seed"])) if rules else None)
        return {"rules": device.faults.snapshot() if device.faults else []}, b"", []

    def _gpu_frame(self, head: Head, _data: bytes) -> Answer:
        frame = self._gpu(head).frame(int(head["scanout"]), with_cursor=bool(head["cursor"]))
        fd = os.memfd_create("rayos-frame", os.MFD_CLOEXEC)
        with os.fdopen(os.dup(fd), "wb") as file:
            file.write(frame.pixels)
        fields = {
            "width": frame.width,
            "height": frame.height,
            "stride": frame.stride,
            "serial": frame.serial,
        }
        return fields, b"", [fd]

    def _gpu_resize(self, head: Head, _data: bytes) -> Answer:
        is_done = self._gpu(head).resize(int(head["scanout"]), int(head["width"]), int(head["height"]))
        return ({}, b"", []) if is_done else None

    def _gpu_wait(self, head: Head, _data: bytes) -> Answer:
        damage = self._gpu(head).screen.damage_since(int(head["since"]), int(head["scanout"]))
        return ({"serial": damage.serial, "rect": damage.rect}, b"", []) if damage is not None else None
