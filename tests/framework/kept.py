"""A real keeper with its worker, sandboxed, without a service: what QEMU and the service see, from a test.

Another `Parent` than the shared one stands for another worker than the right one (a planted bug).
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Self

import msgspec

from rayos_vmm.hardware.launch import SPAWNER
from rayos_vmm.host import identity
from rayos_vmm.shared import packet
from rayos_vmm.shared.spec import KEEPER_SOCKET, Device, WorkerSpec, device_socket
from rayos_vmm.worker.sandbox import Mode
from rayos_vmm.worker.spawner import open_request
from tests.framework.frontend import ANSWER_TIMEOUT, Frontend
from tests.framework.target import Served


class Parent:
    """The parent of keepers: `command` with the number of its socket, ended by `close`."""

    def __init__(
        self, command: Sequence[str | Path] = SPAWNER, environment: Mapping[str, str] | None = None
    ) -> None:
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **(environment or {})},
            )

    def close(self) -> None:
        self.sock.close()
        self._process.wait(ANSWER_TIMEOUT)


@cache
def shared_parent() -> Parent:
    """One for all tests of this process; see `close_shared_parent`."""
    return Parent()


def close_shared_parent() -> None:
    """When the last test is over."""
    if shared_parent.cache_info().currsize:
        shared_parent().close()
        shared_parent.cache_clear()


class Kept:
    """Serves `devices` in `run_dir`, whose descriptors are the caller's. `close` ends it and checks how it ended."""

    def __init__(
        self,
        run_dir: Path,
        devices: Sequence[Device],
        *,
        memory_bytes: int = 64 << 20,
        sandbox: Mode = "on",
        parent: Parent | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.log = run_dir / "keeper.log"
        #: Workers that were killed by `ask`, and what the keeper told unasked.
        self.killed = 0
        self.events: list[dict[str, Any]] = []
        ours, theirs = socket.socketpair()
        with identity.claim() as slot, self.log.open("wb") as log, ours:
            self.uid = identity.user("worker", slot.slot)
            spec = WorkerSpec(
                vm="test",
                run_dir=str(run_dir),
                devices=tuple(devices),
                uid=self.uid,
                memory_bytes=memory_bytes,
                sandbox=sandbox,
            )
            with theirs, open_request(spec, log.fileno(), theirs.fileno(), slot.fds) as (data, ancillary):
                (parent or shared_parent()).sock.sendmsg([data], ancillary)
            ours.settimeout(ANSWER_TIMEOUT)
            line = ours.recv(4096)
            if not line:
                raise ChildProcessError(self.log.read_text())
            self._pidfd = os.pidfd_open(msgspec.json.decode(line)["pid"])
            ours.send(b"\0")
        self._client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._client.settimeout(ANSWER_TIMEOUT)
        self._client.connect(str(run_dir / KEEPER_SOCKET))

    def ask(self, op: str) -> dict[str, Any]:
        """A keeper's operation; its events in between are kept."""
        self.killed += op == "kill_worker"
        self._client.send(packet.encode({"id": 1, "op": op}))
        while True:
            head, _ = packet.decode(self._client.recv(packet.MAX_PACKET_BYTES))
            if head.get("id") == 1:
                return head
            self.events.append(head)

    def status(self) -> dict[str, Any]:
        """The keeper's status, once a worker has told what holds it."""
        deadline = time.monotonic() + ANSWER_TIMEOUT
        while not (status := self.ask("status"))["sandbox"] and time.monotonic() < deadline:
            time.sleep(0.005)
        return status

    def connect(self, device: str) -> Frontend:
        return Frontend.connect(self.run_dir / device_socket(device))

    def settle(self) -> None:
        time.sleep(0.002)

    def close(self) -> None:
        try:
            self.ask("quit")
            if not select.select([self._pidfd], [], [], ANSWER_TIMEOUT)[0]:
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
                raise TimeoutError(f"the keeper does not end: {self.log.read_text()}")
        finally:
            self._client.close()
            os.close(self._pidfd)
        words = self.log.read_text()
        if "keeper died" in words:
            raise ChildProcessError(words)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Sandboxed(Served):
    """`Served` by a sandboxed worker behind its keeper: what QEMU connects to."""

    session_fds = 3  # the keeper's to the frontend, and both ends between it and the worker

    def __init__(self, run_dir: Path, device: Device) -> None:
        self.path = run_dir / device_socket(device.name)
        self.idle_fds = 0
        self.kept = Kept(run_dir, [device])
        self._first = self._now()

    def _now(self) -> list[int]:
        status = self.kept.status()
        assert all(layer["on"] for layer in status["sandbox"].values()), status["sandbox"]
        return [status["pid"], status["worker_pid"]]

    @property
    def pids(self) -> list[int]:
        """Keeper and worker; none when this is another worker than the first."""
        return self._first if self._now() == self._first else []

    def connect(self) -> Frontend:
        return Frontend.connect(self.path)

    def close(self) -> None:
        self.kept.close()


class Link:
    """`Rig`'s target for one device of a `Kept`."""

    def __init__(self, kept: Kept, device: str) -> None:
        self._kept = kept
        self._device = device

    def connect(self) -> Frontend:
        return self._kept.connect(self._device)

    def settle(self) -> None:
        self._kept.settle()

    def close(self) -> None:
        return
