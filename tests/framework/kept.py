"""A real keeper with its worker, sandboxed, without a service: what QEMU and the service see, from a test.

`command` stands for another worker than the right one (a planted bug).
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Self

import msgspec

from rayos_vmm.vm import identity
from rayos_vmm.worker import packet
from rayos_vmm.worker.sandbox import Mode
from rayos_vmm.worker.spec import KEEPER_SOCKET, Device, WorkerSpec, device_socket
from tests.framework.frontend import ANSWER_TIMEOUT, Frontend

KEEPER: Final = (sys.executable, "-P", "-m", "rayos_vmm.worker")


class Kept:
    """Serves `devices` in `run_dir`, whose descriptors are the caller's. `close` ends it and checks how it ended."""

    def __init__(
        self,
        run_dir: Path,
        devices: Sequence[Device],
        *,
        memory_bytes: int = 64 << 20,
        sandbox: Mode = "on",
        command: Sequence[str | Path] = KEEPER,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.run_dir = run_dir
        self.log = run_dir / "keeper.log"
        with identity.claim() as slot, self.log.open("wb") as log:
            self.uid = identity.user("worker", slot.slot)
            spec = WorkerSpec(
                vm="test",
                run_dir=str(run_dir),
                devices=tuple(devices),
                uid=self.uid,
                memory_bytes=memory_bytes,
                sandbox=sandbox,
            )
            fds = [*slot.fds, *(device.fd for device in devices if device.fd >= 0)]
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                pass_fds=fds,
                env={**os.environ, **(environment or {})},
            )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(msgspec.json.encode(spec))
        self.process.stdin.close()
        line = self.process.stdout.readline()
        self.process.stdout.close()
        if not line:
            self.process.wait()
            raise ChildProcessError(self.log.read_text())
        json.loads(line)
        self._client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._client.settimeout(ANSWER_TIMEOUT)
        self._client.connect(str(run_dir / KEEPER_SOCKET))

    def ask(self, op: str) -> dict[str, Any]:
        """A keeper's operation; its events in between are dropped."""
        self._client.send(packet.encode({"id": 1, "op": op}))
        while True:
            head, _ = packet.decode(self._client.recv(packet.MAX_PACKET_BYTES))
            if head.get("id") == 1:
                return head

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
            code = self.process.wait(ANSWER_TIMEOUT)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        finally:
            self._client.close()
        if code != 0:
            raise ChildProcessError(f"exit code {code}: {self.log.read_text()}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
