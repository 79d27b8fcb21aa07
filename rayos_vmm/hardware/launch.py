"""Start a VM's keeper from the service, or find it again."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import msgspec
import trio

from rayos_vmm.hardware.client import KeeperClient, WorkerClient
from rayos_vmm.host.identity import NOBODY, Identity, user
from rayos_vmm.host.process import Process, ProcessId, adopt, spawn
from rayos_vmm.shared import packet
from rayos_vmm.shared.packet import WorkerGone
from rayos_vmm.shared.spec import Device, WorkerSpec, device_socket
from rayos_vmm.worker.sandbox import mode_wanted
from rayos_vmm.worker.spawner import open_request

#: Seconds a keeper has to bind its sockets, on a machine with 64 guests that all start.
START_TIMEOUT: Final = 30.0
#: Seconds in which the parent of a keeper tells how that ended.
REPORT_TIMEOUT: Final = 0.3
#: Ends that nobody asked about are kept up to so many.
MAX_ENDS: Final = 4096
#: The parent of all keepers; the number of its socket follows.
SPAWNER: Final = (sys.executable, "-P", "-m", "rayos_vmm.worker")


class KeeperFailed(Exception):
    """The keeper did not start; the text says why."""


@dataclass(frozen=True, slots=True)
class Keeper:
    """A running keeper. `pid` and the run directory are what a later service needs to find it."""

    pid: int
    run_dir: Path

    def socket(self, device: str) -> Path:
        """Where QEMU connects for a device."""
        return self.run_dir / device_socket(device)

    def chardev_socket(self, device: str, port: int) -> Path:
        return self.run_dir / f"{device}.{port}.sock"

    def worker(self) -> WorkerClient:
        return WorkerClient(self.run_dir)

    def client(self) -> KeeperClient:
        return KeeperClient(self.run_dir)


class Spawner:
    """Starts keepers by their `parent`, which lives as long as the context and is started again if it does not."""

    def __init__(self) -> None:
        self._sock: trio.socket.SocketType | None = None
        self.parent: Process | None = None
        self._started = trio.Event()
        self._ends: dict[int, int] = {}  # how keepers ended, by pid
        self._news = trio.Event()

    async def __aenter__(self) -> Self:
        self.start_parent()
        return self

    async def __aexit__(self, *_: object) -> None:
        with trio.CancelScope(shield=True):
            await self.close()

    def start_parent(self) -> None:
        """Returns at once: it loads its code while others work. Errors: OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs, Path(os.devnull).open("wb") as null:
            self.parent = spawn(
                [*SPAWNER, str(theirs.fileno())],
                output_fd=null.fileno(),
                error_fd=2,
                pass_fds=[theirs.fileno()],
            )
        self._sock = trio.socket.from_stdlib_socket(ours)
        self._started.set()

    async def listen(self) -> None:
        """Notes how keepers end, as their parent saw it. Never returns."""
        while True:
            sock = self._sock
            if sock is None:
                await self._started.wait()
                continue
            try:
                word = await sock.recv(packet.MAX_PACKET_BYTES)
            except (OSError, trio.ClosedResourceError):
                word = b""
            if word:
                self._note_end(**msgspec.json.decode(word))
            elif sock is self._sock:
                await self.close()  # the next keeper starts another

    def _note_end(self, pid: int, status: int) -> None:
        self._ends[pid] = status
        if len(self._ends) > MAX_ENDS:
            del self._ends[next(iter(self._ends))]
        news, self._news = self._news, trio.Event()
        news.set()

    async def watch(self, keeper: ProcessId) -> int | None:
        """Returns when a keeper has ended: its status, minus the signal's number; None when nobody saw it."""
        process = adopt(keeper)
        if process is not None:
            try:
                await process.wait()
            finally:
                process.close()
        with trio.move_on_after(REPORT_TIMEOUT):
            while keeper.pid not in self._ends and self._sock is not None:
                await self._news.wait()
        return self._ends.pop(keeper.pid, None)

    async def start_keeper(
        self,
        vm: str,
        run_dir: Path,
        devices: Sequence[Device],
        log: Path,
        *,
        identity: Identity = NOBODY,
        memory_bytes: int = 0,
        gate_fd: int = -1,
        accounts_fd: int = -1,
        held: Sequence[int] = (),
    ) -> Keeper:
        """Start a keeper that gets the devices' descriptors; the caller may close its own afterwards.

        The keeper holds the claim on `identity` and its workers take its user; `memory_bytes` is the guest's, which
        bounds what they map. `gate_fd` is the gate page, open for reading (-1: everything may happen),
        `accounts_fd` the file of accounts, open for both (-1: nobody reads them). It also keeps `held` open, which
        tells their other ends that it lives. `run_dir` exists and is private. The keeper is in a session of its own
        and outlives the service.
        Errors: KeeperFailed. Cancellation ends it, and it removes its sockets.
        """
        spec = WorkerSpec(
            vm=vm,
            run_dir=str(run_dir),
            devices=tuple(devices),
            uid=user("worker", identity.slot),
            memory_bytes=memory_bytes,
            sandbox=mode_wanted(),
            gate_fd=gate_fd,
            accounts_fd=accounts_fd,
        )
        ours, theirs = socket.socketpair()
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        async with stream:
            with theirs, log.open("ab") as log_file:
                try:
                    with open_request(
                        spec, log_file.fileno(), theirs.fileno(), [*identity.fds, *held]
                    ) as request:
                        await self._send(*request)
                except ValueError as error:
                    raise KeeperFailed(f"{vm}: {error}") from None
            try:
                with trio.fail_after(START_TIMEOUT):
                    word = await _line(stream)
                    if "pid" in word:
                        await stream.send_all(b"\0")
                        return Keeper(word["pid"], run_dir)
            except trio.TooSlowError:
                raise KeeperFailed(f"the keeper of {vm} was not ready in {START_TIMEOUT:.0f} s") from None
            except trio.BrokenResourceError:
                raise KeeperFailed(_last_words(log)) from None
            finally:
                await _wait_gone(stream)
        raise KeeperFailed(word.get("error") or _last_words(log))

    async def _send(self, data: bytes, ancillary: Any) -> None:
        for _ in range(2):
            if self._sock is None:
                self.start_parent()
            assert self._sock is not None
            try:
                await self._sock.sendmsg([data], ancillary)
            except OSError as error:
                failure = error
                await self.close()
            else:
                return
        raise KeeperFailed(f"the parent of all keepers takes no requests: {failure}")

    async def close(self) -> None:
        """End the parent; what it started lives on."""
        if self._sock is not None and self.parent is not None:
            parent = self.parent
            self._sock.close()
            self._sock = None
            self._started = trio.Event()
            await parent.end()
            parent.close()


