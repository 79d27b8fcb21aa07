"""Start a VM's keeper from the service, or find it again."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
import trio

from rayos_vmm.vm.identity import NOBODY, Identity, user
from rayos_vmm.vm.process import spawn
from rayos_vmm.worker.client import KeeperClient, WorkerClient, WorkerGone
from rayos_vmm.worker.sandbox import Mode
from rayos_vmm.worker.spec import Device, WorkerSpec, device_socket

#: Seconds a keeper has to load its code and bind its sockets, on a machine with 64 guests.
START_TIMEOUT: Final = 30.0


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


async def start_keeper(
    vm: str,
    run_dir: Path,
    devices: Sequence[Device],
    log: Path,
    *,
    identity: Identity = NOBODY,
    memory_bytes: int = 0,
    gate_fd: int = -1,
) -> Keeper:
    """Start a keeper that inherits the devices' descriptors; the caller may close its own afterwards.

    The keeper holds the claim on `identity` and its workers take its user; `memory_bytes` is the guest's, which
    bounds what they map. `gate_fd` is the gate page, open for reading (-1: everything may happen).
    `run_dir` exists and is private. The keeper is in a session of its own and outlives the service.
    Errors: KeeperFailed. Cancellation kills it and leaves its sockets for the caller to remove with the directory.
    """
    spec = WorkerSpec(
        vm=vm,
        run_dir=str(run_dir),
        devices=tuple(devices),
        uid=user("worker", identity.slot),
        memory_bytes=memory_bytes,
        sandbox=_mode(),
        gate_fd=gate_fd,
    )
    fds = [*identity.fds, *(fd for device in devices for fd in device.fds)]
    fds += [gate_fd] if gate_fd >= 0 else []
    keeper_in, spec_out = os.pipe2(os.O_CLOEXEC)
    word_in, keeper_out = os.pipe2(os.O_CLOEXEC)
    async with trio.lowlevel.FdStream(spec_out) as to_keeper, trio.lowlevel.FdStream(word_in) as from_keeper:
        try:
            with log.open("ab") as log_file:
                process = spawn(
                    [sys.executable, "-P", "-m", "rayos_vmm.worker"],
                    input_fd=keeper_in,
                    output_fd=keeper_out,
                    error_fd=log_file.fileno(),
                    pass_fds=fds,
                )
        finally:
            os.close(keeper_in)
            os.close(keeper_out)
        try:
            with trio.fail_after(START_TIMEOUT):
                await to_keeper.send_all(msgspec.json.encode(spec))
                await to_keeper.aclose()
                line = b""
                while not line.endswith(b"\n"):
                    chunk = await from_keeper.receive_some()
                    if not chunk:
                        raise KeeperFailed(_last_words(log))
                    line += chunk
            json.loads(line)
        except trio.TooSlowError:
            await process.end(grace_s=0.0)
            raise KeeperFailed(f"the keeper of {vm} was not ready in {START_TIMEOUT:.0f} s") from None
        except trio.BrokenResourceError:
            await process.end(grace_s=0.0)
            raise KeeperFailed(_last_words(log)) from None
        except BaseException:
            await process.end(grace_s=0.0)
            raise
        finally:
            process.close()
    return Keeper(process.pid, run_dir)


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
        _reap(keeper.pid)


def _mode() -> Mode:
    """RAYOS_SANDBOX of the service: "trap" names refused system calls, "off" is for comparing figures."""
    match os.environ.get("RAYOS_SANDBOX", "on"):
        case "trap":
            return "trap"
        case "off":
            return "off"
        case _:
            return "on"


def _reap(pid: int) -> None:
    """Collect our child; a keeper that an earlier service started is somebody else's."""
    with suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"the keeper ended: {lines[-1]}" if lines else "the keeper ended without a word"
