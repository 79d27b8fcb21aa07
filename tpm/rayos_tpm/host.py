"""The host's side of a VM's TPM: set it up, measure a launch, quote, and everything on demand.

Each function is one conversation over an Emulator; the caller holds the TPM's turn, so no guest command comes
in between. A function that makes transient objects or sessions flushes them, also after an error: the
guest's resource manager believes that the three slots are its own.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Final

import trio

from rayos_tpm import command, control, credential, key, nv, pcr, quote, seal
from rayos_tpm.command import RH_ENDORSEMENT, RH_PLATFORM, Code
from rayos_tpm.control import Control, ControlRequest
from rayos_tpm.emulator import Emulator
from rayos_tpm.errors import CommandFailed, StateError, TpmError, Unavailable
from rayos_tpm.journal import Journal
from rayos_tpm.measurement import Measurement
from rayos_tpm.protocol import DeviceInfo, QuoteBundle
from rayos_tpm.state import Record

STOP: Final = ControlRequest(Control.STOP)
_DYNAMIC_MARK: Final = b"RayOS VMM host events 1"
_READ_AT_ONCE: Final = 8  # values in one answer to PCR_Read
_ABSENT: Final = frozenset({0x08B, 0x18B, 0x28B})  # TPM_RC_HANDLE for a handle, for NV as first and second


@asynccontextmanager
async def _flushed(emulator: Emulator, handle: int) -> AsyncIterator[int]:
    try:
        yield handle
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(5):
            await emulator.transmit(key.flush_context(handle))


async def _create(
    emulator: Emulator, hierarchy: int, template: bytes, data: bytes = b""
) -> tuple[int, bytes]:
    frame = key.create_primary(hierarchy, template, data=data)
    return key.parse_created(await emulator.run(Code.CreatePrimary, frame))


async def provision(emulator: Emulator, vm_uuid: str, nv_auth: bytes) -> Record:
    """Set up a TPM fresh from manufacture: SHA-256 bank alone, keys, NV. Leaves it started.

    The bank takes effect at the next TPM_Init, which comes with QEMU.
    """
    await emulator.run(Code.Startup, command.startup())
    await emulator.run(Code.PCR_Allocate, command.pcr_allocate_sha256())
    handle, ek_public = await _create(emulator, RH_ENDORSEMENT, key.EK_TEMPLATE)
    async with _flushed(emulator, handle):
        pass
    ak_public = await _persist_ak(emulator)
    frame = nv.define(nv.POLICY_INDEX, nv.POLICY_SIZE, nv.POLICY_ATTRIBUTES, nv_auth)
    await emulator.run(Code.NV_DefineSpace, frame)
    await write_policy(emulator, b"", nv_auth)
    await emulator.run(Code.Shutdown, command.shutdown())
    return Record(vm_uuid, ak_public, ek_public)


async def _persist_ak(emulator: Emulator) -> bytes:
    handle, public = await _create(emulator, RH_PLATFORM, key.AK_TEMPLATE)
    async with _flushed(emulator, handle):
        await emulator.run(Code.EvictControl, key.evict_control(RH_PLATFORM, handle, key.AK_HANDLE))
    return public


async def check_identity(emulator: Emulator, record: Record) -> None:
    """The attestation key is the recorded one; made again from its seed when somebody evicted it.

    StateError: it is another, so this state is not the one that was recorded.
    """
    try:
        response = await emulator.run(Code.ReadPublic, key.read_public(key.AK_HANDLE))
        public = response.reader().sized()
    except CommandFailed as error:
        if error.code not in _ABSENT:
            raise
        public = await _persist_ak(emulator)
    if public != record.ak_public:
        raise StateError(
            f"the TPM of VM {record.vm_uuid} has another attestation key than recorded: its state was exchanged "
            "or its platform seed changed; remove the TPM's state to start with a new one"
        )


async def store_certificate(emulator: Emulator, certificate: bytes) -> None:
    """Put the endorsement key's certificate where guests look for it, unless it is there already.

    Needs the platform's empty authorization: call between Startup and the guest.
    """
    if len(certificate) > nv.CERTIFICATE_LIMIT:
        raise TpmError(f"an EK certificate of {len(certificate)} bytes; NV takes {nv.CERTIFICATE_LIMIT}")
    index = nv.CERTIFICATE_INDEX
    try:
        frame = nv.read(index, len(certificate), authority=RH_PLATFORM)
        if (await emulator.run(Code.NV_Read, frame)).reader().sized() == certificate:
            return
        await emulator.run(Code.NV_UndefineSpace, nv.undefine(index))
    except CommandFailed as error:
        if error.code not in _ABSENT:
            await emulator.run(Code.NV_UndefineSpace, nv.undefine(index))
    await emulator.run(Code.NV_DefineSpace, nv.define(index, len(certificate), nv.CERTIFICATE_ATTRIBUTES))
    await emulator.run(Code.NV_Write, nv.write(index, certificate, authority=RH_PLATFORM))


async def measure(emulator: Emulator, journal: Journal, measurements: Sequence[Measurement]) -> None:
    """Start the TPM and extend what the host knows, each with its log entry.

    TpmError: the TPM was running already, the log overflows, or a phase is out of order. Unmeasured
    registers must not reach a guest then.
    """
    await emulator.run(Code.Startup, command.startup())
    if journal.profile.is_dynamic:
        await emulator.order(ControlRequest(Control.HASH_START))
        await emulator.order(control.hash_data(_DYNAMIC_MARK))
        await emulator.order(ControlRequest(Control.HASH_END))
        journal.start_dynamic(hashlib.sha256(_DYNAMIC_MARK).digest(), "start of the host's register")
        await emulator.order(control.set_locality(4))
    try:
        for measurement in measurements:
            entry = journal.measure(measurement)
            await emulator.run(Code.PCR_Extend, command.pcr_extend(entry.pcr, entry.digest))
    finally:
        if journal.profile.is_dynamic:
            await emulator.order(control.set_locality(0))


async def lock_platform(emulator: Emulator) -> None:
    """Give the platform a random authorization that nobody keeps, until the next Startup(CLEAR).

    SeaBIOS and OVMF do it themselves, and need it empty; firmware without a TPM driver (qboot) does not.
    """
    await emulator.run(Code.HierarchyChangeAuth, key.change_auth(RH_PLATFORM, os.urandom(pcr.DIGEST_SIZE)))


async def extend(emulator: Emulator, journal: Journal, measurement: Measurement, locality: int) -> int:
    """Extend a running TPM by one more host event; returns the register. locality: the guest's, restored after.

    TpmError: the log is full, or the measurement's phase is over.
    """
    dynamic = journal.profile.is_dynamic
    if dynamic:
        await emulator.order(control.set_locality(4))
    try:
        entry = journal.measure(measurement)
        await emulator.run(Code.PCR_Extend, command.pcr_extend(entry.pcr, entry.digest))
        return entry.pcr
    finally:
        if dynamic:
            await emulator.order(control.set_locality(locality))


async def read_pcrs(emulator: Emulator, chosen: Iterable[int]) -> dict[int, bytes]:
    """The registers' values.

    Unavailable: the TPM has no SHA-256 bank (a guest can switch it off for the next start).
    """
    wanted = sorted(chosen)
    values: dict[int, bytes] = {}
    for start in range(0, len(wanted), _READ_AT_ONCE):
        part = wanted[start : start + _READ_AT_ONCE]
        got = command.parse_pcr_read(await emulator.run(Code.PCR_Read, command.pcr_read(part)))
        if sorted(got) != part:
            raise Unavailable("the TPM has no SHA-256 bank any more; the guest reallocated its registers")
        values |= got
    return values


async def take_quote(
    emulator: Emulator,
    record: Record,
    nonce: bytes,
    chosen: tuple[int, ...],
    *,
    values: Mapping[int, bytes] | None = None,
) -> QuoteBundle:
    """Registers and a quote over them, taken together. values: the registers, when they are known.

    Unavailable: the TPM would not sign; a guest with the platform's authorization can bring that about.
    """
    frame = quote.quote(key.AK_HANDLE, nonce, chosen)
    try:
        known = {index: values[index] for index in chosen} if values else await read_pcrs(emulator, chosen)
        message, signature = quote.parse_quote(await emulator.run(Code.Quote, frame))
    except CommandFailed as error:
        raise Unavailable(f"attestation unavailable: {error}") from None
    if quote.parse_attest(message).digest != pcr.composite(known):
        raise Unavailable(
            "attestation unavailable: the quote does not cover the registers that were expected"
        )
    return QuoteBundle(
        message, signature, nonce, {str(index): value for index, value in known.items()}, record.ak_public
    )


async def write_policy(emulator: Emulator, policy: bytes, auth: bytes) -> None:
    """Write the policy storage, 256 bytes, filled with zeroes."""
    await emulator.run(Code.NV_Write, nv.write(nv.POLICY_INDEX, nv.pad_policy(policy), auth=auth))


async def read_policy(emulator: Emulator, auth: bytes) -> bytes:
    """The policy storage, 256 bytes."""
    frame = nv.read(nv.POLICY_INDEX, nv.POLICY_SIZE, auth=auth)
    return (await emulator.run(Code.NV_Read, frame)).reader().sized()


async def seal_secret(emulator: Emulator, secret: bytes, values: Mapping[int, bytes]) -> None:
    """Seal a secret to register values, in place of an earlier one.

    Needs the platform's empty authorization: call between Startup and the guest.
    """
    evict = key.evict_control(RH_PLATFORM, seal.HANDLE, seal.HANDLE)
    removed = command.parse_response(await emulator.transmit(evict))
    if removed.code not in (command.RC_SUCCESS, *_ABSENT):
        raise CommandFailed(Code.EvictControl.name, removed.code)
    handle, _ = await _create(
        emulator, RH_PLATFORM, seal.template(seal.policy_digest(values)), seal.check_secret(secret)
    )
    async with _flushed(emulator, handle):
        await emulator.run(Code.EvictControl, key.evict_control(RH_PLATFORM, handle, seal.HANDLE))


async def _policy_session(emulator: Emulator) -> int:
    frame = seal.start_policy_session(os.urandom(16))
    return (await emulator.run(Code.StartAuthSession, frame)).handle


async def unseal_secret(emulator: Emulator, chosen: tuple[int, ...]) -> bytes:
    """The sealed secret, if these registers have the values it was sealed to.

    Unavailable: they have not, or nothing is sealed.
    """
    try:
        async with _flushed(emulator, await _policy_session(emulator)) as session:
            await emulator.run(Code.PolicyPCR, seal.policy_pcr(session, chosen))
            return (await emulator.run(Code.Unseal, seal.unseal(seal.HANDLE, session))).reader().sized()
    except CommandFailed as error:
        if error.code in _ABSENT:
            raise Unavailable("no secret is sealed in this TPM") from None
        raise Unavailable(
            f"the secret stays sealed: the registers differ from its policy ({error})"
        ) from None


async def activate(emulator: Emulator, blob: bytes, secret: bytes) -> bytes:
    """Open a credential with the endorsement key, which proves that the attestation key lives beside it."""
    try:
        ek, _ = await _create(emulator, RH_ENDORSEMENT, key.EK_TEMPLATE)
        async with _flushed(emulator, ek), _flushed(emulator, await _policy_session(emulator)) as session:
            await emulator.run(Code.PolicySecret, credential.policy_secret(session))
            frame = credential.activate_credential(key.AK_HANDLE, ek, session, blob, secret)
            return (await emulator.run(Code.ActivateCredential, frame)).reader().sized()
    except CommandFailed as error:
        raise Unavailable(f"credential activation unavailable: {error}") from None


async def device_info(emulator: Emulator) -> DeviceInfo:
    """Vendor, firmware version and capabilities (Part 2, 6.13)."""
    fixed = command.parse_properties(
        await emulator.run(Code.GetCapability, command.get_capability(command.CAP_TPM_PROPERTIES, 0x100, 64))
    )
    reply = await emulator.ask(ControlRequest(Control.GET_CAPABILITY))
    vendor = b"".join(fixed.get(tag, 0).to_bytes(4, "big") for tag in range(0x106, 0x10A))
    return DeviceInfo(
        family=fixed.get(0x100, 0).to_bytes(4, "big").rstrip(b"\0").decode("ascii", "replace"),
        level=fixed.get(0x101, 0),
        revision=f"{fixed.get(0x102, 0) / 100:.2f}",
        manufacturer=fixed.get(0x105, 0).to_bytes(4, "big").decode("ascii", "replace").strip("\0 "),
        vendor=vendor.decode("ascii", "replace").strip("\0 "),
        firmware_version=f"{fixed.get(0x10B, 0):08x}.{fixed.get(0x10C, 0):08x}",
        pcr_count=fixed.get(0x112, 0),
        nv_index_limit_bytes=fixed.get(0x117, 0),
        control_capabilities=int.from_bytes(reply[4:8], "big"),
    )
