"""TPMs from `tpm/`, measured: what a machine boots is hashed, logged and sealed before QEMU gets it."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import msgspec
import trio

from rayos_tpm import pcr, seal
from rayos_tpm.artefact import Artefact, ArtefactStore, MeasuredBoot, measure_boot
from rayos_tpm.authority import Authority
from rayos_tpm.client import TpmClient
from rayos_tpm.errors import TpmError
from rayos_tpm.launch import Tpm, start_tpm
from rayos_tpm.phase import Phase
from rayos_tpm.policy import Policy
from rayos_tpm.process import Process
from rayos_tpm.program import find_swtpm
from rayos_tpm.protocol import Sealed, Status, TpmState
from rayos_tpm.qemu import qemu_arguments
from rayos_tpm.spawner import Spawner, open_spawner
from rayos_vmm.config.spec import Tpm as TpmSpec
from rayos_vmm.errors import GuestGone, Invalid
from rayos_vmm.host.confine import Reach, confined, program_directories
from rayos_vmm.host.identity import user
from rayos_vmm.host.process import ProcessId
from rayos_vmm.machine.needs import MeasuredTpm
from rayos_vmm.machine.record import Record
from rayos_vmm.qemu.arch import architecture_of, board_of
from rayos_vmm.qemu.arguments import direct_firmware
from rayos_vmm.qemu.boot import Boot, FirmwareKind

POLICY_MAXIMUM_BYTES: Final = 1 << 20
#: The parent of all TPM processes, which confines them.
SPAWNER: Final = (sys.executable, "-P", "-m", "rayos_vmm.worker.tpm_process")


class MeasuringTpms:
    """The machines' TPMs. Use `open_tpms`."""

    def __init__(self, spawner: Spawner, authority: Authority, store: ArtefactStore) -> None:
        self._spawner = spawner
        self._authority = authority
        self._store = store

    async def start(
        self, record: Record, boot: Boot, *, runtime: Path, state: Path, log: Path, slot: int
    ) -> MeasuredTpm:
        """Starts a machine's TPM. Close what it returns once QEMU has the descriptors.

        Raises:
            GuestGone: a file cannot be read, or the TPM's state is unusable; the message says why.
            Invalid: the machine's policy or secret is not usable.
        """
        if boot.modules:
            raise Invalid(
                "initrd: the TPM measures no multiboot modules",
                hint="tpm = false (--no-tpm), or pack them into the kernel",
            )
        spec, options, uid = record.spec, record.spec.tpm_options, user("tpm", slot)
        policy = await trio.to_thread.run_sync(_policy, options)
        sealed = await trio.to_thread.run_sync(_secret, options)
        is_uefi = boot.firmware_kind is FirmwareKind.PFLASH
        direct = direct_firmware(spec, boot)

        def measure() -> MeasuredBoot:
            return measure_boot(
                self._store,
                launch=f"machine {record.uuid} memory {spec.memory_bytes} cpus {spec.cpus}",
                policy=msgspec.json.encode(spec.quota, order="sorted").decode(),
                append=boot.append,
                kernel=boot.kernel,
                initrd=boot.initrd,
                firmware=boot.firmware,
                built_in_firmware=direct or architecture_of(spec).firmware.built_in,
            )

        try:
            await trio.to_thread.run_sync(_reclaim, state)
            measured = await trio.to_thread.run_sync(measure)
        except TpmError as error:
            raise GuestGone(str(error)) from None
        try:
            tpm = await start_tpm(
                self._spawner,
                self._authority,
                vm_uuid=record.uuid,
                state_dir=state,
                run_dir=runtime,
                log=log,
                measurements=measured.measurements,
                profile=options.profile or (policy and policy.profile) or _default_profile(is_uefi),
                allowed=_allowed(policy) if policy else None,
                sealed=sealed,
                quote_interval_s=options.quote_interval_s,
                locks_platform=direct is not None,
                launcher=confined(
                    (), Reach(read=program_directories([find_swtpm()]), write=[state]), uid=uid
                ),
                uid=uid,
            )
        except TpmError as error:
            measured.close()
            raise GuestGone(f"the TPM could not be started: {error}") from None
        except BaseException:
            measured.close()
            raise
        own_copies = replace(
            boot,
            kernel=_path(measured.kernel),
            initrd=_path(measured.initrd),
            firmware=_path(measured.firmware),
        )
        return MeasuredTpm(
            process=ProcessId(tpm.process.pid, tpm.process.started),
            socket=tpm.qemu_socket,
            arguments=qemu_arguments(tpm.qemu_socket, board_of(spec).tpms[options.model]),
            boot=own_copies,
            descriptors=measured.descriptors,
            close=measured.close,
        )

    async def stop(self, process: ProcessId, runtime: Path) -> None:
        """Ends a machine's TPM; its state stays. Safe to call again."""
        await Tpm(Process(process.pid, process.start_time), runtime).stop()

    async def follow(self, runtime: Path, on_change: Callable[[str, str], None]) -> None:
        """Calls back with each new state of a machine's TPM and its reason, until the TPM has ended."""
        client = TpmClient(runtime)
        try:
            status: Status = await client.status()
            while status.state is not TpmState.ENDED:
                on_change(status.state.value, status.reason)
                status = await client.wait_change(status.state)
                if status.state is TpmState.FAILED:
                    on_change(status.state.value, status.reason)
                    return
        except TpmError as error:
            on_change(TpmState.FAILED.value, str(error))

    async def watch(self, process: ProcessId) -> str:
        """Returns when a machine's TPM process has ended, and how it did, as the end of a sentence."""
        return await self._spawner.watch(Process(process.pid, process.start_time))

    def note_death(self, runtime: Path, reason: str) -> None:
        """Leaves in place of the last word of a TPM process how that died."""
        TpmClient(runtime).note_death(reason)

    def refusal(self, runtime: Path) -> str:
        """Why a machine's TPM refused the launch, or nothing."""
        try:
            status = TpmClient(runtime).last_status()
        except TpmError:
            return ""
        return status.reason


