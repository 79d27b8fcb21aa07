"""The messages between the service and a VM's TPM proxy: one JSON object a line, both ways.

A request is one of the tagged structs of Request; the answer is an Answer whose `ok` holds the JSON of the
request's result, or whose `error` says what went wrong. Bytes travel as Base64.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final

import msgspec

from rayos_tpm.event_log import Log

LINE_LIMIT: Final = 4 << 20  # a full log is the longest line, well below


class TpmState(StrEnum):
    """Where a VM's TPM is.

    starting -> waiting (for QEMU) -> measured | restored (by migration), again after each reset;
    failed stays: swtpm died, or the launch was refused. ended: QEMU is gone, the state is stored.
    """

    STARTING = "starting"
    WAITING = "waiting"
    MEASURED = "measured"
    RESTORED = "restored"
    FAILED = "failed"
    ENDED = "ended"


class QuoteBundle(msgspec.Struct, frozen=True):
    """A quote with what a verifier needs beside the log.

    message: TPMS_ATTEST. signature: TPMT_SIGNATURE. nonce: the caller's. pcrs: values by register, as text.
    ak_public: the attestation key's TPMT_PUBLIC.
    """

    message: bytes
    signature: bytes
    nonce: bytes
    pcrs: dict[str, bytes]
    ak_public: bytes

    @property
    def values(self) -> dict[int, bytes]:
        """The registers' values by number, ascending."""
        return {int(index): self.pcrs[index] for index in sorted(self.pcrs, key=int)}


class Attestation(msgspec.Struct, frozen=True):
    """A quote and the log of the same moment: no guest command came in between."""

    bundle: QuoteBundle
    log: Log


class DeviceInfo(msgspec.Struct, frozen=True):
    """The TPM's description of itself; revision is the library specification's."""

    family: str
    level: int
    revision: str
    manufacturer: str
    vendor: str
    firmware_version: str
    pcr_count: int
    nv_index_limit_bytes: int
    control_capabilities: int


class Status(msgspec.Struct, frozen=True):
    """A VM's TPM at a glance.

    reason: why it failed, else "". inits: TPM_Inits answered; a SeaBIOS reboot has two.
    phase: the boot phase of the host's last event. missing: guest entries that were not kept.
    baseline_at, last_quote_at: Unix time of the quote in INIT and of the last one after it, 0 when none.
    quote_error: why the last periodic quote failed, else "".
    """

    vm_uuid: str
    state: TpmState
    reason: str
    profile: str
    inits: int
    phase: str
    host_events: int
    guest_events: int
    missing: int
    swtpm_pid: int
    baseline_at: float
    last_quote_at: float
    quote_error: str


class Identity(msgspec.Struct, frozen=True):
    """The public keys and the endorsement certificate (DER, empty before certification)."""

    vm_uuid: str
    ak_public: bytes
    ek_public: bytes
    ek_certificate: bytes


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """Wait until the TPM can meet QEMU -> Identity; the error is why the VM must not start."""


class GetStatus(msgspec.Struct, frozen=True, tag="status"):
    """-> Status."""


class Watch(msgspec.Struct, frozen=True, tag="watch"):
    """Wait until the state differs from this one -> Status."""

    state: TpmState


class Certify(msgspec.Struct, frozen=True, tag="certify"):
    """Keep the endorsement key's certificate; it reaches NV at the next INIT -> null."""

    certificate: bytes


class GetQuote(msgspec.Struct, frozen=True, tag="quote"):
    """-> QuoteBundle. pcrs: null for the profile's."""

    nonce: bytes
    pcrs: list[int] | None = None


class Attest(msgspec.Struct, frozen=True, tag="attest"):
    """-> Attestation. pcrs: null for the profile's."""

    nonce: bytes
    pcrs: list[int] | None = None


class GetBaseline(msgspec.Struct, frozen=True, tag="baseline"):
    """The quote taken in the last INIT, before the guest's first instruction, and its log -> Attestation."""


class GetPcrs(msgspec.Struct, frozen=True, tag="pcrs"):
    """-> values by register."""

    pcrs: list[int] | None = None


class GetLog(msgspec.Struct, frozen=True, tag="log"):
    """-> Log."""


class Extend(msgspec.Struct, frozen=True, tag="extend"):
    """Extend the launch register by one more host event -> the register."""

    description: str
    digest: bytes


class ReadPolicy(msgspec.Struct, frozen=True, tag="nv-read"):
    """-> the 256 bytes of policy storage."""


class WritePolicy(msgspec.Struct, frozen=True, tag="nv-write"):
    """Write up to 256 bytes of policy storage -> null."""

    policy: bytes


class Unseal(msgspec.Struct, frozen=True, tag="unseal"):
    """-> the sealed secret, if the registers match."""

    pcrs: list[int]


class Activate(msgspec.Struct, frozen=True, tag="activate"):
    """-> the secret in a credential."""

    blob: bytes
    secret: bytes


class GetIdentity(msgspec.Struct, frozen=True, tag="identity"):
    """-> Identity."""


class GetDevice(msgspec.Struct, frozen=True, tag="device"):
    """-> DeviceInfo."""


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """End the TPM, its state stored -> null."""


Request = (
    Ready
    | GetStatus
    | Watch
    | Certify
    | GetQuote
    | Attest
    | GetBaseline
    | GetPcrs
    | GetLog
    | Extend
    | ReadPolicy
    | WritePolicy
    | Unseal
    | Activate
    | GetIdentity
    | GetDevice
    | Stop
)


class Failure(msgspec.Struct, frozen=True):
    """kind: the name of a class in rayos_tpm.errors. text: its sentence."""

    kind: str
    text: str


class Answer(msgspec.Struct, frozen=True):
    """One of both is set."""

    ok: msgspec.Raw = msgspec.Raw(b"null")
    error: Failure | None = None


class Sealed(msgspec.Struct, frozen=True):
    """A secret to seal at INIT to the values that pcrs have after the host's events."""

    secret: bytes
    pcrs: list[int]


class MeasurementRecord(msgspec.Struct, frozen=True):
    """A Measurement as it travels."""

    phase: str
    description: str
    digest: bytes


class Config(msgspec.Struct, frozen=True):
    """The configuration of a proxy. It travels in anonymous memory, never in arguments; the state key by a pipe.

    log: where the process and swtpm write their messages.
    uid: the user that the process becomes, if whoever started its parent had it confined; 0: it stays.
    allowed: the digests that may be measured, by phase; a phase that is absent allows all.
    nv_policy, sealed: stored at each INIT when not null.
    launcher: what swtpm's command line is appended to, such as a sandbox; empty for none.
    locks_platform: give the platform hierarchy a random authorization before the guest runs.
    quote_interval_s: 0 for no periodic quotes. connect_limit_s: how long to wait for QEMU.
    """

    vm_uuid: str
    state_dir: str
    run_dir: str
    log: str
    profile: str
    measurements: list[MeasurementRecord]
    allowed: dict[str, list[bytes]] = {}
    nv_policy: bytes | None = None
    sealed: Sealed | None = None
    locks_platform: bool = False
    quote_interval_s: float = 0.0
    connect_limit_s: float = 60.0
    launcher: tuple[str, ...] = ()
    uid: int = 0
