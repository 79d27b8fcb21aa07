"""A VM's TPM for the service: start it before QEMU, find it again, end it, wipe it.

async with open_spawner() as spawner:                      # once, for the service's life
    authority = Authority.open(directory, now=...)
    tpm = await start_tpm(spawner, authority, vm_uuid=..., state_dir=..., run_dir=..., measurements=[...])
    arguments += qemu_arguments(tpm.qemu_socket)
    # store tpm.process.pid and tpm.process.started; a new service: Tpm(Process(pid, started), run_dir)
"""

from __future__ import annotations

import datetime
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from rayos_tpm.authority import Authority
from rayos_tpm.client import TpmClient
from rayos_tpm.guard import STATUS
from rayos_tpm.measurement import Measurement
from rayos_tpm.nv import pad_policy
from rayos_tpm.phase import Phase, profile_named
from rayos_tpm.process import Process
from rayos_tpm.protocol import Config, MeasurementRecord, Sealed
from rayos_tpm.qemu import check_socket_path
from rayos_tpm.server import CONTROL_SOCKET, QEMU_SOCKET
from rayos_tpm.spawner import Spawner

_STATUS_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Tpm:
    """A VM's running TPM.

    process: the TPM process; its id and start time are what a service stores to find it again.
    run_dir: where its sockets are.
    """

    process: Process
    run_dir: Path

    @property
    def qemu_socket(self) -> Path:
        """The path for qemu_arguments."""
        return self.run_dir / QEMU_SOCKET

    @property
    def client(self) -> TpmClient:
        """Status, quotes, registers, log and the rest."""
        return TpmClient(self.run_dir)

    def is_ours(self) -> bool:
        """Whether a recorded TPM process still runs and answers at its socket."""
        return self.process.is_alive() and (self.run_dir / CONTROL_SOCKET).is_socket()

    async def stop(self) -> None:
        """End it, its state stored. Safe to call again; a QEMU that is attached loses its TPM.

        What it last said of itself stays for client.last_status() until the next start.
        """
        await self.process.stop(grace_s=5)
        remove_sockets(self.run_dir)


def remove_sockets(run_dir: Path) -> None:
    """Remove what a TPM process may have left in its directory when it was killed."""
    for name in (QEMU_SOCKET, CONTROL_SOCKET):
        (run_dir / name).unlink(missing_ok=True)


def _listen(path: Path) -> socket.socket:
    check_socket_path(path).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(path))
        path.chmod(0o600)
        listener.listen(16)
    except BaseException:
        listener.close()
        raise
    return listener


async def start_tpm(
    spawner: Spawner,
    authority: Authority,
    *,
    vm_uuid: str,
    state_dir: Path,
    run_dir: Path,
    log: Path | None = None,
    measurements: Sequence[Measurement] = (),
    profile: str = "seed",
    allowed: Mapping[Phase, Sequence[bytes]] | None = None,
    nv_policy: bytes | None = None,
    sealed: Sealed | None = None,
    locks_platform: bool = False,
    quote_interval_s: float = 0.0,
    connect_limit_s: float = 60.0,
    launcher: Sequence[str] = (),
    uid: int = 0,
) -> Tpm:
    """Start the TPM of one VM and return it, ready for QEMU to connect.

    state_dir: the TPM's state, made when missing; run_dir: its sockets and status (0700, exists).
    log: messages of the TPM process and swtpm are appended here; both keep it as their output, by default
        run_dir/tpm.log.
    measurements: what the VM is made of, in phase order; extended at each TPM_Init before QEMU is answered.
    profile: "seed" or "host-reserved" (rayos_tpm.phase).
    allowed: digests that may be measured, by phase; anything else makes QEMU end before its first instruction.
    nv_policy: up to 256 bytes that the guest can read; None leaves what is there.
    sealed: a secret for the registers' values after the host's events.
    locks_platform: true for firmware without a TPM driver (qboot), which leaves the platform hierarchy open.
    quote_interval_s: seconds between periodic quotes, 0 for none.
    connect_limit_s: the TPM ends when QEMU has not connected by then.
    launcher: what swtpm's command line is appended to, such as a sandbox.
    uid: the user that a confined TPM process becomes (0: it stays), for the confinement that the spawner was given.
    After an error or cancellation nothing is left running. TpmError: why the VM must not start.
    """
    chosen = profile_named(profile)
    if nv_policy is not None:
        pad_policy(nv_policy)
    config = Config(
        vm_uuid=vm_uuid,
        state_dir=str(state_dir),
        run_dir=str(run_dir),
        log=str(log or run_dir / "tpm.log"),
        profile=chosen.name,
        measurements=[MeasurementRecord(item.phase, item.description, item.digest) for item in measurements],
        allowed={phase: list(digests) for phase, digests in (allowed or {}).items()},
        nv_policy=nv_policy,
        sealed=sealed,
        locks_platform=locks_platform,
        quote_interval_s=quote_interval_s,
        connect_limit_s=connect_limit_s,
        launcher=tuple(launcher),
        uid=uid,
    )
    remove_sockets(run_dir)
    (run_dir / STATUS).unlink(missing_ok=True)
    with (
        _listen(run_dir / QEMU_SOCKET) as qemu,
        _listen(run_dir / CONTROL_SOCKET) as control,
    ):
        status = os.open(run_dir / STATUS, _STATUS_FLAGS, 0o600)
        try:
            key = authority.state_key(vm_uuid)
            tpm = Tpm(await spawner.spawn(config, key, qemu, control, status), run_dir)
        finally:
            os.close(status)
    try:
        identity = await tpm.client.ready()
        if not identity.ek_certificate:
            now = datetime.datetime.now(datetime.UTC)
            await tpm.client.certify(authority.certify(vm_uuid, identity.ek_public, now=now))
    except BaseException:
        with trio.CancelScope(shield=True):
            await tpm.stop()
        raise
    return tpm