def _reclaim(directory: Path) -> None:
    """Makes the state ours that belongs to the user of the run before, in a slot that another machine may have now.

    Raises:
        TpmError: it cannot be.
    """
    try:
        if directory.is_dir() and not directory.is_symlink():
            for path in (directory, *directory.iterdir()):
                os.chown(path, os.geteuid(), os.getegid(), follow_symlinks=False)
    except OSError as error:
        raise TpmError(f"{error.filename}: {error.strerror}") from None


def _default_profile(is_uefi: bool) -> str:
    """Direct kernel boot has the lower registers for itself; UEFI guests own those."""
    return "host-reserved" if is_uefi else "seed"


def _policy(options: TpmSpec) -> Policy | None:
    """Returns the policy of launches; None: anything may be launched.

    Raises:
        Invalid: the file is missing or no policy, or it was made for another profile than was asked for.
    """
    if options.policy is None:
        return None
    try:
        policy = Policy.from_json(_read(options.policy, "tpm.policy", POLICY_MAXIMUM_BYTES))
    except TpmError as error:
        raise Invalid(f"tpm.policy = {options.policy}: {error}") from None
    if options.profile not in (None, policy.profile):
        raise Invalid(
            f"tpm.profile = {options.profile!r}, but {options.policy} was made for {policy.profile!r}",
            hint="leave tpm.profile away, or write the policy for it",
        )
    return policy


def _allowed(policy: Policy) -> dict[Phase, list[bytes]]:
    """Returns the components that a launch may consist of. Which machine it is (its UUID is new with each definition)
    a verifier decides.
    """
    return {phase: digests for phase, digests in policy.allowed().items() if phase is not Phase.LAUNCH}


def _secret(options: TpmSpec) -> Sealed | None:
    """Raises Invalid: no such file, too long for the TPM, or no registers."""
    if options.secret is None:
        return None
    secret = _read(options.secret.path, "tpm.secret.path", seal.SECRET_LIMIT)
    try:
        return Sealed(seal.check_secret(secret), list(pcr.parse_list(options.secret.pcrs)))
    except (TpmError, ValueError) as error:
        raise Invalid(f"tpm.secret: {error}") from None


def _read(path: str, key: str, limit_bytes: int) -> bytes:
    try:
        with Path(path).open("rb") as file:
            data = file.read(limit_bytes + 1)
    except OSError as error:
        raise Invalid(f"{key} = {path}: cannot be read: {error.strerror}", code="file_missing") from None
    if len(data) > limit_bytes:
        raise Invalid(f"{key} = {path}: longer than the {limit_bytes} bytes that are allowed")
    return data


def _path(artefact: Artefact | None) -> Path | None:
    """The sealed copy as QEMU, which inherits the descriptor, can open it."""
    return None if artefact is None else Path(f"/proc/self/fd/{artefact.descriptor}")


@asynccontextmanager
async def open_tpms(directory: Path) -> AsyncIterator[MeasuringTpms]:
    """TPMs for the service's life; those that it starts live on.

    Args:
        directory: the installation's authority, made when missing.

    Raises:
        GuestGone: the authority's files are damaged or readable by others.
    """
    now = datetime.datetime.now(datetime.UTC)
    try:
        authority = await trio.to_thread.run_sync(lambda: Authority.open(directory, now=now))
    except TpmError as error:
        raise GuestGone(str(error)) from None
    store = ArtefactStore()
    try:
        async with open_spawner(SPAWNER) as spawner:
            yield MeasuringTpms(spawner, authority, store)
    finally:
        store.close()
