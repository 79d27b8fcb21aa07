"""Appraisal and policy: each way in which a launch can differ is named first and in words."""

from __future__ import annotations

import msgspec
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils

from rayos_tpm import appraisal, command, event_log, pcr, quote
from rayos_tpm.appraisal import Code
from rayos_tpm.errors import MalformedMessage
from rayos_tpm.event_log import Entry, Log, Source
from rayos_tpm.explain import explain
from rayos_tpm.journal import Journal
from rayos_tpm.measurement import Measurement, in_order, of_bytes
from rayos_tpm.phase import PROFILES, Phase
from rayos_tpm.policy import Policy

KEY = ec.derive_private_key(7, ec.SECP256R1())
NONCE = b"nonce"
MEASUREMENTS = [of_bytes(phase, f"the {phase}", phase.encode()) for phase in Phase]


def log_of(measurements: list[Measurement]) -> Log:
    """The log of a launch under the seed profile."""
    journal = Journal(PROFILES["seed"])
    for item in in_order(measurements):
        journal.measure(item)
    return Log("vm", "seed", journal.entries)


def quoted(values: dict[int, bytes], nonce: bytes = NONCE) -> tuple[bytes, bytes]:
    """A quote as a TPM makes it, by a key of the test's."""
    message = b"\xff\x54\x43\x47\x80\x18" + command.sized(b"signer") + command.sized(nonce) + bytes(17 + 8)
    message += command.pcr_selection(values) + command.sized(pcr.composite(values))
    r, s = utils.decode_dss_signature(KEY.sign(message, ec.ECDSA(hashes.SHA256())))
    signed = (
        bytes.fromhex("0018000b")
        + command.sized(r.to_bytes(32, "big"))
        + command.sized(s.to_bytes(32, "big"))
    )
    return message, signed


def judge(log: Log, policy: Policy | None, **change: object) -> list[Code]:
    """The codes of the findings against a log whose registers were quoted."""
    values = {index: event_log.replay(log.entries)[index] for index in range(16)}
    message, signed = quoted(values)
    arguments = {"nonce": NONCE, "values": values, **change}
    findings = appraisal.appraise(log, policy, message, signed, KEY.public_key(), **arguments)  # type: ignore[arg-type]
    return [finding.code for finding in findings]


def test_expected_launch_has_no_findings() -> None:
    """The launch that the policy was made from."""
    assert judge(log_of(MEASUREMENTS), Policy.from_measurements(MEASUREMENTS)) == []


@pytest.mark.parametrize("phase", list(Phase))
def test_missing_extra_and_changed_events_are_named(phase: Phase) -> None:
    """For each phase: the event left out, another digest, and one event too many."""
    policy = Policy.from_measurements(MEASUREMENTS)
    without = log_of([item for item in MEASUREMENTS if item.phase is not phase])
    (finding,) = appraisal.check_events(without, policy)
    assert finding.text == f"the {phase} ({phase}) was not measured"
    changed = log_of(
        [of_bytes(phase, "mine", b"!") if item.phase is phase else item for item in MEASUREMENTS]
    )
    (finding,) = appraisal.check_events(changed, policy)
    assert finding.text.startswith(f"mine ({phase}) has SHA-256")
    extra = log_of([*MEASUREMENTS, of_bytes(phase, "smuggled", b"!")])
    (finding,) = appraisal.check_events(extra, policy)
    assert "smuggled" in finding.text


def test_log_that_does_not_lead_to_the_registers() -> None:
    """A log without an event, and one with a forged digest, do not explain the quote."""
    log = log_of(MEASUREMENTS)
    values = {index: event_log.replay(log.entries)[index] for index in range(16)}
    short = Log("vm", "seed", log.entries[:-1])
    message, signed = quoted(values)
    findings = appraisal.appraise(short, None, message, signed, KEY.public_key(), nonce=NONCE, values=values)
    assert [finding.code for finding in findings] == [Code.LOG]
    assert "PCR 11" in findings[0].text


