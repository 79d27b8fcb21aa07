"""Appraisal: does a quote with its log show the launch that a policy expects?

Three questions in this order, each with its own findings: is the quote genuine and fresh (signature, nonce,
register values); does the log explain the registers (replay); are the log's host events the expected ones.
The first finding names what differs. Nothing is said about a host that lies: it could start another swtpm;
what is attested is what this installation launched.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from cryptography.hazmat.primitives.asymmetric import ec

from rayos_tpm import pcr, quote, signature
from rayos_tpm.errors import MalformedMessage
from rayos_tpm.event_log import Entry, Log, Source, replay
from rayos_tpm.phase import ORDER, PROFILES, Phase
from rayos_tpm.policy import Expected, Policy


class Code(StrEnum):
    """Why an appraisal failed."""

    SIGNATURE = "signature"
    NONCE = "nonce"
    VALUES = "values"
    COVERAGE = "coverage"
    LOG = "log"
    PROFILE = "profile"
    EVENT = "event"
    EXCLUSIVE = "exclusive"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that differs, in a sentence."""

    code: Code
    text: str


def check_quote(
    message: bytes,
    signed: bytes,
    signer: ec.EllipticCurvePublicKey,
    *,
    nonce: bytes,
    values: Mapping[int, bytes],
) -> list[Finding]:
    """Whether a quote is genuine, fresh, and over these register values."""
    try:
        if not signature.is_signed_by(message, signed, signer):
            return [
                Finding(Code.SIGNATURE, "the signature is not the attestation key's: the quote was changed")
            ]
        attest = quote.parse_attest(message)
    except MalformedMessage as error:
        return [Finding(Code.SIGNATURE, str(error))]
    findings = []
    if not hmac.compare_digest(attest.nonce, nonce):
        findings.append(
            Finding(
                Code.NONCE, f"the quote has nonce {attest.nonce.hex()}, expected {nonce.hex()}: not fresh"
            )
        )
    if attest.pcrs != tuple(sorted(values)):
        findings.append(
            Finding(
                Code.COVERAGE,
                f"the quote covers PCRs {list(attest.pcrs)}, the values are of {sorted(values)}",
            )
        )
    elif attest.digest != pcr.composite(values):
        findings.append(Finding(Code.VALUES, "the register values are not the ones that were quoted"))
    return findings


def check_replay(log: Log, values: Mapping[int, bytes]) -> list[Finding]:
    """Whether the log leads to the register values; names each register that it does not explain."""
    replayed = replay(log.entries)
    findings = []
    for index in sorted(values):
        if values[index] == replayed[index]:
            continue
        events = sum(entry.pcr == index for entry in log.entries)
        text = f"PCR {index} is {values[index].hex()}, its {events} logged events lead to {replayed[index].hex()}"
        if log.missing:
            text += f" ({log.missing} guest events were not kept)"
        findings.append(Finding(Code.LOG, text))
    return findings


def check_events(log: Log, policy: Policy) -> list[Finding]:
    """Whether the host's events are the expected ones; names the first that differs."""
    if log.profile != policy.profile:
        return [Finding(Code.PROFILE, f"the log has PCR profile {log.profile}, the policy {policy.profile}")]
    registers = {str(phase): index for phase, index in PROFILES[policy.profile].registers.items()}
    seen = [entry for entry in log.entries if entry.source is Source.HOST]
    if PROFILES[policy.profile].is_dynamic:
        seen = seen[1:]  # the D-RTM sequence itself
    for entry in seen:
        if registers.get(entry.phase) != entry.pcr:
            return [
                Finding(
                    Code.EVENT,
                    f"{entry.description}: phase {entry.phase or 'none'} is logged in PCR {entry.pcr}",
                )
            ]
    findings = _first_difference(seen, policy.events)
    for entry in log.entries:
        if entry.source is Source.GUEST and entry.pcr in policy.exclusive:
            text = f"the guest changed PCR {entry.pcr}, which the policy reserves for the host: {entry.description}"
            findings.append(Finding(Code.EXCLUSIVE, text))
            break
    return findings


def _first_difference(seen: Sequence[Entry], expected: Sequence[Expected]) -> list[Finding]:
    position = 0
    for want in expected:
        got = seen[position] if position < len(seen) else None
        if got is not None and got.phase == want.phase and got.digest.hex() in want.digests:
            position += 1
            continue
        if want.is_optional and (got is None or got.phase != want.phase):
            continue
        if got is not None and ORDER.index(Phase(got.phase)) < ORDER.index(Phase(want.phase)):
            break
        if got is None or got.phase != want.phase:
            return [Finding(Code.EVENT, f"{want.description} ({want.phase}) was not measured")]
        accepted = " or ".join(want.digests) or "nothing"
        found = f"{got.description} ({got.phase}) has SHA-256 {got.digest.hex()}"
        text = f"{found}, expected {want.description}: {accepted}"
        return [Finding(Code.EVENT, text)]
    if position < len(seen):
        extra = seen[position]
        text = f"{extra.description} ({extra.phase}), SHA-256 {extra.digest.hex()}, was measured but is not expected"
        return [Finding(Code.EVENT, text)]
    return []


def appraise(
    log: Log,
    policy: Policy | None,
    message: bytes,
    signed: bytes,
    signer: ec.EllipticCurvePublicKey,
    *,
    nonce: bytes,
    values: Mapping[int, bytes],
) -> list[Finding]:
    """Everything that speaks against a launch, the gravest first; empty when nothing does.

    policy: None checks the quote and the log alone.
    A policy's registers must be covered by the quote, else the log could say anything about them.
    """
    findings = check_quote(message, signed, signer, nonce=nonce, values=values)
    if findings:
        return findings
    findings = check_replay(log, values)
    if policy is None:
        return findings
    wanted = {*PROFILES[policy.profile].registers.values(), *policy.exclusive}
    if missing := sorted(wanted - set(values)):
        findings.append(
            Finding(Code.COVERAGE, f"the quote does not cover PCRs {missing}, which the policy speaks of")
        )
    return findings + check_events(log, policy)
