"""Takes revisions to the device workers over their control sockets, and their acknowledgements back.

One connection a worker, all of them in one epoll that trio waits for, so that 64 answers cost one wake-up and not 64.
A worker is not trusted: an answer is at most one packet, one that was not asked for ends the connection, and what ends
is made again after a pause (`distribution`).
"""

from __future__ import annotations

import select
import socket
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import trio

from rayos_vmm.errors import RayosError
from rayos_vmm.policy.distribution import FIRST_DELAY_S, Distribution
from rayos_vmm.shared import packet
from rayos_vmm.shared.packet import Head
from rayos_vmm.shared.spec import CONTROL_SOCKET

OPERATION = "policy"


class Broadcaster:
    """Use `run`. Everything else may be called from any task of the same run.

    `prepare` gives a worker what does not go through its gate page (firewall rules); it raises RayosError when it
    cannot.
    """

    def __init__(
        self, distribution: Distribution, prepare: Callable[[str], Awaitable[None]] | None = None
    ) -> None:
        self.distribution = distribution
        self._prepare_worker = prepare
        self._stale: set[str] = set()  # who has to be prepared
        self._preparing: list[tuple[str, int]] = []
        self._paths: dict[str, Path] = {}
        self._sockets: dict[str, socket.socket] = {}
        self._names: dict[int, str] = {}
        self._epoll = select.epoll()
        self._wake = trio.Event()

    def attach(self, vm: str, runtime: Path) -> None:
        """A machine's worker is there, with its control socket in `runtime`; it is told at once."""
        self.detach(vm)
        self._paths[vm] = runtime / CONTROL_SOCKET
        self.distribution.attach(vm, trio.current_time())
        self._send()

    def detach(self, vm: str) -> None:
        """The worker is gone. Safe to call again."""
        self._close(vm)
        self._paths.pop(vm, None)
        self._stale.discard(vm)
        self.distribution.detach(vm)

    def announce(self, revision: int, stale: Iterable[str] = ()) -> None:
        """Announces a revision that is in force. When this returns it has been sent to all that could be reached, but
        for those that are `stale`: they have to be prepared before.
        """
        self._stale |= set(stale) & self._paths.keys()
        self.distribution.announce(revision, trio.current_time())
        self._send()

    def renew(self, vm: str, *, is_stale: bool) -> None:
        """Something of a machine has changed without a revision: its worker is told at once."""
        if vm in self._paths:
            if is_stale:
                self._stale.add(vm)
            self.distribution.renew(vm, trio.current_time() - FIRST_DELAY_S)
            self._send()

    async def wait_applied(self, vm: str, timeout_s: float) -> bool:
        """Whether a machine's worker has answered all that it was told, within `timeout_s`; true of one that is not."""
        with trio.move_on_after(timeout_s):
            while (target := self.distribution.targets.get(vm)) is not None:
                if target.sent is None and vm not in self.distribution.queue:
                    return not target.is_dead
                await self.changed()
            return True
        return False

    async def wait_all_applied(self, timeout_s: float) -> None:
        """Returns when nobody lags any more or was given up, or after `timeout_s`."""
        targets = self.distribution.targets
        with trio.move_on_after(timeout_s):
            while any(target.lag and not target.is_dead for target in targets.values()):
                await self.changed()

    async def changed(self) -> None:
        """Returns when something was sent, answered or given up."""
        await self._wake.wait()

    async def run(self) -> None:
        """Receives answers and repeats what failed. Ends when cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._receive)
                while True:
                    preparing, self._preparing = self._preparing, []
                    for vm, revision in preparing:
                        nursery.start_soon(self._prepare, vm, revision)
                    wake = self._wake
                    deadline = self.distribution.deadline()
                    with trio.CancelScope(deadline=float("inf") if deadline is None else deadline):
                        await wake.wait()
                        continue
                    self._send()
        finally:
            for vm in list(self._sockets):
                self._close(vm)
            self._epoll.close()

    def _send(self) -> None:
        now = trio.current_time()
        for vm in self.distribution.late(now):
            self._close(vm)
        for vm, revision in self.distribution.take(now):
            if vm in self._stale:
                self._preparing.append((vm, revision))
            else:
                self._tell(vm, revision)
        self._notify()

    def _notify(self) -> None:
        wake, self._wake = self._wake, trio.Event()
        wake.set()

    async def _prepare(self, vm: str, revision: int) -> None:
        """The first half of a delivery; what fails is repeated with the whole."""
        self._stale.discard(vm)
        try:
            if self._prepare_worker is not None:
                await self._prepare_worker(vm)
        except RayosError as error:
            if vm in self._paths:
                self._stale.add(vm)
                self.distribution.fail(vm, error.message, trio.current_time())
        else:
            target = self.distribution.targets.get(vm)
            if target is not None and target.sent is not None and target.under_way == revision:
                self._tell(vm, revision)
        self._notify()

    def _tell(self, vm: str, revision: int) -> None:
        try:
            sock = self._sockets.get(vm) or self._connect(vm)
            sock.send(packet.encode({"id": revision, "op": OPERATION}), socket.MSG_NOSIGNAL)
        except OSError as error:
            self._close(vm)
            self.distribution.fail(vm, f"it cannot be reached: {error.strerror}", trio.current_time())

    def _connect(self, vm: str) -> socket.socket:
        sock = socket.socket(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        try:
            sock.connect(str(self._paths[vm]))
        except OSError:
            sock.close()
            raise
        self._sockets[vm] = sock
        self._names[sock.fileno()] = vm
        self._epoll.register(sock.fileno(), select.EPOLLIN)
        return sock

    def _close(self, vm: str) -> None:
        sock = self._sockets.pop(vm, None)
        if sock is not None:
            self._epoll.unregister(sock.fileno())
            del self._names[sock.fileno()]
            sock.close()

    async def _receive(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._epoll.fileno())
            for fd, _events in self._epoll.poll(0):
                vm = self._names[fd]
                try:
                    data = self._sockets[vm].recv(packet.MAX_PACKET_BYTES)
                except BlockingIOError:
                    continue
                except OSError:
                    data = b""
                self._answer(vm, data)
            self._send()

    def _answer(self, vm: str, data: bytes) -> None:
        now = trio.current_time()
        target = self.distribution.targets[vm]
        if target.sent is None:  # unasked, or its end: there may be a successor
            self._close(vm)
            self.distribution.renew(vm, now)
            return
        if not data:
            self._close(vm)
            self.distribution.fail(vm, "it closed the connection", now)
            return
        try:
            head, _ = packet.decode(data)
        except ValueError as error:
            head = {"message": str(error)}
        self._take(vm, head, now)

    def _take(self, vm: str, head: Head, now: float) -> None:
        revision = head.get("revision")
        if isinstance(revision, int) and "error" not in head:
            self.distribution.acknowledge(vm, revision, now)
            return
        self._close(vm)
        self.distribution.fail(vm, f"it refused: {str(head.get('message', head))[:200]}", now)