def test_stale_forged_and_partial_quotes() -> None:
    """Nonce, signer, values, and registers that the quote leaves out."""
    log, policy = log_of(MEASUREMENTS), Policy.from_measurements(MEASUREMENTS)
    assert judge(log, policy, nonce=b"other") == [Code.NONCE]
    values = {index: event_log.replay(log.entries)[index] for index in range(16)}
    assert judge(log, policy, values={**values, 8: bytes(32)}) == [Code.VALUES]
    assert judge(log, policy, values={0: values[0]}) == [Code.COVERAGE]
    message, signed = quoted(values)
    stranger = ec.derive_private_key(8, ec.SECP256R1()).public_key()
    found = appraisal.check_quote(message, signed, stranger, nonce=NONCE, values=values)
    assert [finding.code for finding in found] == [Code.SIGNATURE]
    part = {index: values[index] for index in (0, 4)}
    message, signed = quoted(part)
    found = appraisal.appraise(log, policy, message, signed, KEY.public_key(), nonce=NONCE, values=part)
    assert Code.COVERAGE in [finding.code for finding in found]


def test_guest_event_in_an_exclusive_register() -> None:
    """The guest may use the registers it shares, not the kernel's."""
    log = log_of(MEASUREMENTS)
    policy = Policy.from_measurements(MEASUREMENTS)
    ima = Entry(10, bytes(32), Source.GUEST, "", "IMA")
    assert judge(msgspec.structs.replace(log, entries=[*log.entries, ima]), policy) == []
    bad = Entry(8, bytes(32), Source.GUEST, "", "guest")
    assert judge(msgspec.structs.replace(log, entries=[*log.entries, bad]), policy) == [Code.EXCLUSIVE]


def test_host_event_in_the_wrong_register() -> None:
    """A log cannot claim that the kernel was measured where the guest may write."""
    log = log_of(MEASUREMENTS)
    moved = [
        msgspec.structs.replace(entry, pcr=16) if entry.phase == "kernel" else entry for entry in log.entries
    ]
    (finding,) = appraisal.check_events(Log("vm", "seed", moved), Policy.from_measurements(MEASUREMENTS))
    assert finding.text == "the kernel: phase kernel is logged in PCR 16"


def test_policy_round_trip_and_refusals() -> None:
    """JSON and back; unknown phases, digests and keys are refused by name."""
    policy = Policy.from_measurements(MEASUREMENTS)
    assert Policy.from_json(policy.to_json()) == policy
    for old, new, named in (
        (b'"kernel"', b'"kernal"', "kernal"), (b'"seed"', b'"sead"', "sead"), (b'"digests"', b'"digest"', "digest"),
        (policy.events[0].digests[0].encode(), b"XY", "not SHA-256"),
    ):  # fmt: skip
        with pytest.raises(MalformedMessage, match=named):
            Policy.from_json(policy.to_json().replace(old, new))


def test_policy_allows_what_it_expects() -> None:
    """The launch check and the appraisal share one list."""
    allowed = Policy.from_measurements(MEASUREMENTS).allowed()
    assert allowed[Phase.KERNEL] == [MEASUREMENTS[2].digest]


def test_explain_names_sources_and_hides_control_characters() -> None:
    """Host events have their phase; what a guest wrote cannot move the terminal's cursor."""
    entries = [*log_of(MEASUREMENTS).entries, Entry(4, bytes(32), Source.GUEST, "", "evil\x1b[2J")]
    lines = explain(Log("vm", "seed", entries), pcrs=[4])
    assert any("host/configuration" in line and "the configuration" in line for line in lines)
    assert not any("\x1b" in line for line in lines)
    assert lines[-1] == f"   = PCR  4 {event_log.replay(entries)[4].hex()}"


def test_parse_attest_reads_the_fields() -> None:
    """Registers and nonce of a quote of the test's key."""
    attest = quote.parse_attest(quoted({0: bytes(32), 11: bytes(32)})[0])
    assert (attest.pcrs, attest.nonce, attest.signer) == ((0, 11), NONCE, b"signer")
