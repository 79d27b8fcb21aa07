"""Everything that has changed a VM's registers since its last reset: ours, and what the guest did.

The proxy sees each command on its way to the TPM, so the guest's extends need no co-operation of the guest
to be known. Invariant: bank.values equals the TPM's registers, and replaying entries gives the same as long
as missing is zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from rayos_tpm import command
from rayos_tpm.command import Code
from rayos_tpm.errors import MalformedMessage, TpmError
from rayos_tpm.event_log import GUEST_LIMIT, HOST_LIMIT, Entry, Source
from rayos_tpm.measurement import Measurement
from rayos_tpm.pcr import PCR_COUNT, Bank
from rayos_tpm.phase import Phase, Profile, advance


@dataclass(slots=True)
class Journal:
    """The entries since reset and the registers that they lead to."""

    profile: Profile
    phase: Phase = Phase.FIRMWARE
    entries: list[Entry] = field(default_factory=list)
    bank: Bank = field(default_factory=Bank)
    missing: int = 0
    _host: int = 0
    _guest: int = 0

    def measure(self, measurement: Measurement) -> Entry:
        """Log a measurement of the host and return its entry, to be extended now.

        TpmError: the log is full (256 entries), or the phase is over. Nothing changed then.
        """
        if self._host >= HOST_LIMIT:
            raise TpmError(
                f"the event log holds its {HOST_LIMIT} host entries; {measurement.description} does not fit"
            )
        phase = advance(self.phase, measurement.phase)
        entry = Entry(
            self.profile.registers[phase], measurement.digest, Source.HOST, phase, measurement.description
        )
        self.phase = phase
        self._host += 1
        self.entries.append(entry)
        self.bank.extend(entry.pcr, entry.digest)
        return entry

    def start_dynamic(self, digest: bytes, description: str) -> None:
        """Log the D-RTM sequence that zeroes registers 17 to 22."""
        self._host += 1
        self.entries.append(Entry(17, digest, Source.HOST, Phase.FIRMWARE, description))
        self.bank.start_dynamic(digest)

    def adopt(self, entries: list[Entry], missing: int) -> None:
        """Take over the entries of a migrated TPM's source."""
        self.entries = list(entries)
        self.missing = missing
        self.bank = Bank()
        self._host = sum(entry.source is Source.HOST for entry in entries)
        self._guest = len(entries) - self._host
        for index, entry in enumerate(entries):
            if index == 0 and self.profile.is_dynamic:
                self.bank.start_dynamic(entry.digest)
            elif entry.digest:
                self.bank.extend(entry.pcr, entry.digest)
            else:
                self.bank.reset(entry.pcr)
        hosts = [entry.phase for entry in entries if entry.source is Source.HOST]
        self.phase = Phase(hosts[-1]) if hosts else Phase.FIRMWARE

    def observe(self, frame: bytes, answer: bytes) -> None:
        """Follow a guest's command and its answer. Whatever the TPM refused changed nothing."""
        code = int.from_bytes(frame[6:10], "big")
        if code not in _WATCHED or answer[6:10] != b"\0\0\0\0":
            return
        register = int.from_bytes(frame[10:14], "big")
        if register >= PCR_COUNT:  # TPM_RH_NULL: hashes, extends nothing
            return
        if code == Code.PCR_Reset:
            self.bank.reset(register)
            self._keep(Entry(register, b"", Source.GUEST, "", "TPM2_PCR_Reset by the guest"))
            return
        digest = _extended(code, frame, answer)
        if digest is not None:
            self.bank.extend(register, digest)
            self._keep(Entry(register, digest, Source.GUEST, "", f"TPM2_{Code(code).name} by the guest"))

    def _keep(self, entry: Entry) -> None:
        if self._guest < GUEST_LIMIT:
            self._guest += 1
            self.entries.append(entry)
        else:
            self.missing += 1


_WATCHED = frozenset({Code.PCR_Extend, Code.PCR_Event, Code.EventSequenceComplete, Code.PCR_Reset})


def _extended(code: int, frame: bytes, answer: bytes) -> bytes | None:
    """The SHA-256 digest that a successful command extended, None when it carried none.

    PCR_Extend says it in its parameters; the other two hash inside the TPM and say it in the answer.
    """
    try:
        if code == Code.PCR_Extend:
            reader = command.Reader(frame, command.HEADER.size + 4)
            reader.take(reader.unsigned(4))  # authorization area
        else:
            reader = command.parse_response(answer).reader()
            if code == Code.EventSequenceComplete and len(reader.data) == 0:
                return None
        for _ in range(reader.unsigned(4)):
            algorithm = reader.unsigned(2)
            digest = reader.take(_SIZES[algorithm])
            if algorithm == command.ALG_SHA256:
                return digest
    except (MalformedMessage, KeyError):
        return None
    return None


_SIZES = {0x0004: 20, command.ALG_SHA256: 32, 0x000C: 48, 0x000D: 64}
