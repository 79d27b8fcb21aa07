"""A real `rayos serve` of its own for a test, without a network, and an ordinary user of the host who attacks it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from rayos_vmm.client.client import Client

START_S = 60.0
NOBODY = 65534


@dataclass
class Daemon:
    """The daemon's process and places."""

    directory: Path
    config: str = ""
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def state(self) -> Path:
        return self.directory / "s"

    @property
    def socket(self) -> Path:
        """Of the owner alone."""
        return self.directory / "r" / "api.sock"

    @property
    def shared(self) -> Path:
        """Everybody may connect there."""
        return self.directory / "all.sock"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    @property
    def client(self) -> Client:
        return Client(self.socket)

    def log(self) -> str:
        """All that it logged."""
        return (self.directory / "log").read_text()

    def start(self) -> None:
        """Returns when it answers."""
        (self.directory / "rayos.toml").write_text(
            f'[service]\nnetwork = false\nshared_socket = "{self.shared}"\n{self.config}'
        )
        told, tell = os.pipe()
        with (self.directory / "log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "rayos_vmm.cli", "serve"),
                    *("--config", str(self.directory / "rayos.toml"), "--report-fd", str(tell)),
                ],
                stdout=log,
                stderr=log,
                pass_fds=[tell],
                env=os.environ | self.environment(),
            )
        os.close(tell)
        with os.fdopen(told, "rb") as pipe:
            assert pipe.read(), self.log()

    def environment(self) -> dict[str, str]:
        """Leads `rayos` to it."""
        return {
            "RAYOS_STATE_DIR": str(self.state),
            "RAYOS_RUNTIME_DIR": str(self.directory / "r"),
        }

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Its status."""
        assert self.process is not None
        with suppress(ProcessLookupError):
            self.process.send_signal(number)
        return self.process.wait(START_S)

    def rayos(self, *words: str, status: int = 0) -> str:
        """Runs `rayos` against it; its output, and its errors when it should fail."""
        done = subprocess.run(
            [sys.executable, "-P", "-m", "rayos_vmm.cli", *words],
            env=os.environ | self.environment(),
            capture_output=True,
            text=True,
            timeout=START_S,
        )
        assert done.returncode == status, f"{words}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stderr if status else done.stdout


@contextmanager
def open_daemon(config: str = "") -> Iterator[Daemon]:
    """A daemon in directories of its own, which are gone afterwards, as it is."""
    directory = Path(tempfile.mkdtemp(prefix="rayd", dir="/tmp"))
    directory.chmod(0o711)
    daemon = Daemon(directory, config)
    try:
        daemon.start()
        yield daemon
    finally:
        if daemon.process is not None and daemon.process.poll() is None:
            daemon.stop()
        shutil.rmtree(directory)


def run_as_nobody(script: str, *arguments: Any, timeout_s: float = START_S) -> str:
    """Runs a Python script as an ordinary user; returns its output."""
    done = subprocess.run(
        [
            *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
            *("/usr/bin/python3", "-I", "-c", script, *map(str, arguments)),
        ],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


async def as_nobody(script: str, *arguments: Any) -> str:
    """`run_as_nobody`, while trio goes on."""
    return await trio.to_thread.run_sync(lambda: run_as_nobody(script, *arguments))


def ask(path: Path, request: bytes, timeout_s: float = 20.0) -> bytes:
    """Everything that is answered to these bytes until the other side closes, by this process' user."""
    with socket.socket(socket.AF_UNIX) as sock:
        # A blocking connect waits for room in a backlog that somebody else has filled, within this.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", int(timeout_s), 0))
        sock.connect(str(path))
        sock.settimeout(timeout_s)
        with suppress(BrokenPipeError):  # it may answer before it has read all
            sock.sendall(request)
        answer = bytearray()
        with suppress(ConnectionResetError):
            while data := sock.recv(65536):
                answer += data
        return bytes(answer)


def get(target: str, **fields: str) -> bytes:
    """A request that closes its connection."""
    more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in fields.items())
    return f"GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{more}\r\n".encode()


def status_of(answer: bytes) -> int:
    """The status of the last answer's head; 0 when there is none."""
    return int(answer.split()[1]) if answer.startswith(b"HTTP/1.1 ") else 0