async def _line(stream: trio.SocketStream) -> dict[str, Any]:
    """Returns the keeper's line; empty when it ended instead."""
    line = b""
    while not line.endswith(b"\n"):
        chunk = await stream.receive_some()
        if not chunk:
            return {}
        line += chunk
    word: dict[str, Any] = msgspec.json.decode(line)
    return word


async def _wait_gone(stream: trio.SocketStream) -> None:
    """When it got no byte: the keeper ends, at the latest when it is ready. When it did, it closed this itself."""
    with trio.CancelScope(shield=True), trio.move_on_after(START_TIMEOUT), suppress(trio.BrokenResourceError):
        await stream.send_eof()
        while await stream.receive_some():
            pass


async def stop_keeper(keeper: Keeper) -> None:
    """End the keeper and its worker, kindly and then not; returns when the process is gone."""
    try:
        pidfd = os.pidfd_open(keeper.pid)
    except ProcessLookupError:
        return
    try:
        client = keeper.client()
        with trio.move_on_after(2.0):
            with suppress(WorkerGone, OSError):
                await client.quit()
            await trio.lowlevel.wait_readable(pidfd)
            return
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        with trio.move_on_after(5.0):
            await trio.lowlevel.wait_readable(pidfd)
    finally:
        client.close()
        os.close(pidfd)


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"the keeper ended: {lines[-1]}" if lines else "the keeper ended without a word"
