"""The journal: what commands do to registers, host limits, and taking over a migrated log."""

from __future__ import annotations

import hashlib
import struct

import pytest

from rayos_tpm import command, pcr
from rayos_tpm.command import Code
from rayos_tpm.errors import TpmError
from rayos_tpm.event_log import GUEST_LIMIT, Source, replay
from rayos_tpm.journal import Journal
from rayos_tpm.measurement import of_bytes
from rayos_tpm.phase import PROFILES, Phase

DIGEST = hashlib.sha256(b"x").digest()
OK = command.error_response(0)


def digests_answer(*digests: tuple[int, bytes]) -> bytes:
    """The answer of PCR_Event: a list of digests under a session."""
    body = struct.pack(">I", len(digests)) + b"".join(
        struct.pack(">H", alg) + value for alg, value in digests
    )
    return (
        command.HEADER.pack(command.SESSIONS, 10 + 4 + len(body) + 5, 0)
        + struct.pack(">I", len(body))
        + body
        + bytes(5)
    )


def test_extend_counts_only_when_it_succeeded() -> None:
    """A refused extend leaves the register and the log alone."""
    journal = Journal(PROFILES["seed"])
    frame = command.pcr_extend(9, DIGEST)
    journal.observe(frame, command.error_response(0x101))
    assert journal.entries == []
    journal.observe(frame, OK)
    assert journal.bank.values[9] == pcr.extend(pcr.ZERO, DIGEST)
    assert (journal.entries[0].pcr, journal.entries[0].source) == (9, Source.GUEST)


def test_event_commands_take_the_digest_from_the_answer() -> None:
    """PCR_Event hashes inside the TPM, for every bank; the SHA-256 one counts."""
    journal = Journal(PROFILES["seed"])
    frame = command.command(Code.PCR_Event, handles=[5], auths=[command.password()], parameters=b"\0\1x")
    journal.observe(frame, digests_answer((0x0004, bytes(20)), (command.ALG_SHA256, DIGEST)))
    assert journal.bank.values[5] == pcr.extend(pcr.ZERO, DIGEST)


def test_null_register_and_other_commands_change_nothing() -> None:
    """TPM_RH_NULL hashes without extending."""
    journal = Journal(PROFILES["seed"])
    frame = command.command(
        Code.PCR_Extend, handles=[command.RH_NULL], auths=[command.password()], parameters=bytes(4)
    )
    journal.observe(frame, OK)
    journal.observe(command.pcr_read([0]), OK)
    journal.observe(b"short", OK)
    assert journal.entries == []


def test_reset_is_logged_and_replayed() -> None:
    """A register that the guest reset replays to what came after."""
    journal = Journal(PROFILES["seed"])
    journal.observe(command.pcr_extend(16, DIGEST), OK)
    journal.observe(command.command(Code.PCR_Reset, handles=[16], auths=[command.password()]), OK)
    assert journal.bank.values[16] == pcr.ZERO == replay(journal.entries)[16]


def test_host_events_end_at_256() -> None:
    """The 257th is refused and changes nothing; the guest's events do not use up the host's room."""
    journal = Journal(PROFILES["seed"])
    for _ in range(300):
        journal.observe(command.pcr_extend(0, DIGEST), OK)
    for _ in range(256):
        journal.measure(of_bytes(Phase.LAUNCH, "e", b""))
    before = journal.bank.values[11]
    with pytest.raises(TpmError, match="256"):
        journal.measure(of_bytes(Phase.LAUNCH, "one more", b""))
    assert journal.bank.values[11] == before


def test_guest_flood_is_followed_not_kept() -> None:
    """Beyond the limit registers stay right, the log says how much is missing."""
    journal = Journal(PROFILES["seed"])
    frame = command.pcr_extend(3, DIGEST)
    for _ in range(GUEST_LIMIT + 10):
        journal.observe(frame, OK)
    assert (len(journal.entries), journal.missing) == (GUEST_LIMIT, 10)
    value = pcr.ZERO
    for _ in range(GUEST_LIMIT + 10):
        value = pcr.extend(value, DIGEST)
    assert journal.bank.values[3] == value


@pytest.mark.parametrize("name", list(PROFILES))
def test_adopted_log_leads_to_the_same_registers(name: str) -> None:
    """A migration's target continues where the source stopped."""
    source = Journal(PROFILES[name])
    if source.profile.is_dynamic:
        source.start_dynamic(DIGEST, "start")
    for phase in Phase:
        source.measure(of_bytes(phase, phase, phase.encode()))
    source.observe(command.pcr_extend(7, DIGEST), OK)
    target = Journal(PROFILES[name])
    target.adopt(source.entries, 0)
    assert target.bank.values == source.bank.values
    assert target.phase is Phase.LAUNCH
