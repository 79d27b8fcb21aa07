"""The worker's control socket: what the service asks of the devices of a running VM.

Each packet is one request ``{"id", "op", ...}`` and gets one answer ``{"id", ...}`` or ``{"id", "error", "message"}``.
Waiting is a late answer: `console.read` at the end of the output, `console.write` and `inject` without room and
`gpu.wait` answer when there is something to say, so nobody polls.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Callable, Sequence
from typing import Final

from rayos_devices.backend import Backend
from rayos_devices.errors import DeniedError, RequestError
from rayos_devices.host import HostRequest, Refused
from rayos_devices.kinds import KINDS
from rayos_devices.limits import Limit
from rayos_devices.loop import Loop
from rayos_vmm.shared import packet
from rayos_vmm.shared.accounts import AccountWriter, hit_ratio, layers
from rayos_vmm.shared.packet import Head
from rayos_vmm.worker.clients import Clients
from rayos_vmm.worker.firewall import PortFirewall
from rayos_vmm.worker.firewall_control import Answer, FirewallControl

#: Connections, and unanswered requests of all of them: the service needs a handful.
MAX_CLIENTS: Final = 16
MAX_WAITING: Final = 256
#: Beyond that a sleep costs less than the looking.
MAX_POLLING_US: Final = 1000.0

#: By name; an operation may be one of several kinds.
_DEVICE_OPERATIONS: Final = {
    name: [kind.operations[name] for kind in KINDS.values() if name in kind.operations]
    for name in dict.fromkeys(name for kind in KINDS.values() for name in kind.operations)
}


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
        self._operations: dict[str, Callable[[Head, bytes], Answer]] = {
            "policy": self._policy,
            "stats": self._stats,
            "polling": self._polling,
            "limit": self._limit,
            "level": self._level,
            **FirewallControl(self._firewall, loop).operations,
        }
        self._clients = Clients(loop, control, MAX_CLIENTS, self._answer, self._closed)
        self._retrying = False
        for backend in backends:
            backend.listen(self._something_happened)
            if isinstance(backend.judge, PortFirewall):
                backend.judge.on_verdict = self._something_happened

    def _closed(self, fd: int) -> None:
        for backend in self._backends.values():
            backend.forget_reader(fd)
        self._waiting = [entry for entry in self._waiting if entry[0] != fd]

    def _answer(self, fd: int, head: Head, payload: bytes) -> bool:
        """Answer now or keep the request; False when the client does not take its answers."""
        self._asking = fd
        try:
            operation = self._operations.get(head.get("op", ""))
            answer = self._device_operation(head, payload) if operation is None else operation(head, payload)
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

    def _device_operation(self, head: Head, data: bytes) -> Answer:
        """Has a device do one of its kind's operations."""
        found = _DEVICE_OPERATIONS.get(head.get("op", ""))
        if found is None:
            raise Refused(
                "unknown_operation", f"known: {', '.join((*self._operations, *_DEVICE_OPERATIONS))}"
            )
        name = head["device"] if "device" in head else next((one.device for one in found if one.device), "")
        backend = self._backends.get(name)
        for one in found:
            if backend is not None and one.takes(backend):
                request = HostRequest(
                    head, data, self._asking, packet.MAX_DATA_BYTES, self._something_happened
                )
                return one(backend, request)
        known = [n for n, candidate in self._backends.items() if any(one.takes(candidate) for one in found)]
        raise Refused("no_such_device", f"no device {name!r}; there are: {', '.join(known) or 'none'}")

    def _find(self, name: str) -> Backend:
        backend = self._backends.get(name)
        if backend is None:
            raise Refused("no_such_device", f"no device {name!r}; there are: {', '.join(self._backends)}")
        return backend

    def _firewall(self, name: str) -> PortFirewall:
        judge = self._find(name).judge
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

    def _limit(self, head: Head, _data: bytes) -> Answer:
        """Change a device's limits, each at once; the answer has all that it has now."""
        backend = self._find(head["device"])
        for name, value in dict(head["limits"]).items():
            backend.change_limit(Limit(name), int(value))
        return {"limits": {limit.value: backend.limit(limit) for limit in backend.LIMITS}}, b"", []

    def _level(self, head: Head, _data: bytes) -> Answer:
        self._accounts.set_level(int(head["level"]))
        return {"level": self._accounts.level}, b"", []
